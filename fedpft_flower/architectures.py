"""Describe each transformer family in one row of data.

To add a family: one row in `ARCHITECTURES` and one tiny config in
`tests/families.py`; the conformance suite then runs over it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from fedpft_flower.config import FedPFTError, Modality

AUTO_MODELS: dict[Modality, Any] = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
}
AUTO_PROCESSORS: dict[Modality, Any] = {
    "text": AutoTokenizer,
    "image": AutoImageProcessor,
}


@dataclass(frozen=True)
class Architecture:
    """Name the parts of one transformer family.

    Paths are dotted; `layers` starts at the model's base (`model.bert`), the other
    paths start at one layer.
    """

    modality: Modality
    layers: str
    # Projections whose outputs are the neurons, each with the number of blocks that
    # its matrix stacks: neuron i is row b * N + i of block b (fused gates have two).
    up: tuple[tuple[str, int], ...]
    # The projection whose inputs are the neurons.
    down: str
    # The modules that LoRA adapts.
    attention: tuple[str, ...]
    # The modules of the task head, starting at the model.
    head: tuple[str, ...]
    # Post-LN blocks: the norm behind the FFN. None in pre-LN blocks.
    output_norm: str | None
    # The config field of the FFN width, or None where the config cannot say it.
    width_field: str | None
    # Positions that no token can take (RoBERTa starts to count behind its padding).
    reserved_positions: int = 0


_BERT = Architecture(
    modality="text",
    layers="encoder.layer",
    up=(("intermediate.dense", 1),),
    down="output.dense",
    attention=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    head=("classifier",),
    output_norm="output.LayerNorm",
    width_field="intermediate_size",
)

ARCHITECTURES: dict[str, Architecture] = {
    # The pooler is the first layer of BERT's head, as `classifier.dense` is of
    # RoBERTa's: left frozen, training is much slower (docs/results.md).
    "bert": replace(_BERT, head=("bert.pooler", "classifier")),
    "roberta": replace(_BERT, reserved_positions=2),
    "distilbert": Architecture(
        modality="text",
        layers="transformer.layer",
        up=(("ffn.lin1", 1),),
        down="ffn.lin2",
        attention=(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
        ),
        head=("pre_classifier", "classifier"),
        output_norm="output_layer_norm",
        width_field="hidden_dim",
    ),
    # Decoders classify from the last token that is no padding.
    "llama": Architecture(
        modality="text",
        layers="layers",
        up=(("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
        down="mlp.down_proj",
        attention=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
        head=("score",),
        output_norm=None,
        width_field="intermediate_size",
    ),
    "modernbert": Architecture(
        modality="text",
        layers="layers",
        up=(("mlp.Wi", 2),),
        down="mlp.Wo",
        attention=("attn.Wqkv", "attn.Wo"),
        head=("head", "classifier"),
        output_norm=None,
        width_field="intermediate_size",
    ),
    "vit": Architecture(
        modality="image",
        layers="layers",
        up=(("mlp.fc1", 1),),
        down="mlp.fc2",
        attention=(
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
        ),
        head=("classifier",),
        output_norm=None,
        width_field="intermediate_size",
    ),
}


@dataclass(frozen=True)
class FFN:
    """Show one layer's feed-forward network as its neurons.

    `up` holds each projection into the N neurons with its number of blocks, `down` the
    projection out of them, `output_norm` the norm behind a post-LN FFN.
    """

    up: tuple[tuple[nn.Linear, int], ...]
    down: nn.Linear
    output_norm: nn.Module | None

    @property
    def width(self) -> int:
        """Return N, the number of neurons."""
        return self.down.in_features

    def up_rows(self) -> list[Tensor]:
        """Return the input weights of the neurons, one [N, D] matrix a block."""
        return [
            block
            for linear, blocks in self.up
            for block in linear.weight.chunk(blocks, dim=0)
        ]

    def down_columns(self) -> Tensor:
        """Return the output weights of the neurons, [D, N]."""
        return self.down.weight

    def parameters_by_axis(self, neurons: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Return every parameter that belongs to neurons, with their places in it.

        Args:
            neurons: positions [K] of the neurons, int64.

        Returns:
            (parameter, axis, indices): the rows (axis 0) of each `up` weight and bias
            and the columns (axis 1) of `down`; `down`'s bias belongs to no neuron.
        """
        places: list[tuple[Tensor, int, Tensor]] = []
        for linear, blocks in self.up:
            width = linear.out_features // blocks
            rows = torch.cat([neurons + block * width for block in range(blocks)])
            places.append((linear.weight, 0, rows))
            if linear.bias is not None:
                places.append((linear.bias, 0, rows))
        places.append((self.down.weight, 1, neurons))
        return places


def architecture_of(model_type: str) -> Architecture:
    """Return the row of a transformer family.

    Raises:
        FedPFTError: there is no row for it.
    """
    if model_type not in ARCHITECTURES:
        raise FedPFTError(
            f"unsupported model type {model_type!r}; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}; add a row in architectures.py"
        )
    return ARCHITECTURES[model_type]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer layers of a model, first to last."""
    row = architecture_of(model.config.model_type)
    base = model.get_submodule(model.base_model_prefix)
    return list(base.get_submodule(row.layers).children())


def layer_prefix(model: PreTrainedModel) -> str:
    """Return what the parameter names of layer i start with, before `i.`."""
    row = architecture_of(model.config.model_type)
    return f"{model.base_model_prefix}.{row.layers}."


def ffn_of(model: PreTrainedModel, layer: nn.Module) -> FFN:
    """Return the feed-forward network of one layer of a model."""
    row = architecture_of(model.config.model_type)
    return FFN(
        up=tuple((_linear(layer, path), blocks) for path, blocks in row.up),
        down=_linear(layer, row.down),
        output_norm=layer.get_submodule(row.output_norm) if row.output_norm else None,
    )


def ffns_of(model: PreTrainedModel) -> list[FFN]:
    """Return the feed-forward network of every layer, first to last."""
    return [ffn_of(model, layer) for layer in layers_of(model)]


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} is {type(module).__name__}"
    return module
