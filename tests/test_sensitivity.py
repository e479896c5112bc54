"""How far logits depend on tokens: against finite differences, and its laws."""

import numpy as np
import pytest
import torch

from benchmarks.plain_loop import load
from fedpft_flower import server
from fedpft_flower.adapters import base_model
from fedpft_flower.alignment import Teacher, distil, layer_level, state_loss
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.batches import real_logits, unit_cotangents
from fedpft_flower.config import AlignConfig, Config, FedPFTError
from fedpft_flower.descent import Schedule
from fedpft_flower.methods import METHODS, method_of
from fedpft_flower.moments import neuron_moments
from fedpft_flower.selection import score
from fedpft_flower.sensitivity import (
    Sensitivity,
    StreamPoint,
    measure,
    sensitivities,
    streams,
    weigh,
)
from tests.families import CONFIGS, recorded, tiny_batch, tiny_model
from tests.test_architectures import adapted, compressed

families = pytest.mark.parametrize("family", sorted(CONFIGS))
SEED = 3


def moved_logits(model, point, batch, place, step):
    """Return the logits where a token's values at a point are moved by a step [D]."""

    def add(values):
        moved = values.clone()
        moved[place] += step
        return moved

    def before(module, inputs):
        return (add(inputs[0]), *inputs[1:])

    def behind(module, inputs, output):
        if isinstance(output, tuple):
            return (add(output[0]), *output[1:])
        return add(output)

    handle = (
        point.module.register_forward_pre_hook(before)
        if point.is_input
        else point.module.register_forward_hook(behind)
    )
    with torch.no_grad():
        logits = real_logits(model, batch)
    handle.remove()
    return logits


@families
def test_sensitivity_against_finite_differences(family):
    model = tiny_model(family).double()
    batch = tiny_batch(family, rows=2)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    for points in (
        streams(layers_of(model), ffns_of(model)),
        [StreamPoint(layer) for layer in layers_of(model)],
    ):
        values, found = sensitivities(model, points, batch, SEED)
        for layer in (0, len(points) - 1):
            assert len(values[layer]) == len(found[layer])
            width = values[layer].shape[1]
            # Of the first row, the token that counts most.
            tokens = len(values[layer]) // 2
            if "attention_mask" in batch:
                tokens = int(batch["attention_mask"][0].sum())
            token = int(found[layer][:tokens].argmax())
            assert found[layer][token] > 0
            slopes = []
            for i in range(width):
                # Some families' norms compute in float32, whatever they are given.
                step = 2e-3 * torch.eye(width, dtype=torch.float64)[i]
                up, down = (
                    moved_logits(model, points[layer], batch, (0, token), sign * step)
                    for sign in (1, -1)
                )
                c = unit_cotangents(up, SEED).double()
                slopes.append(float(((up - down) * c).sum()) / 4e-3)
            expected = np.square(slopes).sum()
            assert float(found[layer][token]) == pytest.approx(expected, rel=0.03)


@families
def test_measuring_changes_nothing_and_leaves_nothing_behind(family):
    model, batch = tiny_model(family), tiny_batch(family)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        expected = real_logits(model, batch)
    points = streams(layers_of(model), ffns_of(model))
    first, again = (sensitivities(model, points, batch, SEED) for _ in range(2))
    for one, other in zip(first[1], again[1], strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(real_logits(model, batch), expected)
    assert not any(p.requires_grad for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for layer, values in enumerate(first[0]):
        stream = recorded(model, layer, [batch])["stream"]
        np.testing.assert_allclose(values, stream, atol=1e-6)


def test_a_classifier_depends_on_one_token_of_its_last_layer():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    points = streams(layers_of(model), ffns_of(model))
    _, found = sensitivities(model, points, batch, SEED)
    lengths = batch["attention_mask"].sum(1).tolist()
    for row in found[-1].split(lengths):
        assert row[0] > 0 and not bool(row[1:].any())
    assert bool((found[0] > 0).all())


def test_weights_are_shares_of_both_kinds():
    plain, s = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0])
    torch.testing.assert_close(weigh(plain, s, 0.0), torch.tensor([0.5, 1.5]))
    found = weigh(plain, s, 0.9)
    torch.testing.assert_close(found, torch.tensor([0.05, 0.15 + 0.9 * 2]))
    nothing = weigh(plain, torch.zeros(2), 0.9)  # no logit depends on this layer
    torch.testing.assert_close(nothing, torch.tensor([0.05, 0.15]))


def test_nothing_is_measured_where_it_counts_nothing():
    assert measure(None, [], [{}], 0.0, SEED) is None


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_moments_take_the_weights(family):
    model = tiny_model(family)
    given = [tiny_batch(family, seed=seed) for seed in range(3)]
    points = streams(layers_of(model), ffns_of(model))
    sensitivity = measure(model, points, given, 0.9, SEED)
    moments = list(
        neuron_moments(
            model,
            layers_of(model),
            ffns_of(model),
            given,
            grams=False,
            sensitivity=sensitivity,
        )
    )
    for layer, found in enumerate(moments):
        parts = [recorded(model, layer, [batch]) for batch in given]
        w = np.concatenate(
            [
                0.1 * len(part["weights"]) * part["weights"] + 0.9 * s / s.mean()
                for part, s in zip(
                    parts,
                    [s[layer].double().numpy() for s in sensitivity.batches],
                    strict=True,
                )
            ]
        )
        a = np.concatenate([part["a"] for part in parts])
        np.testing.assert_allclose(found.mean, w @ a / w.sum(), atol=1e-5)
        np.testing.assert_allclose(found.square, w @ a**2 / w.sum(), atol=1e-5)


