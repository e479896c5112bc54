"""Do what a node does: introduce itself, install the sub-FM, train, measure activity.

A node needs its own rows and what arrives with the install; it never has the FM and
never asks a hub. In deployment every message runs in a new process, in simulation one
process serves many virtual clients: what is cached here is keyed by content alone.
"""

import functools
import json
import logging
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from peft import PeftModel

from fedpft_flower.activity import inactive_rates
from fedpft_flower.adapters import attach_adapter, base_model, get_adapter, load_adapter
from fedpft_flower.architectures import (
    AUTO_PROCESSORS,
    Architecture,
    architecture_of,
)
from fedpft_flower.codec import REFUSED
from fedpft_flower.config import (
    Config,
    DataConfig,
    FedPFTError,
    LoraConfig,
    derive_seed,
    one_line,
)
from fedpft_flower.encoding import Rows, check_images, encode, shuffled_batches
from fedpft_flower.partitions import load_partition
from fedpft_flower.server import Package
from fedpft_flower.sub_fm import (
    build_skeleton,
    compressed_ffns,
    config_from,
    load_weights,
)
from fedpft_flower.tasks import load_site
from fedpft_flower.training import train_adapter
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    PACKAGE,
    Store,
    apply_delta,
    arrays_of,
    config_of,
    last_line,
    message_bytes,
    pack_rates,
    pack_tensors,
    package_from,
    source_hash,
    unpack_tensors,
)

logger = logging.getLogger(__name__)

MAX_INSTALL_MB = 20_000  # of a node that does not say otherwise

Handler = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class SubFM:
    """Hold an installed sub-FM, ready to take an adapter."""

    model: PeftModel
    package: Package
    processor: Any
    architecture: Architecture


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


# What a node with rows of its own may say otherwise than the run's `data.*`.
OWN_KEYS = {
    "data-path": "path",
    "separator": "separator",
    "train-split": "train_split",
    "text-columns": "text_columns",
    "image-column": "image_column",
    "label-column": "label_column",
}


def identify(context: Context) -> Identity:
    """Read a node's config.

    Raises:
        FedPFTError: it says neither which partition nor which file is the node's.
    """
    node = context.node_config
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
    if site := str(node.get("site", "")):
        return Identity(site, True, index, count, own)
    return Identity(f"node-{context.node_id}", False, index, count, own)


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
    return load_partition(
        config.data, config.partition, node.index, node.count, config.seed
    )


def one_line_errors(handler: Handler) -> Handler:
    """Reply with one clear line where the user can mend what went wrong."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FedPFTError as error:
            reason = str(error)
        except Exception as error:  # a hostile message may raise anything
            logger.exception("a message could not be handled")
            what = f"{type(error).__name__}: {last_line(str(error))}"
            kind = message.metadata.message_type
            reason = f"a {kind} message cannot be handled ({what}); see this node's log"
        site = context.node_config.get("site")
        reason = one_line(f"{site}: {reason}" if site else reason)
        logger.error("%s", reason)
        return Message(Error(REFUSED, reason), reply_to=message)

    return handle


@one_line_errors
def hello(message: Message, context: Context) -> Message:
    """Say who this node is, how many rows it has, and which sub-FMs it holds."""
    config = Config.from_run_config(context.run_config)
    node = identify(context)
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
        }
    )
    sizes = MetricRecord({"num-examples": len(rows), "num-partitions": node.count})
    return _reply(message, {CONFIG: introduction, METRICS: sizes})


@one_line_errors
def install(message: Message, context: Context) -> Message:
    """Keep a sub-FM on disk: a whole one, or the changes of one that is there."""
    most = float(context.node_config.get("max-install-mb", MAX_INSTALL_MB))
    size = sum(message_bytes(message).values())
    if size > most * 1e6:
        raise FedPFTError(
            f"the sub-FM has {size / 1e6:.0f} MB, this node takes max-install-mb = "
            f"{most:g}; raise it in the node's config, or let the server keep less"
        )
    request, store = config_of(message), Store()
    wanted, base = request["sub-fm"], request["base"]
    received = unpack_tensors(arrays_of(message), request["bit-cast"])
    text, installed = request[PACKAGE], True
    if base:
        held = store.get(base)
        installed = held is not None
        if held is not None:
            received, text = apply_delta(held[0], received), held[1]
    if installed:
        store.put(wanted, received, text)
    return _reply(message, {CONFIG: ConfigRecord({"installed": installed})})


@one_line_errors
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this node's rows, on the installed sub-FM.

    A node that has lost its copy says so instead, and gets it again.
    """
    config = Config.from_run_config(context.run_config)
    request = config_of(message)
    wanted, current = request["sub-fm"], request["server-round"]
    sub_fm = _load_sub_fm(wanted, config.lora, config.seed)
    if sub_fm is None:
        return _reply(message, {CONFIG: ConfigRecord({"missing": wanted})})
    node = identify(context)
    rows = _rows(config, sub_fm, node)
    load_adapter(sub_fm.model, unpack_tensors(arrays_of(message)))
    metrics: dict[str, Any] = {}
    if request["measure-activity"]:
        metrics |= pack_rates(_measure(sub_fm, rows, config))
    seed = derive_seed(config.seed, "client", current, node.key)
    proximal_mu = request.get("proximal-mu", 0.0)  # only Flower's FedProx sends it
    report = train_adapter(
        sub_fm.model, rows, config.train, request["lr"], seed, proximal_mu
    )
    metrics |= {
        "num-examples": report.examples,
        "train_loss": report.loss,  # the name that Flower's QFedAvg reads
        "steps": report.steps,
        "seconds": report.seconds,
        "peak-memory": peak_memory(),
    }
    adapter, _ = pack_tensors(get_adapter(sub_fm.model))
    return _reply(message, {ARRAYS: adapter, METRICS: MetricRecord(metrics)})


