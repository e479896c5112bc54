"""Evaluate a model on labelled rows."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from fedpft_flower.encoding import Rows

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Hold how well a model classifies `examples` rows.

    Accuracy and macro F1 (the mean over the classes that the rows have) are in [0, 1],
    Matthews' correlation coefficient is in [-1, 1], the loss is the mean cross-entropy.
    """

    accuracy: float
    macro_f1: float
    matthews: float
    loss: float
    examples: int


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows) -> Evaluation:
    """Evaluate a model on labelled rows, in batches of similar length."""
    model.eval()
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    loss = 0.0
    for start in range(0, len(order), EVALUATION_BATCH):
        batch = rows.batch(order[start : start + EVALUATION_BATCH])
        labels = batch.pop("labels")
        logits: Tensor = model(**batch).logits
        found.append(logits.argmax(dim=-1).cpu())
        wanted.append(labels)
        loss += float(
            nn.functional.cross_entropy(logits.cpu(), labels, reduction="sum")
        )
    truth, said = torch.cat(wanted).numpy(), torch.cat(found).numpy()
    return Evaluation(
        accuracy=float(accuracy_score(truth, said)),
        macro_f1=float(f1_score(truth, said, average="macro", labels=np.unique(truth))),
        matthews=float(matthews_corrcoef(truth, said)),
        loss=loss / len(order),
        examples=len(order),
    )
