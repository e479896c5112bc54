"""Refine the plugged-in adapter without labels, once training is over.

The adapter was trained in the sub-FM; in the FM it does almost the same, not quite.
The FM's logits are made to follow those of the sub-FM, both with the adapter, on
public rows, and on the server's validation rows without their labels where the method
says so: the mean over rows, or over tokens where every token has logits,
of KL(p_sub || p_FM). Only the FM's LoRA
changes, not its head, and not the sub-FM. The loss is that of distillation (Hinton et
al. 2015, arXiv 1503.02531) at temperature 1; to refine so is ours.
"""

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedpft_flower.adapters import base_model
from fedpft_flower.batches import Batch, inputs_of, real_logits
from fedpft_flower.descent import Loss, Progress, Schedule, descend


def logit_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean over rows of KL(softmax(teacher) || softmax(student)).

    Args:
        teacher: logits [B, C] of the sub-FM, or [tokens, V].
        student: those of the FM.
    """
    return nn.functional.kl_div(
        nn.functional.log_softmax(student.float(), dim=-1),
        nn.functional.log_softmax(teacher.float(), dim=-1),
        log_target=True,
        reduction="batchmean",
    )


def refine(
    fm: PeftModel,
    sub_fm: PeftModel,
    batches: Iterator[Batch],
    schedule: Schedule,
    report: Callable[[Progress], None],
) -> Progress:
    """Train the FM's LoRA so that the FM's logits follow the sub-FM's.

    Dropout is off.

    Args:
        fm: the FM with the plugged-in adapter.
        sub_fm: the sub-FM with the adapter, which stays as it is.
        batches: endless inputs; labels among them are not looked at.
        schedule: how fast and how long.
        report: called after every step.

    Returns:
        The last step's progress.

    Raises:
        FedPFTError: the loss is not finite.
    """
    fm.eval()
    sub_fm.eval()
    lora = [p for name, p in fm.named_parameters() if ".lora_" in name]

    def loss_of(batch: Batch) -> tuple[Tensor, int]:
        inputs = inputs_of(batch)
        with torch.no_grad():
            teacher = real_logits(sub_fm, inputs)
        mask = batch.get("attention_mask")
        tokens = 0 if mask is None else int(mask.sum())
        return logit_loss(teacher, real_logits(fm, inputs)), tokens

    name, remedy = "the loss of the refinement", f"lower plug-in.lr = {schedule.lr:g}"
    trainable = [(parameter, None) for parameter in lora]
    models, loss = [base_model(sub_fm), base_model(fm)], Loss(loss_of, name, remedy)
    try:
        return descend(models, trainable, batches, loss, schedule, report)
    finally:
        for parameter in lora:
            parameter.grad = None
