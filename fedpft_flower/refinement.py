"""Refine the plugged-in adapter on public data, once training is over.

The adapter was trained in the sub-FM; in the FM it does almost the same, not quite.
The FM's logits are made to follow those of the sub-FM, both with the adapter, on
unlabelled public rows: the mean over rows of KL(p_sub || p_FM). Only the FM's LoRA
changes, not its head, and not the sub-FM.
"""

import time
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedpft_flower.activity import Batch
from fedpft_flower.alignment import Progress
from fedpft_flower.config import FedPFTError


def logit_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean over rows of KL(softmax(teacher) || softmax(student)).

    Args:
        teacher: logits [B, C] of the sub-FM.
        student: logits [B, C] of the FM.
    """
    return nn.functional.kl_div(
        nn.functional.log_softmax(student, dim=-1),
        nn.functional.log_softmax(teacher, dim=-1),
        log_target=True,
        reduction="batchmean",
    )


def refine(
    fm: PeftModel,
    sub_fm: PeftModel,
    batches: Iterator[Batch],
    steps: int,
    lr: float,
    report: Callable[[Progress], None],
) -> None:
    """Train the FM's LoRA so that the FM's logits follow the sub-FM's.

    Adam without weight decay; the learning rate falls linearly to zero. Dropout is off.

    Args:
        fm: the FM with the plugged-in adapter.
        sub_fm: the sub-FM with the adapter, which stays as it is.
        batches: endless public inputs.
        steps: how many.
        lr: the first step's learning rate.
        report: called after every step.

    Raises:
        FedPFTError: the loss is not finite.
    """
    fm.eval()
    sub_fm.eval()
    parameters = [p for name, p in fm.named_parameters() if ".lora_" in name]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    began, tokens = time.monotonic(), 0
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        batch = {n: v for n, v in next(batches).items() if n != "labels"}
        with torch.no_grad():
            teacher = sub_fm(**batch).logits
        loss = logit_loss(teacher, fm(**batch).logits)
        if not bool(torch.isfinite(loss)):
            raise FedPFTError(
                f"the loss of the refinement is {loss.item()} at step {step}; lower "
                f"plug-in.lr = {lr:g}"
            )
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0
        seconds = time.monotonic() - began
        report(Progress(step / steps, step, tokens, seconds, float(loss.detach())))
    for parameter in parameters:
        parameter.grad = None
