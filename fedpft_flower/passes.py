"""Run parts of a model, and see what passes through its layers and FFNs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedpft_flower.architectures import FFN, ffns_of, layers_of
from fedpft_flower.batches import Batch, hidden_states, real_tokens


@contextmanager
def outputs_of(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs [B, T, D] of layers during a forward pass, in order."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        found.append(hidden_states(output))

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ended_behind(last: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the layers behind one not run: they return what that one returned.

    Args:
        last: the last that runs.
        layers: all of its model, first to last.
    """
    behind = list(layers)[[*layers].index(last) + 1 :]
    held: list[Any] = []

    def hold(module: nn.Module, inputs: object, output: object) -> None:
        held[:] = [output]

    handle = last.register_forward_hook(hold)
    for layer in behind:
        layer.forward = lambda *args, **kwargs: held[0]
    try:
        yield
    finally:
        handle.remove()
        for layer in behind:
            del layer.forward


class _ReachedError(Exception):
    """End a forward pass behind the last layer of interest."""


@torch.no_grad()
def run_to(model: nn.Module, layer: nn.Module, batch: Batch) -> Any:
    """Run one batch through a model, and return what a layer of it returned.

    Args:
        model: the model, in evaluation mode.
        layer: one of its layers; what is behind it does not run.
        batch: inputs of the model.
    """
    found: list[Any] = []

    def stop(module: nn.Module, inputs: object, output: Any) -> None:
        found.append(output)
        raise _ReachedError

    handle = layer.register_forward_hook(stop)
    try:
        model(**batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def skipped(layers: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Let the first layers of a model not run: the last of them returned `output`.

    Args:
        layers: the model's layers, from the first.
        output: what the last of them returned on the batch that will run.
    """
    given = list(layers)
    for layer in given:
        layer.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for layer in given:
            del layer.forward


@dataclass(frozen=True)
class Seen:
    """Hold what one layer's FFN did on the real tokens of a batch.

    A neuron's slope is the derivative of its activation by one of its pre-activations;
    it has one for each block of input weights (gate and up).
    """

    inputs: Tensor  # h [tokens, D]
    activations: Tensor  # a [tokens, N]
    slopes: tuple[Tensor, ...]  # of each block, [tokens, N]
    down: Tensor  # W_out a + b_out [tokens, D]
    # What the norm behind the FFN reads; without one, the residual stream there.
    stream: Tensor
    output: Tensor  # of the layer
    returned: Any  # by the layer: the output as the model passes it on, with padding


class _Watched:
    """Hook one layer and its FFN, and keep what passes through them."""

    def __init__(self, layer: nn.Module, ffn: FFN) -> None:
        self._ffn = ffn
        self._raw: dict[str, Tensor] = {}
        self._before: list[Tensor] = []  # pre-activations, one tensor a projection
        self._slopes: list[Tensor] = []
        first = ffn.up[0][0]
        self.handles: list[RemovableHandle] = [
            first.register_forward_pre_hook(self._enter),
            *(linear.register_forward_hook(self._cut_graph) for linear, _ in ffn.up),
            ffn.down.register_forward_pre_hook(self._differentiate),
            ffn.down.register_forward_hook(self._leave_ffn),
            layer.register_forward_hook(self._leave),
        ]
        if ffn.output_norm is not None:
            self.handles.append(ffn.output_norm.register_forward_pre_hook(self._sum))

    def seen(self, mask: Tensor | None) -> Seen:
        """Return what passed, without padding."""
        raw = {name: _numbers(tensor, mask) for name, tensor in self._raw.items()}
        return Seen(
            inputs=raw["inputs"],
            activations=raw["activations"],
            slopes=tuple(_numbers(slope, mask) for slope in self._slopes),
            down=raw["down"],
            stream=raw.get("stream", raw["output"]),
            output=raw["output"],
            returned=self._returned,
        )

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._raw["inputs"] = inputs[0]

    def _cut_graph(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # From here to `down` autograd sees elementwise functions only, whichever they
        # are: the gradient of the sum of all activations holds every slope.
        torch.set_grad_enabled(True)
        leaf = output.detach().requires_grad_(True)
        self._before.append(leaf)
        return leaf

    def _differentiate(self, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        gradients = torch.autograd.grad(inputs[0].sum(), self._before)
        torch.set_grad_enabled(False)
        for (_, blocks), gradient in zip(self._ffn.up, gradients, strict=True):
            self._slopes += gradient.chunk(blocks, dim=-1)
        activations: Tensor = inputs[0].detach()
        self._raw["activations"] = activations
        return activations

    def _sum(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._raw["stream"] = inputs[0]

    def _leave_ffn(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._raw["down"] = output

    def _leave(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._returned = output
        self._raw["output"] = hidden_states(output)


def _numbers(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the real tokens' values in the numbers that sums are made of."""
    return real_tokens(values, mask).float()


@torch.no_grad()
def observe(
    model: nn.Module, layers: Sequence[nn.Module], ffns: Sequence[FFN], batch: Batch
) -> list[Seen]:
    """Run one batch through a model, and return what these layers' FFNs did.

    Args:
        model: the model, in evaluation mode.
        layers: some of its layers, first to last; what is behind them does not run.
        ffns: their FFNs.
        batch: its inputs; `attention_mask` [B, T] marks real tokens where present.
    """
    watched = [_Watched(*pair) for pair in zip(layers, ffns, strict=True)]
    try:
        run_to(model, layers[-1], batch)
    finally:
        for handle in (handle for one in watched for handle in one.handles):
            handle.remove()
    mask = batch.get("attention_mask")
    return [one.seen(mask) for one in watched]


def count_tokens(model: PreTrainedModel, batch: Batch) -> int:
    """Return how many tokens of a batch are real; images have as many as the FM makes.

    Args:
        model: the FM, in evaluation mode.
        batch: its inputs.
    """
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    (first,) = observe(model, layers_of(model)[:1], ffns_of(model)[:1], batch)
    return len(first.inputs)
