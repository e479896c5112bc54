"""Time a message and its reply in a deployment: Flower's polling and this package's.

An app that does nothing (benchmarks/echo) exchanges one message with every SuperNode,
as real processes, through both grids in turns:
    python -m benchmarks.exchange --nodes 2 --exchanges 7
"""

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import ROOT, markdown_table, parser, run_main
from deploy.processes import Deployment


def main() -> None:
    """Run the deployment and print median and range."""
    arguments = parser(__doc__)
    arguments.add_argument("--nodes", type=int, default=2)
    arguments.add_argument("--exchanges", type=int, default=7)
    options = arguments.parse_args()
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
    rows = []
    for name, values in seconds.items():
        figures = statistics.median(values), min(values), max(values)
        rows.append([name, len(values), *(f"{value:.1f}" for value in figures)])
    titles = ("grid", "exchanges", "median s", "smallest", "largest")
    return markdown_table(titles, rows)


if __name__ == "__main__":
    run_main(main)
