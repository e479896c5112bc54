"""Say who a node is, and read its rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from flwr.app import ConfigRecord, Context, Message, MetricRecord

from fedpft_flower.config import (
    PRECISIONS,
    Config,
    DataConfig,
    FedPFTError,
    TrainConfig,
)
from fedpft_flower.images import check_images
from fedpft_flower.install import largest_install
from fedpft_flower.refusals import one_line_errors, tell
from fedpft_flower.software import source_hash, versions
from fedpft_flower.store import Store
from fedpft_flower.tasks import load_site
from fedpft_flower.wire import CONFIG, METRICS, config_of, reply


@dataclass(frozen=True)
class Identity:
    """Say who a node is and where its rows are, as its node-config has it."""

    # What sampling goes by, so that it does not depend on Flower's random node ids.
    key: str
    # Whether the key is the same in every run.
    named: bool
    # Its partition of the run's data; of 0 partitions when the rows are its own.
    index: int
    count: int
    # Its own data settings, over those of the run.
    own: dict[str, Any]


# The site in deploy/supernode.env, which nobody has named yet.
UNNAMED = "CHANGE-ME"

# What a node with rows of its own may say otherwise than the run's `data.*`.
OWN_KEYS = {
    "data-path": "path",
    "subset": "subset",
    "separator": "separator",
    "train-split": "train_split",
    "text-columns": "text_columns",
    "image-column": "image_column",
    "label-column": "label_column",
}
# All that this app reads of a node's config; other apps may read more.
_KNOWN = {
    *OWN_KEYS,
    *("site", "partition-id", "num-partitions"),
    *("micro-batch-size", "recompute", "precision", "max-install-mb"),
}


def identify(context: Context) -> Identity:
    """Read a node's config.

    Raises:
        FedPFTError: it says neither which partition nor which file is the node's; or
            what looks like a slip of the pen.
    """
    node = context.node_config
    for key in node.keys() - _KNOWN:
        if close := get_close_matches(key.lower().replace("_", "-"), _KNOWN, 1, 0.8):
            raise FedPFTError(
                f"this node's config has {key}, which nobody reads; is it {close[0]}?"
            )
    own = {field: str(node[key]) for key, field in OWN_KEYS.items() if key in node}
    try:
        index = int(node.get("partition-id", 0))
        count = int(node.get("num-partitions", 0))
    except ValueError as error:
        raise FedPFTError(
            f"partition-id and num-partitions of a node are numbers: {error}"
        ) from error
    if own and not own.get("path"):
        raise FedPFTError(
            f"this node's config has {', '.join(k for k in OWN_KEYS if k in node)} but "
            "no data-path to read; give one"
        )
    if own:
        count = 0
    elif "partition-id" not in node or "num-partitions" not in node:
        raise FedPFTError(
            'this node has no rows; start it with --node-config \'data-path="..." '
            "site=\"...\"', or 'partition-id=0 num-partitions=2'"
        )
    elif not 0 <= index < count:
        raise FedPFTError(
            f"partition-id = {index} is outside 0 to {count - 1} (num-partitions)"
        )
    if "partition-id" in node:
        return Identity(f"partition-{index:06d}", True, index, count, own)
    if node.get("site") == UNNAMED:
        raise FedPFTError(
            f"site = {UNNAMED!r} in this node's config; give it a name of its own"
        )
    if site := str(node.get("site", "")):
        return Identity(site, True, index, count, own)
    return Identity(f"node-{context.node_id}", False, index, count, own)


def own_training(config: TrainConfig, context: Context) -> TrainConfig:
    """Return how a node trains: as the run says, but as its own machine can.

    Its node-config may have `micro-batch-size`, `recompute` and `precision`, which
    change what a step costs and, but for rounding, nothing else.

    Raises:
        FedPFTError: one of them is no such value.
    """
    node = context.node_config
    size = node.get("micro-batch-size", config.micro_batch_size)
    again = node.get("recompute", config.recompute)
    if not (type(size) is int and size >= 0 and isinstance(again, bool)):
        raise FedPFTError(
            f"this node's config has micro-batch-size = {size!r}, recompute = "
            f"{again!r}; give a number of rows, and true or false"
        )
    precision = node.get("precision", config.precision)
    if precision not in PRECISIONS:
        raise FedPFTError(
            f"this node's config has precision = {precision!r}; choose one of "
            f"{', '.join(PRECISIONS)}"
        )
    return replace(
        config, micro_batch_size=size, recompute=again, precision=str(precision)
    )


def local_rows(node: Identity, config: Config, labels: Sequence[str]) -> Dataset:
    """Return the training rows of a node: its own, or its partition of the run's.

    Args:
        node: who asks.
        config: the run.
        labels: the label set [C], which the server fixes.

    Raises:
        FedPFTError: the rows cannot be read, or a label is outside the set.
    """
    if node.own:
        data: DataConfig = replace(config.data, **node.own)
        return load_site(data, labels, config.seed)
    # Here, since a node with rows of its own needs no partitioner.
    from fedpft_flower.partitions import load_partition

    return load_partition(
        config.data, config.partition, node.index, node.count, config.seed
    )


@one_line_errors
def hello(message: Message, context: Context) -> Message:
    """Say who this node is, how many rows it has, and which sub-FMs it holds."""
    config = Config.from_run_config(context.run_config)
    if config.train.frozen != "fp32" and find_spec("bitsandbytes") is None:
        raise FedPFTError(
            f"train.frozen = {config.train.frozen!r} needs bitsandbytes at every node; "
            "install it: pip install 'fedpft-flower[quantised]', or set train.frozen = "
            "'fp32'"
        )
    node = identify(context)
    # These say what is wrong before anything is sent.
    own_training(config.train, context)
    largest_install(context)
    rows = local_rows(node, config, json.loads(config_of(message)["labels"]))
    check_images(rows, "training rows")
    store = Store()
    introduction = ConfigRecord(
        {
            "key": node.key,
            "named": node.named,
            "store": store.name,
            "held": json.dumps(store.hashes()),
            "source": source_hash(),
            "libraries": json.dumps(dict(versions())),
        }
    )
    # With differential privacy it tells no more than that it has rows.
    examples = min(1, len(rows)) if config.privacy.on else len(rows)
    tell(
        context,
        "run %d: %s has %d rows to train on",
        context.run_id,
        node.key,
        len(rows),
    )
    sizes = MetricRecord({"num-examples": examples, "num-partitions": node.count})
    return reply(message, {CONFIG: introduction, METRICS: sizes})
