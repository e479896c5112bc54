"""Measure what a better start of the sub-FM costs, and what it brings, side by side.

python -m benchmarks.alignment [KEY=VALUE ...] [--seeds N ...] [--only TEXT]

Every recipe chooses neurons and aligns the same FM, in turns; seconds are those of
choosing and aligning. Gradient error and cosine are the server's own measure, on public
batches before training. Settings change the task and the kept fraction; with --only
the first recipe runs beside those whose name has the text.
"""

import statistics
from typing import Any

from benchmarks import markdown_table, parser, run_main, spread
from benchmarks.plain_loop import load
from fedpft_flower.commands import read_config
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.metrics import Metrics
from fedpft_flower.software import quiet

# The first is what the others are compared with.
RECIPES: dict[str, dict[str, Any]] = {
    "norm, distill 240": {"method": "fedpft-b", "align.steps": 240},
    "energy, least squares": {
        "method": "fedpft-ls",
        "sub-fm.selection": "energy",
        "align.before": "least-squares",
    },
    "energy, least squares, distill 40": {
        "method": "fedpft-ls",
        "sub-fm.selection": "energy",
        "align.steps": 40,
    },
    "greedy, least squares": {
        "method": "fedpft-ls",
        "align.before": "least-squares",
    },
    "greedy, least squares, distill 60": {"method": "fedpft-ls", "align.steps": 60},
    "greedy, least squares, distill 240": {"method": "fedpft-ls", "align.steps": 240},
    "energy, least squares, by sensitivity": {
        "method": "fedpft-ls",
        "sub-fm.selection": "energy",
        "align.before": "least-squares",
        "align.sensitivity": 0.9,
    },
    "greedy, least squares, by sensitivity": {
        "method": "fedpft-ls",
        "align.before": "least-squares",
        "align.sensitivity": 0.9,
    },
    "greedy, least squares, distill 60, by sensitivity": {
        "method": "fedpft-ls",
        "align.steps": 60,
        "align.sensitivity": 0.9,
    },
}


def main() -> None:
    """Run every recipe with every seed, and print a table."""
    arguments = parser(__doc__)
    arguments.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--only", default="", help="recipes whose name has this text"
    )
    options = arguments.parse_args()
    quiet()
    first, *others = RECIPES
    chosen = [first, *(name for name in others if options.only in name)]
    if len(chosen) == 1:
        raise FedPFTError(f"no recipe has {options.only!r} in its name; see RECIPES")
    base = read_config(None, options.settings).flat()
    found: dict[str, list[Metrics]] = {name: [] for name in chosen}
    for seed in options.seeds:
        for name in chosen:
            config = Config.from_run_config({**base, **RECIPES[name], "seed": seed})
            metrics = load(config)[2].prepare()
            found[name].append(metrics)
            print(f"{name}, seed {seed}: {seconds(metrics):.1f} s", flush=True)
    print(table(found))


def seconds(metrics: Metrics) -> float:
    """Return how long choosing neurons and aligning took."""
    refit = metrics.get("least-squares", {}).get("seconds", 0.0)
    return float(metrics["selection-seconds"] + refit + metrics.get("seconds", 0.0))


def table(found: dict[str, list[Metrics]]) -> str:
    """Return seconds, gradient error and cosine of every recipe as Markdown."""
    titles = ("recipe", "seconds", "of the first's", "gradient error", "cosine")
    rows = []
    first = [seconds(one) for one in next(iter(found.values()))]
    for name, ones in found.items():
        taken = [seconds(one) for one in ones]
        ratios = [one / other for one, other in zip(taken, first, strict=True)]
        errors, cosines = (
            statistics.mean(one["gradient-after"][key] for one in ones)
            for key in ("relative", "cosine")
        )
        ratio = statistics.median(ratios)
        figures = (f"{ratio:.2f}", f"{errors:.3f}", f"{cosines:.3f}")
        rows.append((name, spread(taken, 1), *figures))
    return markdown_table(titles, rows)


if __name__ == "__main__":
    run_main(main)
