"""Measure how much an FM's logits depend on each token, layer by layer.

For random unit cotangents c of the logits and x_t what a token t has at some place of
the FM,

    s_t = ||d(c . logits) / d x_t||^2

tells how much a small error of x_t, the same in all directions, changes the logits. A
classifier reads one token of its last layer: an error of the others there costs
nothing, and unweighted they are nearly all that an alignment looks at. No labels are
needed. The weights are those of the FM as it is: while an adapter trains, other tokens
may come to matter. The more unequal they are, the fewer tokens an estimate really rests
on. Measure and weights are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_flower.architectures import FFN
from fedpft_flower.batches import (
    Batch,
    hidden_states,
    real_logits,
    real_tokens,
    unit_cotangents,
)
from fedpft_flower.config import derive_seed


@dataclass(frozen=True)
class StreamPoint:
    """Name a place in a model: what a module returns, or what it is given."""

    module: nn.Module
    is_input: bool = False


def streams(layers: Sequence[nn.Module], ffns: Sequence[FFN]) -> list[StreamPoint]:
    """Return where the errors of each layer's FFN are measured.

    That is what the norm behind the FFN reads; without one, the output of the layer.
    """
    return [
        StreamPoint(layer)
        if ffn.output_norm is None
        else StreamPoint(ffn.output_norm, is_input=True)
        for layer, ffn in zip(layers, ffns, strict=True)
    ]


def sensitivities(
    model: nn.Module, points: Sequence[StreamPoint], batch: Batch, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what passes some places of a model, and how much its logits depend on it.

    Args:
        model: the FM with its head, in evaluation mode.
        points: the places, in the order in which a forward pass reaches them.
        batch: its inputs; `attention_mask` [B, T] marks real tokens where present.
        seed: of the cotangents.

    Returns:
        Values [tokens, D] and s [tokens], float32, at every place, without padding.
    """
    found: list[Tensor] = []
    handles = [_hook(point, found) for point in points]
    try:
        with torch.enable_grad():
            logits = real_logits(model, batch)
            cotangents = unit_cotangents(logits, seed).to(logits.dtype)
            with torch.autocast(logits.device.type, enabled=False):
                gradients = torch.autograd.grad(logits, found, cotangents)
    finally:
        for handle in handles:
            handle.remove()
    mask = batch.get("attention_mask")
    return (
        [real_tokens(values.detach(), mask) for values in found],
        [real_tokens(g, mask).float().square().sum(dim=-1) for g in gradients],
    )


def _hook(point: StreamPoint, found: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    def note(values: Tensor) -> None:
        # Frozen weights before it leave no graph: then the gradients begin here.
        if not values.requires_grad:
            values.requires_grad_(True)
        found.append(values)

    def entered(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(inputs[0])

    def left(module: nn.Module, inputs: object, output: object) -> None:
        note(hidden_states(output))

    if point.is_input:
        return point.module.register_forward_pre_hook(entered)
    return point.module.register_forward_hook(left)


def weigh(plain: Tensor, sensitivity: Tensor, share: float) -> Tensor:
    """Return weights of a batch's tokens: a share by sensitivity, the rest plain.

    w = (1 - share) v / mean(v) + share s / mean(s), so that no token counts nothing.
    With any share every batch weighs as much as it has tokens.

    Args:
        plain: v [tokens], the weights without it.
        sensitivity: s [tokens].
        share: in [0, 1).
    """
    least = torch.finfo(sensitivity.dtype).tiny
    by_sensitivity = sensitivity / sensitivity.mean().clamp_min(least)
    return (1.0 - share) * plain / plain.mean() + share * by_sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """Hold the sensitivities of the tokens of some batches, and how much they count."""

    share: float
    batches: Sequence[Sequence[Tensor]]  # s [tokens] of each batch and layer

    def of(self, layers: Sequence[int]) -> "Sensitivity":
        """Return that of some layers alone, numbered anew."""
        chosen = [[batch[layer] for layer in layers] for batch in self.batches]
        return Sensitivity(self.share, chosen)

    def weights(self, batch: int, layer: int, plain: Tensor) -> Tensor:
        """Return the weights [tokens] of a batch's tokens at a layer (see `weigh`)."""
        return weigh(plain, self.batches[batch][layer], self.share)


def measure(
    model: nn.Module,
    points: Sequence[StreamPoint],
    batches: Iterable[Batch],
    share: float,
    seed: int,
) -> Sensitivity | None:
    """Measure the sensitivities of all tokens of batches; None where the share is 0.

    Args:
        model: the FM with its head, in evaluation mode.
        points: a place in each of its layers.
        batches: its inputs.
        share: of the weights that sensitivity makes.
        seed: of the cotangents.
    """
    if not share:
        return None
    found = [
        sensitivities(model, points, batch, derive_seed(seed, "sensitivity", i))[1]
        for i, batch in enumerate(batches)
    ]
    return Sensitivity(share, found)
