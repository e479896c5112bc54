"""Hold what a client needs of the sub-FM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpft_flower.config import FedPFTError, Objective
from fedpft_flower.plan import Plan

# What tokenizers and image processors are saved as; nothing there runs or is unpickled.
_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def check_processor_file(name: str) -> None:
    """Check that a file of a processor lies in its folder and holds data only.

    Raises:
        FedPFTError: it does not.
    """
    if Path(name).name != name:
        raise FedPFTError(f"processor file name {name!r} leaves its folder")
    if Path(name).suffix not in _SUFFIXES:
        raise FedPFTError(
            f"processor file {name!r} is none of {', '.join(_SUFFIXES)}, which hold "
            "data only"
        )


@dataclass(frozen=True)
class Package:
    """Hold all that a client needs to rebuild the sub-FM and to encode its rows."""

    # Fields of the FM's config, which name its family and sizes.
    model_config: dict[str, Any]
    plan: Plan
    # Modules that train in full: they arrive with the adapter, not in `weights`.
    head: tuple[str, ...]
    weights: dict[str, Tensor]
    # |a| up to which a neuron is inactive, [K] for each compressed layer; or empty.
    activity_limits: list[Tensor]
    # File name -> content of the tokenizer or image processor.
    processor_files: dict[str, bytes]
    objective: Objective = "classify"
