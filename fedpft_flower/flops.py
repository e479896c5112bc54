"""Count the floating point operations of training steps."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedpft_flower.batches import Batch

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the operations of both products, of shapes [B, heads, T, size].

    Keys and values may have fewer heads, each shared by several of the queries'.
    """
    batch, heads, tokens, size = query
    return int(2 * batch * heads * tokens * key[-2] * (size + value[-1]))


def _attention_backward(_: Any, *inputs: Any, **__: Any) -> int:
    return 2 * _attention(*inputs)


# Fused attention counts like the products that it stands for: PyTorch does not know
# that of CPUs, adds to the others what they compute again for want of memory, and in
# older versions refuses heads that share keys.
_FUSED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FUSED)


def flops_of(run: Callable[[], object]) -> int:
    """Return the floating point operations of the products in a piece of work."""
    with _counter() as counter:
        run()
    return int(counter.get_total_flops())


class FlopMeter:
    """Tell the floating point operations of a model's training steps.

    Counting makes a step slower, so only a model's first one is counted, and others
    have as many a token, or an image. That is exact for rows of equal length; for
    others it misses how much more, or less, of a token's work is attention.
    """

    def __init__(self) -> None:
        self._each = math.nan

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Count what is done to a batch meanwhile, if nothing was counted before."""
        if not math.isnan(self._each):
            yield
            return
        with _counter() as counter:
            yield
        self._each = counter.get_total_flops() / _units(batch)

    def flops(self, batch: Batch) -> float:
        """Return the operations of a step on a batch; NaN before one was watched."""
        return self._each * _units(batch)


def _units(batch: Batch) -> int:
    """Return how many tokens, padding included, or images a batch has."""
    tokens: Tensor | None = batch.get("input_ids")
    return len(batch["labels"]) if tokens is None else tokens.numel()
