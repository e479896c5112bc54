"""The conformance suite: what must hold for every family's row."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fedpft_flower.activity import activation_rms, inactive_rates, watch
from fedpft_flower.adapters import (
    attach_adapter,
    base_model,
    export_adapter,
    get_adapter,
    load_adapter,
    plug_in,
)
from fedpft_flower.alignment import (
    Teacher,
    distil,
    emulator_level,
    layer_level,
    neuron_level,
)
from fedpft_flower.architectures import (
    ARCHITECTURES,
    family_of,
    ffns_of,
    layers_of,
    matrix_of,
    model_class_of,
    new_model,
)
from fedpft_flower.batches import unit_cotangents
from fedpft_flower.config import (
    AlignConfig,
    FedPFTError,
    LoraConfig,
    SubFMConfig,
    derive_seed,
)
from fedpft_flower.descent import Schedule
from fedpft_flower.fidelity import adapter_gradients, compare_gradients
from fedpft_flower.passes import ended_behind, observe, outputs_of
from fedpft_flower.plan import Plan
from fedpft_flower.planners import keep_all, keep_salient, parameters_of, size_of
from fedpft_flower.received import config_fields, config_from
from fedpft_flower.selection import Evidence, norm
from fedpft_flower.sub_fm import (
    build_skeleton,
    build_sub_fm,
    frozen_weights,
    load_weights,
)
from tests.families import CONFIGS, WIDTH, tiny_batch, tiny_model

families = pytest.mark.parametrize("family", sorted(CONFIGS))
LORA = LoraConfig(r=2, alpha=8)


def test_every_row_has_a_tiny_config():
    assert set(CONFIGS) == set(ARCHITECTURES)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def evidence(ffn):
    return Evidence(ffn, None, ffn.width, AlignConfig(), torch.Generator())


def plans(model, **settings):
    scores = [norm(evidence(ffn)) for ffn in ffns_of(model)]
    return keep_salient(scores, sizes_of(model), SubFMConfig(**settings))


def sizes_of(model):
    return list(map(size_of, layers_of(model), ffns_of(model)))


def whole(model):
    scores = [norm(evidence(ffn)) for ffn in ffns_of(model)]
    return keep_all(scores, sizes_of(model), SubFMConfig())


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapted(family, plan_settings=None, seed=0):
    """Return FM and sub-FM with the same, non-trivial adapter."""
    head = ARCHITECTURES[family].head
    return with_adapters(tiny_model(family), head, plan_settings, seed)


def gradient_error(fm, sub, batches, seed):
    """Return the error of the sub-FM's adapter gradients."""
    inputs = list(batches)
    sides = [adapter_gradients(model, inputs, seed) for model in (fm, sub)]
    return compare_gradients(*sides)


def with_adapters(fm, head, plan_settings=None, seed=0, objective="classify"):
    plan = plans(fm, **(plan_settings or {"keep_fraction": 0.5}))
    sub = build_sub_fm(fm, plan, objective)
    fm = attach_adapter(fm, LORA, head, seed)
    sub = attach_adapter(sub, LORA, head, seed)
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in get_adapter(fm).items()
    }
    load_adapter(fm, moved)
    load_adapter(sub, moved)
    return fm.eval(), sub.eval(), plan


