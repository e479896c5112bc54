"""Write what a comparison found: `results.csv`, tables in Markdown, plots."""

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.curves import aligned_error
from fedpft_flower.disk import put
from fedpft_flower.metrics import is_better, metric_of, metric_row
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


def write_tables(spec: Spec, results: Sequence[Result], out: Path) -> Path:
    """Write `results.csv`, `table.md` and plots.

    Returns:
        Where the Markdown is.

    Raises:
        FedPFTError: the disk refuses.
    """
    try:
        put(out / "results.csv", lambda place: _write_csv(spec, results, place))
        text = markdown(spec, results)
        put(out / "table.md", lambda place: place.write_text(text, encoding="utf-8"))
        _draw(spec, results, out)
    except OSError as error:
        raise FedPFTError(f"cannot write in {out} ({error}); make room") from error
    return out / "table.md"


# ------------------------------------------------------------------------ results.csv


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
    start, *later = gradient_errors(found)
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


def _write_csv(spec: Spec, results: Sequence[Result], place: Path) -> None:
    groups = _by_group(spec, results)
    shown = {result.cell for group in groups.values() for result in group}
    rows = [row_of(result) | {"shown": result.cell in shown} for result in results]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def gradient_errors(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gradient errors of a run, first that with which training starts.

    Each has "round", and where it was measured "relative" and "cosine".
    """
    errors = []
    for entry in found["rounds"]:
        error = entry.get("gradient-error", aligned_error(entry))
        if error or not entry["round"]:
            errors.append({"round": entry["round"], **(error or {})})
    return errors


# --------------------------------------------------------------------------- Markdown


def markdown(spec: Spec, results: Sequence[Result]) -> str:
    """Return all tables: accuracies in the paper's form, costs, differences."""
    by_group = _by_group(spec, results)
    text = [f"# {spec.place.stem}", "", _about(spec, results), ""]
    text += ["## Test results of the FM", "", *_paper_table(spec, by_group), ""]
    for task, partition in spec.columns:
        rows = _long_table(spec, by_group, task, partition)
        text += [f"## {_title(spec, task, partition)}", "", *rows, ""]
        for split in _more_tests(by_group, task, partition):
            title = f"## {split}, {_title(spec, task, partition)}"
            rows = _split_table(spec, by_group, (task, partition), split)
            text += [title, "", *rows, ""]
    if spec.pairs:
        text += ["## Differences", "", *_differences(spec, by_group), ""]
    for state in ("failed", "unrun"):
        others = [result for result in results if result.state == state]
        if others:
            text += [f"## Cells {state}", ""]
            text += [
                f"- {r.cell.name}{f': {r.reason}' if r.reason else ''}" for r in others
            ]
            text.append("")
    return "\n".join(text)


def _title(spec: Spec, task: str, partition: str) -> str:
    """Return a task's name, its partition, and its metric with its better direction."""
    (method, *_), seed = spec.methods, spec.seeds[0]
    kept, lr = (of(task, partition, method)[0] for of in (spec.kept, spec.lrs))
    cell = Cell(task, partition, method, kept, lr, seed)
    metric = metric_of(spec.config(cell).data)
    better = "" if is_better(metric, 1, 0) else ", less is better"
    return f"{_named(task, partition)} ({metric}{better})"


def _named(task: str, partition: str) -> str:
    return ", ".join(filter(None, (task, partition)))


Group = tuple[str, str, str, float]


def _by_group(spec: Spec, results: Sequence[Result]) -> dict[Group, list[Result]]:
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


def _about(spec: Spec, results: Sequence[Result]) -> str:
    states = [result.state for result in results]
    told = ", ".join(
        f"{states.count(state)} {state}"
        for state in ("finished", "failed", "unrun")
        if state in states
    )
    return (
        f"{spec.nodes} nodes, seeds {', '.join(map(str, spec.seeds))}; cells: {told}"
        f"{_sources(results)}. "
        "Values are means over seeds, behind them the sample standard deviation. Gaps "
        f"are distances from {spec.reference} with the same seeds, with the 95 % "
        "interval of a paired bootstrap over seeds and test rows where the metric is a "
        "mean over rows; with one seed, over test rows alone. With few seeds such an "
        "interval is narrower than what other seeds would give (where seeds matter "
        "more than rows, it holds the truth in about half of all cases for two seeds, "
        "three quarters for three), so the gap of every seed stands beside it. The "
        "gradient error is over a method's own adapters: of fewer layers where layers "
        "are dropped, so it does not compare with that of others. Server s: the "
        "seconds of choosing neurons, alignment and refinement, without evaluation."
    )


def _sources(results: Sequence[Result]) -> str:
    """Say how many versions of the code made the cells, where it was not one."""
    made = {r.found["manifest"].get("source") for r in results if r.found is not None}
    told = f"; made by {len(made)} versions of the code" if len(made) > 1 else ""
    return told + (", some not recorded" if told and None in made else "")


def _paper_table(spec: Spec, groups: dict[Group, list[Result]]) -> list[str]:
    columns = [
        (task, partition, split)
        for task, partition in spec.columns
        for split in ("", *_more_tests(groups, task, partition))
    ]
    named = [
        ", ".join(filter(None, (split, _title(spec, task, partition))))
        for task, partition, split in columns
    ]
    rows = dict.fromkeys((method, kept) for _, _, method, kept in spec.groups())
    lines = _header("method", "kept", *named)
    for method, kept in rows:
        cells = []
        for task, partition, split in columns:
            found = groups.get((task, partition, method, kept), [])
            known = [r for r in found if split in ("", *r.more_tests)]
            values = [result.test("fm", split) for result in known]
            cells.append(_marked(_spread(values), len(values), len(spec.seeds)))
        lines.append(_line(method, f"{kept:g}", *cells))
    return lines


def _more_tests(groups: dict[Group, list[Result]], task: str, part: str) -> list[str]:
    """Return the names of the further test splits of a task."""
    found = [rs for key, rs in groups.items() if key[:2] == (task, part)]
    return sorted({name for rs in found for r in rs for name in r.more_tests})


def _marked(text: str, count: int, wanted: int) -> str:
    """Say of how many seeds a value is, where it is not of all."""
    return f"{text} [{_seeds(count)}]" if 0 < count < wanted else text


def _long_table(
    spec: Spec, groups: dict[Group, list[Result]], task: str, partition: str
) -> list[str]:
    lines = _header(
        *("method", "kept", "lr", "seeds", "FM", "plugged in", "sub-FM"),
        *(f"gap to {spec.reference}", "by seed", "client parameters", "never sent"),
        *("MB once", "MB a round", "GFLOP a round", "server s"),
        *("gradient error", "cosine"),
    )
    for of_task, of_partition, method, kept in spec.groups():
        group = (of_task, of_partition, method, kept)
        found = groups.get(group, [])
        if group[:2] != (task, partition) or not found:
            continue
        others = _alike(spec, groups, (task, partition, spec.reference, kept))
        rows = [row_of(result) for result in found]
        lines.append(
            _line(
                method,
                f"{kept:g}",
                f"{found[0].cell.lr:g}",
                str(len(found)),
                *(
                    _spread([result.test(model) for result in found])
                    for model in ("fm", "plain", "sub-fm")
                ),
                *_gap(found, others, spec),
                _column(rows, "parameters-sub-fm", 1e-6, 1, " M"),
                _column(rows, "share-withheld", 100, 1, " %"),
                _column(rows, "bytes-install-per-client", 1e-6, 1),
                _column(rows, "bytes-per-client-and-round", 1e-6, 2),
                _column(rows, "flops-per-client-and-round", 1e-9, 0),
                _column(rows, "server-seconds", 1, 0),
                _column(rows, "gradient-error"),
                _column(rows, "gradient-cosine"),
            )
        )
    return lines


def _split_table(
    spec: Spec, groups: dict[Group, list[Result]], column: tuple[str, str], split: str
) -> list[str]:
    """Return the table of a further test split of a task and partition."""
    lines = _header(
        *("method", "kept", "FM", "sub-FM", f"gap to {spec.reference}", "by seed")
    )
    for task, partition, method, kept in spec.groups():
        found = groups.get((task, partition, method, kept), [])
        known = [r for r in found if split in r.more_tests]
        if (task, partition) != column or not known:
            continue
        others = _alike(spec, groups, (task, partition, spec.reference, kept))
        values = [
            _marked(
                _spread([r.test(model, split) for r in known]),
                len(known),
                len(spec.seeds),
            )
            for model in ("fm", "sub-fm")
        ]
        gap = _gap(known, others, spec, split)
        lines.append(_line(method, f"{kept:g}", *values, *gap))
    return lines


def _alike(
    spec: Spec, groups: dict[Group, list[Result]], wanted: Group
) -> list[Result]:
    """Return a method's cells of this kept fraction, or of the only one of the spec."""
    task, partition, method, kept = wanted
    fractions = spec.kept(task, partition, method)
    only = fractions[0] if len(fractions) == 1 else kept
    return groups.get((task, partition, method, only), [])


def _differences(spec: Spec, groups: dict[Group, list[Result]]) -> list[str]:
    lines = _header(
        *("task", "kept", "one", "other", "seeds", "one minus other", "by seed")
    )
    for one, other in spec.pairs:
        for task, part in spec.columns:
            for kept, found, others in _both(spec, groups, task, part, one, other):
                count = str(len(_paired(found, others)))
                gap = _gap(found, others, spec)
                lines.append(_line(_named(task, part), kept, one, other, count, *gap))
    return lines


def _both(
    spec: Spec,
    groups: dict[Group, list[Result]],
    task: str,
    part: str,
    one: str,
    other: str,
) -> list[tuple[str, list[Result], list[Result]]]:
    """Return for each comparison the kept fraction, the one's cells, the other's."""
    fractions = sorted(
        key[3] for key in groups if key[:2] == (task, part) and key[2] in (one, other)
    )
    found: dict[tuple[int, int], tuple[str, list[Result], list[Result]]] = {}
    for kept in fractions:
        ones = _alike(spec, groups, (task, part, one, kept))
        others = _alike(spec, groups, (task, part, other, kept))
        if ones and others:
            found.setdefault((id(ones), id(others)), (f"{kept:g}", ones, others))
    return list(found.values()) or [("-", [], [])]


def _paired(ones: list[Result], others: list[Result]) -> list[tuple[Result, Result]]:
    by_seed = {result.cell.seed: result for result in others}
    return [(r, by_seed[r.cell.seed]) for r in ones if r.cell.seed in by_seed]


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _gap(
    ones: list[Result], others: list[Result], spec: Spec, split: str = ""
) -> tuple[str, str]:
    """Return the mean difference of the FM's test metric, and that of every seed.

    The mean has its 95 % interval.
    """
    pairs = [
        pair
        for pair in _paired(ones, others)
        if pair[0] != pair[1] and all(split in ("", *one.more_tests) for one in pair)
    ]
    if not pairs:
        return "-", "-"
    metric = pairs[0][0].metric
    row = metric_row(metric)
    scale, unit, digits = (100, " points", 1) if row.in_points else (1, "", 2)
    by_seed = [scale * (a.test("fm", split) - b.test("fm", split)) for a, b in pairs]
    mean = statistics.mean(by_seed)
    each = ", ".join(f"{one:+.{digits}f}" for one in by_seed)
    rights = [(_hits(one, split), _hits(other, split)) for one, other in pairs]
    told = f" [{_seeds(len(pairs))}]" if len(pairs) < len(spec.seeds) else ""
    sizes = {len(hits) for pair in rights for hits in pair}
    if not row.by_row or len(sizes) > 1 or not max(sizes):
        return f"{mean:+.2f}{unit}{told}", each
    low, high = interval(np.stack([scale * (one - other) for one, other in rights]))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){unit}{told}", each


