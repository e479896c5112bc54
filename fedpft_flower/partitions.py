"""Share the training rows among virtual clients, by flwr-datasets' partitioners."""

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
    SizePartitioner,
)

from fedpft_flower.config import DataConfig, FedPFTError, PartitionConfig, derive_seed
from fedpft_flower.tasks import check_kind, load_task

# Build a partitioner for `count` clients, and the rows in the order that it shares out.
Kind = Callable[[Dataset, PartitionConfig, int, int], tuple[Partitioner, Dataset]]


def load_partition(
    data: DataConfig, partition: PartitionConfig, index: int, count: int, seed: int
) -> Dataset:
    """Return the training rows of virtual client `index` of `count`.

    Raises:
        FedPFTError: there are no training rows, or a partition would be empty.
    """
    try:
        part = _partitioner(data, partition, count, seed).load_partition(index)
    except ValueError as error:  # the partitioner says that it cannot
        reason = " ".join(str(error).split())
        raise FedPFTError(
            f"partition.kind = {partition.kind!r} cannot share {data.task!r} among "
            f"{count} nodes ({reason}); change partition.* or use fewer nodes"
        ) from error
    if not len(part):
        raise FedPFTError(f"partition {index} of {count} is empty; use fewer nodes")
    return part


@lru_cache(maxsize=2)
def _partitioner(
    data: DataConfig, partition: PartitionConfig, count: int, seed: int
) -> Partitioner:
    train = load_task(data, seed).train
    if train is None:
        raise FedPFTError(
            f"data.path = {data.path!r} has no split {data.train_split!r} to train on; "
            "set data.train-split, or give every node its own rows: --node-config "
            "'data-path=\"...\"'"
        )
    if len(train) < count:
        raise FedPFTError(
            f"{len(train)} training rows for {count} nodes leave an empty partition; "
            "use fewer nodes or more rows"
        )
    rows = derive_seed(seed, "partition") % 2**32
    check_kind(data, partition)
    partitioner, ordered = PARTITIONS[partition.kind](train, partition, count, rows)
    partitioner.dataset = ordered
    return partitioner


def _iid(
    train: Dataset, config: PartitionConfig, count: int, seed: int
) -> tuple[Partitioner, Dataset]:
    return IidPartitioner(count), train.shuffle(seed=seed)


def _dirichlet(
    train: Dataset, config: PartitionConfig, count: int, seed: int
) -> tuple[Partitioner, Dataset]:
    def draw(least: int) -> Partitioner:
        return DirichletPartitioner(
            num_partitions=count,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=least,
            self_balancing=False,
            seed=seed,
        )

    least = max(1, min(10, len(train) // (10 * count)))
    trial = draw(least)
    trial.dataset = train.select_columns(["label"])
    try:
        with warnings.catch_warnings():  # it tells of every draw
            warnings.simplefilter("ignore")
            trial.load_partition(0)
    except ValueError:  # ten draws gave some client fewer: of few classes most do
        return _deal(train, _filled(train, draw(0), count, least, seed))
    return draw(least), train


def _filled(
    train: Dataset, drawn: Partitioner, count: int, least: int, seed: int
) -> np.ndarray:
    """Return each row's client as drawn, but `least` rows at least for every client.

    What a client lacks comes, row by row, from who has most.
    """
    drawn.dataset = train.select_columns(["label"]).add_column(
        "row", np.arange(len(train))
    )
    rows = [list(drawn.load_partition(client)["row"][:]) for client in range(count)]
    generator = np.random.default_rng(seed)
    while len(poorest := min(rows, key=len)) < least:
        richest = max(rows, key=len)
        poorest.append(richest.pop(int(generator.integers(len(richest)))))
    clients = np.empty(len(train), dtype=np.int64)
    for client, own in enumerate(rows):
        clients[own] = client
    return clients


def _deal(train: Dataset, clients: np.ndarray) -> tuple[Partitioner, Dataset]:
    """Give each row to the client that is named for it."""
    others = [name for name in train.column_names if name != "client"]
    dealt = train.select_columns(others).add_column("client", clients)
    return NaturalIdPartitioner("client"), dealt


def _pathological(
    train: Dataset, config: PartitionConfig, count: int, seed: int
) -> tuple[Partitioner, Dataset]:
    chosen = PathologicalPartitioner(
        num_partitions=count,
        partition_by="label",
        num_classes_per_partition=config.classes,
        # Every class has a client where there are as many clients as classes.
        class_assignment_mode="first-deterministic",
        seed=seed,
    )
    return chosen, train


def _natural(
    train: Dataset, config: PartitionConfig, count: int, seed: int
) -> tuple[Partitioner, Dataset]:
    """Give each client the rows of its own id, or of several ids dealt in turn."""
    if "client" not in train.column_names:
        raise FedPFTError(
            "partition.kind = 'natural' needs the column that says which client a row "
            "belongs to; name it in data.client-column"
        )
    ids, places = np.unique(np.asarray(train["client"][:]), return_inverse=True)
    if len(ids) < count:
        raise FedPFTError(
            f"data.client-column has {len(ids)} different values, but there are "
            f"{count} nodes; use {len(ids)} nodes or fewer"
        )
    return _deal(train, places % count)


def _sizes(
    train: Dataset, config: PartitionConfig, count: int, seed: int
) -> tuple[Partitioner, Dataset]:
    """Draw the clients' shares of the rows from Dirichlet(alpha), one row at least."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet([config.alpha] * count)
    edges = np.floor(np.cumsum(shares) * (len(train) - count)).astype(int)
    edges[-1] = len(train) - count  # the sum of floats is not always one
    sizes = 1 + np.diff(edges, prepend=0)
    return SizePartitioner(sizes.tolist()), train.shuffle(seed=seed)


PARTITIONS: dict[str, Kind] = {
    "iid": _iid,
    # Label skew: each class is shared by a draw from Dirichlet(alpha) (Yurochkin et al.
    # 2019, arXiv 1905.12022).
    "dirichlet": _dirichlet,
    # Label skew: `partition.classes` classes a client (after McMahan et al. 2017, arXiv
    # 1602.05629).
    "pathological": _pathological,
    # As the rows say: `data.client-column`.
    "natural": _natural,
    # Size skew: IID rows, shares drawn from Dirichlet(alpha).
    "sizes": _sizes,
}