@families
def test_full_plan_is_bit_identical_and_shares_no_storage(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    before = snapshot(fm)
    sub = build_sub_fm(fm, whole(fm))
    assert torch.equal(logits(fm, batch), logits(sub, batch))
    with torch.no_grad():
        for parameter in sub.parameters():
            parameter.zero_()
    assert same(before, snapshot(fm))


@families
def test_cut_keeps_exactly_the_planned_neurons(family):
    fm = tiny_model(family)
    plan = plans(fm, keep_neurons=7, whole_layers="0,-1")
    assert plan.compressed == (1,)
    sub = build_sub_fm(fm, plan)
    for layer, (big, small) in enumerate(zip(ffns_of(fm), ffns_of(sub), strict=True)):
        kept = list(plan.kept[layer])
        assert small.width == len(kept)
        assert torch.equal(small.down_columns(), big.down_columns()[:, kept])
        assert equal_or_none(small.down.bias, big.down.bias)
        for (cut, blocks), (full, _) in zip(small.up, big.up, strict=True):
            rows = [b * big.width + i for b in range(blocks) for i in kept]
            assert torch.equal(matrix_of(cut), matrix_of(full)[rows])
            assert equal_or_none(
                cut.bias, None if full.bias is None else full.bias[rows]
            )


def equal_or_none(left, right):
    return left is right is None or torch.equal(left, right)


@families
def test_sizes_count_every_parameter_once(family):
    fm = tiny_model(family)
    for plan in (whole(fm), plans(fm, keep_neurons=7, whole_layers="0")):
        layers = layers_of(build_sub_fm(fm, plan))
        counted = sum(p.numel() for layer in layers for p in layer.parameters())
        assert parameters_of(plan, sizes_of(fm)) == counted


@families
def test_cut_neurons_are_what_masking_their_activation_gives(family):
    """Independent slow version: the FM with the cut neurons' activations set to 0."""
    fm, batch = tiny_model(family), tiny_batch(family)
    plan = plans(fm, keep_fraction=0.5)
    sub = build_sub_fm(fm, plan)
    handles = []
    for layer, ffn in enumerate(ffns_of(fm)):
        mask = torch.zeros(WIDTH)
        mask[list(plan.kept[layer])] = 1.0
        hook = lambda module, inputs, m=mask: (inputs[0] * m,)  # noqa: E731
        handles.append(ffn.down.register_forward_pre_hook(hook))
    expected = logits(fm, batch)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits(sub, batch), expected)


@families
def test_permuting_neurons_leaves_logits_unchanged(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    expected = logits(fm, batch)
    with torch.no_grad():
        for ffn in ffns_of(fm):
            order = torch.randperm(ffn.width)
            for parameter, axis, _ in ffn.parameters_by_axis(order):
                blocks = parameter.shape[axis] // ffn.width
                places = torch.cat([order + b * ffn.width for b in range(blocks)])
                parameter.copy_(parameter.index_select(axis, places))
    torch.testing.assert_close(logits(fm, batch), expected)


@families
def test_saliency_sees_every_weight_of_its_neuron_only(family):
    fm = tiny_model(family)
    ffn = ffns_of(fm)[1]
    before = norm(evidence(ffn))
    for parameter, axis, _ in ffn.parameters_by_axis(torch.tensor([3])):
        if parameter.ndim < 2:
            continue  # biases do not count in the paper's saliency
        with torch.no_grad():
            parameter.select(axis, 3).add_(1.0)
        after = norm(evidence(ffn))
        changed = (after != before).nonzero().flatten().tolist()
        assert changed == [3]
        before = after


@families
def test_saliency_is_the_norm_of_row_and_column(family):
    ffn = ffns_of(tiny_model(family))[0]
    scores = norm(evidence(ffn))
    for i in range(ffn.width):
        rows = [
            matrix_of(projection)[block * ffn.width + i]
            for projection, blocks in ffn.up
            for block in range(blocks)
        ]
        joined = torch.cat([*rows, ffn.down_columns()[:, i]])
        torch.testing.assert_close(scores[i], joined.norm())


@families
def test_what_down_gives_reaches_the_stream_as_the_row_says(family):
    """Least squares takes that for granted: a norm or factor must be in the row."""
    model, batch = tiny_model(family), tiny_batch(family)
    layer, ffn = layers_of(model)[1], ffns_of(model)[1]
    (before,) = observe(model, [layer], [ffn], batch)
    more = torch.randn(len(ffn.down_columns()))
    handle = ffn.down.register_forward_hook(lambda m, i, output: output + more)
    (after,) = observe(model, [layer], [ffn], batch)
    handle.remove()
    moved, expected = after.stream - before.stream, ffn.scaled(more)
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-5, rtol=1e-4)


def test_a_number_may_multiply_what_down_gives():
    """BEiT without layer scale has 1.0 in the place of the vector."""
    config = AutoConfig.for_model(
        "beit", **CONFIGS["beit"] | {"layer_scale_init_value": 0.0}
    )
    model = new_model(ARCHITECTURES["beit"], config, "classify")
    scale = ffns_of(model)[0].output_scale
    assert scale.tolist() == [1.0] * config.hidden_size


@families
def test_uniform_width_opens_with_stock_transformers(family, tmp_path):
    fm, batch = tiny_model(family), tiny_batch(family)
    sub = build_sub_fm(fm, plans(fm, keep_neurons=10))
    sub.save_pretrained(tmp_path)
    row = ARCHITECTURES[family]
    if row.width_field is None:
        return  # the config has a ratio, which few widths fit
    stock = model_class_of(row, "classify").from_pretrained(tmp_path)
    assert torch.equal(logits(stock.eval(), batch), logits(sub, batch))


