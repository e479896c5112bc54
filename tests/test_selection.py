"""Selections against slow references in NumPy float64."""

import logging

import numpy as np
import pytest
import torch

from benchmarks.plain_loop import load
from fedpft_flower import progress, server
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import AlignConfig, Config, FedPFTError
from fedpft_flower.moments import neuron_moments
from fedpft_flower.passes import count_tokens, observe, run_to, skipped
from fedpft_flower.selection import (
    SELECTIONS,
    Evidence,
    energy,
    greedy,
    greedy_columns,
    output_metric,
    score,
    variance,
)
from tests.families import (
    CONFIGS,
    LAYERS,
    WIDTH,
    activation_of,
    columns_of,
    covariance,
    recorded,
    tiny_batch,
    tiny_model,
)

families = pytest.mark.parametrize("family", sorted(CONFIGS))


def batches(family, count=3):
    return [tiny_batch(family, seed=seed) for seed in range(count)]


def moments_of(fm, family, grams=True):
    return list(neuron_moments(fm, layers_of(fm), ffns_of(fm), batches(family), grams))


def evidence(ffn, moments=None, count=WIDTH, **align):
    return Evidence(ffn, moments, count, AlignConfig(**align), torch.Generator())


def slopes(fm, layer, h):
    """Return da/dz of every block at inputs h, by the family's own formula."""
    ffn = ffns_of(fm)[layer]
    z = [
        torch.tensor(h) @ rows.detach().double().T + bias
        for rows, bias in zip(ffn.up_rows(), biases(ffn), strict=True)
    ]
    act = activation_of(fm)
    leaves = [one.requires_grad_(True) for one in z]
    out = act(leaves[0]) * (leaves[1] if len(leaves) == 2 else 1.0)
    return [g.numpy() for g in torch.autograd.grad(out.sum(), leaves)]


def biases(ffn):
    found = []
    for linear, blocks in ffn.up:
        if linear.bias is None:
            found += [0.0] * blocks
        else:
            found += list(linear.bias.detach().double().chunk(blocks))
    return found


@families
def test_moments_against_numpy(family):
    fm = tiny_model(family)
    for layer, found in enumerate(moments_of(fm, family)):
        seen = recorded(fm, layer, batches(family))
        w = seen["weights"]
        np.testing.assert_allclose(found.mean, w @ seen["a"], atol=1e-6)
        np.testing.assert_allclose(found.square, w @ seen["a"] ** 2, atol=1e-6)
        gram = seen["a"].T @ (w[:, None] * seen["a"])
        np.testing.assert_allclose(found.gram, gram, atol=1e-5)
        metric = covariance(seen["h"], seen["weights"])
        rows = [r.detach().double().numpy() for r in ffns_of(fm)[layer].up_rows()]
        g = slopes(fm, layer, seen["h"])
        expected = sum(
            (rows[i] @ metric @ rows[j].T) * (g[i].T @ (w[:, None] * g[j]))
            for i in range(len(rows))
            for j in range(len(rows))
        )
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.jacobian, expected, atol=2e-5 * scale)


@families
def test_jacobian_gram_is_the_energy_of_directional_derivatives(family):
    """K_ij = E[(da_i . v)(da_j . v)] for v of covariance Q, by finite differences."""
    fm = tiny_model(family)
    (found, *_) = moments_of(fm, family)
    seen, ffn = recorded(fm, 0, batches(family)), ffns_of(fm)[0]
    metric = covariance(seen["h"], seen["weights"])
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    act = activation_of(fm)

    def activations(h):
        z = [
            torch.tensor(h) @ rows.detach().double().T + bias
            for rows, bias in zip(ffn.up_rows(), biases(ffn), strict=True)
        ]
        return (act(z[0]) * (z[1] if len(z) == 2 else 1.0)).numpy()

    np.testing.assert_allclose(activations(seen["h"]), seen["a"], atol=1e-5)
    gram = np.zeros((WIDTH, WIDTH))
    for direction in root.T:
        step = 1e-5 * direction
        moved = (activations(seen["h"] + step) - activations(seen["h"] - step)) / 2e-5
        gram += moved.T @ (seen["weights"][:, None] * moved)
    scale = np.abs(gram).max()
    np.testing.assert_allclose(found.jacobian, gram, atol=2e-5 * scale)


