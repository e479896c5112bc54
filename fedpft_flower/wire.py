"""Translate between tensors and Flower records, and count what is sent.

Names of records and kinds of messages stand here; the keys of a request or a reply
stand with who writes and who reads it. Nothing is ever unpickled: arrays travel as raw
bytes with dtype and shape, structure as JSON text.
"""

import functools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedpft_flower.config import Config, FedPFTError, OwnRowsError, one_line
from fedpft_flower.refusals import UNTOLD, refusal

logger = logging.getLogger(__name__)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
HELLO, INSTALL, TRAIN = "query.hello", "query.install", "train"
_EXPIRED = {3, 4}  # Flower's error codes for a message and a reply that lived too long
PACKAGE = "package"  # key of a package's JSON in an install
# What a node says of its training, and the most that is believed (`train_metrics`).
TRAIN_METRICS: dict[str, float] = {
    "num-examples": 1e12,
    "train_loss": 1e6,
    "steps": 1e12,
    "seconds": 1e9,
    "step-seconds": 1e9,
    "flops": 1e24,
    "bf16": 1.0,
    "peak-memory": 1e15,
}
RATES = "inactive-rates."  # prefix of activity statistics among the metrics

Handler = Callable[[Message, Context], Message]

# Tensors that Flower's records cannot hold travel as integers of the same size.
_BIT_CAST = {torch.bfloat16: torch.int16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BIT_CAST}


def arrays_of(message: Message) -> ArrayRecord:
    """Return the array record of a message."""
    return cast(ArrayRecord, message.content[ARRAYS])


def config_of(message: Message) -> dict[str, Any]:
    """Return the values of a message's config record; empty without one."""
    return dict(message.content.config_records.get(CONFIG, {}))


def metrics_of(message: Message) -> dict[str, Any]:
    """Return the values of a message's metric record; empty without one."""
    return dict(message.content.metric_records.get(METRICS, {}))


def train_metrics(config: Config) -> dict[str, float]:
    """Return which metrics a reply to a train message holds, and the most of each.

    With uniform weights every client has one example. With quantised matrices no
    operations are told: PyTorch cannot count those products. With differential privacy
    nothing else leaves a client beside its adapter: losses, steps and seconds have no
    noise.
    """
    known = dict(TRAIN_METRICS)
    if config.weighting == "uniform":
        known["num-examples"] = 1
    if config.train.frozen != "fp32":
        del known["flops"]
    if config.privacy.on:
        known = {"num-examples": known["num-examples"]}
    return known


def last_line(reason: str | None) -> str:
    """Return the last line of an error's reason, which may be a whole traceback."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "unknown error"


def reply(message: Message, records: dict[str, Any]) -> Message:
    """Reply to a message with these records."""
    return Message(RecordDict(records), reply_to=message)


def one_line_errors(handler: Handler) -> Handler:
    """Reply with one clear line where the user can mend what went wrong."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        told = ""  # where it is not the whole reason
        try:
            return handler(message, context)
        except FedPFTError as error:
            reason = str(error)
            if isinstance(error, OwnRowsError) and "data-path" in context.node_config:
                told = error.told
        except Exception as error:  # a hostile message may raise anything
            logger.exception("a message could not be handled")
            kind, name = message.metadata.message_type, type(error).__name__
            cannot = f"a {kind} message cannot be handled ({name}"
            reason = f"{cannot}: {last_line(str(error))}); see this node's log"
            if "data-path" in context.node_config:  # it may quote a row
                told = f"{cannot}); see this node's log"
        logger.error("%s", one_line(reason))
        if context.run_config.get("privacy.mechanism", "none") != "none":
            told = UNTOLD
        site, told = context.node_config.get("site"), told or reason
        return refusal(message, f"{site}: {told}" if site else told)

    return handle


def is_silence(reply: Message) -> bool:
    """Tell whether a reply is Flower's word that none came from the node."""
    return reply.has_error() and reply.error.code in _EXPIRED


def reason_of(reply: Message, name: str) -> str:
    """Return in one line why a reply is an error.

    Args:
        reply: an error.
        name: of its node, which may say it itself.
    """
    if is_silence(reply):
        return (
            "no reply in time (timeout-seconds), or the node is gone, or its reply was "
            "lost on the way"
        )
    return last_line(reply.error.reason).removeprefix(f"{name}: ")


