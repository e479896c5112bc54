"""Train the adapter on a node's rows, on the sub-FM that it holds, measure activity.

A node never has the FM and never asks a hub. In deployment every message runs in a new
process, in simulation one process serves many virtual clients: what is held here is
keyed by all that decides what it is, and never by who the client is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from peft import PeftModel

from fedpft_flower.activity import inactive_rates
from fedpft_flower.adapters import attach_adapter, base_model, get_adapter, load_adapter
from fedpft_flower.architectures import Architecture, architecture_of, is_within
from fedpft_flower.config import (
    Config,
    FedPFTError,
    LoraConfig,
    TrainConfig,
    derive_seed,
)
from fedpft_flower.devices import (
    device_here,
    move,
    peak_gpu_memory,
    peak_memory,
    release,
)
from fedpft_flower.encoding import Rows, encode, shuffled_batches
from fedpft_flower.flops import FlopMeter
from fedpft_flower.node import Identity, identify, local_rows, own_training
from fedpft_flower.package import Package
from fedpft_flower.processors import load_processor
from fedpft_flower.progress import StepLog
from fedpft_flower.quantisation import quantise
from fedpft_flower.received import config_from
from fedpft_flower.refusals import last_line, one_line_errors, tell
from fedpft_flower.store import Store, package_from
from fedpft_flower.sub_fm import build_skeleton, compressed_ffns, load_weights
from fedpft_flower.training import train_adapter
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    arrays_of,
    config_of,
    pack_rates,
    pack_tensors,
    reply,
    train_metrics,
    unpack_tensors,
)


@dataclass(frozen=True)
class SubFM:
    """Hold an installed sub-FM, ready to take an adapter."""

    model: PeftModel
    package: Package
    processor: Any
    architecture: Architecture
    meter: FlopMeter


def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this node's rows, on the installed sub-FM.

    A node that has lost its copy says so instead, and gets it again.
    """
    try:
        return _train(message, context)
    finally:
        # Others may share this GPU. An error holds what it met on its way, so here it
        # is over.
        release()


@contextmanager
def _memory_told() -> Iterator[None]:
    """Say what helps where memory ends.

    Raises:
        FedPFTError: it ended.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        met = last_line(str(error) or type(error).__name__)
        raise FedPFTError(
            f"memory ended in training ({met}); set recompute or a "
            "lower micro-batch-size in this node's config, or train.recompute, "
            "train.micro-batch-size or train.frozen for all; virtual clients may share "
            "a GPU among fewer (fedpft-run --clients-per-gpu)"
        ) from error


@one_line_errors
@_memory_told()
def _train(message: Message, context: Context) -> Message:
    config = Config.from_run_config(context.run_config)
    request = config_of(message)
    wanted, current = request["sub-fm"], request["server-round"]
    sub_fm = _load_sub_fm(wanted, config.lora, config.seed, config.train.frozen)
    if sub_fm is None:
        return reply(message, {CONFIG: ConfigRecord({"missing": wanted})})
    node = identify(context)
    rows, own = _rows(config, sub_fm, node), own_training(config.train, context)
    load_adapter(sub_fm.model, unpack_tensors(arrays_of(message)))
    metrics: dict[str, Any] = {}
    if request["measure-activity"]:
        if config.privacy.on or config.align.activity != "clients":
            raise FedPFTError(
                "the server asks for activity statistics, which have no noise and were "
                f"not to leave (align.activity = {config.align.activity!r}); with "
                "privacy.mechanism set align.activity = 'public'"
            )
        metrics |= pack_rates(_measure(sub_fm, rows, own))
    seed = derive_seed(config.seed, "client", current, node.key)
    proximal_mu = request.get("proximal-mu", 0.0)  # only Flower's FedProx sends it
    what = f"run {context.run_id}, round {current}"
    tell(context, "%s: training on %d rows", what, len(rows))
    report = train_adapter(
        sub_fm.model,
        rows,
        own,
        request["lr"],
        seed,
        proximal_mu,
        sub_fm.meter,
        StepLog(partial(tell, context), what),
    )
    tell(
        context,
        "%s: trained on %d rows, %d steps, loss %.3f, %.1f s",
        *(what, report.examples, report.steps, report.loss, report.seconds),
    )
    told = {
        "num-examples": 1 if config.weighting == "uniform" else report.examples,
        "train_loss": report.loss,  # the name that Flower's QFedAvg reads
        "steps": report.steps,
        "seconds": report.seconds,
        "step-seconds": report.step_seconds,
        "flops": report.flops,
        "bf16": float(report.compute.bf16),
        "peak-memory": peak_memory(),
        "peak-gpu-memory": peak_gpu_memory(),
    }
    metrics |= {name: told[name] for name in train_metrics(config)}
    adapter, _ = pack_tensors(get_adapter(sub_fm.model))
    return reply(message, {ARRAYS: adapter, METRICS: MetricRecord(metrics)})


def build_from_package(
    package: Package, lora: LoraConfig, seed: int, frozen: str = "fp32"
) -> PeftModel:
    """Rebuild the sub-FM with an adapter still to be loaded.

    Args:
        package: what arrived.
        lora: shape of the adapter.
        seed: of its initial values.
        frozen: how to hold the frozen matrices (`train.frozen`).

    Raises:
        FedPFTError: the package's family has no row, or it does not fit together.
    """
    try:
        received = config_from(package.model_config)
        skeleton = build_skeleton(received, package.plan, package.objective)
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
        if is_within(name, package.head)
    }
    load_weights(skeleton, {**package.weights, **head})
    device = device_here()
    if frozen != "fp32":
        quantise(skeleton, frozen, device)
    move(skeleton, device)
    places = package.plan.adapter_places
    return attach_adapter(skeleton, lora, package.head, seed, places)


# The sub-FM that this process used last, by all that decides what it is.
_HELD: dict[tuple[str, LoraConfig, int, str], SubFM] = {}


def _load_sub_fm(
    content: str, lora: LoraConfig, seed: int, frozen: str = "fp32"
) -> SubFM | None:
    """Return an installed sub-FM, or None where the store has no sound copy."""
    key = content, lora, seed, frozen
    if key not in _HELD:
        forget_sub_fm()  # first: two may be too large for a GPU
        if (held := Store().get(content)) is None:
            return None
        package = package_from(held[1], held[0])
        model = build_from_package(package, lora, seed, frozen)
        architecture = architecture_of(base_model(model).config)
        files = Store().directory(content) / "processor"
        processor = load_processor(files, architecture)
        # The model has the weights, on a GPU perhaps.
        package = replace(package, weights={})
        _HELD[key] = SubFM(model, package, processor, architecture, FlopMeter())
    return _HELD[key]


def forget_sub_fm() -> None:
    """Let go of the sub-FM that this process keeps between messages."""
    _HELD.clear()
    release()


def _rows(config: Config, sub_fm: SubFM, node: Identity) -> Rows:
    modality, objective = sub_fm.architecture.modality, sub_fm.package.objective
    labels = list[str]()
    if objective == "classify":
        named = sub_fm.package.model_config["id2label"]
        labels = [named[str(place)] for place in range(len(named))]
    part = local_rows(node, config, labels)
    return encode(part, sub_fm.processor, modality, config.data, objective)


def _measure(sub_fm: SubFM, rows: Rows, config: TrainConfig) -> list[torch.Tensor]:
    model, package = base_model(sub_fm.model), sub_fm.package
    size = config.micro_batch_size or config.batch_size
    batches = shuffled_batches(rows, size, seed=0)
    ffns = compressed_ffns(model, package.plan)
    return inactive_rates(model, ffns, batches, package.activity_limits)