@families
def test_a_client_rebuilds_it_from_the_fields_of_the_config(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    for plan in (plans(fm, keep_neurons=7, whole_layers="0"), whole(fm)):
        sub = build_sub_fm(fm, plan)
        skeleton = build_skeleton(config_from(config_fields(fm.config)), plan)
        load_weights(skeleton, sub.state_dict())
        assert torch.equal(logits(skeleton.eval(), batch), logits(sub, batch))


def test_a_large_base_of_rotary_positions_is_taken():
    """As Mistral Small and models of long contexts have it; it is no size."""
    fields = config_fields(tiny_model("mistral").config)
    fields["rope_parameters"] |= {"rope_theta": 1e9}
    assert config_from(fields).rope_parameters["rope_theta"] == 1e9


@families
def test_dropped_layers_are_renumbered(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    everything = whole(fm)
    kept = {layer: everything.kept[layer] for layer in (0, 2)}
    sub = build_sub_fm(fm, Plan(everything.widths, kept))
    assert [ffn.width for ffn in ffns_of(sub)] == [WIDTH, WIDTH]
    assert torch.equal(ffns_of(sub)[1].down_columns(), ffns_of(fm)[2].down_columns())
    with torch.no_grad(), passed_over(layers_of(fm)[1]):
        expected = fm(**batch).logits
    torch.testing.assert_close(logits(sub, batch), expected, rtol=1e-5, atol=1e-6)


@contextmanager
def passed_over(layer):
    """Let a layer return what it is given."""

    def restore(module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = layer.register_forward_hook(restore, with_kwargs=True)
    yield
    handle.remove()


def emulated(family):
    """Return FM and emulator: layers 0, 2, 4 of five kept, adapters in 0 and 4."""
    fm = tiny_model(family, layers=5)
    everything = whole(fm)
    plan = Plan(everything.widths, {i: everything.kept[i] for i in (0, 2, 4)}, (0, 4))
    sub, head = build_sub_fm(fm, plan), ARCHITECTURES[family].head
    fm = attach_adapter(fm, LORA, head, 0, plan.adapters)
    sub = attach_adapter(sub, LORA, head, 0, plan.adapter_places)
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in get_adapter(sub).items()
    }
    load_adapter(sub, moved)
    return fm.eval(), sub.eval(), plan


@families
def test_plug_in_renumbers_the_layers_of_an_emulator(family, tmp_path):
    from peft import PeftModel

    fm, sub, plan = emulated(family)
    adapter, batch = get_adapter(sub), tiny_batch(family)
    before = logits(fm, batch)
    plug_in(fm, adapter, plan)
    assert not torch.allclose(logits(fm, batch), before)
    left, right = get_adapter(fm), adapter
    for (name, tensor), (small, sent) in zip(left.items(), right.items(), strict=True):
        assert torch.equal(tensor, sent)
        assert name == small.replace(".2.", ".4.", 1)
    assert {n.split(".lora_")[0] for n in left if ".1." in n or ".2." in n} == set()
    export_adapter(fm, tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(family, layers=5), str(tmp_path))
    assert torch.equal(logits(stock.eval(), batch), logits(fm, batch))


@families
def test_emulator_distillation_changes_only_the_emulator_and_helps(family):
    fm, sub, plan = emulated(family)
    plug_in(fm, get_adapter(sub), plan)
    assert plan.aligned == plan.emulator == (2,)
    assert [plan.teacher(layer) for layer in plan.layers] == [1, 3, 4]
    before, batches = snapshot(sub), [tiny_batch(family, seed=s) for s in range(3)]
    error = gradient_error(fm, sub, batches, seed=0)
    middle = layers_of(base_model(sub))[1]
    seen = align(fm, sub, plan, emulator_level([middle]), family, steps=60)
    assert seen[-1].loss < 0.9 * seen[0].loss
    assert gradient_error(fm, sub, batches, seed=0).relative < error.relative
    after = snapshot(sub)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {id(p) for p in middle.parameters()}
    assert changed <= {n for n, p in sub.named_parameters() if id(p) in inside}


@families
def test_untrained_adapter_changes_nothing_trained_one_does(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    expected = logits(fm, batch)
    model = attach_adapter(fm, LORA, ARCHITECTURES[family].head, seed=0).eval()
    assert torch.equal(logits(model, batch), expected)
    trained = {name: tensor + 0.1 for name, tensor in get_adapter(model).items()}
    load_adapter(model, trained)
    assert not torch.allclose(logits(model, batch), expected)


@families
def test_adapters_have_the_same_names_and_shapes_on_both_sides(family):
    fm, sub, _ = adapted(family)
    left, right = get_adapter(fm), get_adapter(sub)
    assert list(left) == list(right)
    assert same(left, right)
    attention = len(ARCHITECTURES[family].attention)
    assert sum("lora_" in name for name in left) == 2 * attention * 3


@families
def test_adapter_that_does_not_fit_is_refused(family):
    fm, _, _ = adapted(family)
    adapter = get_adapter(fm)
    name = next(iter(adapter))
    for wrong in (
        {k: v for k, v in adapter.items() if k != name},
        {**adapter, "stranger": torch.zeros(1)},
        {**adapter, name: torch.zeros(1)},
        {**adapter, name: adapter[name].double()},
        {**adapter, name: adapter[name] * float("nan")},
    ):
        with pytest.raises(FedPFTError, match="adapter"):
            load_adapter(fm, wrong)
    assert same(adapter, get_adapter(fm))


@families
def test_merged_is_unmerged(family):
    fm, _, _ = adapted(family)
    batch = tiny_batch(family)
    expected = logits(fm, batch)
    merged = copy.deepcopy(fm).merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-4)


@families
def test_exported_adapter_opens_on_the_stock_fm(family, tmp_path):
    from peft import PeftModel

    fm, _, _ = adapted(family)
    batch = tiny_batch(family)
    export_adapter(fm, tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(family), str(tmp_path)).eval()
    assert torch.equal(logits(stock, batch), logits(fm, batch))


@families
def test_no_gradient_is_computed_below_the_first_adapter(family):
    """Adapters from layer 1 up: the backward pass leaves layer 0 alone."""
    row = ARCHITECTURES[family]
    model = attach_adapter(tiny_model(family), LORA, row.head, seed=0)
    layers, entering = layers_of(base_model(model)), []
    layers[0].requires_grad_(False)
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, given, named: entering.append(
                given[0] if given else named["hidden_states"]
            ),
            with_kwargs=True,
        )
    loss = model(**tiny_batch(family)).logits.square().mean()
    loss.backward()
    needs = [states.requires_grad for states in entering]
    assert needs == [False, False] + [True] * (len(layers) - 2)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@families
def test_thinned_sub_fm_trains_and_its_frozen_weights_stay(family):
    fm = tiny_model(family)
    sub = build_sub_fm(fm, plans(fm, keep_fraction=0.5))
    frozen = frozen_weights(sub, ARCHITECTURES[family].head)
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    model = attach_adapter(sub, LORA, ARCHITECTURES[family].head, seed=0)
    start = get_adapter(model)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.01
    )
    batch = {**tiny_batch(family), "labels": torch.tensor([0, 1, 2, 3, 0])}
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert same(before, frozen)
    assert not same(start, get_adapter(model))


