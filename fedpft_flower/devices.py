"""Put models on the accelerator that there is, and let their inputs follow."""

import logging
import resource
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpft_flower.config import first_line

if TYPE_CHECKING:  # `fedpft-run` only counts GPUs
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


@cache
def device_here() -> torch.device:
    """Return the first GPU that this process may use, or the CPU.

    A GPU that PyTorch has no code for is none. CUDA_VISIBLE_DEVICES says which GPUs it
    may use.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        if "no kernel image" not in str(error):  # others have it, for now, perhaps
            return torch.device("cuda")
        logger.warning(
            "PyTorch sees a GPU and cannot use it, so the CPU works (%s); install a "
            "PyTorch that knows it, or hide it with CUDA_VISIBLE_DEVICES=",
            first_line(error),
        )
        return torch.device("cpu")
    return torch.device("cuda")


def gpus_here() -> int:
    """Return how many GPUs this process may use."""
    return torch.cuda.device_count()


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 itself, and not by other means."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "get_capabilities", None)  # older PyTorch has it not
    found: dict[str, Any] = tell() if tell else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def peak_memory() -> int:
    """Return this process's largest resident memory so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_gpu_memory() -> int:
    """Return the most GPU memory that this process had in use, in bytes; 0 without."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def release() -> None:
    """Give the GPU memory that this process holds and does not use back to others."""
    if torch.cuda.is_initialized():
        # After some errors nothing works on it; the reply that tells them must leave.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def move(model: "PreTrainedModel", device: torch.device) -> None:
    """Move a model to a device, in place.

    Whatever it is called with then follows: to its device, and images into its numbers
    (not every family sees to that itself). So batches need not know where models are.
    """
    if device.type == "cuda":  # float32 is to mean float32, in convolutions too
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    nn.Module.to(model, device)
    # The body too is called by itself, where nobody needs logits.
    for module in (model, model.base_model):
        let_inputs_follow(module)


def let_inputs_follow(module: nn.Module) -> None:
    """Give a module its inputs where its weights are, and floats in their numbers."""
    module.register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(module.parameters())

    def moved(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        dtype = weight.dtype if value.is_floating_point() else value.dtype
        return value.to(weight.device, dtype)

    return tuple(map(moved, inputs)), {name: moved(v) for name, v in named.items()}
