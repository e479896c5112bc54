"""Score the neurons of an FM and choose which of them the sub-FM keeps.

Scoring (`SALIENCIES`), choosing (the planners) and cutting (`sub_fm.py`) are three
things: a score is a tensor, a choice is a `Plan`, a cut is a model.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedpft_flower.architectures import FFN
from fedpft_flower.config import FedPFTError, SubFMConfig, derive_seed, names_in

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
    def is_whole(self) -> bool:
        """Tell whether the sub-FM is the FM itself."""
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


class LayerSize(NamedTuple):
    """Count the parameters of a layer: of one neuron, and of all else together."""

    neuron: int
    rest: int


def size_of(layer: nn.Module, ffn: FFN) -> LayerSize:
    """Count the parameters of a layer."""
    places = ffn.parameters_by_axis(torch.zeros(1, dtype=torch.int64))
    neuron = sum(p.numel() // p.shape[axis] * len(at) for p, axis, at in places)
    whole = sum(parameter.numel() for parameter in layer.parameters())
    return LayerSize(neuron, whole - neuron * ffn.width)


def parameters_of(plan: Plan, sizes: Sequence[LayerSize]) -> int:
    """Count the parameters of all layers that a plan keeps."""
    return sum(
        sizes[layer].rest + sizes[layer].neuron * len(neurons)
        for layer, neurons in plan.kept.items()
    )


# A planner chooses from scores [N] and sizes of every layer.
Planner = Callable[[Sequence[Tensor], Sequence[LayerSize], SubFMConfig], Plan]


def keep_all(
    scores: Sequence[Tensor], sizes: Sequence[LayerSize], config: SubFMConfig
) -> Plan:
    """Keep every neuron of every layer: the sub-FM is the FM."""
    widths = tuple(len(layer_scores) for layer_scores in scores)
    return Plan(widths, {i: tuple(range(width)) for i, width in enumerate(widths)})


def keep_salient(
    scores: Sequence[Tensor], sizes: Sequence[LayerSize], config: SubFMConfig
) -> Plan:
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


def drop_layers(
    scores: Sequence[Tensor], sizes: Sequence[LayerSize], config: SubFMConfig
) -> Plan:
    """Keep whole layers: the ends, which carry the adapters, and some between them.

    The layers between are spaced evenly, as many as the budget has room for: a share
    of the parameters of all layers, or what `keep_salient` would keep (Offsite-Tuning,
    Xiao et al. 2023, section 3.2; the budget as in Peng et al. 2024, section 4).

    Raises:
        FedPFTError: the end layers alone are above the budget.
    """
    whole = keep_all(scores, sizes, config)
    if config.layer_budget:
        budget = config.layer_budget * parameters_of(whole, sizes)
    else:
        budget = parameters_of(keep_salient(scores, sizes, config), sizes)
    count, ends = len(scores), config.end_layers
    adapters = tuple(i for i in range(count) if i < ends or i >= count - ends)
    for kept in range(count - len(adapters), -1, -1):
        layers = sorted({*adapters, *_between(ends, count - ends, kept)})
        plan = Plan(whole.widths, {i: whole.kept[i] for i in layers}, adapters)
        if parameters_of(plan, sizes) <= budget:
            return plan
    raise FedPFTError(
        f"sub-fm.end-layers = {ends} keeps {len(adapters)} whole layers, which is more "
        "than the budget; raise sub-fm.layer-budget or sub-fm.keep-fraction"
    )


def _between(first: int, end: int, count: int) -> list[int]:
    """Choose `count` of the layers first..end-1, evenly spaced between their ends."""
    step = (end - first + 1) / (count + 1)
    return [first - 1 + round(step * (i + 1)) for i in range(count)]


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