def align(fm, sub, plan, trainable, family, steps=30, weight=0.01):
    batches = iter(lambda: tiny_batch(family, rows=8), None)
    seen = []
    distil(
        fm, sub, plan, trainable, batches, Schedule(0.01, steps), weight, seen.append
    )
    return seen


def compressed(sub, plan):
    ffns = ffns_of(base_model(sub))
    return [ffns[plan.layers.index(layer)] for layer in plan.compressed]


@families
def test_layer_distillation_reduces_the_error_and_changes_only_ffns(family):
    fm, sub, plan = adapted(family, {"keep_fraction": 0.5, "whole_layers": "0"})
    teacher, before = snapshot(fm), snapshot(sub)
    trainable = layer_level(compressed(sub, plan))
    seen = align(fm, sub, plan, trainable, family)
    assert seen[-1].loss < 0.9 * seen[0].loss
    assert same(teacher, snapshot(fm))
    after = snapshot(sub)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {id(parameter) for parameter, _ in trainable}
    names = {n for n, p in sub.named_parameters() if id(p) in allowed}
    assert changed == names


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_of_a_distillation_against_numpy(weight):
    """Layer 0 is whole: it is neither aligned nor among the products."""
    fm, sub, plan = adapted("bert", {"keep_fraction": 0.5, "whole_layers": "0"})
    batch = tiny_batch("bert")
    real = batch["attention_mask"].bool().numpy()
    states, products = [], []
    for model in (base_model(fm), base_model(sub)):
        with torch.no_grad():
            found = model.bert(**batch, output_hidden_states=True).hidden_states
        states.append([h.double().numpy()[real] for h in found[1:]])  # of the layers
        layers = model.bert.encoder.layer
        products.append([matrix(la.output) @ matrix(la.intermediate) for la in layers])
    expected = 0.0
    for layer in (1, 2):
        (h_fm, h_sub), (p_fm, p_sub) = (
            [side[layer] for side in kind] for kind in (states, products)
        )
        expected += np.mean((h_fm - h_sub) ** 2) / np.mean(h_fm**2) / 2
        expected += weight * np.mean((p_fm - p_sub) ** 2) / np.mean(p_fm**2) / 2
    trainable, said = layer_level(compressed(sub, plan)), []
    schedule = Schedule(0.01, 1)
    distil(fm, sub, plan, trainable, iter([batch]), schedule, weight, said.append)
    assert said[0].loss == pytest.approx(expected, rel=1e-5)


