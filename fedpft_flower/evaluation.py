"""Evaluate a model on the rows of a task."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_flower.config import Objective
from fedpft_flower.encoding import NO_TARGET, Rows

EVALUATION_BATCH = 64
# Logits of a generating model are as long as the vocabulary for every token.
GENERATION_BATCH = 8


def evaluate(
    model: nn.Module, rows: Rows, objective: Objective = "classify"
) -> dict[str, float]:
    """Evaluate a model on rows with labels.

    Returns:
        The metrics of the objective (`metrics.METRICS`) and "loss", the mean
        cross-entropy over rows or, where text is generated, over learnt tokens.
    """
    return judge(model, rows, objective)[0]


def judge(
    model: nn.Module, rows: Rows, objective: Objective = "classify"
) -> tuple[dict[str, float], list[bool]]:
    """Evaluate a model, and tell which rows it gets right.

    Returns:
        What `evaluate` returns; and for every row, in their order, whether its label
        is the one said or, where text is generated, whether it matches exactly.
    """
    return _JUDGES[objective](model, rows)


def _classes(model: nn.Module, rows: Rows) -> tuple[dict[str, float], list[bool]]:
    """Return accuracy, macro F1, Matthews' correlation and loss; and the right rows."""
    # Here, since a run that generates text needs none of it.
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits, labels = predict(model, rows)
    truth, said = labels.numpy(), logits.argmax(dim=-1).numpy()
    present = np.unique(truth)  # macro F1 is the mean over the classes of the rows
    metrics = {
        "accuracy": float(accuracy_score(truth, said)),
        "macro-f1": float(f1_score(truth, said, average="macro", labels=present)),
        "matthews": float(matthews_corrcoef(truth, said)),
        "loss": float(nn.functional.cross_entropy(logits, labels)),
    }
    return metrics, (truth == said).tolist()


@torch.no_grad()
def predict(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return logits [rows, classes] and labels [rows], in the order of the rows.

    They run in batches of similar length.
    """
    model.eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    order: list[int] = []
    for chosen in _by_length(rows, EVALUATION_BATCH):
        batch = rows.batch(chosen)
        order += chosen
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    back = torch.tensor(order).argsort()
    # Here, since a GPU is waited for where its numbers are fetched.
    return torch.cat(logits).cpu()[back], torch.cat(labels)[back]


@torch.no_grad()
def _texts(model: nn.Module, rows: Rows) -> tuple[dict[str, float], list[bool]]:
    """Return perplexity, token accuracy, exact match and loss; and the exact rows.

    Perplexity is exp(loss). A row matches exactly when the most likely token is the
    right one at every place that is learnt, the end token's included: greedy decoding
    then writes this very response, since each of its prefixes is the right one.
    """
    model.eval()
    loss, tokens, hits = 0.0, 0, 0
    exact = [False] * len(rows)
    for chosen in _by_length(rows, GENERATION_BATCH):
        batch = rows.batch(chosen)
        targets = batch.pop("labels")[:, 1:]
        learnt = targets != NO_TARGET
        logits = model(**batch).logits[:, :-1][learnt].float()
        wanted = targets[learnt].to(logits.device)
        loss += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right = torch.ones_like(learnt)  # where nothing is learnt nothing is wrong
        right[learnt] = (logits.argmax(dim=-1) == wanted).cpu()
        tokens += len(wanted)
        hits += int(right[learnt].sum())
        for row, matches in zip(chosen, right.all(dim=1).tolist(), strict=True):
            exact[row] = matches
    mean = loss / tokens
    metrics = {
        "perplexity": math.exp(min(mean, 700.0)),  # the largest that a float can hold
        "token-accuracy": hits / tokens,
        "exact-match": sum(exact) / len(rows),
        "loss": mean,
    }
    return metrics, exact


# What a model does, and how its rows are judged.
_JUDGES: dict[
    Objective, Callable[[nn.Module, Rows], tuple[dict[str, float], list[bool]]]
] = {"classify": _classes, "generate": _texts}


def _by_length(rows: Rows, size: int) -> Iterator[list[int]]:
    """Yield the rows in batches of similar length."""
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]
