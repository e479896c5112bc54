"""Send tensors with fewer bits: adapters in both directions, frozen weights once.

The adapter's codec is outermost: `mods.codec_mod` around the ClientApp and the grid
wrapper at the server. Handlers, other mods (clipping, noise) and strategies see
float32 only.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = "@scale"  # behind the name of an int8 tensor: its scales


def encode_weights(tensors: Mapping[str, Tensor], codec: str) -> dict[str, Tensor]:
    """Encode frozen weights.

    fp32, bf16 and fp16 convert every tensor of float32. int8 keeps a scale for each row
    of a matrix, s = max|w| / 127, and round(w / s), the usual symmetric quantisation;
    other tensors stay float32.

    Args:
        tensors: weights by name.
        codec: "fp32", "bf16", "fp16" or "int8".
    """
    encoded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            encoded[name] = tensor
        elif codec != "int8":
            encoded[name] = tensor.to(_DTYPES[codec])
        elif tensor.ndim < 2:
            encoded[name] = tensor
        else:
            rows = tensor.flatten(1)
            scale = (rows.abs().amax(dim=1) / 127).clamp_min(1e-30)
            levels = (rows / scale[:, None]).round().clamp(-127, 127)
            encoded[name] = levels.to(torch.int8).reshape(tensor.shape)
            encoded[name + SCALE] = scale
    return encoded


def decode_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as float32, from what `encode_weights` made of them."""
    decoded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        if scale is not None:
            shape = [-1] + [1] * (tensor.ndim - 1)
            decoded[name] = tensor.float() * scale.reshape(shape)
        else:
            halved = tensor.dtype in (torch.bfloat16, torch.float16)
            decoded[name] = tensor.float() if halved else tensor
    return decoded


def encode_arrays(record: ArrayRecord, codec: str) -> ArrayRecord:
    """Encode the float32 arrays of an adapter; bfloat16 travels as integers."""
    if codec == "fp32":
        return record
    encoded = {}
    for name, array in record.items():
        value = torch.from_numpy(np.array(array.numpy())).to(_DTYPES[codec])
        bits = value.view(torch.int16) if codec == "bf16" else value
        encoded[name] = Array(bits.numpy())
    return ArrayRecord(encoded)


def decode_arrays(record: ArrayRecord, codec: str) -> ArrayRecord:
    """Return an adapter's arrays as float32, from what `encode_arrays` made of them.

    Raises:
        ValueError: there is no such codec, or an array has not the type that it gives.
    """
    if codec not in _DTYPES:
        raise ValueError(f"there is no codec {codec!r}")
    if codec == "fp32":
        return record
    wanted = torch.int16 if codec == "bf16" else torch.float16
    decoded = {}
    for name, array in record.items():
        value = torch.from_numpy(np.array(array.numpy()))
        if value.dtype != wanted:
            raise ValueError(f"{name} is {value.dtype}, {codec} travels as {wanted}")
        value = value.view(_DTYPES[codec])
        decoded[name] = Array(value.float().numpy())
    return ArrayRecord(decoded)


def recode(
    content: RecordDict, codec: str, change: Callable[[ArrayRecord, str], ArrayRecord]
) -> RecordDict:
    """Return content whose arrays are encoded or decoded; the original stays."""
    records = dict(content.items())
    for name, record in content.array_records.items():
        records[name] = change(record, codec)
    return RecordDict(records)
