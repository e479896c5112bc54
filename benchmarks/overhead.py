"""Compare the seconds of a run through Flower with those of the plain loop.

Both sides do the same work: the same clients, rows, steps, alignment and evaluation.
The plain loop (`benchmarks/plain_loop.py`) is one PyTorch process at its best number of
threads; the other side is `fedpft-run`, that is `flwr run` under Ray. They take turns,
each repetition with a seed and processes of its own, and must end alike:
    python -m benchmarks.overhead --rounds 6 --repeats 3 key=value ...

A steady round is one after the first and without alignment; a side's figure is the
median over them. The ratio is taken within a repetition. Every cell of the table is a
median over repetitions, with the smallest and the largest behind it.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import ROOT, markdown_table, parser, run_main, spread
from benchmarks.finished import only_run, run_app, seconds_after_first, start_up
from benchmarks.plain_loop import PlainLoop
from fedpft_flower.adapters import Adapter, export_adapter
from fedpft_flower.commands import read_config
from fedpft_flower.config import Config
from fedpft_flower.evaluation import evaluate
from fedpft_flower.metrics import Metrics
from fedpft_flower.run_directory import RunDirectory
from fedpft_flower.runs import LOG
from fedpft_flower.tasks import load_task, task_of

# Relative L2 distance of the final adapters. With one thread everywhere it is 0; other
# thread counts add floats in another order, and training makes that grow.
TOLERANCE = 0.002


@dataclass(frozen=True)
class Side:
    """Hold what one side of a repetition measured."""

    # Seconds from the start of the side's first process until round 1 begins, its
    # imports included.
    start_up: float
    rounds: list[Metrics]
    adapter: Adapter
    # Of them, until the ServerApp speaks: its log says when, a plain loop has none.
    until_app: float = math.nan

    @property
    def before(self) -> float:
        """Return the seconds of all that comes before the alignment."""
        return self.start_up - self.prepare

    @property
    def prepare(self) -> float:
        """Return the seconds of alignment before training and of first evaluations."""
        return float(self.rounds[0]["seconds"])

    @property
    def steady(self) -> float:
        """Return the median seconds of rounds after the first, without alignment."""
        return _median(seconds_after_first(self.rounds, aligned=False))

    @property
    def aligned(self) -> float:
        """Return the median seconds of rounds after the first, with alignment."""
        return _median(seconds_after_first(self.rounds, aligned=True))


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds or [math.nan])


def main() -> None:
    """Run both sides in turn and print the table."""
    options = _options()
    # The refinement behind the last round is in no figure.
    pairs = [f"rounds={options.rounds}", "plug-in.steps=0", *options.set]
    with TemporaryDirectory() as place:
        # No sub-FM of an earlier run may spare Flower an install.
        os.environ["FEDPFT_CACHE"] = f"{place}/cache"
        config = read_config(options.conf, pairs)
        if config.rounds < 2:
            sys.exit(f"rounds = {config.rounds}; give 2 or more, one must be steady")
        in_fresh_process(load_task, config.data, config.seed)  # extracts, if it must
        threads = options.threads or in_fresh_process(
            best_threads, config, options.nodes
        )
        repetitions = []
        for repeat in range(options.repeats):
            out = Path(place) / str(repeat)
            own = [*pairs, f"seed={config.seed + repeat}"]
            plain = plain_side(options.conf, own, options.nodes, threads, out / "plain")
            flower = flower_side(options.conf, own, options.nodes, out / "flower")
            print(verdict(plain, flower), flush=True)
            repetitions.append((plain, flower))
    print(table(repetitions, threads))


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    arguments.add_argument("--conf", type=Path, default=ROOT / "conf" / "demo.toml")
    arguments.add_argument("--nodes", type=int, default=20)
    arguments.add_argument("--rounds", type=int, default=6, help="2 or more")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--threads", type=int, default=0, help="of the plain loop; 0 finds the best"
    )
    return arguments.parse_intermixed_args()


# ------------------------------------------------------------------------ the two sides


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which leaves no memory or threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def best_threads(config: Config, nodes: int) -> int:
    """Return how many threads make a round of the plain loop shortest."""
    cores = os.cpu_count() or 1
    loop = PlainLoop(config, nodes)
    rows = loop.server.encode(loop.task.validation)
    objective = task_of(config.data.task).objective
    seconds: dict[int, float] = {}
    for threads in sorted({*(2**i for i in range(cores.bit_length())), cores}):
        torch.set_num_threads(threads)
        for _ in range(2):  # the first one only warms up
            began = time.monotonic()
            loop.train(config.rounds)  # the last round never measures activity
            for model in (loop.server.fm, loop.server.sub_fm):
                evaluate(model, rows, objective)
            seconds[threads] = time.monotonic() - began
        print(f"threads: {threads}, a round: {seconds[threads]:.1f} s", file=sys.stderr)
    return min(seconds, key=lambda threads: seconds[threads])


def plain_side(
    conf: Path, pairs: Sequence[str], nodes: int, threads: int, out: Path
) -> Side:
    """Run the plain loop in a process of its own."""
    began = time.time()
    config = read_config(conf, [*pairs, f"out-dir={out}"])
    in_fresh_process(run_plain_loop, config, nodes, threads)
    return read_side(out, began)


def run_plain_loop(config: Config, nodes: int, threads: int) -> None:
    """Run the plain loop and write its metrics and adapter as a Flower run does."""
    torch.set_num_threads(threads)
    loop, directory = PlainLoop(config, nodes), RunDirectory(config, 0)
    for entry in loop.run():
        directory.add_round(entry)
    export_adapter(loop.server.fm, directory.path / "adapter")


def flower_side(conf: Path, pairs: Sequence[str], nodes: int, out: Path) -> Side:
    """Run the same by `fedpft-run`, whose progress goes to standard error."""
    began = time.time()
    run_app(conf, [*pairs, f"out-dir={out}"], nodes)
    return read_side(out, began)


def read_side(out: Path, began: float) -> Side:
    """Read the only run directory below `out`, of a run that began at this time."""
    place, rounds = only_run(out)
    log = place / LOG
    return Side(
        start_up=start_up(place, rounds, began),
        rounds=rounds,
        adapter=load_file(place / "adapter" / "adapter_model.safetensors"),
        until_app=first_line(log) - began if log.exists() else math.nan,
    )


def first_line(log: Path) -> float:
    """Return when the first line of a run's log was written, in seconds."""
    with log.open(encoding="utf-8") as lines:
        day, time_of_day = lines.readline().split()[:2]
    return datetime.strptime(f"{day} {time_of_day}", "%Y-%m-%d %H:%M:%S,%f").timestamp()


