"""Choose, by their scores, which layers and neurons of an FM the sub-FM keeps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedpft_flower.architectures import FFN
from fedpft_flower.config import FedPFTError, SubFMConfig, names_in
from fedpft_flower.plan import Plan


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


def kept_counts(config: SubFMConfig, widths: Sequence[int]) -> list[int]:
    """Return how many neurons every layer keeps: all N of those left whole.

    Raises:
        FedPFTError: more neurons or other layers are asked for than the FM has.
    """
    whole = _whole_layers(config.whole_layers, len(widths))
    return [
        width if layer in whole else _count(config, width)
        for layer, width in enumerate(widths)
    ]


def _count(config: SubFMConfig, width: int) -> int:
    if config.keep_neurons > width:
        raise FedPFTError(
            f"sub-fm.keep-neurons = {config.keep_neurons}, but a layer of this FM has "
            f"{width} neurons; choose 1 to {width}"
        )
    return config.keep_neurons or max(1, round(width * config.keep_fraction))


def keep_salient(
    scores: Sequence[Tensor], sizes: Sequence[LayerSize], config: SubFMConfig
) -> Plan:
    """Keep the neurons with the largest scores in every layer that is not left whole.

    Equal scores keep the lower position, so that the plan is the same everywhere.

    Raises:
        FedPFTError: more neurons or other layers are asked for than the FM has.
    """
    widths = tuple(len(layer_scores) for layer_scores in scores)
    kept: dict[int, tuple[int, ...]] = {}
    for layer, count in enumerate(kept_counts(config, widths)):
        order = torch.sort(scores[layer], descending=True, stable=True).indices
        kept[layer] = tuple(sorted(order[:count].tolist()))
    return Plan(widths, kept)


def drop_layers(
    scores: Sequence[Tensor], sizes: Sequence[LayerSize], config: SubFMConfig
) -> Plan:
    """Keep whole layers: the ends, which carry the adapters, and some between them.

    The layers between are as many as the budget has room for: a share of the
    parameters of all layers, or what `keep_salient` would keep (Offsite-Tuning,
    Xiao et al. 2023, section 3.2; the budget as in Peng et al. 2024, section 4). They
    are spaced evenly, and as far from both ends; the code of Xiao et al. keeps those
    next to the ends, and spaces the others between them.

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
