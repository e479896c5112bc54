"""Refit the output weights of compressed FFNs by ridge least squares, layer by layer.

For one compressed layer, with the activations a of its kept neurons at the sub-FM's own
inputs, and the target t that would make the residual stream behind it the FM's:

    minimise over V, c:  E||V a + c - t||^2
                         + beta s E||V J_a - W J_a'||^2_Q + lambda ||V - W_S||^2

W_S are the present output columns of the kept neurons: the FM's, until a refit or a
distillation changes them. J_a and J_a' the Jacobians of kept
neurons (at the sub-FM's input) and of all the FM's neurons (at the FM's input), Q the
covariance of the sub-FM's inputs, s the ratio of the energies of output and Jacobian at
the present columns; with layer scale, V and c are what reaches the residual stream. E
is the mean over tokens with the weights of `moments`, or a mix of these and
`sensitivity`; batches are added up in float64, and the solution is float64. The
objective is ours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import FFN, ffns_of, layers_of
from fedpft_flower.batches import Batch
from fedpft_flower.config import AlignConfig, FedPFTError
from fedpft_flower.moments import Sums, token_weights
from fedpft_flower.passes import Seen, observe, run_to, skipped
from fedpft_flower.plan import Plan
from fedpft_flower.selection import energy_ratio
from fedpft_flower.sensitivity import Sensitivity

# Every so many batches, one is held out of the sums to watch for overfit.
HOLD_OUT_EVERY = 10
# The ridge is multiplied by the one of these factors that has the least held-out error.
RIDGE_FACTORS = (1.0, 10.0, 100.0, 1000.0)

# Columns [D, K] and bias [D] of a layer's output; None where it has no bias.
Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Quadratic:
    """Hold the quadratic function of V [D, K] and c [D] of one layer; all float64."""

    columns: Tensor  # the present W_S [D, K]
    bias: Tensor | None  # the present b_out [D]; None where `down` has none, so c = 0
    gram: Tensor  # E[a a^T] [K, K]
    cross: Tensor  # E[t a^T] [D, K]
    mean: Tensor  # E[a] [K]
    target: Tensor  # E[t] [D]
    square: Tensor  # E[t^2], a scalar
    jacobian: Tensor  # beta s K_SS [K, K]
    jacobian_cross: Tensor  # beta s W K_NS [D, K]
    ridge: Tensor  # lambda, a scalar
    tokens: int

    def with_ridge(self, factor: float) -> "Quadratic":
        """Return the same objective with a multiple of its ridge."""
        return replace(self, ridge=factor * self.ridge)

    def error(self, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Return E||V a + c - t||^2, the error of the output."""
        found = self.square - 2 * (columns * self.cross).sum()
        found = found + ((columns @ self.gram) * columns).sum()
        if bias is not None:
            shift = 2 * (columns @ self.mean - self.target)
            found = found + (bias * (bias + shift)).sum()
        return found

    def solve(self) -> Output:
        """Return the V [D, K] and c [D] that minimise the objective."""
        gram, cross = self.gram, self.cross
        if self.bias is not None:
            gram = gram - torch.outer(self.mean, self.mean)
            cross = cross - torch.outer(self.target, self.mean)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        left = gram + self.jacobian + self.ridge * identity
        right = cross + self.jacobian_cross + self.ridge * self.columns
        columns: Tensor = torch.linalg.solve(left, right, left=False)
        return columns, self.centre(columns)

    def centre(self, columns: Tensor) -> Tensor | None:
        """Return the best bias of given columns."""
        return None if self.bias is None else self.target - columns @ self.mean

    def unexplained(self, columns: Tensor, bias: Tensor | None) -> float:
        """Return the error as a share of the target's variance."""
        variance = self.square - self.target.square().sum()
        return float(self.error(columns, bias) / variance.clamp_min(1e-30))


@dataclass(frozen=True)
class Fit:
    """Say what the refit of a layer did: unexplained shares of its target."""

    layer: int
    tokens: int
    # The chosen one of `RIDGE_FACTORS`; 0 where only the bias was refitted.
    ridge_factor: float
    before: float
    after: float
    held_out_before: float
    held_out_after: float


