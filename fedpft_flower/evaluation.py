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


def evaluate(model: nn.Module, rows: Rows) -> Evaluation:
    """Evaluate a model on labelled rows."""
    logits, labels = predict(model, rows)
    truth, said = labels.numpy(), logits.argmax(dim=-1).numpy()
    return Evaluation(
        accuracy=float(accuracy_score(truth, said)),
        macro_f1=float(f1_score(truth, said, average="macro", labels=np.unique(truth))),
        matthews=float(matthews_corrcoef(truth, said)),
        loss=float(nn.functional.cross_entropy(logits, labels)),
        examples=len(rows),
    )


@torch.no_grad()
def predict(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return logits [rows, classes] and labels [rows], in the order of the rows.

    They run in batches of similar length.
    """
    model.eval()
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, len(order), EVALUATION_BATCH):
        batch = rows.batch(order[start : start + EVALUATION_BATCH])
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float().cpu())
    back = torch.tensor(order).argsort()
    return torch.cat(logits)[back], torch.cat(labels)[back]