# --------------------------------------------------------------------------- the report


def verdict(plain: Side, flower: Side) -> str:
    """Return one line that says how alike both sides ended.

    Raises:
        SystemExit: they did not do the same work.
    """
    losses = [side.rounds[-1]["fm-loss"] for side in (plain, flower)]
    apart = distance(plain.adapter, flower.adapter)
    line = (
        f"validation loss {losses[0]:.4f} and {losses[1]:.4f}, relative "
        f"distance of the adapters {apart:.1e}"
    )
    if not apart <= TOLERANCE:
        sys.exit(f"the two sides did NOT do the same work: {line}")
    return f"same work: {line}"


def distance(one: Adapter, other: Adapter) -> float:
    """Return the relative L2 distance of two adapters."""
    names = sorted(one.keys() | other.keys())
    first, second = (torch.cat([a[n].flatten() for n in names]) for a in (one, other))
    return float((first - second).norm() / first.norm())


def table(repetitions: Sequence[tuple[Side, Side]], threads: int) -> str:
    """Return the comparison as Markdown."""
    figures: dict[str, Callable[[Side], float]] = {
        "steady round": lambda side: side.steady,
        "round with alignment": lambda side: side.aligned,
        "start-up until round 1": lambda side: side.start_up,
        "- align, first evaluation": lambda side: side.prepare,
        "- all before": lambda side: side.before,
        "- - processes, imports": lambda side: side.until_app,
        "- - data, FM, neurons, nodes": lambda side: side.before - side.until_app,
    }
    rows = []
    for name, seconds in figures.items():
        both = [(seconds(plain), seconds(flower)) for plain, flower in repetitions]
        cells = [
            spread([plain for plain, _ in both], 1),
            spread([flower for _, flower in both], 1),
            spread([flower - plain for plain, flower in both], 1),
            spread([flower / plain for plain, flower in both], 2),
        ]
        rows.append([name, *cells])
    plain_loop = f"plain loop (threads: {threads})"
    titles = ("seconds", plain_loop, "Flower", "Flower adds", "ratio")
    return markdown_table(titles, rows)


if __name__ == "__main__":
    run_main(main)
