"""The refit against slow references in NumPy float64, and its laws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpft_flower.adapters import base_model
from fedpft_flower.alignment import state_loss
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import AlignConfig, FedPFTError
from fedpft_flower.least_squares import Walk, _held_out, quadratics, refit
from fedpft_flower.sensitivity import measure, streams
from tests.families import (
    CONFIGS,
    columns_of,
    covariance,
    layer_scale,
    recorded,
    tiny_batch,
)
from tests.test_architectures import adapted
from tests.test_selection import slopes

families = pytest.mark.parametrize("family", sorted(CONFIGS))
ALIGN = AlignConfig()


def batches(family, count=10):
    return [tiny_batch(family, seed=seed, rows=16) for seed in range(count)]


def objective_of(fm, sub, plan, layer, given, align):
    (place,) = plan.places([layer])
    walks = Walk(fm, given, changes=False), Walk(sub, given, changes=True)
    return quadratics(walks, (layer, place), align)


def weights_of(fm, layer, given, measured):
    """Return the weights of tokens, a tenth of them plain, with the sum 1."""
    parts = []
    for batch, s in zip(given, measured, strict=True):
        plain = recorded(fm, layer, [batch])["weights"]
        parts.append(
            0.1 * len(plain) * plain + 0.9 * (s[layer] / s[layer].mean()).numpy()
        )
    weights = np.concatenate(parts).astype(np.float64)
    return weights / weights.sum()


def reference(fm, sub, plan, layer, given, align, measured=None):
    """Solve one layer's refit by an augmented least-squares problem, row by row."""
    place = plan.places([layer])[0]
    ffn, fm_ffn = ffns_of(base_model(sub))[place], ffns_of(base_model(fm))[layer]
    teacher, student = recorded(fm, layer, given), recorded(sub, place, given)
    a, h, w = student["a"], student["h"], teacher["weights"]
    if measured is not None:
        w = weights_of(fm, layer, given, measured)
    target = teacher["stream"] - (student["stream"] - student["f"])
    columns = columns_of(ffn)
    has_bias = ffn.down.bias is not None
    centred = a - w @ a if has_bias else a
    metric = covariance(h, w)
    rows = [r.detach().double().numpy() for r in ffn.up_rows()]
    fm_rows = [r.detach().double().numpy() for r in fm_ffn.up_rows()]
    own = slopes(base_model(sub), place, h)
    wide = slopes(base_model(fm), layer, teacher["h"])
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows))]
    k_own = sum(
        (rows[i] @ metric @ rows[j].T) * (own[i].T @ (w[:, None] * own[j]))
        for i, j in pairs
    )
    k_cross = sum(
        (fm_rows[i] @ metric @ rows[j].T) * (wide[i].T @ (w[:, None] * own[j]))
        for i, j in pairs
    )
    weighted = w[:, None] * centred
    gram = centred.T @ weighted
    share = np.trace(columns @ gram @ columns.T) / np.trace(columns @ k_own @ columns.T)
    scale = align.jacobian_weight * share
    ridge = align.ridge * np.diag(gram).mean()
    goal = target - w @ target if has_bias else target
    left = gram + scale * k_own + ridge * np.eye(len(gram))
    wide_columns = columns_of(fm_ffn)
    right = goal.T @ weighted + scale * wide_columns @ k_cross + ridge * columns
    found = np.linalg.lstsq(left, right.T, rcond=None)[0].T
    return found, w @ target - found @ (w @ a) if has_bias else None


