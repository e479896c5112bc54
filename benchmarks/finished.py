"""Make runs, and measure those that are finished, each in a line of a table."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from benchmarks import ROOT, header, line, parser
from fedpft_flower.loading import load_rows, load_server
from fedpft_flower.metrics import Metrics
from fedpft_flower.plan import Plan
from fedpft_flower.runs import ROUNDS, FinishedRun, read_rounds
from fedpft_flower.server import ProxyServer
from fedpft_flower.software import quiet
from fedpft_flower.tasks import TaskData


def measure_runs(
    about: str | None,
    titles: Sequence[str],
    row: Callable[[FinishedRun], Sequence[object]],
) -> None:
    """Print a table with a row for every run named on the command line.

    Args:
        about: what is measured, for --help.
        titles: the columns.
        row: measures a run.

    Raises:
        FedPFTError: a directory is that of no finished run.
    """
    arguments = parser(about)
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = arguments.parse_args()
    quiet()
    print(header(titles))
    for place in options.runs:
        print(line(row(FinishedRun.read(place.absolute()))), flush=True)


def run_app(spec: Path, pairs: Sequence[str], nodes: int, *options: str) -> None:
    """Run an experiment by `fedpft-run`, whose progress goes to standard error.

    Args:
        spec: a TOML file of settings.
        pairs: settings over it, key=value.
        nodes: how many virtual clients.
        options: more options of `fedpft-run`.
    """
    command: list[str | Path] = [Path(sys.executable).with_name("fedpft-run"), spec]
    command += [*pairs, f"--nodes={nodes}", f"--app={ROOT}", *options]
    ended = subprocess.run(command, stdout=sys.stderr, check=False)
    if ended.returncode:
        sys.exit(f"the run of {spec} failed")


def only_run(root: Path) -> tuple[Path, list[Metrics]]:
    """Return the only run directory below a root, and the metrics of its rounds."""
    (metrics,) = root.glob(f"*/{ROUNDS}")
    return metrics.parent, read_rounds(metrics.parent)


def seconds_after_first(rounds: Sequence[Metrics], aligned: bool) -> list[float]:
    """Return the seconds of rounds after the first, with alignment or steady ones."""
    later = rounds[2:]
    return [entry["seconds"] for entry in later if ("alignment" in entry) is aligned]


def start_up(place: Path, rounds: Sequence[Metrics], began: float) -> float:
    """Return the seconds from `began` (clock time) until a run's first round."""
    # The file was last written when the last round ended.
    ended = (place / ROUNDS).stat().st_mtime
    trained: float = sum(entry["seconds"] for entry in rounds[1:])
    return ended - trained - began


def server_of(run: FinishedRun) -> tuple[ProxyServer, TaskData, Dataset | None]:
    """Return a run's server as it was before any alignment, its rows, public rows.

    Raises:
        FedPFTError: they cannot be read.
    """
    task, public = load_rows(run.config)
    plan = Plan.from_json(run.manifest["plan"])
    return load_server(run.config, task, public, plan), task, public