def test_scores_know_which_layer_a_weight_is_of():
    """A token that alone counts decides, in each layer by itself."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    width, count = ffns_of(model)[0].width, int(batch["attention_mask"].sum())
    counts = [width, 2, 2]  # the first layer is left whole
    only = torch.eye(count)
    sensitivity = Sensitivity(0.999, [[only[0], only[3], only[5]]])
    found = score(model, "energy", counts, [batch], AlignConfig(), 0, sensitivity)
    for layer, token in ((1, 3), (2, 5)):
        a = recorded(model, layer, [batch])["a"][token]
        norms = ffns_of(model)[layer].output_columns().norm(dim=0).numpy()
        expected = np.abs(a) * norms
        assert int(found[layer].argmax()) == int(expected.argmax())


def test_kept_rows_keep_their_sensitivity():
    fm, batch = tiny_model("bert"), tiny_batch("bert")
    layers = layers_of(fm)[1:]
    teacher = Teacher(fm, layers, 1e9, share=0.9, seed=SEED)
    first, again = teacher(batch), teacher(batch)
    for one, other in zip(
        [*first.states, *first.weights], [*again.states, *again.weights], strict=True
    ):
        torch.testing.assert_close(one, other)
    forgetful = Teacher(fm, layers, 0.0, share=0.9, seed=SEED)
    for _ in range(2):
        torch.testing.assert_close(forgetful(batch).weights[0], first.weights[0])
    other = Teacher(fm, layers, 0.0, share=0.9, seed=SEED + 1)
    assert not torch.equal(other(batch).weights[0], first.weights[0])


@families
def test_distillation_by_sensitivity_lowers_the_weighted_loss(family):
    fm, sub, plan = adapted(family)
    batch, losses = tiny_batch(family), []

    def endless():
        while True:
            yield batch

    trainable = layer_level(compressed(sub, plan))
    schedule = Schedule(0.002, 20)
    distil(
        fm,
        sub,
        plan,
        trainable,
        endless(),
        schedule,
        0.0,
        lambda progress: losses.append(progress.loss),
        share=0.9,
        seed=SEED,
    )
    base = base_model(fm)
    layers = [layers_of(base)[layer] for layer in plan.aligned]
    target = Teacher(base, layers, 0.0, 0.9, SEED)(batch)
    places = plan.places(plan.aligned)
    found = [recorded(sub, place, [batch])["output"] for place in places]
    student = [torch.tensor(one, dtype=torch.float32) for one in found]
    after = float(state_loss(target.states, student, target.weights))
    assert after == pytest.approx(losses[-1], rel=0.5)  # a step later
    assert after < losses[0]


def test_tokens_count_alike_where_no_setting_says_otherwise():
    assert not any(row.sensitivity for row in METHODS.values())
    flat = {"method": "fedpft-b", "align.sensitivity": 0.5}
    assert method_of(Config.from_run_config(flat)).sensitivity == 0.5


def test_a_share_below_zero_is_the_methods_choice_or_a_mistake():
    with pytest.raises(FedPFTError, match=r"give 0 to 0\.999, or -1"):
        Config.from_run_config({"align.sensitivity": -0.5})
    with pytest.raises(FedPFTError, match=r"validation-share = -0\.5; give 0 to 1"):
        Config.from_run_config({"plug-in.validation-share": -0.5})


def prepared(settings, **changes):
    config = Config.from_run_config({**settings, **changes})
    proxy = load(config)[2]
    proxy.prepare()
    return proxy


@pytest.mark.parametrize("before", ["least-squares", "distill"])
def test_the_server_counts_tokens_as_its_settings_say(settings, before):
    alike, again, weighed = (
        prepared(settings, **{"align.before": before, "align.sensitivity": share})
        for share in (0.0, -1.0, 0.9)
    )
    one, other, third = (proxy.package().weights for proxy in (alike, again, weighed))
    assert alike.plan == weighed.plan  # of norms, which look at no tokens
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_neurons_are_chosen_by_tokens_that_count(settings):
    alike, weighed = (
        prepared(
            settings,
            **{
                "sub-fm.selection": "energy",
                "align.before": "none",
                "align.sensitivity": share,
            },
        )
        for share in (0.0, 0.99)
    )
    assert alike.plan != weighed.plan


def test_sensitivity_is_measured_anew_when_the_adapter_has_changed(
    settings, monkeypatch
):
    shares, real = [], server.measure

    def counted(model, points, batches, share, seed):
        shares.append(share)
        return real(model, points, batches, share, seed)

    monkeypatch.setattr(server, "measure", counted)
    proxy = prepared(
        settings,
        **{
            "sub-fm.selection": "greedy",
            "sub-fm.keep-fraction": server.USUAL_SHARE,
            "align.before": "least-squares",
            "align.during": "least-squares",
            "align.sensitivity": 0.9,
        },
    )
    assert shares == [0.9]  # choosing neurons and least squares share it
    adapter = {name: tensor + 0.01 for name, tensor in proxy.adapter.items()}
    proxy.end_round(1, adapter, None)
    assert shares == [0.9, 0.9]