def _hits(result: Result, split: str) -> NDArray[np.float64]:
    assert result.found is not None
    name = f"fm ({split})" if split else "fm"
    hits = result.found.get("hits", {}).get(name, "")
    return np.array(list(hits), dtype=np.float64)


DRAWS = 4000  # of a bootstrap


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle 95 % of the mean by a bootstrap over seeds and examples.

    Args:
        values: of every seed and example [S, N]; differences make it a paired one.
    """
    generator = np.random.default_rng(0)
    seeds, examples = values.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        rows = generator.integers(seeds, size=seeds)
        columns = generator.integers(examples, size=examples)
        means[draw] = values[rows].mean(axis=0)[columns].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _column(
    rows: Sequence[dict[str, Any]],
    column: str,
    scale: float = 1.0,
    digits: int = 3,
    unit: str = "",
) -> str:
    """Return a column of `results.csv`, and of how many seeds it is known."""
    known = [row[column] for row in rows if row.get(column) is not None]
    return _marked(_spread(known, scale, digits, unit), len(known), len(rows))


def _spread(
    values: Sequence[float], scale: float = 1.0, digits: int = 3, unit: str = ""
) -> str:
    """Return mean (sample standard deviation), or a dash."""
    if not values:
        return "-"
    mean = f"{scale * statistics.mean(values):.{digits}f}{unit}"
    if len(values) < 2 or (scale != 1.0 and len(set(values)) == 1):
        return mean  # of sizes, which seeds share
    return f"{mean} ({scale * statistics.stdev(values):.{digits}f})"


def _header(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------ plots

Point = tuple[float, float]


def _draw(spec: Spec, results: Sequence[Result], out: Path) -> None:
    groups = _by_group(spec, results)
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
    errors = gradient_errors(result.found)
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
        panel.set(title=_named(task, partition), xlabel=across)
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
        panel.set(title=_named(task, partition))
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
