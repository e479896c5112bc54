"""Say what the sub-FM keeps of the FM."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedpft_flower.config import FedPFTError

# Bounds on what a received plan may say.
MOST_LAYERS, MOST_NEURONS = 1000, 10_000_000


@dataclass(frozen=True)
class Plan:
    """Say which layers and neurons of the FM the sub-FM keeps.

    `widths` holds N of every FM layer; `kept` maps each kept FM layer to its kept
    neurons, ascending. A layer that is absent is dropped, a layer that keeps all is
    whole, any other is compressed. `adapters` names the FM layers that carry LoRA;
    None stands for every kept one.
    """

    widths: tuple[int, ...]
    kept: Mapping[int, tuple[int, ...]]
    adapters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that every kept neuron exists, once, in ascending order.

        Raises:
            FedPFTError: the plan names a layer or neuron that the FM does not have.
        """
        for layer, neurons in self.kept.items():
            if not 0 <= layer < len(self.widths):
                raise FedPFTError(
                    f"plan keeps layer {layer}; the FM has 0 to {len(self.widths) - 1}"
                )
            ascending = all(a < b for a, b in pairwise(neurons))
            if not neurons or not ascending or neurons[0] < 0:
                raise FedPFTError(f"plan: layer {layer} needs ascending neurons")
            if neurons[-1] >= self.widths[layer]:
                raise FedPFTError(
                    f"plan keeps neuron {neurons[-1]} of layer {layer}, which has "
                    f"{self.widths[layer]}"
                )
        if self.adapters is not None and not set(self.adapters) <= set(self.kept):
            raise FedPFTError("plan puts adapters into layers that it drops")

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the kept FM layers; their order is the sub-FM's."""
        return tuple(sorted(self.kept))

    @property
    def compressed(self) -> tuple[int, ...]:
        """Return the kept FM layers that lost neurons."""
        return tuple(
            layer for layer in self.layers if len(self.kept[layer]) < self.widths[layer]
        )

    @property
    def emulator(self) -> tuple[int, ...]:
        """Return the kept FM layers that stand in for dropped ones.

        Where layers are dropped, these are all whole ones that carry no adapter (the
        emulator of Offsite-Tuning, Xiao et al. 2023, section 3.2).
        """
        if self.adapters is None or len(self.kept) == len(self.widths):
            return ()
        others = {*self.adapters, *self.compressed}
        return tuple(layer for layer in self.layers if layer not in others)

    @property
    def aligned(self) -> tuple[int, ...]:
        """Return the kept FM layers that alignment may change."""
        return tuple(sorted({*self.compressed, *self.emulator}))

    def teacher(self, layer: int) -> int:
        """Return the FM layer whose output a kept layer should reproduce.

        It is the one before the next kept layer, so that the next sees what it sees in
        the FM; without dropped layers, it is the layer itself.
        """
        following = [kept for kept in self.layers if kept > layer]
        return (following[0] if following else len(self.widths)) - 1

    @property
    def adapter_places(self) -> list[int] | None:
        """Return where in the sub-FM the adapters are; None stands for everywhere."""
        return None if self.adapters is None else self.places(self.adapters)

    def places(self, layers: Sequence[int]) -> list[int]:
        """Return where in the sub-FM these FM layers are."""
        return [self.layers.index(layer) for layer in layers]

    @property
    def told(self) -> str:
        """Return in words what is kept."""
        return (
            f"{len(self.layers)} of {len(self.widths)} layers kept, "
            f"{len(self.compressed)} of them compressed"
        )

    @property
    def is_whole(self) -> bool:
        """Tell whether every neuron of every layer is kept."""
        return self.layers == tuple(range(len(self.widths))) and not self.compressed

    def to_json(self) -> str:
        """Write the plan as JSON text; whole layers are written as "all"."""
        kept = {
            str(layer): list(self.kept[layer]) if layer in self.compressed else "all"
            for layer in self.layers
        }
        return json.dumps(
            {"widths": self.widths, "kept": kept, "adapters": self.adapters}
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            FedPFTError: the text is not a plan.
        """
        try:
            data = json.loads(text)
            widths = tuple(int(width) for width in data["widths"])
            if min(widths) < 1:
                raise ValueError("a layer has no neurons")
            if len(widths) > MOST_LAYERS or sum(widths) > MOST_NEURONS:
                raise ValueError("it is larger than any model")
            named: dict[int, Iterable[int]] = {
                int(layer): range(widths[int(layer)])
                if neurons == "all"
                else map(int, neurons)
                for layer, neurons in data["kept"].items()
            }
            # Only now, so that a layer named a thousand times costs as much as one.
            kept = {layer: tuple(neurons) for layer, neurons in named.items()}
            carrying = data["adapters"]
            adapters = None if carrying is None else tuple(map(int, carrying))
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise FedPFTError(f"not a plan: {error}; expected Plan.to_json") from error
        return cls(widths, kept, adapters)
