"""Share the training rows among virtual clients, by flwr-datasets' partitioners."""

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
            f"partition.kind = {partition.kind!r} leaves an empty partition among "
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
    chosen = DirichletPartitioner(
        num_partitions=count,
        partition_by="label",
        alpha=config.alpha,
        # Small enough that a draw meets it even with strong skew; never empty.
        min_partition_size=max(1, min(10, len(train) // (10 * count))),
        self_balancing=False,
        seed=seed,
    )
    return chosen, train


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
    dealt = train.remove_columns("client").add_column("client", places % count)
    return NaturalIdPartitioner("client"), dealt


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
    # Label skew: each class is shared by a draw from Dirichlet(alpha).
    "dirichlet": _dirichlet,
    # Label skew: `partition.classes` classes a client.
    "pathological": _pathological,
    # As the rows say: `data.client-column`.
    "natural": _natural,
    # Size skew: IID rows, shares drawn from Dirichlet(alpha).
    "sizes": _sizes,
}
