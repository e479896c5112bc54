"""Hold frozen matrices in 8 or 4 bits while an adapter trains, by bitsandbytes.

Only for clients that lack memory: it is slower on a CPU, and the adapter then trains on
a model that is a little off (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import FedPFTError

# Activations beyond it are multiplied in full (LLM.int8, Dettmers et al. 2022, arXiv
# 2208.07339, section 3.2): decoders have a few that are far larger than all others.
OUTLIER = 6.0


def check_frozen(model: PreTrainedModel, kind: str) -> None:
    """Check that clients can hold this model's matrices as `train.frozen` says.

    Raises:
        FedPFTError: they cannot.
    """
    down = ffns_of(model)[0].down
    if kind != "fp32" and isinstance(down, Conv1D):
        raise FedPFTError(
            f"train.frozen = {kind!r}: {model.config.model_type} stores its matrices "
            "transposed, which bitsandbytes cannot hold; set train.frozen = 'fp32'"
        )


def quantise(model: PreTrainedModel, kind: str, device: torch.device) -> None:
    """Replace every linear module in a model's layers by one that holds fewer bits.

    Embeddings, norms and what is behind the layers stay as they are.

    Args:
        model: on the CPU, before an adapter is attached; changed in place.
        kind: "int8" (a scale for each output) or "nf4" (4 bits, a scale for each 64).
        device: where the new modules lie; never more than one matrix is there whole.

    Raises:
        FedPFTError: a GPU cannot multiply matrices of these sizes.
    """
    linears = [
        (layer, path, module)
        for layer in layers_of(model)
        for path, module in layer.named_modules()
        if type(module) is nn.Linear
    ]
    if kind == "int8" and device.type == "cuda":
        _check_sizes([linear for _, _, linear in linears])
    for layer, path, linear in linears:
        layer.set_submodule(path, _quantised(linear, kind, device))


# Of the outputs of a product of int8 matrices on a GPU (cuBLAS, cublasLtMatmul).
_MULTIPLE = 4


def _check_sizes(linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        if linear.out_features % _MULTIPLE:
            raise FedPFTError(
                f"train.frozen = 'int8': a matrix has {linear.out_features} outputs, "
                f"and a GPU takes multiples of {_MULTIPLE}; choose "
                "sub-fm.keep-fraction or sub-fm.keep-neurons so that so many neurons "
                "are kept"
            )


def _quantised(linear: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    # Here, since hardly any node needs it, and it takes a second to load.
    bnb = import_module("bitsandbytes").nn
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    weight = linear.weight.detach()
    if kind == "int8":
        new = bnb.Linear8bitLt(
            *sizes, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        # In what numbers a step computes, `train.precision` says.
        new = bnb.Linear4bit(
            *sizes, quant_type="nf4", compute_dtype=torch.float32, device="meta"
        )
        new.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
        # It would repack the matrix for inference, which has no backward pass.
        new.support_avx512bf16_for_cpu = False
    new.bias = linear.bias
    moved: nn.Module = new.to(device)
    return moved
