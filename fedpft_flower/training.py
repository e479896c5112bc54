"""Fine-tune an adapter on local rows."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedpft_flower.activity import Batch
from fedpft_flower.config import FedPFTError, TrainConfig, derive_seed
from fedpft_flower.encoding import Rows, endless_batches, shuffled_batches


@dataclass(frozen=True)
class TrainReport:
    """Say what a local training did; `loss` is the mean over its steps."""

    loss: float
    examples: int
    steps: int
    seconds: float


def round_lr(config: TrainConfig, current: int, rounds: int) -> float:
    """Return lr_r = lr * (1 - (r - 1) / R) for round r of R, or a constant lr.

    The last round still learns; in the authors' code its rate is zero.
    """
    if config.lr_decay == "none":
        return config.lr
    return config.lr * (1.0 - (current - 1) / rounds)


def train_adapter(
    model: PeftModel,
    rows: Rows,
    config: TrainConfig,
    lr: float,
    seed: int,
    proximal_mu: float = 0.0,
) -> TrainReport:
    """Train the adapter that a model holds, by AdamW on shuffled local batches.

    With mu > 0 the objective is FedProx's: loss + mu / 2 * ||w - w_0||^2, w_0 being the
    adapter at the start (Li et al. 2020, arXiv 1812.06127, eq. 2); the report's loss is
    without that term.

    Args:
        model: a sub-FM with an adapter; only the adapter changes.
        rows: the local rows, labelled.
        config: epochs or steps, batch size, weight decay, clipping.
        lr: this round's learning rate.
        seed: seed of the batches and of dropout.
        proximal_mu: weight of the proximal term; 0 leaves it out.

    Raises:
        FedPFTError: the loss or the adapter is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    began, losses = time.monotonic(), []
    # The process is shared by virtual clients: dropout must not depend on its past.
    torch.manual_seed(derive_seed(seed, "dropout"))
    _train_mode(model, config.frozen_dropout)
    for batch in _batches(rows.varied(seed), config, seed):
        loss = objective = model(**batch).loss
        if proximal_mu:
            objective = loss + proximal_mu / 2 * _squared_distance(parameters, start)
        optimiser.zero_grad(set_to_none=True)
        objective.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    mean = sum(losses) / len(losses)
    # The last step's adapter is in no loss.
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    if not (finite and math.isfinite(mean)):
        raise FedPFTError(
            f"local training diverged: the mean loss is {mean}, the adapter is "
            f"{'' if finite else 'not '}finite; lower train.lr = {config.lr}"
        )
    return TrainReport(mean, len(rows), len(losses), time.monotonic() - began)


def _squared_distance(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the squared L2 distance of two lists of tensors of equal shapes."""
    pairs = zip(ones, others, strict=True)
    return torch.stack([(one - other).square().sum() for one, other in pairs]).sum()


def _train_mode(model: PeftModel, frozen_dropout: bool) -> None:
    """Turn on LoRA's dropout, and the frozen model's own only where it is asked for."""
    model.train(frozen_dropout)
    for name, module in model.named_modules():
        if name.endswith(".lora_dropout"):
            module.train()


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
