"""Score the neurons of an FM and choose which of them the sub-FM keeps.

Scoring (`SALIENCIES`), choosing (the planners) and cutting (`sub_fm.py`) are three
things: a score is a tensor, a choice is a `Plan`, a cut is a model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedpft_flower.architectures import FFN
from fedpft_flower.config import FedPFTError, SubFMConfig, derive_seed, names_in


@dataclass(frozen=True)
class Plan:
    """Say which layers and neurons of the FM the sub-FM keeps.

    `widths` holds N of every FM layer; `kept` maps each kept FM layer to its kept
    neurons, ascending. A layer that is absent is dropped, a layer that keeps all is
    whole, any other is compressed.
    """

    widths: tuple[int, ...]
    kept: Mapping[int, tuple[int, ...]]

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
    def is_whole(self) -> bool:
        """Tell whether the sub-FM is the FM itself."""
        return self.layers == tuple(range(len(self.widths))) and not self.compressed

    def to_json(self) -> str:
        """Write the plan as JSON text; whole layers are written as "all"."""
        kept = {
            str(layer): list(self.kept[layer]) if layer in self.compressed else "all"
            for layer in self.layers
        }
        return json.dumps({"widths": self.widths, "kept": kept})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            FedPFTError: the text is not a plan.
        """
        try:
            data = json.loads(text)
            widths = tuple(int(width) for width in data["widths"])
            kept = {
                int(layer): tuple(range(widths[int(layer)]))
                if neurons == "all"
                else tuple(int(neuron) for neuron in neurons)
                for layer, neurons in data["kept"].items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise FedPFTError(f"not a plan: {error}; expected Plan.to_json") from error
        return cls(widths, kept)


def norm_saliency(ffn: FFN, generator: torch.Generator) -> Tensor:
    """Score neurons by the L2 norm of all their weights.

    s_i = || [W_in[i, :], W_out[:, i]] ||_2 (Peng et al. 2024, sub-FM construction); a
    gated neuron joins its rows of every block.

    Returns:
        Scores [N], float32.
    """
    squares = ffn.down_columns().detach().float().square().sum(dim=0)
    for rows in ffn.up_rows():
        squares = squares + rows.detach().float().square().sum(dim=1)
    return squares.sqrt()


def random_saliency(ffn: FFN, generator: torch.Generator) -> Tensor:
    """Score neurons at random: the control for every other saliency.

    Returns:
        Scores [N] in [0, 1), float32.
    """
    return torch.rand(ffn.width, generator=generator)


Saliency = Callable[[FFN, torch.Generator], Tensor]
SALIENCIES: dict[str, Saliency] = {"norm": norm_saliency, "random": random_saliency}


def score(ffns: Sequence[FFN], name: str, seed: int) -> list[Tensor]:
    """Score the neurons of every layer by the named saliency.

    Returns:
        One tensor [N] a layer.

    Raises:
        FedPFTError: there is no saliency of this name.
    """
    if name not in SALIENCIES:
        raise FedPFTError(
            f"sub-fm.saliency = {name!r}; choose one of {', '.join(SALIENCIES)}"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "saliency"))
    return [SALIENCIES[name](ffn, generator) for ffn in ffns]


def keep_all(scores: Sequence[Tensor], config: SubFMConfig) -> Plan:
    """Keep every neuron of every layer: the sub-FM is the FM."""
    widths = tuple(len(layer_scores) for layer_scores in scores)
    return Plan(widths, {i: tuple(range(width)) for i, width in enumerate(widths)})


def keep_salient(scores: Sequence[Tensor], config: SubFMConfig) -> Plan:
    """Keep the neurons with the largest scores in every layer that is not left whole.

    Equal scores keep the lower position, so that the plan is the same everywhere.

    Raises:
        FedPFTError: more neurons or other layers are asked for than the FM has.
    """
    widths = tuple(len(layer_scores) for layer_scores in scores)
    whole = _whole_layers(config.whole_layers, len(widths))
    kept: dict[int, tuple[int, ...]] = {}
    for layer, layer_scores in enumerate(scores):
        count = widths[layer] if layer in whole else _count(config, widths[layer])
        order = torch.sort(layer_scores, descending=True, stable=True).indices
        kept[layer] = tuple(sorted(order[:count].tolist()))
    return Plan(widths, kept)


Planner = Callable[[Sequence[Tensor], SubFMConfig], Plan]


def _count(config: SubFMConfig, width: int) -> int:
    if config.keep_neurons > width:
        raise FedPFTError(
            f"sub-fm.keep-neurons = {config.keep_neurons}, but a layer of this FM has "
            f"{width} neurons; choose 1 to {width}"
        )
    return config.keep_neurons or max(1, round(width * config.keep_fraction))


def _whole_layers(text: str, count: int) -> set[int]:
    whole = set()
    for entry in names_in(text):
        layer = int(entry)
        if not -count <= layer < count:
            raise FedPFTError(
                f"sub-fm.whole-layers = {text!r}: layer {layer} does not exist; this "
                f"FM has layers 0 to {count - 1}"
            )
        whole.add(layer % count)
    return whole
