"""Score the neurons of an FM: the larger the score, the sooner a neuron is kept.

Scoring, choosing (`planners.py`) and cutting (`sub_fm.py`) are three things: a score is
a tensor, a choice is a `Plan`, a cut is a model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpft_flower.architectures import FFN, ffns_of, layers_of
from fedpft_flower.batches import Batch
from fedpft_flower.config import AlignConfig, derive_seed, row_called
from fedpft_flower.moments import Moments, neuron_moments
from fedpft_flower.sensitivity import Sensitivity

# Bytes of float64 sums that one pass over public batches may hold; larger models take
# several. One layer alone may have more: of a gated one five matrices of N x N.
MOST_BYTES = 2e9


@dataclass(frozen=True)
class Evidence:
    """Hold all that a score may depend on, for one layer."""

    ffn: FFN
    # Of public tokens; None where the selection needs none.
    moments: Moments | None
    # How many neurons will be kept at most: an order behind them is not needed.
    count: int
    align: AlignConfig
    generator: torch.Generator

    @property
    def seen(self) -> Moments:
        """Return the moments, which a selection that needs them always has."""
        assert self.moments is not None
        return self.moments


def norm(evidence: Evidence) -> Tensor:
    """Score neurons by the L2 norm of all their weights.

    s_i = || [W_in[i, :], W_out[:, i]] ||_2 (Peng et al. 2024, sub-FM construction); a
    gated neuron joins its rows of every block.

    Returns:
        Scores [N], float32.
    """
    squares = evidence.ffn.down_columns().detach().float().square().sum(dim=0)
    for rows in evidence.ffn.up_rows():
        squares = squares + rows.detach().float().square().sum(dim=1)
    return squares.sqrt()


def random(evidence: Evidence) -> Tensor:
    """Score neurons at random: the control for every other selection.

    Returns:
        Scores [N] in [0, 1), float32.
    """
    return torch.rand(evidence.ffn.width, generator=evidence.generator)


def energy(evidence: Evidence) -> Tensor:
    """Score neurons by the energy that they give to the output.

    s_i = sqrt(E[a_i^2]) ||W_out[:, i]||_2 (the L2 norm over a column of the scores of
    Wanda, Sun et al. 2023, arXiv 2306.11695). E is over tokens with the weights of
    `moments`.

    Returns:
        Scores [N], float64.
    """
    return evidence.seen.square.sqrt() * _column_norms(evidence.ffn)


def variance(evidence: Evidence) -> Tensor:
    """Score neurons by how much the output varies with them.

    s_i = sqrt(Var[a_i]) ||W_out[:, i]||_2, over tokens with the weights of `moments`:
    the mean of a neuron that is cut can move into the bias (FLAP, An et al. 2023, arXiv
    2312.11983), which the alignment "bias"
    or "least-squares" does.

    Returns:
        Scores [N], float64.
    """
    spread = evidence.seen.square - evidence.seen.mean.square()
    return spread.clamp_min(0).sqrt() * _column_norms(evidence.ffn)


def greedy(evidence: Evidence) -> Tensor:
    """Score neurons by the order in which greedy column selection takes them.

    The target is the FFN's output, in the metric M = C + beta K (C: covariance of the
    activations, K: Jacobian Gram, both over tokens with the weights of `moments`). The
    order is nested: it does not depend on how many neurons are kept.

    Returns:
        Scores [N], float64: N for the first, N - 1 for the second; those behind `count`
        have their remaining gain, below 1.
    """
    width, columns = evidence.ffn.width, evidence.ffn.output_columns()
    metric = output_metric(evidence)
    order, gains = greedy_columns(columns @ metric, metric, evidence.count)
    scores = 0.5 * gains / gains.max().clamp_min(1e-300)
    places = torch.arange(len(order), dtype=torch.float64, device=scores.device)
    scores[torch.tensor(order, device=scores.device)] = width - places
    return scores


def output_metric(evidence: Evidence) -> Tensor:
    """Return M = M' + lambda mean(diag M') I with M' = C + beta s K, [N, N].

    s = tr(W C W^T) / tr(W K W^T) makes beta (`align.jacobian-weight`) a share; lambda
    is `align.ridge`. C is the covariance, or E[a a^T] where `down` has no bias that
    could take up a mean. The metric is ours: the paper scores weights alone.
    """
    ffn, seen, align = evidence.ffn, evidence.seen, evidence.align
    assert seen.gram is not None
    assert seen.jacobian is not None
    centred = ffn.down.bias is not None
    gram = seen.gram - torch.outer(seen.mean, seen.mean) if centred else seen.gram
    weights = ffn.output_columns()
    share = energy_ratio(weights, gram, seen.jacobian)
    metric = gram + align.jacobian_weight * share * seen.jacobian
    ridge = align.ridge * metric.diagonal().mean().clamp_min(1e-30)
    return metric + ridge * torch.eye(len(metric), dtype=metric.dtype).to(metric)


def energy_ratio(weights: Tensor, gram: Tensor, jacobian: Tensor) -> Tensor:
    """Return tr(W G W^T) / tr(W K W^T): the energies of output and Jacobian."""
    output = ((weights @ gram) * weights).sum()
    slope = ((weights @ jacobian) * weights).sum()
    return output / slope.clamp_min(1e-30)


def greedy_columns(
    target: Tensor, metric: Tensor, count: int
) -> tuple[list[int], Tensor]:
    """Choose columns one after the other, each with the largest decrease of the error.

    The error of a choice S is min over V of tr((V P_S - W) M (V P_S - W)^T); each step
    takes argmax_i sum_r T[r, i]^2 / d_i of the residual T = W M and diagonal d, and
    updates both by one column of a pivoted Cholesky factor. That is orthogonal least
    squares (Chen, Billings and Luo 1989), for all rows of W at once.

    Args:
        target: W M [D, N], float64.
        metric: M [N, N], positive definite, float64.
        count: how many to choose, at most N.

    Returns:
        The chosen positions in order, and the gains [N] that were left at the end.
    """
    target, rest = target.clone(), metric.diagonal().clone()
    factor = torch.zeros(count, len(rest), dtype=metric.dtype, device=metric.device)
    open_ = torch.ones_like(rest, dtype=torch.bool)
    floor = torch.finfo(metric.dtype).eps * float(rest.max())
    chosen: list[int] = []
    for step in range(count):
        best = int(_gains(target, rest, open_, floor).argmax())
        scale = rest[best].clamp_min(floor).sqrt()
        column = (metric[best] - factor[:step, best] @ factor[:step]) / scale
        target.addr_(target[:, best] / scale, column, alpha=-1)
        rest = rest - column.square()
        factor[step] = column
        open_[best] = False
        chosen.append(best)
    return chosen, _gains(target, rest, open_, floor).clamp_min(0)


def _gains(target: Tensor, rest: Tensor, open_: Tensor, floor: float) -> Tensor:
    gains = target.square().sum(dim=0) / rest.clamp_min(floor)
    return torch.where(open_, gains, torch.full_like(gains, -1.0))


def _column_norms(ffn: FFN) -> Tensor:
    return ffn.output_columns().square().sum(dim=0).sqrt()


@dataclass(frozen=True)
class Selection:
    """Describe a selection: its score, and what it must see of the public corpus."""

    score: Callable[[Evidence], Tensor]
    needs: Literal["nothing", "moments", "grams"] = "nothing"


SELECTIONS: dict[str, Selection] = {
    "norm": Selection(norm),
    "random": Selection(random),
    "energy": Selection(energy, needs="moments"),
    "variance": Selection(variance, needs="moments"),
    "greedy": Selection(greedy, needs="grams"),
}


def selection_of(name: str) -> Selection:
    """Return the row of a selection.

    Raises:
        FedPFTError: there is no such selection.
    """
    return row_called(name, SELECTIONS, "sub-fm.selection")


def score(
    model: PreTrainedModel,
    name: str,
    counts: Sequence[int],
    batches: Iterable[Batch],
    align: AlignConfig,
    seed: int,
    sensitivity: Sensitivity | None = None,
) -> list[Tensor]:
    """Score the neurons of every layer by the named selection.

    Args:
        model: the FM, in evaluation mode.
        name: of the selection.
        counts: how many neurons each layer keeps; a layer that keeps all is not scored.
        batches: public inputs, where the selection needs some; iterated once for
            every group of layers whose sums fit into memory together.
        align: `jacobian_weight` and `ridge`.
        seed: of random scores.
        sensitivity: of the batches' tokens, at the stream of every layer.

    Returns:
        One tensor [N] a layer.

    Raises:
        FedPFTError: there is no such selection, or the FM's hidden states are not
            finite.
    """
    row = selection_of(name)
    generator = torch.Generator().manual_seed(derive_seed(seed, "saliency"))
    ffns = ffns_of(model)
    scores = [torch.zeros(ffn.width) for ffn in ffns]
    open_ = [i for i, ffn in enumerate(ffns) if counts[i] < ffn.width]
    for group in _groups(open_, ffns, row):
        found = _moments(model, group, batches, row, sensitivity)
        for layer, moments in zip(group, found, strict=True):
            scores[layer] = row.score(
                Evidence(ffns[layer], moments, counts[layer], align, generator)
            ).cpu()
    return scores


def _groups(
    layers: Sequence[int], ffns: Sequence[FFN], row: Selection
) -> Iterator[list[int]]:
    """Yield layers whose sums fit into memory together."""
    group: list[int] = []
    used = 0.0
    for layer in layers:
        blocks = len(ffns[layer].up_rows())
        size = 8.0 * ffns[layer].width ** 2 * (1 + blocks**2)
        if group and row.needs == "grams" and used + size > MOST_BYTES:
            yield group
            group, used = [], 0.0
        group.append(layer)
        used += size
    if group:
        yield group


def _moments(
    model: PreTrainedModel,
    group: Sequence[int],
    batches: Iterable[Batch],
    row: Selection,
    sensitivity: Sensitivity | None,
) -> Iterable[Moments | None]:
    if row.needs == "nothing":
        return [None] * len(group)
    layers, ffns = layers_of(model), ffns_of(model)
    chosen = [layers[i] for i in group], [ffns[i] for i in group]
    theirs = None if sensitivity is None else sensitivity.of(group)
    return neuron_moments(model, *chosen, batches, row.needs == "grams", theirs)
