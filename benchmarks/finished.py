"""Measure runs that are finished: their directories in, a line of a table each out."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from fedpft_flower.app import load_rows, load_server, quiet
from fedpft_flower.plan import Plan
from fedpft_flower.report import FinishedRun
from fedpft_flower.server import ProxyServer
from fedpft_flower.tasks import TaskData


def measure_runs(
    about: str | None, titles: Sequence[str], line: Callable[[FinishedRun], str]
) -> None:
    """Print a table with a line for every run named on the command line.

    Args:
        about: what is measured, for --help.
        titles: the columns.
        line: measures a run.

    Raises:
        FedPFTError: a directory is that of no finished run.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args()
    quiet()
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for place in options.runs:
        print(line(FinishedRun.read(place.absolute())), flush=True)


def server_of(run: FinishedRun) -> tuple[ProxyServer, TaskData, Dataset | None]:
    """Return a run's server as it was before any alignment, its rows, public rows.

    Raises:
        FedPFTError: they cannot be read.
    """
    task, public = load_rows(run.config)
    plan = Plan.from_json(run.manifest["plan"])
    return load_server(run.config, task, public, plan), task, public