def peak_memory() -> int:
    """Return this process's largest resident memory so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build_from_package(package: Package, lora: LoraConfig, seed: int) -> PeftModel:
    """Rebuild the sub-FM with an adapter still to be loaded.

    Raises:
        FedPFTError: the package's family has no row, or it does not fit together.
    """
    try:
        skeleton = build_skeleton(config_from(package.model_config), package.plan)
    except FedPFTError:
        raise
    except Exception as error:  # a hostile config raises almost anything
        raise FedPFTError(
            f"the received sub-FM cannot be built ({last_line(str(error))}); the "
            "server sent what does not fit together"
        ) from error
    head = {
        name: torch.zeros(tensor.shape, dtype=torch.float32)
        for name, tensor in skeleton.state_dict().items()
        if any(name.startswith(f"{module}.") for module in package.head)
    }
    load_weights(skeleton, {**package.weights, **head})
    places = package.plan.adapter_places
    return attach_adapter(skeleton, lora, package.head, seed, places)


class _MissingError(Exception):
    """Say that the store has no sound copy; unlike None, it is not cached."""


@functools.lru_cache(maxsize=1)
def _load_sub_fm_cached(content: str, lora: LoraConfig, seed: int) -> SubFM:
    store = Store()
    held = store.get(content)
    if held is None:
        raise _MissingError(content)
    package = package_from(held[1], held[0])
    architecture = architecture_of(str(package.model_config["model_type"]))
    processor = AUTO_PROCESSORS[architecture.modality].from_pretrained(
        store.directory(content) / "processor",
        local_files_only=True,
        trust_remote_code=False,
    )
    model = build_from_package(package, lora, seed)
    return SubFM(model, package, processor, architecture)


def _load_sub_fm(content: str, lora: LoraConfig, seed: int) -> SubFM | None:
    try:
        return _load_sub_fm_cached(content, lora, seed)
    except _MissingError:
        return None


def _rows(config: Config, sub_fm: SubFM, node: Identity) -> Rows:
    named = sub_fm.package.model_config["id2label"]
    labels = [named[str(place)] for place in range(len(named))]
    part = local_rows(node, config, labels)
    modality = sub_fm.architecture.modality
    return encode(part, sub_fm.processor, modality, config.data.max_length)


def _measure(sub_fm: SubFM, rows: Rows, config: Config) -> list[torch.Tensor]:
    ffns = compressed_ffns(base_model(sub_fm.model), sub_fm.package.plan)
    batches = shuffled_batches(rows, config.train.batch_size, seed=0)
    return inactive_rates(sub_fm.model, ffns, batches, sub_fm.package.activity_limits)


def _reply(message: Message, records: dict[str, Any]) -> Message:
    return Message(RecordDict(records), reply_to=message)
