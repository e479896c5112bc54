"""How far logits depend on tokens: against finite differences, and its laws."""

import numpy as np
import pytest
import torch

from fedpft_flower.activity import real_logits
from fedpft_flower.adapters import base_model
from fedpft_flower.alignment import Teacher, layer_level
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import AlignConfig, Config
from fedpft_flower.descent import Schedule
from fedpft_flower.methods import METHODS, method_of
from fedpft_flower.moments import neuron_moments
from fedpft_flower.selection import score
from fedpft_flower.sensitivity import (
    Sensitivity,
    Site,
    measure,
    sensitivities,
    streams,
    weigh,
)
from tests.families import CONFIGS, recorded, tiny_batch, tiny_model
from tests.test_architectures import adapted, compressed, gradient_error

families = pytest.mark.parametrize("family", sorted(CONFIGS))
SEED = 3


def moved_logits(model, site, batch, place, step):
    """Return the logits where a token's values at a site are moved by a step [D]."""

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
        site.module.register_forward_pre_hook(before)
        if site.is_input
        else site.module.register_forward_hook(behind)
    )
    with torch.no_grad():
        logits = real_logits(model, batch)
    handle.remove()
    return logits


def cotangents(logits):
    drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(SEED))
    return drawn / drawn.norm(dim=-1, keepdim=True)


@families
def test_sensitivity_against_finite_differences(family):
    model = tiny_model(family).double()
    batch = tiny_batch(family, rows=2)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    for sites in (
        streams(layers_of(model), ffns_of(model)),
        [Site(layer) for layer in layers_of(model)],
    ):
        values, found = sensitivities(model, sites, batch, SEED)
        for layer in (0, len(sites) - 1):
            assert len(values[layer]) == len(found[layer])
            token, width = 1, values[layer].shape[1]  # the second of the first row
            slopes = []
            for i in range(width):
                # Some families' norms compute in float32, whatever they are given.
                step = 2e-3 * torch.eye(width, dtype=torch.float64)[i]
                up, down = (
                    moved_logits(model, sites[layer], batch, (0, token), sign * step)
                    for sign in (1, -1)
                )
                c = cotangents(up.float()).double()
                slopes.append(float(((up - down) * c).sum()) / 4e-3)
            expected = np.square(slopes).sum()
            assert float(found[layer][token]) == pytest.approx(expected, rel=0.01)


@families
def test_measuring_changes_nothing_and_leaves_nothing_behind(family):
    model, batch = tiny_model(family), tiny_batch(family)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        expected = real_logits(model, batch)
    sites = streams(layers_of(model), ffns_of(model))
    first, again = (sensitivities(model, sites, batch, SEED) for _ in range(2))
    for one, other in zip(first[1], again[1], strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(real_logits(model, batch), expected)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    for layer, values in enumerate(first[0]):
        stream = recorded(model, layer, [batch])["stream"]
        np.testing.assert_allclose(values, stream, atol=1e-6)


def test_a_classifier_depends_on_one_token_of_its_last_layer():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    sites = streams(layers_of(model), ffns_of(model))
    _, found = sensitivities(model, sites, batch, SEED)
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
    sites = streams(layers_of(model), ffns_of(model))
    sensitivity = measure(model, sites, given, 0.9, SEED)
    moments = list(
        neuron_moments(
            model,
            layers_of(model),
            ffns_of(model),
            given,
            grams=False,
            weights_of=sensitivity.weights,
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
    torch.testing.assert_close(forgetful(batch).weights[0], first.weights[0])
    assert not torch.equal(forgetful(batch).weights[0], first.weights[0])


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_distillation_by_sensitivity_lowers_the_gradient_error_more(family):
    from fedpft_flower.alignment import distil

    errors = []
    for share in (0.0, 0.9):
        fm, sub, plan = adapted(family)
        batches = [tiny_batch(family, seed=seed, rows=8) for seed in range(8)]

        def endless(given=batches):
            while True:
                yield from given

        distil(
            fm,
            sub,
            plan,
            layer_level(compressed(sub, plan)),
            endless(),
            Schedule(0.01, 60),
            0.0,
            lambda progress: None,
            share=share,
            seed=SEED,
        )
        errors.append(gradient_error(fm, sub, batches, SEED).relative)
        assert all(p.grad is None for p in base_model(fm).parameters())
    assert errors[1] < errors[0]


def test_tokens_count_alike_where_no_setting_says_otherwise():
    assert not any(row.sensitivity for row in METHODS.values())
    flat = {"method": "fedpft-b", "align.sensitivity": 0.5}
    assert method_of(Config.from_run_config(flat)).sensitivity == 0.5
