"""Measure two bounds that are no federated methods: `centralised` and `local`.

python -m benchmarks.bounds conf/demo.toml key=value ... --nodes 20 --seeds 0 1 2

Both train LoRA and the head on the whole FM (the configured `method` is ignored) with
the federation's FM, start, batch size, optimiser and test rows. Every stage is one call
of `train_adapter`, as a client's training is, with a fresh AdamW and a constant rate:

* `centralised`: all clients' training rows in one place; one stage a round. A stage
  takes as many steps as the clients that the federation would choose in this round take
  together, at this round's learning rate. So the number of steps is the federation's:
  rounds x clients per round x steps per client.
* `local`: each client alone on its own rows, for the steps that it expects to take in
  all rounds: rounds x (clients per round / nodes) x its steps, rounded. It has as many
  stages as the rounds that it expects to be chosen in (rounded, at least one), of equal
  length up to one step; the learning rate falls over them as it does over rounds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import markdown_table, parser, run_main
from benchmarks.plain_loop import PlainLoop
from fedpft_flower.adapters import load_adapter
from fedpft_flower.commands import read_config
from fedpft_flower.config import Config, FedPFTError, TrainConfig, derive_seed
from fedpft_flower.encoding import Rows
from fedpft_flower.evaluation import evaluate
from fedpft_flower.metrics import metric_of
from fedpft_flower.sampling import sample
from fedpft_flower.tasks import task_of
from fedpft_flower.training import round_lr, train_adapter


def main() -> None:
    """Measure both bounds for every seed and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("conf", type=Path, help="experiment")
    arguments.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--nodes", type=int, default=20)
    arguments.add_argument(
        "--clients", type=int, help="`local` takes a seeded sample of so many nodes"
    )
    options = arguments.parse_intermixed_args()
    config = read_config(options.conf, options.set)
    clients = options.clients or options.nodes
    if not 0 < clients <= options.nodes:
        raise FedPFTError(f"--clients {clients} of --nodes {options.nodes}; give fewer")
    central, alone = [], []
    for seed in options.seeds:
        loop = whole_fm(replace(config, seed=seed), options.nodes)
        central.append(centralised(loop))
        alone.append(local(loop, clients))
    print(f"test {metric_of(config.data)}\n")
    print(table(options.seeds, central, alone))


def whole_fm(config: Config, nodes: int) -> PlainLoop:
    """Load a federation whose clients would get the whole FM."""
    return PlainLoop(replace(config, method="fedpetuning"), nodes)


def centralised(loop: PlainLoop) -> float:
    """Train on all rows in one place and return the test metric."""
    assert loop.task.train is not None  # PlainLoop has refused such a task
    rows = loop.server.encode(loop.task.train)
    return trained_metric(loop, rows, centralised_steps(loop), "centralised")


def local(loop: PlainLoop, clients: int) -> list[float]:
    """Train so many clients alone and return the test metric of each."""
    generator = np.random.default_rng(derive_seed(loop.config.seed, "local"))
    chosen = sorted(generator.choice(loop.keys, size=clients, replace=False).tolist())
    return [
        trained_metric(loop, loop.rows(key), local_steps(loop, key), key)
        for key in chosen
    ]


def centralised_steps(loop: PlainLoop) -> list[int]:
    """Return the steps of every stage: those of all clients of a round."""
    return [
        sum(
            client_steps(len(loop.rows(key)), loop.config.train)
            for key in sample(loop.config, loop.keys, current)
        )
        for current in range(1, loop.config.rounds + 1)
    ]


def local_steps(loop: PlainLoop, key: str) -> list[int]:
    """Return the steps of every stage of a client that trains alone."""
    config = loop.config
    chosen = len(sample(config, loop.keys, 1)) * config.rounds / len(loop.keys)
    stages = max(1, round(chosen))
    steps = max(1, round(chosen * client_steps(len(loop.rows(key)), config.train)))
    return [steps * (i + 1) // stages - steps * i // stages for i in range(stages)]


def client_steps(rows: int, train: TrainConfig) -> int:
    """Return the optimiser steps of one local training on so many rows."""
    return train.local_steps or train.local_epochs * math.ceil(rows / train.batch_size)


def trained_metric(
    loop: PlainLoop, rows: Rows, stages: Sequence[int], purpose: str
) -> float:
    """Train the FM from the federation's start; return its metric on the test."""
    server, config = loop.server, loop.config
    load_adapter(server.fm, server.adapter)
    for stage, steps in enumerate(stages, start=1):
        train_adapter(
            server.fm,
            rows,
            replace(config.train, local_steps=steps),
            round_lr(config.train, stage, len(stages)),
            derive_seed(config.seed, "bound", purpose, stage),
        )
    test = server.encode(loop.task.test)
    objective = task_of(config.data.task).objective
    return evaluate(server.fm, test, objective)[metric_of(config.data)]


def table(
    seeds: Sequence[int], central: Sequence[float], alone: Sequence[Sequence[float]]
) -> str:
    """Return test metrics as Markdown; spreads are sample deviations."""
    each = (f"seed {seed}" for seed in seeds)
    titles = ("bound", *each, "mean", "spread", "spread over clients")
    rows = []
    means = [statistics.mean(accuracies) for accuracies in alone]
    over_clients = statistics.mean(map(deviation, alone))
    for name, values, clients in (
        ("centralised", central, math.nan),
        ("local", means, over_clients),
    ):
        figures = [*values, statistics.mean(values), deviation(values), clients]
        rows.append([name, *("-" if math.isnan(f) else f"{f:.3f}" for f in figures)])
    return markdown_table(titles, rows)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; of one value, NaN."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


if __name__ == "__main__":
    run_main(main)
