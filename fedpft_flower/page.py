"""Write the report of a run as one HTML page that needs nothing besides itself.

Names of nodes and reasons of failures come from nodes: everything is escaped
(`markup.py`), and the page has no script.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedpft_flower import curves
from fedpft_flower.charts import STYLE as CHART_STYLE
from fedpft_flower.charts import bars, lines, strip
from fedpft_flower.config import Config, Scalar
from fedpft_flower.markup import Markup, element
from fedpft_flower.methods import name_of
from fedpft_flower.metrics import Metrics, metric_of
from fedpft_flower.plan import Plan
from fedpft_flower.wording import (
    count_nodes,
    data_name,
    last_part,
    percent,
    shown_settings,
    size,
    which_adapter,
)

_DESCRIPTION = {
    "train": "training rows in one place (virtual clients share them)",
    "validation": "every choice is made on it; labels are used for nothing else",
    "test": "only reported",
    "public": "the server's own, unlabelled: aligns the sub-FM",
}

_STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --text: #1c2128; --quiet: #59636e; --line: #d8dee4;
  --panel: #f6f8fa; --mark: #0a5fb4; --bad: #b3261e;
  --s0: #0a66c2; --s1: #d0570b; --s2: #1a7f37; --s3: #8250df;
  --s4: #a17000; --s5: #c4328a; --s6: #0b7a8a; --s7: #6e7781;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #0f1419; --text: #e6edf3; --quiet: #9aa6b2; --line: #313a44;
    --panel: #182028; --mark: #6cb6ff; --bad: #ff8a80;
    --s0: #58a6ff; --s1: #ff9d4d; --s2: #56d364; --s3: #bc8cff;
    --s4: #e3b341; --s5: #f778ba; --s6: #39c5cf; --s7: #a0abb6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem;
  background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 {
  font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line);
}
p { margin: .5rem 0; max-width: 46rem; }
.quiet, .unit { color: var(--quiet); }
.tiles {
  display: grid; gap: .75rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr));
}
.tiles div { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word;
}
thead th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.pairs th { width: 16rem; color: var(--quiet); }
table.pairs td, .hash { overflow-wrap: anywhere; }
.number + :not(.number) { padding-left: 1rem; }
table.layers td:last-child { width: 60%; padding-right: 0; vertical-align: middle; }
.bad { color: var(--bad); }
code, .hash { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85em; }
.figures {
  display: grid; gap: 1.5rem 2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
}
figure { margin: 0; break-inside: avoid; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; }
.unit { font-size: .85rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .85rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--mark); }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  table.pairs th { width: 9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  tr { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""


def render_page(
    config: Mapping[str, Scalar],
    rounds: Sequence[Metrics],
    summary: Metrics,
    manifest: Metrics,
) -> str:
    """Return the report of a finished run as one HTML document.

    It is the same whether its facts come from memory or from the files.

    Args:
        config: the effective configuration, flat.
        rounds: the objects of `metrics.jsonl`.
        summary: of `summary.json`.
        manifest: of `manifest.json`.

    Raises:
        FedPFTError: the configuration is none, or the manifest's plan.
    """
    typed = Config.from_run_config(config)
    metric, plan = metric_of(typed.data), Plan.from_json(manifest["plan"])
    settings = shown_settings(config)
    title = f"{name_of(typed)}: {settings['fm.name']} on {data_name(config)}"
    parts = [
        element("h1", title),
        element("p", _subtitle(settings, rounds, summary, metric), class_="quiet"),
        _tiles(summary, metric, plan),
        _section("What was run", _what(settings, summary, manifest, plan)),
        _section("Results", _results(summary, metric, plan)),
        _section("Curves", _curves(rounds, metric, plan)),
        _section("Bytes", _bytes(rounds, summary)),
        _section("Gradient error", _gradient_error(rounds)),
        _section("Nodes", _nodes(rounds, manifest)),
        _section("Kept neurons", _neurons(plan)),
        _section("Time and memory", _time(rounds, summary)),
        _section("Protection sheet", _protection(summary, rounds)),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_STYLE + CHART_STYLE)),
    )
    page = element("html", head, element("body", element("main", *parts)), lang="en")
    return f"<!doctype html>\n{page}\n"


# --------------------------------------------------------------------- its sections


def _section(title: str, *content: object) -> Markup:
    return element("section", element("h2", title), *content)


def _subtitle(
    settings: Mapping[str, Scalar],
    rounds: Sequence[Metrics],
    summary: Metrics,
    metric: str,
) -> str:
    nodes = {
        name
        for entry in rounds
        if "skipped" not in entry
        for name, one in entry.get("per-client", {}).items()
        if one["outcome"] == "ok"
    }
    return (
        f"Federated proxy fine-tuning: task {settings['data.task']}, judged by "
        f"{metric}, {summary['rounds']} rounds, {len(nodes)} "
        f"node{'s' * (len(nodes) != 1)} trained, seed {settings['seed']}"
    )


def _tiles(summary: Metrics, metric: str, plan: Plan) -> Markup:
    before, after = summary["test-before"], summary["test-after"]
    tiles = [
        (f"FM before, test {metric}", _score(before[f"fm-{metric}"])),
        ("FM after", _score(after[f"fm-{metric}"])),
    ]
    if not plan.is_whole:
        tiles.append(("sub-FM after", _score(after[f"sub-fm-{metric}"])))
    tiles += [
        ("FM weights never sent", percent(summary["share-withheld"])),
        ("to and from clients", size(summary["bytes-down"] + summary["bytes-up"])),
        ("client failures", str(summary["failures"])),
    ]
    pairs = [element("div", element("dt", n), element("dd", v)) for n, v in tiles]
    return element("dl", *pairs, class_="tiles")


def _what(
    settings: Mapping[str, Scalar], summary: Metrics, manifest: Metrics, plan: Plan
) -> list[Markup]:
    facts = [*_facts(settings, summary, manifest, plan), *_hashes(manifest)]
    return [_pairs(facts), _splits(manifest), _settings(settings)]


def _facts(
    settings: Mapping[str, Scalar], summary: Metrics, manifest: Metrics, plan: Plan
) -> list[tuple[str, object]]:
    nodes, labels = manifest["nodes"], manifest["labels"]
    planned = manifest.get("planned-rounds", settings["rounds"])
    return [
        ("method", name_of(Config.from_run_config(settings))),
        ("aggregation strategy", settings["strategy"]),
        ("FM", settings["fm.name"]),
        ("sub-FM", "the whole FM" if plan.is_whole else plan.told),
        ("task", settings["data.task"]),
        ("data", last_part(str(settings["data.path"])) or "embedded"),
        ("labels", ", ".join(labels) if labels else "none: text is generated"),
        ("nodes", count_nodes(nodes)),
        ("rounds", f"{summary['rounds']} of {planned}"),
        ("adapter of", which_adapter(summary)),
        ("seed", manifest["seed"]),
        ("platform", _platform(manifest)),
        (
            "versions",
            ", ".join(f"{n} {v}" for n, v in sorted(manifest["versions"].items())),
        ),
        *(
            (f"other versions at {node}", ", ".join(f"{n} {v}" for n, v in own.items()))
            for node, own in sorted(manifest.get("node-versions", {}).items())
        ),
    ]


def _hashes(manifest: Metrics) -> list[tuple[str, object]]:
    return [
        (f"{name}, SHA-256", element("span", manifest[key], class_="hash"))
        for name, key in (
            ("FM", "fm-sha256"),
            ("sub-FM", "sub-fm-sha256"),
            ("averaged adapter", "adapter-sha256"),
            ("final adapter, in the FM", "final-adapter-sha256"),
        )
    ]


def _splits(manifest: Metrics) -> Markup:
    splits = [
        [
            name,
            str(split["rows"]),
            split["source"] or _DESCRIPTION.get(name, ""),
            element("span", split["sha256"], class_="hash"),
        ]
        for name, split in sorted(manifest["splits"].items())
    ]
    titles = ["split", "rows", "from", "SHA-256"]
    return _table(titles, splits, {1}, "Rows at the server")


def _settings(settings: Mapping[str, Scalar]) -> Markup:
    whole = [
        (key, element("code", repr(value) if isinstance(value, str) else str(value)))
        for key, value in sorted(settings.items())
    ]
    return element(
        "details",
        element("summary", "The whole effective configuration"),
        element(
            "p",
            "Of paths the last part; config.toml beside this page has them whole.",
            class_="quiet",
        ),
        _pairs(whole),
    )


def _platform(manifest: Metrics) -> str:
    machine = manifest["machine"]
    return f"{machine['platform']}, {machine['threads']} threads"


def _results(summary: Metrics, metric: str, plan: Plan) -> list[Markup]:
    before, plain, after = (
        summary[f"test-{when}"] for when in ("before", "plain", "after")
    )
    names = [metric, *sorted(_names(after) - {metric, "loss"}), "loss"]
    refined = summary["refinement"]
    rows = [
        ("FM before", "test", before, "fm"),
        ("FM, plugged in", "test", plain, "fm"),
    ]
    if refined.get("kept"):
        rows.append(("FM, refined", "test", after, "fm"))
    if not plan.is_whole:
        rows.append(("sub-FM", "test", after, "sub-fm"))
    for split, found in sorted(summary["more-tests"].items()):
        rows.append(("FM", split, found, "fm"))
        if not plan.is_whole:
            rows.append(("sub-FM", split, found, "sub-fm"))
    table = _table(
        ["model", "split", *names],
        [
            [model, split, *(_score(found[f"{key}-{name}"]) for name in names)]
            for model, split, found, key in rows
        ],
        set(range(2, 2 + len(names))),
    )
    told = _refinement(refined, metric) + _followed(refined)
    return [table, element("p", told, class_="quiet")]


def _followed(refined: Metrics) -> str:
    """Say where the refinement saw validation rows, on which its figures then are."""
    if not (share := refined.get("validation-share")):
        return ""
    return (
        f" {percent(share)} of its batches were validation rows, without their labels, "
        "so that figures on validation behind it are of rows that it has seen."
    )


def _refinement(refined: Metrics, metric: str) -> str:
    if not refined:
        return "This run did not refine the plugged-in adapter."
    if "error" in refined:
        return f"The refinement failed: {refined['error']}; the adapter is the average."
    loss, score = (
        tuple(_score(refined[f"validation-{name}{when}"]) for when in ends)
        for name, ends in (("loss-", ("before", "after")), ("", ("before", "after")))
    )
    kept = "kept" if refined["kept"] else "not kept"
    return (
        f"Refinement, {refined['steps']} steps without labels: validation loss "
        f"{loss[0]} to {loss[1]}, {metric} {score[0]} to {score[1]}; {kept}."
    )


def _names(found: Metrics) -> set[str]:
    return {name.removeprefix("fm-") for name in found if name.startswith("fm-")}


def _curves(rounds: Sequence[Metrics], metric: str, plan: Plan) -> list[Markup]:
    shown = curves.scores(rounds, metric, plan), curves.losses(rounds, plan)
    drawn = {
        f"{what}: {name}": dict(points)
        for what, found in zip((metric, "loss"), shown, strict=True)
        for name, points in found.items()
    }
    rows = [
        [
            entry["round"],
            *(
                _score(points[entry["round"]]) if entry["round"] in points else ""
                for points in drawn.values()
            ),
        ]
        for entry in rounds
    ]
    table = _table(["round", *drawn], rows, set(range(1, 1 + len(drawn))))
    return [
        _figures(
            lines(f"{metric} on validation", metric, shown[0]),
            lines("Loss", "cross-entropy", shown[1]),
        ),
        element("details", element("summary", "Figures of every round"), table),
    ]


def _bytes(rounds: Sequence[Metrics], summary: Metrics) -> list[Markup]:
    def stacks(way: str) -> dict[float, dict[str, float]]:
        return {
            entry["round"]: {
                kind.removeprefix(f"{way}-"): count["logical"] / 1e6
                for kind, count in entry.get("bytes", {}).items()
                if kind.startswith(f"{way}-")
            }
            for entry in rounds
        }

    totals: dict[str, list[int]] = {}
    for entry in rounds:
        for kind, count in entry.get("bytes", {}).items():
            total = totals.setdefault(kind, [0, 0])
            total[0] += count["logical"]
            total[1] += count["sent"]
    return [
        _figures(
            bars("From the server to clients", "MB", stacks("down")),
            bars("From clients to the server", "MB", stacks("up")),
        ),
        _table(
            ["direction, kind", "for all recipients", "of that sent"],
            [
                [kind, size(all_), size(sent)]
                for kind, (all_, sent) in sorted(totals.items())
            ],
            {1, 2},
        ),
        element(
            "p",
            f"A client gets {size(summary['bytes-install-per-client'])} once "
            f"(install), and {size(summary['bytes-per-client-and-round'])} cross in a "
            "round that it takes. What a machine already held is counted and not sent.",
            class_="quiet",
        ),
    ]


def _gradient_error(rounds: Sequence[Metrics]) -> Markup:
    found = curves.gradient_errors(rounds)
    measured = {current for errors in found.values() for current in errors}
    if not measured:
        return _nothing("This run measured no gradient error.")
    kinds = (
        ("Error of the sub-FM's adapter gradients", "relative L2", "relative"),
        ("Their direction", "cosine with the FM's", "cosine"),
    )
    if len(measured) == 1:  # a point is no curve
        rows = [
            [label, *(_score(error[name]) for *_, name in kinds)]
            for label, errors in found.items()
            for error in errors.values()
        ]
        titles = ["in round " + str(*measured), *(unit for _, unit, _ in kinds)]
        return _table(titles, rows, {1, 2})
    return _figures(
        *(
            lines(title, unit, curves.of_errors(found, name))
            for title, unit, name in kinds
        )
    )


@dataclass
class _Node:
    """Sum up what one node did in a run."""

    rows: int | None = None
    rounds: int = 0
    losses: list[float] = field(default_factory=list)
    down: int = 0
    up: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    failures: list[str] = field(default_factory=list)


def _sum_up(
    rounds: Sequence[Metrics], rows: Mapping[str, int | None]
) -> dict[str, _Node]:
    nodes = {name: _Node(rows=count) for name, count in rows.items()}
    for entry in rounds:
        for name, one in entry.get("per-client", {}).items():
            node = nodes.setdefault(name, _Node())
            node.down += one.get("bytes-down", 0)
            node.up += one.get("bytes-up", 0)
            if one["outcome"] == "ok":
                node.rounds += 1
                # With differential privacy nodes tell none of these.
                node.losses += [one["train_loss"]] if "train_loss" in one else []
                node.seconds += one.get("seconds", 0.0)
                node.flops += one.get("flops", 0.0)
            else:
                node.failures.append(f"round {entry['round']}: {one['outcome']}")
    return nodes


def _nodes(rounds: Sequence[Metrics], manifest: Metrics) -> list[Markup]:
    nodes = _sum_up(rounds, manifest["nodes"])
    active = {name: n for name, n in nodes.items() if n.rounds or n.failures}
    rows: list[list[object]] = [
        [
            name,
            "" if node.rows is None else str(node.rows),
            str(node.rounds),
            _score(sum(node.losses) / len(node.losses)) if node.losses else "",
            size(node.down),
            size(node.up),
            f"{node.seconds:.1f}" if node.seconds else "",
            f"{node.flops / 1e9:.3g}" if node.flops else "",
            [
                element("span", part, element("br"), class_="bad")
                for part in node.failures
            ],
        ]
        for name, node in sorted(active.items())
    ]
    titles = [
        "node",
        "rows",
        "rounds",
        "mean loss",
        "down",
        "up",
        "seconds",
        "GFLOP",
        "failures",
    ]
    parts = [_table(titles, rows, set(range(1, 8)))]
    if idle := len(nodes) - len(active):
        nodes_were = "nodes were" if idle > 1 else "node was"
        text = f"{idle} more {nodes_were} there and not asked to train."
        parts.append(element("p", text, class_="quiet"))
    return parts


def _neurons(plan: Plan) -> list[Markup]:
    rows: list[list[object]] = []
    for layer, width in enumerate(plan.widths):
        kept = plan.kept.get(layer, ())
        state = (
            "dropped" if not kept else "whole" if len(kept) == width else "compressed"
        )
        adapted = kept and (plan.adapters is None or layer in plan.adapters)
        label = f"layer {layer} keeps {len(kept)} of {width} neurons"
        rows.append(
            [
                str(layer),
                state,
                f"{len(kept)} of {width}",
                "yes" if adapted else "no",
                strip(label, kept, width),
            ]
        )
    titles = ["layer", "state", "neurons", "adapter", "which"]
    return [
        element(
            "p",
            "What the sub-FM keeps of every layer's feed-forward network, neuron 0 at "
            "the left; a place is as full as the share of its neurons that stays.",
            class_="quiet",
        ),
        _table(titles, rows, {2}, class_="layers"),
    ]


def _time(rounds: Sequence[Metrics], summary: Metrics) -> list[Markup]:
    seconds = {
        entry["round"]: {"seconds": entry["seconds"]}
        for entry in rounds
        if "seconds" in entry
    }
    peaks = {
        f"{name}{on}": _gigabytes(rounds, f"peak-{kind}-{side}")
        for kind, on in (("memory", ""), ("gpu-memory", ", GPU"))
        for name, side in (("server", "server"), ("largest client", "client"))
    }
    memory = {name: ones for name, ones in peaks.items() if any(y for _, y in ones)}
    return [
        _figures(
            bars("Seconds a round (0: preparation)", "s", seconds),
            lines("Peak memory so far", "GB", memory),
        ),
        element(
            "p",
            f"All rounds took {summary['seconds']:.0f} s; peak memory "
            f"{size(summary['peak-memory-server'])} at the server, "
            f"{size(summary['peak-memory-client'])} at a client.",
            class_="quiet",
        ),
    ]


def _gigabytes(rounds: Sequence[Metrics], key: str) -> list[tuple[float, float]]:
    return [(x, y / 1e9) for x, y in curves.series(rounds, key)]


def _protection(summary: Metrics, rounds: Sequence[Metrics]) -> list[Markup]:
    sheet = summary["protection"]["rows"]
    rows = [[row["name"], row["value"], row["note"]] for row in sheet]
    parts = [_table(["what", "value", "note"], rows, set())]
    if privacy := summary["privacy"]:
        told = ", ".join(f"{name} {value}" for name, value in privacy.items())
        parts.append(element("p", f"Differential privacy: {told}."))
    spent = [
        (entry["round"], float(entry["privacy"]["epsilon"]))
        for entry in rounds
        if "epsilon" in entry.get("privacy", {})
    ]
    parts.append(_figures(lines("Privacy spent", "epsilon", {"epsilon": spent})))
    return parts


# ------------------------------------------------------------------------ its pieces


def _figures(*figures: Markup) -> Markup:
    return element("div", *figures, class_="figures") if any(figures) else Markup()


def _nothing(text: str) -> Markup:
    return element("p", text, class_="quiet")


def _pairs(rows: Iterable[tuple[str, object]]) -> Markup:
    body = [
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in rows
    ]
    return element("table", element("tbody", *body), class_="pairs")


def _table(
    titles: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: set[int],
    caption: str = "",
    class_: str | None = None,
) -> Markup:
    """Return a table; its first column names the rows, `numbers` are aligned right."""

    def kind(place: int) -> str | None:
        return "number" if place in numbers else None

    head = [
        element("th", title, scope="col", class_=kind(place))
        for place, title in enumerate(titles)
    ]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(
                element("td", cell, class_=kind(place))
                for place, cell in enumerate(row[1:], start=1)
            ),
        )
        for row in rows
    ]
    table = element(
        "table",
        element("caption", caption) if caption else "",
        element("thead", element("tr", *head)),
        element("tbody", *body),
        class_=class_,
    )
    label = caption or f"table by {titles[0]}"
    return element(
        "div", table, class_="scroll", tabindex=0, role="region", aria_label=label
    )


def _score(value: float) -> str:
    """Return a metric or loss; of a large one, four digits."""
    return f"{value:.3f}" if abs(value) < 1000 or math.isnan(value) else f"{value:.4g}"
