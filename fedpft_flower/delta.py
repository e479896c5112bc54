"""Carry the changes of a sub-FM instead of all of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpft_flower.config import FedPFTError

_INDEX = {0: "@rows", 1: "@columns"}


def make_delta(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what `apply_delta` needs to turn `old` into `new`, bit for bit.

    Only changed rows or columns (whichever are fewer) are carried, with their places.
    Both must have the same names and shapes.
    """
    delta: dict[str, Tensor] = {}
    for name, tensor in new.items():
        changed = bits(old[name]) != bits(tensor)
        if not bool(changed.any()):
            continue
        axes = [0] if changed.ndim < 2 else [0, 1]
        places = {
            axis: changed.transpose(0, axis).flatten(1).any(1).nonzero().flatten()
            if changed.ndim > 1
            else changed.nonzero().flatten()
            for axis in axes
        }
        axis = min(axes, key=lambda a: len(places[a]) / tensor.shape[a])
        delta[name] = tensor.index_select(axis, places[axis])
        delta[name + _INDEX[axis]] = places[axis].to(torch.int32)
    return delta


def apply_delta(
    old: Mapping[str, Tensor], delta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a `make_delta`.

    Raises:
        FedPFTError: the difference names a tensor that `old` does not have.
    """
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name, values in delta.items():
        if name.endswith(tuple(_INDEX.values())):
            continue
        axis = 0 if name + _INDEX[0] in delta else 1
        places = delta.get(name + _INDEX[axis])
        if name not in new or places is None:
            raise FedPFTError(f"change of the sub-FM names an unknown tensor {name!r}")
        new[name].index_copy_(axis, places.long(), values)
    return new


def bits(tensor: Tensor) -> Tensor:
    """View floats as integers: -0.0 differs from 0.0, NaN equals itself."""
    if not tensor.is_floating_point():
        return tensor
    same_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(same_size[tensor.element_size()])
