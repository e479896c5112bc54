"""Hold what the cells of a comparison found, and write `results.csv`."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft_flower.config import Config
from fedpft_flower.curves import aligned_error
from fedpft_flower.metrics import is_better, metric_of
from fedpft_flower.spec import Cell, Spec


@dataclass(frozen=True)
class Result:
    """Hold a cell with what it found, or with the reason why it failed."""

    cell: Cell
    found: dict[str, Any] | None
    reason: str | None

    @property
    def state(self) -> str:
        """Return "finished", "failed" or "unrun"."""
        if self.found is not None:
            return "finished"
        return "failed" if self.reason else "unrun"

    @property
    def metric(self) -> str:
        """Return the metric of a finished cell."""
        assert self.found is not None
        return metric_of(Config.from_run_config(self.found["config"]).data)

    @property
    def more_tests(self) -> dict[str, dict[str, float]]:
        """Return the metrics of further test splits, by their names."""
        assert self.found is not None
        return dict(self.found["summary"].get("more-tests", {}))

    @property
    def validation(self) -> float:
        """Return the validation metric of a finished cell."""
        assert self.found is not None
        return validation_score(self.found, self.metric)

    def rows_tested(self, split: str = "") -> str | None:
        """Return the hash of a finished cell's test rows, as far as it is known.

        Args:
            split: a further test split; "" is the usual one.
        """
        assert self.found is not None
        splits = self.found["manifest"].get("splits", {})
        known = splits.get(split or "test", {}).get("sha256")
        return None if known is None else str(known)

    def test(self, model: str, split: str = "") -> float:
        """Return a test metric of a finished cell.

        Args:
            model: "plain" (the FM with the averaged adapter), "fm" (the same after its
                refinement), "sub-fm".
            split: a further test split, which knows no "plain"; "" is the usual one.
        """
        assert self.found is not None
        when = "test-plain" if model == "plain" else "test-after"
        scores = self.more_tests[split] if split else self.found["summary"][when]
        name = "sub-fm" if model == "sub-fm" else "fm"
        return float(scores[f"{name}-{self.metric}"])


def validation_score(found: Mapping[str, Any], metric: str) -> float:
    """Return the validation metric of the FM whose test metric a run reports.

    It is that of the refined FM where the refinement was kept, else that of the best
    round where the run kept its adapter, else that of the last evaluation.
    """
    summary = found["summary"]
    refinement = summary.get("refinement") or {}
    if refinement.get("kept"):
        return float(refinement["validation-after"])
    scores = {
        entry["round"]: entry[f"fm-{metric}"]
        for entry in found["rounds"]
        if entry.get(f"fm-{metric}") is not None
    }
    best = summary.get("select") == "best"
    return float(scores[summary["best-round"] if best else max(scores)])


def best_of(results: Sequence[Result]) -> Result:
    """Return the finished cell that validates best, the first of equals."""
    best, *others = results
    for other in others:
        if is_better(best.metric, other.validation, best.validation):
            best = other
    return best


def row_of(result: Result) -> dict[str, Any]:
    """Return a cell as a row of `results.csv`; what is not known is left out."""
    cell = result.cell
    row: dict[str, Any] = {
        "task": cell.task,
        "partition": cell.partition,
        "method": cell.method,
        "kept": cell.kept,
        "lr": cell.lr,
        "seed": cell.seed,
        "state": result.state,
        "reason": result.reason,
    }
    if result.found is None:
        return row
    summary, found = result.found["summary"], result.found
    return row | {
        "nodes": found["nodes"],
        "rounds": summary.get("rounds"),
        "metric": result.metric,
        **_score_columns(result),
        **_gradient_columns(found),
        **_cost_columns(summary),
        **_protection_columns(summary),
        "fm-sha256": found["manifest"].get("fm-sha256"),
    }


def _score_columns(result: Result) -> dict[str, Any]:
    assert result.found is not None
    before = result.found["summary"].get("test-before", {})
    return {
        "validation": result.validation,
        "test-before": before.get(f"fm-{result.metric}"),
        "test-plugged-in": result.test("plain"),
        "test-fm": result.test("fm"),
        "test-sub-fm": result.test("sub-fm"),
        **{
            f"{name}-{model}": scores[f"{model}-{result.metric}"]
            for name, scores in result.more_tests.items()
            for model in ("fm", "sub-fm")
        },
    }


def _gradient_columns(found: dict[str, Any]) -> dict[str, Any]:
    start, *later = errors_by_round(found)
    return {
        "gradient-error": start.get("relative"),
        "gradient-cosine": start.get("cosine"),
        "gradient-error-last": later[-1].get("relative") if later else None,
    }


_COSTS = (
    *("share-withheld", "bytes-install-per-client", "bytes-per-client-and-round"),
    *("bytes-down", "bytes-up", "flops-per-client-and-round", "server-seconds"),
    *("peak-memory-server", "peak-memory-client", "failures"),
)


def _cost_columns(summary: Mapping[str, Any]) -> dict[str, Any]:
    parameters = summary.get("parameters", {})
    return {
        **{f"parameters-{name}": count for name, count in parameters.items()},
        **{key: summary.get(key) for key in _COSTS},
        "round-seconds": summary.get("seconds"),
    }


def _protection_columns(summary: Mapping[str, Any]) -> dict[str, Any]:
    sheet, spent = summary.get("protection", {}), summary.get("privacy") or {}
    return {
        **{key: sheet.get(key) for key in ("sent-verbatim", "re-fitted", "theft-gap")},
        **{key: spent.get(key) for key in ("epsilon", "delta")},
    }


def write_csv(spec: Spec, results: Sequence[Result], place: Path) -> None:
    """Write `results.csv`: a row a cell, also of those that have none yet."""
    groups = by_group(spec, results)
    shown = {result.cell for group in groups.values() for result in group}
    rows = [row_of(result) | {"shown": result.cell in shown} for result in results]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def errors_by_round(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gradient errors of a run, first that with which training starts.

    Each has "round", and where it was measured "relative" and "cosine".
    """
    errors = []
    for entry in found["rounds"]:
        error = entry.get("gradient-error", aligned_error(entry))
        if error or not entry["round"]:
            errors.append({"round": entry["round"], **(error or {})})
    return errors


def named(task: str, partition: str) -> str:
    """Return what people read of a task and its partition."""
    return ", ".join(filter(None, (task, partition)))


Group = tuple[str, str, str, float]


def by_group(spec: Spec, results: Sequence[Result]) -> dict[Group, list[Result]]:
    """Return the finished cells by task, partition, method and kept fraction.

    Of a grid of rates, those of the rate that all seeds share: the best one.
    """
    groups: dict[Group, list[Result]] = {}
    for result in results:
        cell = result.cell
        if result.found is not None:
            key = (cell.task, cell.partition, cell.method, cell.kept)
            groups.setdefault(key, []).append(result)
    for key, found in groups.items():
        first = [r for r in found if r.cell.seed == spec.seeds[0]]
        lr = best_of(first or found).cell.lr
        groups[key] = [r for r in found if r.cell.lr == lr]
    return groups
