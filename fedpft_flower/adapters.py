"""Attach, read, load and export adapters: LoRA on attention plus the task head.

An adapter is a dict from PEFT's parameter names to tensors, named as in the sub-FM. FM
and sub-FM have the same names and shapes, so nothing is converted between them; where
layers were dropped, the plug-in renumbers them. Every load checks that no name is
missing and none is left over.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from fedpft_flower.architectures import architecture_of, layer_prefix
from fedpft_flower.config import (
    FedPFTError,
    LoraConfig,
    derive_seed,
    first_line,
    names_in,
)
from fedpft_flower.devices import let_inputs_follow
from fedpft_flower.dropout import replace_dropout
from fedpft_flower.plan import Plan

Adapter = dict[str, Tensor]


def attach_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    head: tuple[str, ...],
    seed: int,
    layers: Sequence[int] | None = None,
) -> PeftModel:
    """Attach LoRA and a trainable head to a model, in place, and freeze the rest.

    LoRA starts at the identity (B = 0), so the outputs do not change. What trains is
    float32, in whatever numbers the model is.

    Args:
        model: the FM or a sub-FM.
        config: shape of LoRA.
        head: modules that train in full.
        seed: seed of LoRA's A.
        layers: the layers of this model that carry LoRA; None takes all.

    Raises:
        FedPFTError: `lora.targets` names a module that the model does not have.
    """
    row = architecture_of(model.config)
    targets = list(names_in(config.targets) or row.attention)
    _check_targets(model, targets)
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        target_modules=targets,
        modules_to_save=list(head),
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=None if layers is None else row.layers.rpartition(".")[2],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        try:
            adapted = peft.get_peft_model(model, lora)
        except (TypeError, ValueError) as error:  # a module that cannot be adapted
            raise FedPFTError(
                f"lora.targets or lora.head cannot be adapted ({first_line(error)}); "
                "name linear modules of the attention, and modules of the head"
            ) from error
    _check_head(adapted, head)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            replace_dropout(module.lora_dropout)
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                let_inputs_follow(trained.float())
    return adapted


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    row, prefix = architecture_of(model.config), layer_prefix(model)
    names = [name for name, _ in model.named_modules()]
    ffn = {*(path for path, _ in row.up), row.down}
    for target in targets:
        matches = [n for n in names if n == target or n.endswith(f".{target}")]
        if not matches:
            raise FedPFTError(
                f"lora.targets: {model.config.model_type} has no module {target!r}; "
                f"the attention modules are {', '.join(row.attention)}"
            )
        inside = [n.removeprefix(prefix).partition(".")[2] for n in matches]
        if ffn & set(inside):
            raise FedPFTError(
                f"lora.targets: {target!r} is in the FFN, whose neurons the sub-FM "
                f"lacks; the attention modules are {', '.join(row.attention)}"
            )


def _check_head(model: PeftModel, head: tuple[str, ...]) -> None:
    """Check that PEFT, which compares the ends of names, took the head and no more."""
    taken = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    if taken != set(head):
        raise FedPFTError(
            f"lora.head: {sorted(head)} cannot be told from {sorted(taken)}; name all "
            "of them, or none"
        )


def base_model(model: PeftModel) -> PreTrainedModel:
    """Return the transformer inside a model with an adapter."""
    return cast(PreTrainedModel, model.get_base_model())


def get_adapter(model: PeftModel) -> Adapter:
    """Return a copy of the adapter that a model holds, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: t.detach().to("cpu", copy=True) for name, t in state.items()}


def load_adapter(model: PeftModel, adapter: Mapping[str, Tensor]) -> None:
    """Load an adapter into a model that has its names; into the FM, use `plug_in`.

    Raises:
        FedPFTError: a name is missing or left over, or a shape differs.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_adapter(adapter, own)
    set_peft_model_state_dict(model, dict(adapter))


def plug_in(fm: PeftModel, adapter: Mapping[str, Tensor], plan: Plan) -> None:
    """Load an adapter of the sub-FM into the FM, at the layers that it comes from.

    Raises:
        FedPFTError: a name is missing or left over, or a shape differs.
    """
    prefix = f"base_model.model.{layer_prefix(base_model(fm))}"
    renumbered = {}
    for name, tensor in adapter.items():
        if name.startswith(prefix):
            place, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{plan.layers[int(place)]}.{rest}"
        renumbered[name] = tensor
    load_adapter(fm, renumbered)


def check_adapter(
    adapter: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check that an adapter has the expected names, shapes and finite values.

    Raises:
        FedPFTError: it has not.
    """
    missing, extra = expected.keys() - adapter.keys(), adapter.keys() - expected.keys()
    if missing or extra:
        raise FedPFTError(
            f"adapter does not fit: missing {sorted(missing)[:3]}, left over "
            f"{sorted(extra)[:3]}"
        )
    for name, tensor in adapter.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise FedPFTError(
                f"adapter does not fit: {name} is {tensor.dtype} {tuple(tensor.shape)},"
                f" expected {want.dtype} {tuple(want.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise FedPFTError(f"adapter has values that are not finite in {name}")


def export_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter as a PEFT directory that loads on the stock FM."""
    model.save_pretrained(str(directory), save_embedding_layers=False)
