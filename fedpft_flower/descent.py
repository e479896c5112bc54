"""Lower a loss by gradient steps, within a budget: the server's every training loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpft_flower.batches import Batch
from fedpft_flower.compute import Compute, asked_for, best_here, rough_shapes
from fedpft_flower.config import FedPFTError

# A parameter that may change, and the mask of its entries that may (None: all).
Trainable = tuple[Tensor, Tensor | None]
# Returns the loss of a batch, and how many tokens it has.
LossOf = Callable[[Batch], tuple[Tensor, int]]

# How often the held-out loss is measured during a budget.
CHECKS = 10


@dataclass(frozen=True)
class Loss:
    """Hold a loss, and how to speak of it."""

    of: LossOf
    # What people call it; what is found to be fastest is kept under this name.
    name: str
    # What they can do when it is not finite.
    remedy: str


@dataclass(frozen=True)
class Schedule:
    """Say how fast and how long a loss is lowered; 0 means no such limit."""

    lr: float
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    # End when so many held-out losses in a row were no new best one; 0 never does.
    patience: int = 0
    # In which numbers products are computed (`train.precision`).
    precision: str = "fp32"

    def used(self, steps: int, tokens: int, seconds: float) -> float:
        """Return the used share of the limit that is closest, in [0, 1]."""
        pairs = (
            (steps, self.steps),
            (tokens, self.tokens),
            (seconds, self.seconds),
        )
        return min(1.0, max(used / limit for used, limit in pairs if limit))


@dataclass(frozen=True)
class Progress:
    """Tell how far a descent is."""

    share: float
    steps: int
    tokens: int
    seconds: float
    loss: float
    # The last one that was measured; None where none is.
    held_out: float | None = None
    done: bool = False


_BEGINNING = Progress(share=0.0, steps=0, tokens=0, seconds=0.0, loss=math.nan)


def descend(
    models: Sequence[PreTrainedModel],
    trainable: Sequence[Trainable],
    batches: Iterator[Batch],
    loss: Loss,
    schedule: Schedule,
    report: Callable[[Progress], None],
    held_out: Sequence[Batch] = (),
) -> Progress:
    """Lower a loss by Adam without weight decay, until a budget is used.

    An entry outside its mask stays bit-identical; the learning rate falls linearly with
    the used budget. With a patience, the parameters end as they were at the lowest
    held-out loss.

    Args:
        models: all that the loss runs, the one that changes last.
        trainable: the parameters that may change; they take gradients.
        batches: endless inputs.
        loss: what to lower.
        schedule: how fast and how long.
        report: called after every step.
        held_out: inputs that this descent does not learn from, where there is a
            patience.

    Returns:
        The last step's progress.

    Raises:
        FedPFTError: the loss is not finite.
    """
    parameters = [parameter for parameter, _ in trainable]
    how, batches = _compute(loss, models, batches, parameters, schedule.precision)

    def computed_loss(batch: Batch) -> tuple[Tensor, int]:
        with how.step(parameters[0].device):
            return loss.of(batch)

    optimiser = torch.optim.Adam(parameters, lr=schedule.lr)
    with how.steps(models):
        watch = (
            _Watch(parameters, computed_loss, held_out) if schedule.patience else None
        )
        began, progress = time.monotonic(), _BEGINNING
        while not progress.done:
            optimiser.param_groups[0]["lr"] = schedule.lr * (1.0 - progress.share)
            found, tokens = computed_loss(next(batches))
            steps, tokens = progress.steps + 1, progress.tokens + tokens
            value = float(found.detach())  # a GPU is waited for here, once a step
            if not math.isfinite(value):
                raise FedPFTError(
                    f"{loss.name} is {value} at step {steps}; {loss.remedy}"
                )
            _step(optimiser, found, trainable)
            share = schedule.used(steps, tokens, time.monotonic() - began)
            over = watch is not None and watch.failures(share) >= schedule.patience
            progress = Progress(
                share,
                steps,
                tokens,
                seconds=time.monotonic() - began,
                loss=value,
                held_out=watch.last if watch else None,
                done=share >= 1.0 or over,
            )
            report(progress)
    if watch:
        watch.restore()
    return progress


def _compute(
    loss: Loss,
    models: Sequence[PreTrainedModel],
    batches: Iterator[Batch],
    parameters: Sequence[Tensor],
    precision: str,
) -> tuple[Compute, Iterator[Batch]]:
    """Return how steps are computed, and all batches: a trial looks at the first."""
    how = asked_for(precision)
    if how is not None:
        return how, batches
    first = next(batches)
    how = best_here(
        models,
        lambda: torch.autograd.grad(loss.of(first)[0], parameters),
        (loss.name, rough_shapes(first)),
    )
    return how, chain([first], batches)


def _step(
    optimiser: torch.optim.Optimizer, loss: Tensor, trainable: Sequence[Trainable]
) -> None:
    gradients = torch.autograd.grad(loss, [parameter for parameter, _ in trainable])
    for (parameter, mask), gradient in zip(trainable, gradients, strict=True):
        parameter.grad = gradient if mask is None else torch.where(mask, gradient, 0.0)
    optimiser.step()


class _Watch:
    """Measure a loss on held-out batches now and then; keep the best parameters."""

    def __init__(
        self, parameters: Sequence[Tensor], loss_of: LossOf, batches: Sequence[Batch]
    ) -> None:
        self._parameters, self._loss_of, self._batches = parameters, loss_of, batches
        self._checks, self._failures = 0, 0
        self.last = self._lowest = self._measure()
        self._best = [parameter.detach().clone() for parameter in parameters]

    def failures(self, share: float) -> int:
        """Return how many measured losses in a row were no new best one.

        It is measured whenever another part of the budget is used.
        """
        if int(CHECKS * share) > self._checks:
            self._checks = int(CHECKS * share)
            self.last = self._measure()
            self._failures += 1
            if self.last < self._lowest:
                self._lowest, self._failures = self.last, 0
                for best, parameter in zip(self._best, self._parameters, strict=True):
                    best.copy_(parameter.detach())
        return self._failures

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the best parameters back."""
        for best, parameter in zip(self._best, self._parameters, strict=True):
            parameter.copy_(best)

    @torch.no_grad()
    def _measure(self) -> float:
        losses = [float(self._loss_of(batch)[0]) for batch in self._batches]
        return sum(losses) / len(losses)
