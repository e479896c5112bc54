"""Name the metrics that runs are judged by."""

from dataclasses import dataclass
from typing import Any

from fedpft_flower.config import DataConfig, FedPFTError, Objective
from fedpft_flower.tasks import task_of

# What is measured, by name; or names of what was measured on several things.
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """Describe a metric."""

    # Whether more is better.
    rises: bool = True
    # Whether differences are told in points, hundredths of it.
    in_points: bool = True
    # Whether it is the mean over rows of what `evaluation.judge` calls right; one of an
    # objective's at most.
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
    rows = [named[metric] for named in METRICS.values() if metric in named]
    return rows[0]  # of one that two objectives have, all are equal
