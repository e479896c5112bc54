"""Operations of training steps: as counted by hand, and told by the token."""

import math
from functools import partial

import pytest
import torch

from fedpft_flower.adapters import attach_adapter, base_model
from fedpft_flower.config import LoraConfig
from fedpft_flower.flops import FlopMeter, flops_of
from fedpft_flower.training import add_gradients, recomputed, train_mode
from tests.families import CLASSES, CONFIGS, LAYERS, WIDTH, tiny_batch, tiny_model


def adapted(family):
    return attach_adapter(tiny_model(family), LoraConfig(r=2), (), seed=0)


def labelled(family, **more):
    batch = tiny_batch(family, **more)
    count = len(next(iter(batch.values())))
    return {**batch, "labels": torch.arange(count) % CLASSES}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_fused_attention_counts_like_the_products_that_it_is(family, padded):
    """Without padding there is no mask, and heads that share keys are not repeated."""
    model, batch = adapted(family), labelled(family)
    if not padded and "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    fused = flops_of(partial(add_gradients, model, batch, 0))
    base_model(model).set_attn_implementation("eager")
    assert fused == flops_of(partial(add_gradients, model, batch, 0)) > 0


def by_hand(parameters, rows, length, hidden, layers):
    """Return a training step's operations: frozen matrices, LoRA's, attention's.

    A product with a frozen matrix comes once forward and once backward, for its input;
    that with a trained one twice backward. The first layer's input has no gradient, so
    query, key and value there give it none.
    """
    frozen, lora, first = parameters
    tokens = rows * length
    attention = 4 * rows * length * length * hidden
    return tokens * (4 * frozen - 2 * first + 6 * lora) + 3 * layers * attention


def test_a_step_counts_like_one_counted_by_hand():
    model, rank = adapted("bert"), 2
    config, rows, length = base_model(model).config, 5, 9
    d, classes = config.hidden_size, CLASSES
    layer = 4 * d * d + 2 * d * WIDTH
    lora = 4 * LAYERS * 2 * d * rank  # beside query, key, value and output
    # What takes the embeddings, which need no gradient: three matrices, three LoRA's A.
    first = 3 * d * d + 3 * d * rank
    tokens = by_hand((LAYERS * layer, lora, first), rows, length, d, LAYERS)
    head = rows * (4 * d * d + 4 * d * classes)  # pooler and classifier, both frozen
    batch = labelled("bert")
    assert batch["input_ids"].shape == (rows, length)
    assert flops_of(partial(add_gradients, model, batch, 0)) == tokens + head


def test_other_steps_have_as_many_a_token():
    model, meter = adapted("bert"), FlopMeter()
    first, more = labelled("bert"), labelled("bert", rows=8)
    assert math.isnan(meter.flops(first))
    for batch in (first, more):
        with meter.watch(batch):
            add_gradients(model, batch, 0)
    assert meter.flops(first) == flops_of(partial(add_gradients, model, first, 0))
    assert meter.flops(more) == flops_of(partial(add_gradients, model, more, 0))


def test_images_are_counted_too():
    model, meter = adapted("vit"), FlopMeter()
    one, other = labelled("vit"), labelled("vit", rows=3)
    with meter.watch(one):
        add_gradients(model, one, 0)
    assert meter.flops(other) == flops_of(partial(add_gradients, model, other, 0))


def test_what_is_computed_again_counts_again():
    model, batch = adapted("bert"), labelled("bert")
    train_mode(model, frozen_dropout=False)
    once = flops_of(partial(add_gradients, model, batch, 0))
    with recomputed(model):
        again = flops_of(partial(add_gradients, model, batch, 0))
    assert 1.3 < again / once < 1.6
