"""Say what config a client is sent, and judge a received one, which may be hostile."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fedpft_flower.architectures import family_of
from fedpft_flower.config import FedPFTError
from fedpft_flower.plan import MOST_LAYERS

# Bounds on what a received config may ask for.
MOST_ENTRIES, MOST, MOST_FLOAT = 100_000, 2e7, 1e12
# Fields that models of many families read although their configs declare none such.
_UNDECLARED = {"head_dim", "is_causal"}


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config that a client needs to rebuild the model.

    They are those of the family, as this machine's `transformers` knows it, and the
    label set: no paths, no code to load, no choice of kernels.
    """
    allowed = _allowed_fields(config.model_type)
    fields = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in fields.items() if name in allowed}


def config_from(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a config from received fields, which may be hostile.

    Raises:
        FedPFTError: an unsupported family, a field that is not allowed, or a value
            that no sound config has.
    """
    model_type = str(fields.get("model_type"))
    family_of(model_type)
    extra = sorted(fields.keys() - _allowed_fields(model_type))
    if extra:
        raise FedPFTError(
            f"received config has fields that are not allowed: {extra[:3]}"
        )
    for name, value in fields.items():
        if not _is_sound(value):
            raise FedPFTError(
                f"received config: {name} = {str(value)[:40]!r} is refused"
            )
    rest = {name: value for name, value in fields.items() if name != "model_type"}
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **rest)
    if not 0 < config.num_hidden_layers <= MOST_LAYERS:
        raise FedPFTError(f"received config has {config.num_hidden_layers} layers")
    return config


def _allowed_fields(model_type: str) -> set[str]:
    family = AutoConfig.for_model(model_type).to_dict().keys()
    own = family - PreTrainedConfig().to_dict().keys()
    undeclared = {*family_of(model_type).undeclared, *_UNDECLARED}
    return {*own, *undeclared, "model_type", "id2label", "label2id", "problem_type"}


def _is_sound(value: Any, depth: int = 0) -> bool:
    """Tell a plain value of a plausible size from anything else."""
    if isinstance(value, list | dict):
        inside = [*value, *(value.values() if isinstance(value, dict) else ())]
        small = len(inside) <= MOST_ENTRIES and depth < 3
        return small and all(_is_sound(one, depth + 1) for one in inside)
    if isinstance(value, str):
        return len(value) <= MOST_ENTRIES
    # A float is no size: the base of rotary positions may be 1e9.
    most = MOST_FLOAT if isinstance(value, float) else MOST
    return value is None or (isinstance(value, int | float) and abs(value) <= most)