# --------------------------------------------------------------------------- tensors


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[ArrayRecord, str]:
    """Pack tensors of any dtype, exactly.

    Returns:
        The arrays, and JSON that names the dtype of each bit-cast tensor.
    """
    arrays, casts = {}, {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype in _BIT_CAST:
            casts[name] = str(value.dtype).removeprefix("torch.")
            value = value.view(_BIT_CAST[value.dtype])
        arrays[name] = Array(value.numpy())
    return ArrayRecord(arrays), json.dumps(casts)


def unpack_tensors(record: ArrayRecord, casts: str = "{}") -> dict[str, Tensor]:
    """Unpack what `pack_tensors` packed; the tensors own their memory."""
    tensors = {}
    named = json.loads(casts)
    for name, array in record.items():
        tensor = torch.from_numpy(np.array(array.numpy()))
        tensors[name] = tensor.view(_DTYPES[named[name]]) if name in named else tensor
    return tensors


# ------------------------------------------------------------------------ the ledger


class Ledger:
    """Count bytes of record payloads by round, direction and kind.

    Kinds: install (a whole sub-FM), delta (its changed rows), adapter, statistics
    (activity), control (everything else). `sent` leaves out what a machine already
    held.
    """

    def __init__(self) -> None:
        self.round = 0
        self.logical: dict[tuple[int, str, str], int] = defaultdict(int)
        self.sent: dict[tuple[int, str, str], int] = defaultdict(int)

    def count(
        self, direction: str, message: Message, logical: bool = True, sent: bool = True
    ) -> int:
        """Count one message; `direction` is "down" (to clients) or "up".

        Returns:
            Its bytes, all kinds together.
        """
        return self.add(direction, message_bytes(message), logical, sent)

    def add(
        self,
        direction: str,
        sizes: Mapping[str, int],
        logical: bool = True,
        sent: bool = True,
    ) -> int:
        """Count what a message has, kind -> bytes; return the sum."""
        for kind, size in sizes.items():
            self.logical[self.round, direction, kind] += size if logical else 0
            self.sent[self.round, direction, kind] += size if sent else 0
        return sum(sizes.values())

    def state(self) -> list[list[Any]]:
        """Return all counts, as JSON can hold them."""
        return [[*key, self.logical[key], self.sent[key]] for key in self.logical]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Become what `state` returned."""
        for current, way, kind, logical, sent in state:
            self.logical[current, way, kind] = logical
            self.sent[current, way, kind] = sent

    def total(self, direction: str, current: int | None = None) -> int:
        """Return all bytes of a direction, in one round or in the whole run."""
        return sum(
            size
            for (of, way, _), size in self.logical.items()
            if way == direction and current in (None, of)
        )

    def kinds(self, direction: str) -> dict[str, int]:
        """Return the bytes of a direction in the whole run, by kind."""
        sizes: dict[str, int] = defaultdict(int)
        for (_, way, kind), size in sorted(self.logical.items()):
            if way == direction:
                sizes[kind] += size
        return dict(sizes)

    def table(self, current: int) -> dict[str, dict[str, int]]:
        """Return the bytes of a round as direction-kind -> logical, sent."""
        rows = sorted(key for key in self.logical if key[0] == current)
        return {
            f"{way}-{kind}": {
                "logical": self.logical[of, way, kind],
                "sent": self.sent[of, way, kind],
            }
            for of, way, kind in rows
        }


def message_bytes(message: Message) -> dict[str, int]:
    """Return the payload bytes of a message by kind: raw arrays, serialized records."""
    if message.has_error():
        return {}
    sizes: dict[str, int] = defaultdict(int)
    content = message.content
    arrays = "adapter"
    if message.metadata.message_type == INSTALL:
        arrays = "delta" if config_of(message).get("base") else "install"
    for record in content.array_records.values():
        sizes[arrays] += record.count_bytes()
    for config in content.config_records.values():
        whole = len(config.deflate())
        # The package's JSON holds the processor: it is part of the install.
        package = len(str(config.get(PACKAGE, "")))
        sizes[arrays] += package
        sizes["control"] += whole - package
    for metrics in content.metric_records.values():
        statistics, others = split_rates(metrics)
        sizes["statistics"] += len(statistics.deflate()) if statistics else 0
        sizes["control"] += len(others.deflate())
    return {kind: size for kind, size in sizes.items() if size}


def split_rates(metrics: Mapping[str, Any]) -> tuple[MetricRecord, MetricRecord]:
    """Part activity statistics from the other metrics."""
    rates = {k: v for k, v in metrics.items() if k.startswith(RATES)}
    return MetricRecord(rates), MetricRecord(
        {k: v for k, v in metrics.items() if k not in rates}
    )


def pack_rates(rates: Sequence[Tensor]) -> dict[str, list[float]]:
    """Return inactive rates as metrics, one list a layer."""
    return {f"{RATES}{i}": rate.double().tolist() for i, rate in enumerate(rates)}


def unpack_rates(metrics: Mapping[str, Any]) -> list[Tensor]:
    """Return the inactive rates among metrics, layer by layer."""
    names = sorted(metrics, key=lambda name: int(name.removeprefix(RATES)))
    return [torch.tensor(metrics[name], dtype=torch.float32) for name in names]
