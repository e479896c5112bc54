"""Federate by a plain loop over `ProxyServer`: no Flower, no Ray, no wire.

Clients, rows, seeds, steps, averaging, alignment and evaluation are those of the same
run through Flower, so both end with the same adapter (tests/test_federation.py).
"""

import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from datasets import Dataset
from torch import Tensor

from fedpft_flower.activity import average_rates, inactive_rates
from fedpft_flower.adapters import Adapter, base_model, get_adapter, load_adapter
from fedpft_flower.config import Config, FedPFTError, derive_seed
from fedpft_flower.encoding import Rows, shuffled_batches
from fedpft_flower.loading import load_rows, load_server
from fedpft_flower.metrics import Metrics
from fedpft_flower.partitions import load_partition
from fedpft_flower.sampling import sample
from fedpft_flower.server import ProxyServer
from fedpft_flower.software import quiet
from fedpft_flower.sub_fm import compressed_ffns
from fedpft_flower.tasks import TaskData
from fedpft_flower.training import train_adapter


def load(config: Config) -> tuple[TaskData, Dataset | None, ProxyServer]:
    """Load the task, the public corpus where there is one, and the server with its FM.

    Raises:
        FedPFTError: the configuration, the data or the FM do not fit each other.
    """
    task, public = load_rows(config)
    return task, public, load_server(config, task, public)


# Settings with the values that this loop is for.
_ONLY = {
    "strategy": "FedAvg",
    "privacy.mechanism": "none",
    "wire.adapter": "fp32",
    "wire.frozen": "fp32",
    "train.frozen": "fp32",
    "early-stop": 0,
    "select": "last",
}


class PlainLoop:
    """Train all clients in turn, on the server's own sub-FM, which spares a copy."""

    def __init__(self, config: Config, nodes: int) -> None:
        """Load task and FM for so many clients.

        Raises:
            FedPFTError: a setting asks for what this loop does not do, or there are no
                training rows.
        """
        quiet()
        settings = config.flat()
        for key, value in _ONLY.items():
            if settings[key] != value:
                raise FedPFTError(
                    f"{key} = {settings[key]!r}: the plain loop only averages what it "
                    f"trained in float32, to the last round; give {key}={value}"
                )
        self.config = config
        self.task, _, self.server = load(config)
        if self.task.train is None:
            raise FedPFTError(f"data.path = {config.data.path!r} has no training rows")
        self.keys = [f"partition-{index:06d}" for index in range(nodes)]
        self.rows = cache(self._rows)  # every client's rows are encoded once

    def run(self) -> Iterator[Metrics]:
        """Yield every round's metrics, named as in `metrics.jsonl`; first round 0."""
        server, rounds = self.server, self.config.rounds
        began = time.monotonic()
        alignment = server.prepare()
        server.evaluate("test")
        for current in range(rounds + 1):
            if current:
                alignment = server.end_round(current, *self.train(current))
            entry: Metrics = {"round": current}
            if alignment or not current:
                entry["alignment"] = alignment
            if current % self.config.eval_every == 0 or current == rounds:
                entry |= server.evaluate("validation")
            now = time.monotonic()
            entry["seconds"], began = now - began, now
            yield entry

    def train(self, current: int) -> tuple[Adapter, list[Tensor] | None]:
        """Train the clients of a round.

        Returns:
            The averaged adapter, and the averaged inactive rates where they are due.
        """
        server, config = self.server, self.config
        adapters, rates, weights = [], [], []
        for key in sample(config, self.keys, current):
            rows = self.rows(key)
            load_adapter(server.sub_fm, server.adapter)
            if server.wants_activity(current):
                rates.append(self._measure(rows))
            seed = derive_seed(config.seed, "client", current, key)
            train_adapter(server.sub_fm, rows, config.train, server.lr(current), seed)
            adapters.append(get_adapter(server.sub_fm))
            weights.append(1 if config.weighting == "uniform" else len(rows))
        averaged = average_rates(rates, weights) if rates else None
        return average_adapters(adapters, weights), averaged

    def _rows(self, key: str) -> Rows:
        config, count = self.config, len(self.keys)
        index = self.keys.index(key)
        part = load_partition(config.data, config.partition, index, count, config.seed)
        return self.server.encode(part)

    def _measure(self, rows: Rows) -> list[Tensor]:
        server = self.server
        ffns = compressed_ffns(base_model(server.sub_fm), server.plan)
        batches = shuffled_batches(rows, self.config.train.batch_size, seed=0)
        return inactive_rates(base_model(server.sub_fm), ffns, batches, server.limits)


def average_adapters(adapters: Sequence[Adapter], weights: Sequence[int]) -> Adapter:
    """Average adapters by their weights."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return {
        name: torch.einsum(
            "c,c...->...", shares, torch.stack([a[name] for a in adapters]).double()
        ).to(first.dtype)
        for name, first in adapters[0].items()
    }