def matrix(part):
    return part.dense.weight.detach().double().numpy()


@families
def test_layers_behind_the_last_that_is_looked_at_do_not_run(family):
    fm, batch = tiny_model(family), tiny_batch(family)
    layers, ran = layers_of(fm), []
    with torch.no_grad(), outputs_of([layers[1]]) as expected:
        logits = fm(**batch).logits
    inner = next(layers[2].children())
    handle = inner.register_forward_hook(lambda *_: ran.append(1))
    ends = ended_behind(layers[1], layers)
    with torch.no_grad(), outputs_of([layers[1]]) as found, ends:
        fm.base_model(**batch)
    assert torch.equal(found[0], expected[0])
    assert not ran
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, logits)
    handle.remove()
    assert ran


def test_the_fm_sees_rows_that_are_held_out_once():
    fm, sub, plan = adapted("bert")
    held_out = [tiny_batch("bert", seed) for seed in (8, 9)]
    trainable, runs = layer_level(compressed(sub, plan)), []
    endless = (tiny_batch("bert", seed) for seed in range(10))
    handle = base_model(fm).base_model.register_forward_hook(lambda *_: runs.append(1))
    schedule, said = Schedule(0.001, 10, patience=10), []
    distil(fm, sub, plan, trainable, endless, schedule, 0.01, said.append, held_out)
    handle.remove()
    assert len({one.held_out for one in said}) > 5
    assert len(runs) == 10 + len(held_out)


def halves(batch, order):
    """Return two batches of the rows in this order, without needless padding."""
    mask, found = batch.get("attention_mask"), []
    for rows in (order[:2], order[2:]):
        length = int(mask[rows].sum(1).max()) if mask is not None else None
        found.append({name: one[rows, :length] for name, one in batch.items()})
    return found


@families
@pytest.mark.parametrize("rows", [0, 2, 5])
def test_hidden_states_are_computed_once_a_row_while_memory_allows(family, rows):
    fm, runs = tiny_model(family), []
    layers = layers_of(fm)[1:]
    first, again = (
        halves(tiny_batch(family), o) for o in ([0, 1, 2, 3, 4], [4, 1, 3, 0, 2])
    )
    plain = Teacher(fm, layers, 0.0)
    most = max(plain(one).states[0].numel() for one in first)
    size = most * len(layers) * 4 / 2
    kept = Teacher(fm, layers, rows * size)
    for batch in first:
        kept(batch)
    handle = fm.base_model.register_forward_hook(lambda *_: runs.append(1))
    for batch in again:
        expected = plain(batch)
        runs.clear()
        for one, other in zip(kept(batch).states, expected.states, strict=True):
            torch.testing.assert_close(one, other)
        assert (len(runs) == 0) == (rows == 5)
    handle.remove()


@families
def test_post_ln_blocks_train_their_output_norm_and_pre_ln_blocks_none(family):
    _, sub, plan = adapted(family)
    names = {id(p): n for n, p in sub.named_parameters()}
    norms = [
        names[id(parameter)]
        for parameter, _ in layer_level(compressed(sub, plan))
        if "norm" in names[id(parameter)].lower()
    ]
    assert bool(norms) == (ARCHITECTURES[family].output_norm is not None)