@families
def test_observing_changes_nothing_and_stops_early(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    with torch.no_grad():
        before = fm(**batch).logits
    layers, ffns = layers_of(fm), ffns_of(fm)
    ran = []
    handle = layers[2].register_forward_hook(lambda *_: ran.append(2))
    first, second = observe(fm, layers[:2], ffns[:2], batch)
    handle.remove()
    assert not ran
    assert torch.is_grad_enabled()
    with torch.no_grad():
        after = fm(**batch).logits
        torch.testing.assert_close(
            second.down, ffns[1].down(second.activations), atol=1e-6, rtol=1e-5
        )
    assert torch.equal(before, after)
    assert count_tokens(fm, batch) == len(first.inputs)
    norm = ffns[1].output_norm
    if norm is None:
        assert torch.equal(second.stream, second.output)
    elif not torch.equal(second.stream, second.down):  # not before the residual
        torch.testing.assert_close(norm(second.stream), second.output)


@families
def test_skipping_layers_changes_nothing(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    layers, ran = layers_of(fm), []
    with torch.no_grad():
        expected = fm(**batch).logits
    given = run_to(fm, layers[1], batch)
    inner = next(layers[1].children())
    handle = inner.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), skipped(layers[:2], given):
        found = fm(**batch).logits
    assert torch.equal(found, expected)
    assert not ran
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, expected)
    handle.remove()
    assert ran


@families
def test_energy_and_variance_against_numpy(family):
    fm = tiny_model(family)
    for layer, found in enumerate(moments_of(fm, family, grams=False)):
        seen, ffn = recorded(fm, layer, batches(family)), ffns_of(fm)[layer]
        norms = np.linalg.norm(columns_of(ffn), axis=0)
        square, mean = (seen["weights"] @ seen["a"] ** power for power in (2, 1))
        expected = np.sqrt(square) * norms
        np.testing.assert_allclose(energy(evidence(ffn, found)), expected, rtol=1e-4)
        expected = np.sqrt(square - mean**2) * norms
        np.testing.assert_allclose(variance(evidence(ffn, found)), expected, rtol=1e-3)


def smallest_error(weights, metric, chosen):
    """Return min over V of tr((V P - W) M (V P - W)^T), by solving for V."""
    if not chosen:
        return np.trace(weights @ metric @ weights.T)
    inner = metric[np.ix_(chosen, chosen)]
    columns = weights @ metric[:, chosen] @ np.linalg.inv(inner)
    wide = np.zeros_like(weights)
    wide[:, chosen] = columns
    return np.trace((wide - weights) @ metric @ (wide - weights).T)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_largest_decrease_at_every_step(seed):
    rng = np.random.default_rng(seed)
    weights, factor = rng.normal(size=(4, 9)), rng.normal(size=(9, 7))
    metric = factor @ factor.T + 1e-3 * np.eye(9)
    chosen, gains = greedy_columns(
        torch.tensor(weights @ metric), torch.tensor(metric), 6
    )
    for place, best in enumerate(chosen):
        errors = {
            i: smallest_error(weights, metric, [*chosen[:place], i])
            for i in range(9)
            if i not in chosen[:place]
        }
        assert errors[best] == pytest.approx(min(errors.values()), rel=1e-8)
    left = smallest_error(weights, metric, chosen)
    for i in set(range(9)) - set(chosen):
        decrease = left - smallest_error(weights, metric, [*chosen, i])
        assert float(gains[i]) == pytest.approx(decrease, rel=1e-6, abs=1e-9)


@families
def test_greedy_order_is_nested_and_recomputed_in_numpy(family):
    fm = tiny_model(family)
    ffn, found = ffns_of(fm)[1], moments_of(fm, family)[1]
    whole = greedy(evidence(ffn, found, WIDTH)).argsort(descending=True)
    for count in (1, 5, 12):
        scores = greedy(evidence(ffn, found, count))
        assert (
            scores.argsort(descending=True)[:count].tolist() == whole[:count].tolist()
        )
        assert scores.sort(descending=True).values[count:].max() < 1
    seen = recorded(fm, 1, batches(family))
    weights = columns_of(ffn)
    gram = seen["a"].T @ (seen["weights"][:, None] * seen["a"])
    if ffn.down.bias is not None:
        gram = covariance(seen["a"], seen["weights"])
    jacobian = found.jacobian.numpy()
    share = np.trace(weights @ gram @ weights.T) / np.trace(
        weights @ jacobian @ weights.T
    )
    metric = gram + 0.3 * share * jacobian
    metric += 1e-3 * np.diag(metric).mean() * np.eye(WIDTH)
    np.testing.assert_allclose(
        output_metric(evidence(ffn, found)), metric, atol=1e-5 * np.abs(metric).max()
    )
    for place in range(4):
        taken = whole[:place].tolist()
        errors = {
            i: smallest_error(weights, metric, [*taken, i])
            for i in range(WIDTH)
            if i not in taken
        }
        best = errors[int(whole[place])]
        assert best == pytest.approx(min(errors.values()), rel=1e-3)


