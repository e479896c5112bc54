"""Draw what a comparison found: against rounds, bytes and kept fractions."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fedpft_flower.disk import put
from fedpft_flower.results import Group, Result, by_group, errors_by_round, named
from fedpft_flower.spec import Spec

Point = tuple[float, float]


def draw(spec: Spec, results: Sequence[Result], out: Path) -> None:
    """Draw a directory's plots, PNG; nothing where no cell is finished."""
    groups = by_group(spec, results)
    if not groups:
        return
    score = "the FM's {metric}, averaged adapter (validation)"
    figures: tuple[tuple[str, str, str, Callable[[Result], list[Point]]], ...] = (
        ("metric-rounds", "round", score, _by_round),
        ("metric-bytes", "MB to and from all clients", score, _by_bytes),
        ("gradient-rounds", "round", "gradient error (relative L2)", _gradients),
    )
    for name, across, up, points in figures:
        _panels(spec, groups, out / f"{name}.png", across, up, points)
    if any(len(spec.kept(t, p, method)) > 1 for t, p, method, _ in groups):
        _by_kept(spec, groups, out / "metric-kept.png")


def _by_round(result: Result) -> list[Point]:
    return [(entry["round"], score) for entry, score in _scored(result)]


def _by_bytes(result: Result) -> list[Point]:
    assert result.found is not None
    sizes = [
        e.get("bytes-down", 0) + e.get("bytes-up", 0) for e in result.found["rounds"]
    ]
    if not any(sizes):
        return []
    total = dict(
        zip(
            (entry["round"] for entry in result.found["rounds"]),
            accumulate(sizes),
            strict=True,
        )
    )
    return [(total[e["round"]] / 1e6, score) for e, score in _scored(result)]


def _scored(result: Result) -> Iterator[tuple[dict[str, Any], float]]:
    assert result.found is not None
    for entry in result.found["rounds"]:
        if (score := entry.get(f"fm-{result.metric}")) is not None:
            yield entry, float(score)


def _gradients(result: Result) -> list[Point]:
    assert result.found is not None
    errors = errors_by_round(result.found)
    return [(e["round"], e["relative"]) for e in errors if "relative" in e]


def _panels(
    spec: Spec,
    groups: dict[Group, list[Result]],
    place: Path,
    across: str,
    up: str,
    points: Callable[[Result], list[Point]],
) -> None:
    """Draw a panel for each task and partition, for each method the mean and the range.

    Where seeds ended after unlike numbers of rounds, up to the first end.
    """
    figure, panels = _grid(len(spec.columns))
    for panel, (task, partition) in zip(panels, spec.columns, strict=True):
        panel.set(title=named(task, partition), xlabel=across)
        panel.set_ylabel(up.format(metric=_metric(groups, task, partition)))
        panel.grid(alpha=0.3)
        for (of, share, method, kept), found in groups.items():
            lines = [line for r in found if (line := points(r))]
            if (of, share) != (task, partition) or not lines:
                continue
            several = len(spec.kept(task, partition, method)) > 1
            label = f"{method}, {kept:g}" if several else method
            length = min(map(len, lines))
            values = np.array([line[:length] for line in lines])  # seeds, points, 2
            x, y = values[..., 0].mean(axis=0), values[..., 1]
            (drawn,) = panel.plot(x, y.mean(axis=0), marker="o", ms=3, label=label)
            low, high = y.min(axis=0), y.max(axis=0)
            panel.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, title="mean and range of seeds", title_fontsize=8)
        else:
            panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center")
    if any(panel.lines for panel in panels):
        _save(figure, place)
    plt.close(figure)


def _metric(groups: dict[Group, list[Result]], task: str, partition: str) -> str:
    found = [rs[0] for (t, p, *_), rs in groups.items() if (t, p) == (task, partition)]
    return found[0].metric if found else "metric"


def _by_kept(spec: Spec, groups: dict[Group, list[Result]], place: Path) -> None:
    """Draw the test metric against the kept fraction; whole FMs are level lines."""
    figure, panels = _grid(len(spec.columns))
    for panel, (task, partition) in zip(panels, spec.columns, strict=True):
        panel.set(title=named(task, partition))
        panel.set(xlabel="kept fraction of the neurons")
        panel.set_ylabel(f"the FM's {_metric(groups, task, partition)} (test)")
        panel.grid(alpha=0.3)
        colours = cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
        for method in spec.methods:
            found = {
                kept: [result.test("fm") for result in results]
                for (t, p, m, kept), results in groups.items()
                if (t, p, m) == (task, partition, method)
            }
            if not found:
                continue
            if list(found) == [1.0]:
                level = statistics.mean(found[1.0])
                colour = next(colours)
                panel.axhline(level, ls="--", color=colour, label=method)
                continue
            kept = sorted(found)
            means = [statistics.mean(found[one]) for one in kept]
            errors = [
                statistics.stdev(found[one]) if len(found[one]) > 1 else 0.0
                for one in kept
            ]
            panel.errorbar(
                kept,
                means,
                errors,
                marker="o",
                capsize=3,
                label=method,
                color=next(colours),
            )
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    _save(figure, place)
    plt.close(figure)


def _grid(count: int) -> tuple[Any, list[Any]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(5.2 * columns, 4 * rows),
        squeeze=False,
        layout="constrained",
    )
    every = list(panels.flat)
    for panel in every[count:]:
        panel.axis("off")
    return figure, every[:count]


def _save(figure: Any, place: Path) -> None:
    put(place, lambda draft: figure.savefig(draft, dpi=120))