@families
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_refit_against_numpy_layer_after_layer(family, share):
    fm, sub, plan = adapted(family)
    given = batches(family)
    ffns, layers = ffns_of(base_model(fm)), layers_of(base_model(fm))
    sensitivity = measure(base_model(fm), streams(layers, ffns), given, share, 0)
    learnt = [batch for i, batch in enumerate(given) if i % 10 != 9]
    measured = sensitivity and [
        s for i, s in enumerate(sensitivity.batches) if i % 10 != 9
    ]
    fits = []
    _, twin, _ = adapted(family)
    for layer in plan.compressed:  # the twin becomes what the reference says
        columns, bias = reference(fm, twin, plan, layer, learnt, ALIGN, measured)
        ffn = ffns_of(base_model(twin))[plan.places([layer])[0]]
        with torch.no_grad():
            raw = (columns.T / layer_scale(ffn)).T
            ffn.down_columns().copy_(torch.tensor(raw))
            if bias is not None:
                ffn.down.bias.copy_(torch.tensor(bias / layer_scale(ffn)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpft_flower.least_squares.RIDGE_FACTORS", (1.0,))
        refit(fm, sub, plan, given, ALIGN, fits.append, sensitivity=sensitivity)
    for one, other in zip(
        ffns_of(base_model(sub)), ffns_of(base_model(twin)), strict=True
    ):
        scale = float(other.down.weight.detach().abs().max())
        torch.testing.assert_close(
            one.down.weight, other.down.weight, atol=2e-3 * scale, rtol=1e-3
        )
        if one.down.bias is not None:
            torch.testing.assert_close(
                one.down.bias, other.down.bias, atol=2e-3 * scale, rtol=1e-3
            )
    assert [fit.layer for fit in fits] == list(plan.compressed)
    assert all(fit.after < fit.before for fit in fits)


def value(objective, columns, bias):
    """Return the objective, up to the Jacobian term's constant."""
    slopes = ((columns @ objective.jacobian) * columns).sum()
    slopes = slopes - 2 * (columns * objective.jacobian_cross).sum()
    distance = (columns - objective.columns).square().sum()
    return objective.error(columns, bias) + slopes + objective.ridge * distance


@families
def test_the_solution_is_a_minimum_and_never_above_the_original_columns(family):
    fm, sub, plan = adapted(family)
    generator = torch.Generator().manual_seed(0)
    for ridge, weight in ((1e-3, 0.3), (1e-6, 0.0), (10.0, 3.0)):
        align = replace(ALIGN, ridge=ridge, jacobian_weight=weight)
        for layer in plan.compressed:
            one, _ = objective_of(fm, sub, plan, layer, batches(family, 6), align)
            columns, bias = one.solve()
            lowest = value(one, columns, bias)
            assert lowest <= value(one, one.columns, one.bias)
            if weight == 0.0:
                assert one.error(columns, bias) <= one.error(one.columns, one.bias)
            for _ in range(5):
                noise = 0.01 * torch.randn(
                    columns.shape, generator=generator, dtype=torch.float64
                )
                assert lowest < value(one, columns + noise, bias)
            if bias is not None:
                assert lowest < value(one, columns, bias + 0.01)


@families
def test_errors_of_an_objective_are_those_of_its_tokens(family):
    fm, sub, plan = adapted(family)
    layer, given = plan.compressed[0], batches(family, 10)
    one, held_out = objective_of(fm, sub, plan, layer, given, ALIGN)
    for objective, part in ((one, given[:9]), (held_out, given[9:])):
        teacher, student = recorded(fm, layer, part), recorded(sub, layer, part)
        differences = student["stream"] - teacher["stream"]
        expected = teacher["weights"] @ (differences**2).sum(1)
        found = float(objective.error(objective.columns, objective.bias))
        assert found == pytest.approx(expected, rel=1e-3)
        assert objective.tokens == len(differences)


@families
def test_the_layers_follow_the_fm_closer(family):
    fm, sub, plan = adapted(family)
    refit(fm, sub, plan, batches(family), ALIGN, lambda fit: None)
    _, untouched, _ = adapted(family)
    batch = tiny_batch(family, seed=99, rows=8)
    layer = plan.compressed[-1]
    outputs = [
        torch.tensor(recorded(model, layer, [batch])["output"])
        for model in (fm, untouched, sub)
    ]
    before = state_loss([outputs[0]], [outputs[1]])
    assert state_loss([outputs[0]], [outputs[2]]) < before


@families
def test_only_output_weights_and_biases_change(family):
    fm, sub, plan = adapted(family, {"keep_fraction": 0.5, "whole_layers": "0"})
    models = {"fm": fm, "sub": sub}
    before = {
        name: {k: v.clone() for k, v in model.state_dict().items()}
        for name, model in models.items()
    }
    refit(fm, sub, plan, batches(family, 4), ALIGN, lambda fit: None)
    changed = {
        name: {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
        for (name, model), old in zip(models.items(), before.values(), strict=True)
    }
    allowed = {
        id(parameter)
        for layer in plan.compressed
        for parameter in ffns_of(base_model(sub))[layer].down.parameters()
    }
    assert not changed["fm"]
    named = {n for n, p in sub.named_parameters() if id(p) in allowed}
    assert changed["sub"] == named


def test_columns_that_already_fit_stay():
    """A neuron that does nothing in the FM leaves nothing to compensate."""
    fm, sub, plan = adapted("bert", {"keep_neurons": 23})
    before = [ffn.down.weight.clone() for ffn in ffns_of(base_model(sub))]
    with torch.no_grad():
        for layer, ffn in enumerate(ffns_of(base_model(fm))):
            (missing,) = set(range(24)) - set(plan.kept[layer])
            ffn.down.weight[:, missing] = 0.0
    fits = []
    refit(fm, sub, plan, batches("bert", 4), ALIGN, fits.append)
    assert all(abs(fit.before) < 1e-6 for fit in fits)
    for ffn, old in zip(ffns_of(base_model(sub)), before, strict=True):
        torch.testing.assert_close(ffn.down.weight, old, atol=1e-5, rtol=1e-4)


def test_a_norm_that_distillation_changed_is_taken_into_account(monkeypatch):
    def error():
        """Return the error of the first layer after a refit, its norm changed."""
        fm, sub, plan = adapted("bert")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for ffn in ffns_of(base_model(sub)):
                for parameter in ffn.output_norm.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise)
        refit(fm, sub, plan, batches("bert"), ALIGN, lambda fit: None)
        batch = tiny_batch("bert", seed=99, rows=8)
        wanted, found = (recorded(model, 0, [batch])["output"] for model in (fm, sub))
        return np.square(wanted - found).mean() / np.square(wanted).mean()

    aware = error()
    monkeypatch.setattr(
        "fedpft_flower.least_squares._stream", lambda teacher, norm: teacher.stream
    )
    assert aware < 0.5 * error()


def test_bias_only_moves_the_mean_and_keeps_the_columns():
    fm, sub, plan = adapted("bert")
    before = [ffn.down.weight.clone() for ffn in ffns_of(base_model(sub))]
    fits = []
    refit(fm, sub, plan, batches("bert"), ALIGN, fits.append, bias_only=True)
    after = [ffn.down.weight for ffn in ffns_of(base_model(sub))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(fit.after < fit.before for fit in fits)


def test_where_the_layer_scale_is_zero_nothing_is_refitted():
    fm, sub, plan = adapted("dinov2")
    with torch.no_grad():
        for model in (fm, sub):
            for ffn in ffns_of(base_model(model)):
                ffn.output_scale[3] = 0.0
    before = [ffn.down.weight.clone() for ffn in ffns_of(base_model(sub))]
    refit(fm, sub, plan, batches("dinov2"), ALIGN, lambda fit: None)
    for ffn, old in zip(ffns_of(base_model(sub)), before, strict=True):
        same = (ffn.down.weight == old).all(dim=1).tolist()
        assert same == [row == 3 for row in range(12)]


def test_every_tenth_batch_is_held_out_of_fewer_the_smallest():
    def given(*rows):
        return [{"pixel_values": torch.zeros(count, 3)} for count in rows]

    assert _held_out(given(*[4] * 20)) == {9, 19}
    assert _held_out(given(16, 1)) == {1}
    assert _held_out(given(1, 16)) == {0}
    assert _held_out(given(4, 4, 4)) == {2}


def test_hidden_states_that_are_not_finite_are_named():
    fm, sub, plan = adapted("bert")
    with torch.no_grad():
        ffns_of(base_model(fm))[0].down.bias.fill_(torch.inf)
    with pytest.raises(FedPFTError, match="not finite on public rows"):
        refit(fm, sub, plan, batches("bert"), ALIGN, print)


def test_bias_only_needs_a_bias():
    fm, sub, plan = adapted("llama")
    with pytest.raises(FedPFTError, match="no output bias; choose 'least-squares'"):
        refit(fm, sub, plan, batches("llama", 2), ALIGN, print, bias_only=True)


def test_one_batch_is_too_little():
    fm, sub, plan = adapted("bert")
    with pytest.raises(FedPFTError, match="two batches"):
        refit(fm, sub, plan, batches("bert", 1), ALIGN, print)


def test_a_larger_ridge_is_taken_where_few_tokens_overfit():
    fm, sub, plan = adapted("bert", {"keep_neurons": 20})
    few = [tiny_batch("bert", seed=seed, rows=1) for seed in range(3)]
    fits = []
    tiny_ridge = replace(ALIGN, ridge=1e-9, jacobian_weight=0.0)
    refit(fm, sub, plan, few, tiny_ridge, fits.append)
    assert any(fit.ridge_factor > 1 for fit in fits)