def test_dead_and_equal_neurons_do_no_harm():
    metric = torch.zeros(5, 5, dtype=torch.float64)
    metric[:2, :2] = 1.0  # two equal neurons, three dead ones
    target = torch.ones(3, 5, dtype=torch.float64) @ metric
    chosen, gains = greedy_columns(target, metric, 5)
    assert sorted(chosen) == list(range(5))
    assert bool(torch.isfinite(gains).all())
    assert chosen[0] in (0, 1)


def test_random_is_seeded_and_differs_from_layer_to_layer():
    fm, counts = tiny_model("bert"), [3] * LAYERS

    def scores(seed):
        return score(fm, "random", counts, [], AlignConfig(), seed)

    first, again = scores(1), scores(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], scores(2)[0])
    assert not torch.equal(first[0], first[1])


def test_layers_that_keep_all_are_not_scored():
    counts = [WIDTH, 3, WIDTH]
    fm = tiny_model("bert")
    found = score(fm, "greedy", counts, batches("bert"), AlignConfig(), 0)
    assert [bool(one.any()) for one in found] == [False, True, False]


def test_sums_of_many_layers_take_several_passes(monkeypatch):
    fm, align = tiny_model("llama"), AlignConfig()
    given = (fm, "greedy", [5] * LAYERS, batches("llama"), align, 0)
    together = score(*given)
    monkeypatch.setattr("fedpft_flower.selection.MOST_BYTES", 1.0)
    apart = score(*given)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_an_unknown_selection_is_refused():
    with pytest.raises(FedPFTError, match=r"selection = 'magic'.*norm, random, energy"):
        score(tiny_model("bert"), "magic", [1] * LAYERS, [], AlignConfig(), 0)


def test_a_pass_over_public_batches_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(progress.LoggedBatches([1, 2, 3, 4], "choosing neurons")) == [
            1,
            2,
            3,
            4,
        ]
    assert "choosing neurons:  50 %" in caplog.text


@pytest.mark.parametrize(("whole", "tokens_for"), [("0", [8]), ("0,1,2,3", [])])
def test_layers_left_whole_need_no_tokens(settings, monkeypatch, whole, tokens_for):
    asked, real = [], server.ProxyServer._calibration_batches

    def noting(self, model, size, kept):
        asked.append(size)
        return real(self, model, size, kept)

    monkeypatch.setattr(server.ProxyServer, "_calibration_batches", noting)
    settings |= {"sub-fm.selection": "greedy", "sub-fm.whole-layers": whole}
    load(Config.from_run_config(settings | {"method": "fedpft-n"}))
    assert asked == tokens_for


@pytest.mark.parametrize("kept", [3, 6, 12, 18])
def test_there_are_25_public_tokens_for_each_kept_neuron_or_it_says_so(
    settings, monkeypatch, caplog, kept
):
    counted, real = [], server.ProxyServer._calibration_batches

    def counting(self, model, size, kept):
        batches = real(self, model, size, kept)
        counted.append(sum(count_tokens(model, batch) for batch in batches))
        return batches

    monkeypatch.setattr(server.ProxyServer, "_calibration_batches", counting)
    settings |= {"method": "fedpft-n", "sub-fm.selection": "energy"}
    settings |= {"sub-fm.keep-neurons": kept, "data.public-rows": 400}
    for few in (False, True):
        tokens = {"align.calibration-tokens": 15 * kept} if few else {}
        # A batch of one row is no longer than the tokens that are asked for.
        load(Config.from_run_config(settings | tokens | {"align.batch-size": 1}))
        assert (counted[-1] >= 25 * kept) is not few
        said = f"public tokens for {kept} kept neurons a layer are few"
        assert (said in caplog.text) is few


@pytest.mark.parametrize("selection", sorted(SELECTIONS))
def test_a_smaller_sub_fms_neurons_are_among_a_larger_ones(settings, selection):
    """Else whoever is given both holds more of the FM than the larger one has."""
    settings |= {"method": "fedpft-n", "sub-fm.selection": selection}
    settings |= {"data.public-rows": 400}
    kept = {}
    for count in (1, 3, 9):
        config = Config.from_run_config(settings | {"sub-fm.keep-neurons": count})
        _, _, chosen = load(config)
        kept[count] = chosen.plan.kept
    for less, more in ((1, 3), (3, 9)):
        assert all(set(kept[less][i]) < set(kept[more][i]) for i in kept[less])
