"""Fine-tune an adapter on local rows."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import layers_of
from fedpft_flower.batches import Batch
from fedpft_flower.compute import Compute, asked_for, best_here, rough_shapes
from fedpft_flower.config import FedPFTError, TrainConfig, derive_seed
from fedpft_flower.encoding import NO_TARGET, Rows, endless_batches, shuffled_batches
from fedpft_flower.flops import FlopMeter


@dataclass(frozen=True)
class TrainReport:
    """Say what a local training did; `loss` is the mean over its steps.

    `step_seconds` is the median step's; of more than one, the first does not count.
    `compute` is how they were computed, `flops` the floating point operations of all
    their matrix products.
    """

    loss: float
    examples: int
    steps: int
    seconds: float
    step_seconds: float
    flops: float
    compute: Compute


def round_lr(config: TrainConfig, current: int, rounds: int) -> float:
    """Return the learning rate of round r of R.

    W = `warmup_ratio` * R rounds, rounded, and R - 1 at most, lead to lr:
    lr_r = lr * r / (W + 1). From round W + 1 on it stays, or falls:
    lr_r = lr * (1 - (r - W - 1) / (R - W)). The last round still learns; in the
    authors' code its rate is zero.
    """
    warmup = min(round(config.warmup_ratio * rounds), rounds - 1)
    if current <= warmup:
        return config.lr * current / (warmup + 1)
    if config.lr_decay == "none":
        return config.lr
    return config.lr * (1.0 - (current - warmup - 1) / (rounds - warmup))


def train_adapter(
    model: PeftModel,
    rows: Rows,
    config: TrainConfig,
    lr: float,
    seed: int,
    proximal_mu: float = 0.0,
    meter: FlopMeter | None = None,
    watch: Callable[[int, int], None] = lambda done, steps: None,
) -> TrainReport:
    """Train the adapter that a model holds, by AdamW on shuffled local batches.

    With mu > 0 the objective is FedProx's: loss + mu / 2 * ||w - w_0||^2, w_0 being the
    adapter at the start (Li et al. 2020, arXiv 1812.06127, eq. 2), whose gradient is
    mu (w - w_0) more; the report's loss is without that term.

    Args:
        model: a sub-FM with an adapter; only the adapter changes.
        rows: the local rows, labelled.
        config: epochs or steps, batch size, memory, weight decay, clipping.
        lr: this round's learning rate.
        seed: seed of the batches and of dropout.
        proximal_mu: weight of the proximal term; 0 leaves it out.
        meter: of this model; a new one counts the operations of the first step.
        watch: is told after every step how many are done, and of how many.

    Raises:
        FedPFTError: the loss or the adapter is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    device = parameters[0].device
    train_mode(model, config.frozen_dropout)
    how = asked_for(config.precision) or _best_here(model, rows, config)
    meter, flops, steps = meter or FlopMeter(), 0.0, _steps(len(rows), config)
    began, losses, ends = time.monotonic(), [], []
    # The process is shared by virtual clients: dropout must not depend on its past.
    torch.manual_seed(derive_seed(seed, "dropout"))
    with (
        recomputed(model) if config.recompute else nullcontext(),
        how.steps([base_model(model)]),
    ):
        for batch in _batches(rows.varied(seed), config, seed):
            optimiser.zero_grad(set_to_none=True)
            with how.step(device), meter.watch(batch):
                losses.append(add_gradients(model, batch, config.micro_batch_size))
            flops += meter.flops(batch)
            if proximal_mu:
                _add_proximal(parameters, start, proximal_mu)
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimiser.step()
            # A GPU may be at work still; the next step's inputs wait for it.
            ends.append(time.monotonic())
            watch(len(ends), steps)
    model.eval()
    mean = sum(torch.stack(losses).tolist()) / len(losses)
    _check_finite(mean, parameters, config.lr)
    seconds = time.monotonic() - began
    each = [end - before for before, end in pairwise([began, *ends])]
    return TrainReport(
        mean,
        len(rows),
        len(losses),
        seconds,
        statistics.median(each[1:] or [seconds]),
        flops,
        how,
    )


def _add_proximal(
    parameters: Sequence[Tensor], start: Sequence[Tensor], mu: float
) -> None:
    """Add the gradient of mu / 2 * ||w - w_0||^2."""
    for parameter, first in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - first, alpha=mu)


def _check_finite(loss: float, parameters: Sequence[Tensor], lr: float) -> None:
    # The last step's adapter is in no loss.
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    if not (finite and math.isfinite(loss)):
        raise FedPFTError(
            f"local training diverged: the mean loss is {loss}, the adapter is "
            f"{'' if finite else 'not '}finite; lower train.lr = {lr}"
        )


def _best_here(model: PeftModel, rows: Rows, config: TrainConfig) -> Compute:
    """Try how steps are fastest; nothing is left of the trial."""
    batch = next(shuffled_batches(rows, config.batch_size, seed=0))

    def step() -> None:
        add_gradients(model, batch, config.micro_batch_size)

    with recomputed(model) if config.recompute else nullcontext():
        what = rough_shapes(batch), config.micro_batch_size, config.recompute
        found = best_here([base_model(model)], step, what)
    model.zero_grad(set_to_none=True)
    return found


def add_gradients(model: nn.Module, batch: Batch, size: int) -> Tensor:
    """Add the gradients of a batch's loss to its model's, some rows at a time.

    The loss is a mean over rows, or over the tokens that are learnt where every token
    has a label, so each part counts by its share of them.

    Args:
        model: gives the loss.
        batch: inputs [B, ...] with `labels`.
        size: rows at a time; 0 takes all at once.

    Returns:
        The loss of the whole batch [], float64, where the model is: who reads it waits
        for a GPU.
    """
    rows = len(batch["labels"])
    size = size or rows
    whole, total = _learnt(batch["labels"]), torch.zeros((), dtype=torch.float64)
    for first in range(0, rows, size):
        part = {name: one[first : first + size] for name, one in batch.items()}
        if share := _learnt(part["labels"]) / whole:  # the mean of nothing is NaN
            loss = model(**part).loss * share
            loss.backward()
            total = total + loss.detach()
    return total


def _learnt(labels: Tensor) -> int:
    """Return how many rows, or tokens behind the first, are learnt."""
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != NO_TARGET).sum())


@contextmanager
def recomputed(model: PeftModel) -> Iterator[None]:
    """Let layers forget what is inside them until its gradients are due.

    Dropout falls as it did the first time. Decoders keep no tokens for later meanwhile:
    they would come twice.
    """
    base = base_model(model)
    layers, config = layers_of(base), base.config
    keeps = getattr(config, "use_cache", False)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if keeps:
        config.use_cache = False
    try:
        yield
    finally:
        if keeps:
            config.use_cache = keeps
        for layer in layers:
            del layer.forward


def train_mode(model: PeftModel, frozen_dropout: bool) -> None:
    """Turn on LoRA's dropout, and the frozen model's own only where it is asked for."""
    model.train(frozen_dropout)
    for name, module in model.named_modules():
        if name.endswith(".lora_dropout"):
            module.train()


def _steps(rows: int, config: TrainConfig) -> int:
    epoch = math.ceil(rows / config.batch_size)
    return config.local_steps or config.local_epochs * epoch


def _batches(rows: Rows, config: TrainConfig, seed: int) -> Iterator[Batch]:
    if config.local_steps:
        yield from islice(
            endless_batches(rows, config.batch_size, seed), config.local_steps
        )
        return
    for epoch in range(config.local_epochs):
        yield from shuffled_batches(
            rows, config.batch_size, derive_seed(seed, "epoch", epoch)
        )
