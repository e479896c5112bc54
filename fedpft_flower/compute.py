"""Choose in which numbers gradient steps are computed, and how attention is.

Parameters, gradients and optimiser stay float32; with bfloat16 only products are
computed in it (autocast). What is fastest depends on processor and model: where there
is a choice, a few steps of each kind decide, once for a machine and a model.
"""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from fedpft_flower.batches import Batch
from fedpft_flower.devices import has_bf16
from fedpft_flower.disk import keep, private_cache

# What a choice must save to depart from float32: less is lost in the noise of a clock.
LEAST_GAIN = 1.15
WARM_UP, TIMED = 1, 3  # steps of each kind


@dataclass(frozen=True)
class Compute:
    """Say how steps are computed; as it is, in float32 and as the model itself does."""

    bf16: bool = False
    # Whether attention is written out as products: on CPUs, PyTorch's fused one has a
    # slow backward pass in bfloat16 where there is a mask.
    eager: bool = False

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Compute one step so: weights' bfloat16 copies last no longer than that."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            yield

    @contextmanager
    def steps(self, models: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Let models compute attention so, for a while."""
        before = [model.config._attn_implementation for model in models]
        if self.eager:
            for model in models:
                model.set_attn_implementation("eager")
        try:
            yield
        finally:
            for model, own in zip(models, before, strict=True):
                if self.eager:
                    model.set_attn_implementation(own)


# In the order in which they are tried.
CHOICES = (Compute(), Compute(bf16=True), Compute(bf16=True, eager=True))


def asked_for(precision: str) -> Compute | None:
    """Return how steps are computed by "fp32" or "bf16"; None by "auto"."""
    return None if precision == "auto" else Compute(bf16=precision == "bf16")


def best_here(
    models: Sequence[PreTrainedModel], step: Callable[[], object], what: object
) -> Compute:
    """Return how steps are fastest on this machine.

    Without a device that multiplies bfloat16 itself, as they are. What was fastest is
    kept on disk, since a deployed node runs every message in a new process.

    Args:
        models: all whose forward pass is part of a step, the trained one last.
        step: does one step without changing anything.
        what: says what else of a step its speed depends on, such as its batch.

    Raises:
        FedPFTError: it cannot be kept.
    """
    device = next(models[-1].parameters()).device
    if not has_bf16(device):
        return Compute()
    place = private_cache("compute") / f"{_key(models, device, what)}.json"
    if (known := _read(place)) is not None:
        return known
    found = fastest(models, step, device)
    keep(place, lambda draft: draft.write_text(json.dumps(asdict(found))))
    return found


def rough_shapes(batch: Batch) -> list[list[int]]:
    """Return a batch's shapes with every size rounded up to a power of two.

    Batches that are nearly as long need no trial of their own.
    """
    return [[1 << (n - 1).bit_length() for n in one.shape] for one in batch.values()]


def fastest(
    models: Sequence[PreTrainedModel],
    step: Callable[[], object],
    device: torch.device,
) -> Compute:
    """Return how steps are fastest; float32 unless something saves enough."""
    # On GPUs the fused attention is the fast one, and needs less memory.
    tried = [way for way in CHOICES if not (way.eager and device.type == "cuda")]
    seconds: dict[Compute, list[float]] = {way: [] for way in tried}
    for turn in range(WARM_UP + TIMED):
        for way, taken in seconds.items():
            began = time.monotonic()
            with way.steps(models), way.step(device):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= WARM_UP:
                taken.append(time.monotonic() - began)
    medians = {choice: statistics.median(taken) for choice, taken in seconds.items()}
    best = min(medians, key=lambda choice: medians[choice])
    gained = medians[Compute()] / medians[best]
    return best if gained >= LEAST_GAIN else Compute()


def _key(models: Sequence[PreTrainedModel], device: torch.device, what: object) -> str:
    """Return a hash of what decides about speed: models, batch, device, software."""
    shapes = [
        (model.config.model_type, [(p.shape, p.dtype) for p in model.parameters()])
        for model in models
    ]
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device)]
    else:  # also where several machines share a home
        machine = [platform.node(), str(torch.get_num_threads())]
    software = [torch.__version__, transformers.__version__]
    text = repr([shapes, what, machine, software])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(place: Path) -> Compute | None:
    """Return what was kept, or None where nothing (sound) was."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return next(choice for choice in CHOICES if asdict(choice) == found)
    except (OSError, StopIteration, ValueError):
        return None