def refit(
    fm: PeftModel,
    sub_fm: PeftModel,
    plan: Plan,
    batches: Sequence[Batch],
    align: AlignConfig,
    report: Callable[[Fit], None],
    bias_only: bool = False,
    sensitivity: Sensitivity | None = None,
) -> None:
    """Refit the output weights and biases of all compressed layers, first to last.

    Each layer sees what the layers below it became. Both models hold the same adapter.

    Args:
        fm: the FM.
        sub_fm: the sub-FM, whose `down` projections change.
        plan: what the sub-FM kept.
        batches: public inputs; some are held out, to choose the ridge.
        align: `jacobian_weight` (beta) and `ridge` (lambda, as a share of the mean
            variance of the activations).
        report: called after every layer.
        bias_only: leave the columns, so that only the means of the neurons that were
            cut move into the bias (FLAP, An et al. 2023, arXiv 2312.11983), and with
            them the mean error of the layers below.
        sensitivity: of the batches' tokens, at the stream of every layer of the FM.

    Raises:
        FedPFTError: there are too few public rows, no bias to refit, or hidden states
            that are not finite.
    """
    if len(batches) < 2:
        raise FedPFTError(
            "least squares needs two batches of public rows, one to learn from and one "
            "held out; raise data.public-rows or data.public-tokens, or lower "
            "align.batch-size"
        )
    fm.eval()
    sub_fm.eval()
    walks = Walk(fm, batches, changes=False), Walk(sub_fm, batches, changes=True)
    for layer in plan.compressed:
        (place,) = plan.places([layer])
        learnt, held_out = quadratics(walks, (layer, place), align, sensitivity)
        if bias_only and learnt.bias is None:
            raise FedPFTError(
                "align.before = 'bias', but the FFNs of this FM have no output bias; "
                "choose 'least-squares'"
            )
        present = learnt.columns, learnt.bias
        factor, solution = min(
            _solutions(learnt, bias_only), key=lambda pair: held_out.error(*pair[1])
        )
        walks[1].ffns[place].write_output(*solution)
        report(
            Fit(
                layer=layer,
                tokens=learnt.tokens,
                ridge_factor=factor,
                before=learnt.unexplained(*present),
                after=learnt.unexplained(*solution),
                held_out_before=held_out.unexplained(*present),
                held_out_after=held_out.unexplained(*solution),
            )
        )


def _solutions(learnt: Quadratic, bias_only: bool) -> list[tuple[float, Output]]:
    """Return what a layer's output may become: ridge factor, and columns with bias."""
    if bias_only:
        return [(0.0, (learnt.columns, learnt.centre(learnt.columns)))]
    return [(factor, learnt.with_ridge(factor).solve()) for factor in RIDGE_FACTORS]


class Walk:
    """Go through a model layer by layer; each batch stays at the layer it reached."""

    def __init__(
        self, model: PeftModel, batches: Sequence[Batch], changes: bool
    ) -> None:
        """Begin before the first layer.

        Args:
            model: the model, in evaluation mode.
            batches: its inputs.
            changes: whether a layer may change once it has been observed.
        """
        base = base_model(model)
        self.ffns, self.batches = ffns_of(base), batches
        self._model, self._layers, self._changes = model, layers_of(base), changes
        self._at = 0  # the layer that all batches reached
        self._outputs: list[Any] = [None] * len(batches)  # of the layer before it

    def observe(self, place: int) -> Iterator[Seen]:
        """Yield what the FFN of a layer does on every batch, going there first."""
        for i, batch in enumerate(self.batches):
            if place > self._at:
                with skipped(self._layers[: self._at], self._outputs[i]):
                    before = self._layers[place - 1]
                    self._outputs[i] = run_to(self._model, before, batch)
            with skipped(self._layers[:place], self._outputs[i]):
                chosen = [self._layers[place]], [self.ffns[place]]
                (seen,) = observe(self._model, *chosen, batch)
            if not self._changes:
                self._outputs[i] = seen.returned
            yield seen
        self._at = place if self._changes else place + 1