@families
def test_neuron_distillation_changes_only_the_chosen_neurons(family):
    fm, sub, plan = adapted(family)
    ffns = compressed(sub, plan)
    chosen = [torch.tensor([1, 4]), torch.tensor([0]), torch.tensor([2, 3, 11])]
    before = snapshot(sub)
    seen = align(fm, sub, plan, neuron_level(ffns, chosen), family, steps=10)
    assert seen[-1].loss < seen[0].loss
    after = snapshot(sub)
    names = {id(p): n for n, p in sub.named_parameters()}
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for ffn, neurons in zip(ffns, chosen, strict=True):
        for parameter, axis, places in ffn.parameters_by_axis(neurons):
            name = names[id(parameter)]
            moved = after[name].index_select(axis, places)
            assert not torch.equal(moved, before[name].index_select(axis, places))
            expected[name].index_copy_(axis, places, moved)
    assert same(expected, after)  # bit for bit


@families
def test_gradient_error_is_zero_for_the_fm_itself(family):
    fm, sub, _ = adapted(family)
    batches = [tiny_batch(family, seed=s) for s in range(3)]
    itself = gradient_error(fm, fm, batches, seed=0)
    assert itself.relative == 0.0
    assert itself.cosine == pytest.approx(1.0)
    found = gradient_error(fm, sub, batches, seed=0)
    assert found.relative > 0
    assert found == gradient_error(fm, sub, batches, seed=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_adapter_gradients_are_those_of_differences(family):
    """In float64, by moving one value of the adapter at a time."""
    fm = adapted(family)[0].double()
    batch = {
        name: values.double() if values.is_floating_point() else values
        for name, values in tiny_batch(family).items()
    }
    (found,) = adapter_gradients(fm, [batch], seed=0)
    cotangent = unit_cotangents(logits(fm, batch), derive_seed(0, "cotangent", 0))
    trained = [p for p in fm.parameters() if p.requires_grad]
    for parameter, gradient in list(zip(trained, found, strict=True))[::5]:
        place = int(gradient.abs().argmax())
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.view(-1)[place] += step
                values.append(float((logits(fm, batch) * cotangent).sum()))
                parameter.view(-1)[place] -= step
        expected = (values[0] - values[1]) / 2e-6
        assert float(gradient.flatten()[place]) == pytest.approx(expected, rel=1e-4)


# No law, so not every random model does it.
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "modernbert", "vit"])
def test_gradient_error_falls_by_alignment(family):
    fm, sub, plan = adapted(family, {"keep_fraction": 0.25})
    batches = [tiny_batch(family, seed=s) for s in range(3)]
    before = gradient_error(fm, sub, batches, seed=0)
    align(fm, sub, plan, layer_level(compressed(sub, plan)), family, steps=100)
    after = gradient_error(fm, sub, batches, seed=0)
    assert 0 < after.relative < before.relative


@families
def test_activity_excludes_padding_and_agrees_with_a_count_by_hand(family):
    model, batch = tiny_model(family), tiny_batch(family)
    ffns = ffns_of(model)
    seen = {}
    watch(model, ffns, [batch], lambda place, values: seen.__setitem__(place, values))
    if "attention_mask" in batch:
        assert len(seen[0]) == int(batch["attention_mask"].sum())
    rms = activation_rms(model, ffns, [batch])
    torch.testing.assert_close(rms[1], seen[1].square().mean(dim=0).sqrt())
    limits = [0.5 * r for r in rms]
    rates = inactive_rates(model, ffns, [batch], limits)
    by_hand = torch.tensor(
        [
            sum(abs(float(row[i])) <= float(limits[2][i]) for row in seen[2])
            / len(seen[2])
            for i in range(WIDTH)
        ]
    )
    torch.testing.assert_close(rates[2], by_hand)
    if "attention_mask" in batch:  # what stands at padding must not matter
        noisy = dict(batch)
        noisy["input_ids"] = torch.where(
            batch["attention_mask"].bool(), batch["input_ids"], 7
        )
        again = inactive_rates(model, ffns, [noisy], limits)
        torch.testing.assert_close(again[0], rates[0])


def test_unknown_family_says_which_row_to_add():
    with pytest.raises(FedPFTError, match=r"xlnet.*supported.*add a row"):
        family_of("xlnet")
