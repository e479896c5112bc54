"""Evaluate a model on the rows of a task."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_flower.config import DataConfig, FedPFTError, Objective
from fedpft_flower.encoding import NO_TARGET, Rows
from fedpft_flower.tasks import task_of

EVALUATION_BATCH = 64
# Logits of a generating model are as long as the vocabulary for every token.
GENERATION_BATCH = 8


@dataclass(frozen=True)
class Metric:
    """Describe a metric."""

    # Whether more is better.
    rises: bool = True
    # Whether differences are told in points, hundredths of it.
    in_points: bool = True
    # Whether it is a mean over rows, each right or wrong.
    by_row: bool = False


# Metrics of each objective; the first is what a run is judged by when `data.metric`
# names none. All have "loss" besides.
METRICS: dict[Objective, dict[str, Metric]] = {
    "classify": {
        "accuracy": Metric(by_row=True),
        "macro-f1": Metric(),
        "matthews": Metric(),
    },
    "generate": {
        "perplexity": Metric(rises=False, in_points=False),
        "token-accuracy": Metric(),
        "exact-match": Metric(by_row=True),
    },
}


def metric_of(config: DataConfig) -> str:
    """Return the name of the metric that a run is judged and shown by.

    Raises:
        FedPFTError: `data.metric` is none of the task's.
    """
    known = METRICS[task_of(config.task).objective]
    if config.metric and config.metric not in known:
        raise FedPFTError(
            f"data.metric = {config.metric!r} is no metric of data.task = "
            f"{config.task!r}; choose one of {', '.join(known)}"
        )
    return config.metric or next(iter(known))


def is_better(metric: str, one: float, other: float) -> bool:
    """Tell whether the first value of a metric is better than the second."""
    return one > other if metric_row(metric).rises else one < other


def metric_row(metric: str) -> Metric:
    """Return the row of a metric."""
    (row,) = [named[metric] for named in METRICS.values() if metric in named]
    return row


def evaluate(
    model: nn.Module, rows: Rows, objective: Objective = "classify"
) -> dict[str, float]:
    """Evaluate a model on rows with labels.

    Returns:
        The metrics of the objective (`METRICS`) and "loss", the mean cross-entropy
        over rows or, where text is generated, over the tokens that are learnt.
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
    if objective == "generate":
        return _generation(model, rows)
    # Here, since most commands only name a metric.
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
def _generation(model: nn.Module, rows: Rows) -> tuple[dict[str, float], list[bool]]:
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


def _by_length(rows: Rows, size: int) -> Iterator[list[int]]:
    """Yield the rows in batches of similar length."""
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]