def quadratics(
    walks: tuple[Walk, Walk],
    places: tuple[int, int],
    align: AlignConfig,
    sensitivity: Sensitivity | None = None,
) -> tuple[Quadratic, Quadratic]:
    """Return the objective of a layer on most batches, and on those held out.

    Args:
        walks: through the FM and through the sub-FM.
        places: of the layer in the FM and in the sub-FM.
        align: `jacobian_weight` and `ridge`.
        sensitivity: of the batches' tokens, at the stream of every layer of the FM.
    """
    fm_ffn, ffn = (walk.ffns[i] for walk, i in zip(walks, places, strict=True))
    learnt, held_out = Sums(), Sums()
    kept_back = _held_out(walks[0].batches)
    seen = (walk.observe(i) for walk, i in zip(walks, places, strict=True))
    for i, (teacher, student) in enumerate(zip(*seen, strict=True)):
        weights = token_weights(teacher)
        if sensitivity is not None:
            weights = sensitivity.weights(i, places[0], weights)
        _add(held_out if i in kept_back else learnt, teacher, student, ffn, weights)
    fm_rows = [rows.detach() for rows in fm_ffn.up_rows()]
    columns = fm_ffn.output_columns()
    return (
        _objective(learnt, ffn, fm_rows, columns, align),
        _objective(held_out, ffn, fm_rows, columns, align),
    )


def _held_out(batches: Sequence[Batch]) -> set[int]:
    """Return which batches are held out: every tenth, of fewer the smallest."""
    if len(batches) >= HOLD_OUT_EVERY:
        return set(range(HOLD_OUT_EVERY - 1, len(batches), HOLD_OUT_EVERY))
    rows = [max(map(len, batch.values())) for batch in batches]
    return {max(range(len(rows)), key=lambda i: (-rows[i], i))}


def _add(sums: Sums, teacher: Seen, student: Seen, ffn: FFN, weights: Tensor) -> None:
    residual = student.stream - ffn.scaled(student.down)
    wanted = _stream(teacher, ffn.output_norm) - residual
    sums.begin(weights)
    sums.add("a", student.activations)
    sums.add("aa", student.activations, student.activations)
    sums.add("t", wanted)
    sums.add("ta", wanted, student.activations)
    sums.add("t^2", wanted.square().sum(dim=1))
    sums.add("h", student.inputs)
    sums.add("hh", student.inputs, student.inputs)
    sums.add_slopes(student.slopes, student.slopes, "gg")
    sums.add_slopes(teacher.slopes, student.slopes, "GG")


def _stream(teacher: Seen, norm: nn.Module | None) -> Tensor:
    """Return the residual stream from which the sub-FM would give the FM's output.

    It is the FM's own, unless distillation changed the LayerNorm behind it: then the
    one that the present norm would map to the FM's output if it divided by the mean
    and scale of the FM's own. (Of an RMSNorm behind an FFN, as Gemma 2 has, a change
    is not made up for.)
    """
    if not isinstance(norm, nn.LayerNorm):
        return teacher.stream
    mean = teacher.stream.mean(dim=-1, keepdim=True)
    variance = teacher.stream.var(dim=-1, keepdim=True, unbiased=False)
    output = teacher.output - norm.bias
    weight = torch.where(norm.weight.abs() > 1e-6, norm.weight, torch.inf)
    return mean + (variance + norm.eps).sqrt() * output / weight


def _objective(
    sums: Sums,
    ffn: FFN,
    fm_rows: Sequence[Tensor],
    fm_columns: Tensor,
    align: AlignConfig,
) -> Quadratic:
    columns = ffn.output_columns()
    rows = [block.detach() for block in ffn.up_rows()]
    metric = sums.covariance("h")
    jacobian = sums.jacobian(rows, rows, metric, "gg")
    cross = sums.jacobian(fm_rows, rows, metric, "GG")
    gram, bias = sums.mean("aa"), ffn.output_bias()
    centred = sums.covariance("a") if bias is not None else gram
    scale = align.jacobian_weight * energy_ratio(columns, centred, jacobian)
    return Quadratic(
        tokens=sums.tokens,
        columns=columns,
        bias=bias,
        gram=gram,
        cross=sums.mean("ta"),
        mean=sums.mean("a"),
        target=sums.mean("t"),
        square=sums.mean("t^2"),
        jacobian=scale * jacobian,
        jacobian_cross=scale * fm_columns @ cross,
        ridge=align.ridge * centred.diagonal().mean().clamp_min(1e-30),
    )
