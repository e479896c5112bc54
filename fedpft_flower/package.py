"""Hold what a client needs of the sub-FM."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedpft_flower.config import Objective
from fedpft_flower.plan import Plan


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
