"""Sum up what the FFNs of a model do on public tokens, for scoring and refitting.

Everything is streamed: memory depends on the sizes of the FFNs, never on the number of
tokens. Sums are float64, padding is excluded.

A token weighs 1 / Var[x], the variance over the entries of its residual stream x
behind the FFN in the FM. The norm that reads the stream (behind a post-LN FFN, before a
pre-LN block) divides by its standard deviation, so this is how much an error of the
token counts for all that follows; unweighted, the few tokens with a huge stream
(attention sinks) outweigh all others. The weight is ours (docs/results.md).
"""

import math
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
from fedpft_flower.config import FedPFTError
from fedpft_flower.sensitivity import Sensitivity

# Keeps the weight of a token finite, as a norm's own epsilon does.
LEAST_VARIANCE = 1e-6


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

    @property
    def weights(self) -> Tensor:
        """Return the weight of every token, [tokens]."""
        return 1.0 / (self.stream.var(dim=-1, unbiased=False) + LEAST_VARIANCE)


class _ReachedError(Exception):
    """End a forward pass behind the last layer of interest."""


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
def output_of(model: nn.Module, layer: nn.Module, batch: Batch) -> Any:
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
        output_of(model, layers[-1], batch)
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


class Sums:
    """Add up products over weighted tokens, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._weights = torch.zeros(())  # of the tokens that are being added [tokens]
        self._total = 0.0
        self._sums: dict[str, Tensor] = {}

    def begin(self, weights: Tensor) -> None:
        """Begin a batch of tokens with these weights [tokens].

        Raises:
            FedPFTError: they are not finite.
        """
        self._weights = weights
        self.tokens += len(weights)
        self._total += float(weights.double().sum())
        if not math.isfinite(self._total):
            raise FedPFTError(
                "the FM's hidden states are not finite on public rows; look at these "
                "rows, or load the FM with fm.dtype = 'float32'"
            )

    def add(self, name: str, left: Tensor, right: Tensor | None = None) -> None:
        """Add the weighted sum over the batch's tokens of x, or of x y^T.

        Args:
            name: which sum.
            left: x [tokens, N], or a scalar each [tokens].
            right: y [tokens, M], or None.
        """
        if right is None:
            product = self._weights @ left
        else:
            product = left.T @ (self._weights[:, None] * right)
        total = self._sums.get(name)
        if total is None:
            self._sums[name] = product.double()
        else:
            total += product

    def mean(self, name: str) -> Tensor:
        """Return a sum divided by the sum of the weights, float64."""
        return self._sums[name] / max(self._total, 1e-300)

    def add_slopes(
        self, left: Sequence[Tensor], right: Sequence[Tensor], name: str
    ) -> None:
        """Add the sums over tokens of g g'^T, for all pairs of blocks."""
        for i, g_left in enumerate(left):
            for j, g_right in enumerate(right):
                self.add(f"{name}/{i}/{j}", g_left, g_right)

    def jacobian(
        self, left: Sequence[Tensor], right: Sequence[Tensor], metric: Tensor, name: str
    ) -> Tensor:
        """Return K = sum over pairs of blocks of (W Q W'^T) o E[g g'^T], float64.

        With a_i(h) the activation of neuron i, K_ij = E[(da_i/dh) Q (da'_j/dh)^T], so
        that E||V J_a - W J_a'||^2 (in the metric Q) is a quadratic of V (ours).

        Args:
            left: input weights W [N, D] of each block.
            right: input weights W' [M, D] of each block.
            metric: Q [D, D].
            name: of the sums that `add_slopes` made.
        """
        total = torch.zeros(len(left[0]), len(right[0])).to(metric)
        for i, w_left in enumerate(left):
            for j, w_right in enumerate(right):
                product = w_left.double() @ metric @ w_right.double().T
                total += product * self.mean(f"{name}/{i}/{j}")
        return total

    def covariance(self, name: str) -> Tensor:
        """Return E[x x^T] - E[x] E[x]^T, from the sum of x and that of its products.

        Args:
            name: of the sum of x; that of products has it twice ("h", "hh").
        """
        mean = self.mean(name)
        return self.mean(2 * name) - torch.outer(mean, mean)


@dataclass(frozen=True)
class Moments:
    """Hold weighted moments of one FFN's activations a over public tokens, float64."""

    mean: Tensor  # E[a] [N]
    square: Tensor  # E[a^2] [N]
    gram: Tensor | None = None  # E[a a^T] [N, N]
    jacobian: Tensor | None = None  # K of `Sums.jacobian` with itself, [N, N]


def neuron_moments(
    model: nn.Module,
    layers: Sequence[nn.Module],
    ffns: Sequence[FFN],
    batches: Iterable[Batch],
    grams: bool,
    sensitivity: Sensitivity | None = None,
) -> Iterator[Moments]:
    """Yield the moments of these layers' neurons; sums are freed as they are used.

    Args:
        model: the FM, in evaluation mode.
        layers: some of its layers, first to last.
        ffns: their FFNs.
        batches: public inputs.
        grams: whether to sum [N, N] products too.
        sensitivity: of the batches' tokens, at the stream of each of these layers.

    Raises:
        FedPFTError: the FM's hidden states are not finite.
    """
    sums = [Sums() for _ in ffns]
    for i, batch in enumerate(batches):
        observed = observe(model, layers, ffns, batch)
        for place, (one, seen) in enumerate(zip(sums, observed, strict=True)):
            weights = seen.weights
            if sensitivity is not None:
                weights = sensitivity.weights(i, place, weights)
            one.begin(weights)
            one.add("a", seen.activations)
            one.add("a^2", seen.activations.square())
            if grams:
                one.add("h", seen.inputs)
                one.add("hh", seen.inputs, seen.inputs)
                one.add("aa", seen.activations, seen.activations)
                one.add_slopes(seen.slopes, seen.slopes, "gg")
    for ffn in ffns:
        yield _moments(sums.pop(0), ffn, grams)


def _moments(sums: Sums, ffn: FFN, grams: bool) -> Moments:
    mean, square = sums.mean("a"), sums.mean("a^2")
    if not grams:
        return Moments(mean, square)
    rows = [block.detach() for block in ffn.up_rows()]
    metric = sums.covariance("h")
    jacobian = sums.jacobian(rows, rows, metric, "gg")
    return Moments(mean, square, sums.mean("aa"), jacobian)
