"""Measure how neurons fire, from one forward-pre-hook on `down`.

In every family the input of `down` is the neurons' activation, so nobody needs to know
where the activation function lives. Padding is excluded by the attention mask.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpft_flower.architectures import FFN
from fedpft_flower.batches import Batch, inputs_of, real_tokens

# Called with the layer's place in the list and its activations [tokens, N].
Watcher = Callable[[int, Tensor], None]


@torch.no_grad()
def watch(
    model: PreTrainedModel, ffns: Sequence[FFN], batches: Iterable[Batch], see: Watcher
) -> None:
    """Run batches through a model's body and show the activations of every FFN.

    Args:
        model: the model, evaluated without dropout; its head does not run.
        ffns: the FFNs of its layers.
        batches: inputs; `attention_mask` [B, T] marks real tokens where present.
        see: receives activations [tokens, N] without padding.
    """
    mask: Tensor | None = None

    def hook(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            see(place, real_tokens(inputs[0], mask))

        return seen

    handles = [
        ffn.down.register_forward_pre_hook(hook(i)) for i, ffn in enumerate(ffns)
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            model.base_model(**inputs_of(batch))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def activation_rms(
    model: PreTrainedModel, ffns: Sequence[FFN], batches: Iterable[Batch]
) -> list[Tensor]:
    """Return the root mean square [N] of every neuron's activation, layer by layer."""
    squares = [torch.zeros(ffn.width, dtype=torch.float64) for ffn in ffns]
    tokens = [0 for _ in ffns]

    def see(place: int, activations: Tensor) -> None:
        squares[place] += activations.double().square().sum(dim=0).cpu()
        tokens[place] += len(activations)

    watch(model, ffns, batches, see)
    return [
        (square / max(count, 1)).sqrt().float()
        for square, count in zip(squares, tokens, strict=True)
    ]


def inactive_rates(
    model: PreTrainedModel,
    ffns: Sequence[FFN],
    batches: Iterable[Batch],
    limits: Sequence[Tensor],
) -> list[Tensor]:
    """Return how often each neuron is inactive, layer by layer.

    A neuron is inactive on a token when |a| <= its limit. This takes the place of the
    paper's APoZ (average percentage of zeros, Hu et al. 2016, arXiv 1607.03250), since
    GELU is hardly ever zero; with ReLU and a limit of 0 it is APoZ.

    Args:
        model: the model, evaluated without dropout.
        ffns: the FFNs to look at.
        batches: inputs of the model.
        limits: one tensor [N] per FFN.

    Returns:
        Rates [N] in [0, 1], float32.
    """
    counts = [torch.zeros(ffn.width, dtype=torch.int64) for ffn in ffns]
    tokens = [0 for _ in ffns]

    def see(place: int, activations: Tensor) -> None:
        quiet = activations.abs() <= limits[place].to(activations.device)
        counts[place] += quiet.sum(dim=0).cpu()
        tokens[place] += len(activations)

    watch(model, ffns, batches, see)
    return [
        count.float() / max(total, 1)
        for count, total in zip(counts, tokens, strict=True)
    ]


def average_rates(
    rates: Sequence[Sequence[Tensor]], weights: Sequence[int]
) -> list[Tensor]:
    """Average the clients' inactive rates, layer by layer, weighted by examples."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return [
        torch.einsum("c,ck->k", shares, torch.stack(layer).double()).float()
        for layer in zip(*[list(client) for client in rates], strict=True)
    ]
