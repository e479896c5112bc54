"""Write what a comparison found as tables in Markdown, beside its CSV and plots."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpft_flower.config import FedPFTError
from fedpft_flower.disk import put
from fedpft_flower.metrics import is_better, metric_of, metric_row
from fedpft_flower.plots import draw
from fedpft_flower.results import Group, Result, by_group, named, row_of, write_csv
from fedpft_flower.spec import Cell, Spec


def write_tables(spec: Spec, results: Sequence[Result], out: Path) -> Path:
    """Write `results.csv`, `table.md` and plots.

    Returns:
        Where the Markdown is.

    Raises:
        FedPFTError: the disk refuses.
    """
    try:
        put(out / "results.csv", lambda place: write_csv(spec, results, place))
        text = markdown(spec, results)
        put(out / "table.md", lambda place: place.write_text(text, encoding="utf-8"))
        draw(spec, results, out)
    except OSError as error:
        raise FedPFTError(f"cannot write in {out} ({error}); make room") from error
    return out / "table.md"


def markdown(spec: Spec, results: Sequence[Result]) -> str:
    """Return all tables: accuracies in the paper's form, costs, differences."""
    groups = by_group(spec, results)
    text = [f"# {spec.place.stem}", "", _about(spec, results), ""]
    if changed := _methods(spec):
        text += ["## Methods", "", *changed, ""]
    text += ["## Test results of the FM", "", *_paper_table(spec, groups), ""]
    for task, partition in spec.columns:
        rows = _long_table(spec, groups, task, partition)
        text += [f"## {_title(spec, task, partition)}", "", *rows, ""]
        for split in _more_tests(groups, task, partition):
            title = f"## {split}, {_title(spec, task, partition)}"
            rows = _split_table(spec, groups, (task, partition), split)
            text += [title, "", *rows, ""]
    if spec.pairs:
        text += ["## Differences", "", *_differences(spec, groups), ""]
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
    return f"{named(task, partition)} ({metric}{better})"


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
        "three quarters for three), and wider than need be where what differs by seed "
        "and row matters most (1.4 times for two seeds, 1.5 for three), so the gap of "
        "every seed stands beside it. The "
        "gradient error is over a method's own adapters: of fewer layers where layers "
        "are dropped, so it does not compare with that of others. Server s: the "
        "seconds of choosing neurons, alignment and refinement, without evaluation."
    )


def _methods(spec: Spec) -> list[str]:
    """Say what methods are that are no rows as they stand, and where."""
    lines = []
    for method in spec.methods:
        where: dict[str, list[str]] = {}
        for task, partition in spec.columns:
            name = spec.name_of(task, partition, method)
            where.setdefault(name, []).append(named(task, partition))
        for name in [name for name in where if name != method]:
            there = "" if len(where) == 1 else f" ({'; '.join(where[name])})"
            told = name.removeprefix(f"{method} ")
            lines.append(f"- {method}: {told}{there}")
    return lines


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
    titles = [
        ", ".join(filter(None, (split, _title(spec, task, partition))))
        for task, partition, split in columns
    ]
    rows = dict.fromkeys((method, kept) for _, _, method, kept in spec.groups())
    lines = _header("method", "kept", *titles)
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
                lines.append(_line(named(task, part), kept, one, other, count, *gap))
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
    differences = np.stack([scale * (one - other) for one, other in rights])
    # Where test rows are a sample, each seed has its own.
    shared = len({pair[0].rows_tested(split) for pair in pairs} - {None}) < 2
    low, high = interval(differences, shared)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){unit}{told}", each


def _hits(result: Result, split: str) -> NDArray[np.float64]:
    assert result.found is not None
    name = f"fm ({split})" if split else "fm"
    hits = result.found.get("hits", {}).get(name, "")
    return np.array(list(hits), dtype=np.float64)


DRAWS = 4000  # of a bootstrap


def interval(values: NDArray[np.float64], shared: bool = True) -> tuple[float, float]:
    """Return the middle 95 % of the mean by a bootstrap over seeds and examples.

    Args:
        values: of every seed and example [S, N]; differences make it a paired one.
        shared: whether the seeds have the same examples, which are drawn for all at
            once; else each seed's are drawn alone.
    """
    generator = np.random.default_rng(0)
    seeds, examples = values.shape
    means = np.empty(DRAWS)
    for number in range(DRAWS):
        rows = generator.integers(seeds, size=(seeds, 1))
        columns = generator.integers(examples, size=(1 if shared else seeds, examples))
        means[number] = values[rows, columns].mean()
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
