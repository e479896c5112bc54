"""Cut the sub-FM out of an FM as a plan says."""

import copy
from collections.abc import Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpft_flower.architectures import (
    FFN,
    Projection,
    architecture_of,
    ffn_of,
    ffns_of,
    is_within,
    layer_prefix,
    layers_of,
    matrix_of,
    new_model,
)
from fedpft_flower.config import FedPFTError, Objective
from fedpft_flower.devices import move
from fedpft_flower.plan import Plan

# Fields that have an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers")


def build_sub_fm(
    fm: PreTrainedModel, plan: Plan, objective: Objective = "classify"
) -> PreTrainedModel:
    """Cut a sub-FM out of an FM, which is not touched and shares no storage with it.

    The sub-FM lies where the FM does, and is float32 in whatever numbers the FM is.
    """
    skeleton = build_skeleton(fm.config, plan, objective)
    load_weights(skeleton, dict(cut(fm, _own_state(fm), plan)))
    move(skeleton, fm.device)
    skeleton.eval()
    return skeleton


def build_skeleton(
    fm_config: PreTrainedConfig, plan: Plan, objective: Objective = "classify"
) -> PreTrainedModel:
    """Build a sub-FM of the plan's shape whose weights are still to be loaded.

    Args:
        fm_config: the config of the FM (any modality that has a row).
        plan: what to keep.
        objective: what the model does.

    Returns:
        A model with parameters on the meta device. Its config names the width where
        all layers share one, so that it opens with stock `transformers`.
    """
    row = architecture_of(fm_config)
    config = copy.deepcopy(fm_config)
    config.dtype = torch.float32
    config.num_hidden_layers = len(plan.layers)
    for name in _BY_LAYER:
        if kinds := getattr(config, name, None):
            setattr(config, name, [kinds[layer] for layer in plan.layers])
    widths = {len(plan.kept[layer]) for layer in plan.layers}
    if row.width_field and len(widths) == 1:
        setattr(config, row.width_field, widths.pop())
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = new_model(row, config, objective)
    for layer, fm_layer in zip(layers_of(model), plan.layers, strict=True):
        _resize(model, layer, len(plan.kept[fm_layer]))
    return model


def load_weights(skeleton: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give a skeleton its weights; they become its parameters without a copy.

    Raises:
        FedPFTError: a weight is missing, left over, or of another shape.
    """
    expected = _own_state(skeleton)
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    wrong = [
        k for k in expected.keys() & weights if expected[k].shape != weights[k].shape
    ]
    if missing or extra or wrong:
        raise FedPFTError(
            f"weights do not fit the sub-FM: missing {sorted(missing)[:3]}, left over "
            f"{sorted(extra)[:3]}, other shape {sorted(wrong)[:3]}"
        )
    # All own weights are there; those tied to others are not, and follow.
    skeleton.load_state_dict(weights, assign=True, strict=False)
    skeleton.tie_weights()


def compressed_ffns(sub_fm: PreTrainedModel, plan: Plan) -> list[FFN]:
    """Return the FFNs of a sub-FM that lost neurons, in the order of the layers."""
    ffns = ffns_of(sub_fm)
    return [ffns[place] for place in plan.places(plan.compressed)]


def frozen_weights(model: PreTrainedModel, head: tuple[str, ...]) -> dict[str, Tensor]:
    """Return a live view of the weights that clients do not train, without the head.

    Take it before adapters are attached: PEFT renames modules but keeps the tensors,
    so the view follows every later change in place.
    """
    return {
        name: tensor.detach()
        for name, tensor in _own_state(model).items()
        if not is_within(name, head)
    }


def _own_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and buffers, without those that are others once more.

    A decoder's output matrix often is its token embedding.
    """
    state = model.state_dict(keep_vars=True)
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return dict(state)


def _resize(model: PreTrainedModel, layer: nn.Module, width: int) -> None:
    row = architecture_of(model.config)
    ffn = ffn_of(model, layer)
    for (path, blocks), (up, _) in zip(row.up, ffn.up, strict=True):
        _replace(layer, path, up, (blocks * width, matrix_of(up).shape[1]))
    _replace(layer, row.down, ffn.down, (len(ffn.down_columns()), width))


def _replace(
    layer: nn.Module, path: str, old: Projection, shape: tuple[int, int]
) -> None:
    """Put a projection of another shape, [outputs, inputs], in the place of one."""
    if matrix_of(old).shape == shape:
        return
    outputs, inputs = shape
    with torch.device("meta"):
        new = (
            Conv1D(outputs, inputs)
            if isinstance(old, Conv1D)
            else nn.Linear(inputs, outputs, bias=old.bias is not None)
        )
    layer.set_submodule(path, new)


def cut(
    fm: PreTrainedModel, weights: Mapping[str, Tensor], plan: Plan
) -> Iterator[tuple[str, Tensor]]:
    """Yield an FM's weights as the sub-FM has them before any alignment, one by one.

    Dropped layers and cut neurons are left out, layers are renumbered.

    Args:
        fm: the FM.
        weights: some or all of its weights by their names without an adapter.
        plan: what to keep.
    """
    places = {}
    for layer, ffn in enumerate(ffns_of(fm)):
        neurons = torch.tensor(plan.kept.get(layer, ()), dtype=torch.int64)
        for parameter, axis, indices in ffn.parameters_by_axis(neurons):
            places[parameter.data_ptr()] = (axis, indices)
    prefix, order = layer_prefix(fm), {layer: i for i, layer in enumerate(plan.layers)}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in order:
                continue
            name = f"{prefix}{order[int(number)]}.{rest}"
        part, place = tensor.detach(), places.get(tensor.data_ptr())
        if place is not None:
            part = part.index_select(place[0], place[1].to(tensor.device))
        dtype = torch.float32 if part.is_floating_point() else part.dtype
        yield name, part.to(dtype, copy=place is None)
