"""Translate between tensors and Flower records.

Names of records and kinds of messages stand here; the keys of a request or a reply
stand with who writes and who reads it. Nothing is ever unpickled: arrays travel as raw
bytes with dtype and shape, structure as JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedpft_flower.config import Config

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
HELLO, INSTALL, TRAIN = "query.hello", "query.install", "train"
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
    "peak-gpu-memory": 1e15,
}
RATES = "inactive-rates."  # prefix of activity statistics among the metrics


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


def reply(message: Message, records: dict[str, Any]) -> Message:
    """Reply to a message with these records."""
    return Message(RecordDict(records), reply_to=message)


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


# ------------------------------------------------------------------- activity rates


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
