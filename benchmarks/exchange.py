"""Time a message and its reply in a deployment: Flower's polling and this package's.

An app that does nothing (benchmarks/echo) exchanges one message with every SuperNode,
as real processes, through both grids in turns:
    python -m benchmarks.exchange --nodes 2 --exchanges 7
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import ROOT, run_main
from deploy.processes import Deployment


def main() -> None:
    """Run the deployment and print median and range."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--exchanges", type=int, default=7)
    options = parser.parse_args()
    print(table(measure(options.nodes, options.exchanges)))


def measure(nodes: int, exchanges: int) -> dict[str, list[float]]:
    """Return the seconds of every exchange, by grid."""
    with TemporaryDirectory() as place, Deployment(Path(place)) as deployment:
        # The echo app imports this checkout, wherever the package is installed.
        deployment.environment["PYTHONPATH"] = str(ROOT)
        deployment.superlink()
        for number in range(nodes):
            deployment.supernode(f"node-{number}", f"partition-id={number}")
        echo = ROOT / "benchmarks" / "echo"
        deployment.submit("run", {"exchanges": exchanges}, echo)
        status = deployment.status("run", seconds=60.0 * (exchanges + 2))
        told = re.search(r"^seconds: (.*)$", deployment.log("run"), re.MULTILINE)
        if told is None:
            sys.exit(f"{deployment.log('run')}\nthe run is {status}")
        return dict(json.loads(told[1]))


def table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return Markdown: a row a grid."""
    lines = [
        "| grid | exchanges | median s | smallest | largest |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        cells = f"{len(values)} | {middle:.1f} | {low:.1f} | {high:.1f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
