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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_flower.architectures import FFN
from fedpft_flower.batches import Batch
from fedpft_flower.config import FedPFTError
from fedpft_flower.passes import Seen, observe
from fedpft_flower.sensitivity import Sensitivity

# Keeps the weight of a token finite, as a norm's own epsilon does.
LEAST_VARIANCE = 1e-6


def token_weights(seen: Seen) -> Tensor:
    """Return 1 / Var[x] of every token's stream x, [tokens]."""
    return 1.0 / (seen.stream.var(dim=-1, unbiased=False) + LEAST_VARIANCE)


class Sums:
    """Add up products over weighted tokens, batch by batch in float64."""

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
            weights = token_weights(seen)
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
