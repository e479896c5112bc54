"""Compare methods over seeds through `fedpft-run`, and print mean and spread.

python -m benchmarks.methods conf/sst2-minilm.toml --nodes 100 \
    --methods fedpetuning fedpft fedpft-n --seeds 0 1 2 --out DIR key=value ...
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks import ROOT, run_main
from fedpft_flower.commands import read_config, run_experiment
from fedpft_flower.evaluation import metric_of


def main() -> None:
    """Run every cell that has no result yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("conf", type=Path)
    parser.add_argument("set", nargs="*", metavar="key=value")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metric", help="another than the spec's data.metric")
    options = parser.parse_intermixed_args()
    cells = [(method, seed) for seed in options.seeds for method in options.methods]
    for method, seed in cells:
        place = options.out / f"{method}-{seed}"
        if summary_of(place) is None:
            began = time.monotonic()
            pairs = [
                *options.set,
                f"method={method}",
                f"seed={seed}",
                f"out-dir={place}",
            ]
            status = run_experiment(options.conf, pairs, options.nodes, ROOT, False)
            print(f"{method} seed {seed}: status {status}, ", end="")
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    metric = options.metric or metric_of(read_config(options.conf, options.set).data)
    print(table(options.methods, options.seeds, options.out, metric))


def summary_of(place: Path) -> dict[str, dict[str, float]] | None:
    """Return the summary of the finished run below a directory, if there is one."""
    found = sorted(place.glob("*/summary.json"))
    return json.loads(found[-1].read_text()) if found else None


def table(methods: list[str], seeds: list[int], out: Path, metric: str) -> str:
    """Return a test metric as Markdown: each seed, mean, sample deviation."""
    header = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| method | model | {header} | mean | spread |",
        "|" + "---|" * (len(seeds) + 4),
    ]
    for method in methods:
        results = [summary_of(out / f"{method}-{seed}") for seed in seeds]
        for name, key in (("FM", f"fm-{metric}"), ("sub-FM", f"sub-fm-{metric}")):
            values = [r["test-after"][key] for r in results if r]
            cells = [f"{r['test-after'][key]:.3f}" if r else "failed" for r in results]
            mean = f"{statistics.mean(values):.3f}" if values else "-"
            spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            lines.append(
                f"| {method} | {name} | {' | '.join(cells)} | {mean} | {spread} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
