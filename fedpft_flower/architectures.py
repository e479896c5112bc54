"""Describe each transformer family in one row of data.

To add a family: one row in `ARCHITECTURES` and one tiny config in
`tests/families.py`; the conformance suite then runs over it (docs/families.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedpft_flower.config import FedPFTError, Modality, Objective

AUTO_MODELS: dict[tuple[Modality, Objective], Any] = {
    ("text", "classify"): AutoModelForSequenceClassification,
    ("image", "classify"): AutoModelForImageClassification,
    ("text", "generate"): AutoModelForCausalLM,
}
AUTO_PROCESSORS: dict[Modality, Any] = {
    "text": AutoTokenizer,
    "image": AutoImageProcessor,
}


@dataclass(frozen=True)
class Architecture:
    """Name the parts of one transformer family.

    Paths are dotted; `layers` starts at the model's base (`model.bert`), `head` at the
    model, the other paths at one layer.
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
    # The modules of the classification head.
    head: tuple[str, ...]
    # The norm behind the FFN, be it behind the residual connection (post-LN blocks) or
    # before it. None in pre-LN blocks.
    output_norm: str | None
    # The config field of the FFN width, or None where the config cannot say it.
    width_field: str | None
    # What multiplies the output of `down` (layer scale): a vector or a number; it may
    # be absent.
    output_scale: str | None = None
    # Positions that no token can take (RoBERTa starts to count behind its padding).
    reserved_positions: int = 0
    # Whether tokens see only those before them, so that it can generate text.
    decoder: bool = False
    # The class of the classifier where its `Auto` class leaves a choice.
    model_class: str | None = None
    # Fields of the config that the model reads although its class declares none such.
    undeclared: tuple[str, ...] = ()
    # The config flag with which attention depends on its layer's number: of such an FM
    # no layer can be dropped, since the sub-FM would count anew.
    numbered: str | None = None
    # (config field, value, name of the row to take where the field has that value).
    variant: tuple[str, Any, str] | None = None


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
_ROBERTA = replace(_BERT, reserved_positions=2)
# Decoders classify from the last token that is no padding, or generate.
_LLAMA = Architecture(
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
    decoder=True,
    output_norm=None,
    width_field="intermediate_size",
)
# A norm of the FFN's output, before the residual connection.
_LLAMA_NORMED = replace(_LLAMA, output_norm="post_feedforward_layernorm")
_OPT = Architecture(
    modality="text",
    layers="decoder.layers",
    up=(("fc1", 1),),
    down="fc2",
    attention=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
    ),
    head=("score",),
    decoder=True,
    output_norm=None,
    width_field="ffn_dim",
)
_VIT = Architecture(
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
)
_DINOV2 = replace(
    _VIT,
    layers="encoder.layer",
    width_field=None,  # the config has a ratio
    output_scale="layer_scale2.lambda1",
)

ARCHITECTURES: dict[str, Architecture] = {
    # The pooler is the first layer of BERT's head, as `classifier.dense` is of
    # RoBERTa's: left frozen, training is much slower (docs/results.md).
    "bert": replace(_BERT, head=("bert.pooler", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "ernie": replace(_BERT, head=("ernie.pooler", "classifier")),
    "electra": _BERT,
    "deberta-v2": replace(  # and version 3
        _BERT,
        attention=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        head=("pooler", "classifier"),
        undeclared=(
            "attention_head_size",
            "cls_dropout",
            "conv_act",
            "conv_groups",
            "conv_kernel_size",
            "embedding_size",
            "norm_rel_ebd",
            "position_buckets",
            "share_att_key",
        ),
    ),
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
    "gpt2": Architecture(
        modality="text",
        layers="h",
        up=(("mlp.c_fc", 1),),
        down="mlp.c_proj",
        attention=("attn.c_attn", "attn.c_proj"),
        head=("score",),
        decoder=True,
        output_norm=None,
        width_field="n_inner",
        numbered="scale_attn_by_inverse_layer_idx",
    ),
    "gpt_neox": Architecture(  # Pythia
        modality="text",
        layers="layers",
        up=(("mlp.dense_h_to_4h", 1),),
        down="mlp.dense_4h_to_h",
        attention=("attention.query_key_value", "attention.dense"),
        head=("score",),
        decoder=True,
        output_norm=None,
        width_field="intermediate_size",
    ),
    "opt": replace(_OPT, variant=("do_layer_norm_before", False, "opt-post-ln")),
    "opt-post-ln": replace(_OPT, output_norm="final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA_NORMED,
    "gemma3_text": _LLAMA_NORMED,
    "olmo": _LLAMA,
    "olmo2": _LLAMA_NORMED,
    "olmo3": _LLAMA_NORMED,
    "smollm3": _LLAMA,
    "arcee": replace(_LLAMA, up=(("mlp.up_proj", 1),)),
    "phi": replace(
        _LLAMA,
        up=(("mlp.fc1", 1),),
        down="mlp.fc2",
        attention=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.dense",
        ),
    ),
    "phi3": replace(
        _LLAMA,
        up=(("mlp.gate_up_proj", 2),),
        attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    ),
    "starcoder2": replace(_LLAMA, up=(("mlp.c_fc", 1),), down="mlp.c_proj"),
    "vit": _VIT,
    "deit": replace(_VIT, model_class="DeiTForImageClassification"),
    "beit": replace(_VIT, output_scale="lambda_2"),
    "dinov2": replace(_DINOV2, variant=("use_swiglu_ffn", True, "dinov2-swiglu")),
    "dinov2_with_registers": replace(
        _DINOV2, variant=("use_swiglu_ffn", True, "dinov2-swiglu")
    ),
    "dinov2-swiglu": replace(
        _DINOV2,
        up=(("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
        down="mlp.down_proj",
    ),
}

# What multiplies by a matrix: GPT-2's stores it transposed.
Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class FFN:
    """Show one layer's feed-forward network as its neurons.

    `up` holds each projection into the N neurons with its number of blocks, `down` the
    projection out of them, `output_norm` the norm behind the FFN, `output_scale`
    a vector [D] that multiplies what `down` gives.
    """

    up: tuple[tuple[Projection, int], ...]
    down: Projection
    output_norm: nn.Module | None = None
    output_scale: Tensor | None = None

    @property
    def width(self) -> int:
        """Return N, the number of neurons."""
        down = self.down
        return int(down.nx if isinstance(down, Conv1D) else down.in_features)

    def up_rows(self) -> list[Tensor]:
        """Return the input weights of the neurons, one [N, D] matrix a block."""
        return [
            block
            for projection, blocks in self.up
            for block in matrix_of(projection).chunk(blocks, dim=0)
        ]

    def down_columns(self) -> Tensor:
        """Return the output weights of the neurons, [D, N]."""
        return matrix_of(self.down)

    def scaled(self, values: Tensor) -> Tensor:
        """Return what `down` gave, [..., D], as it reaches the residual stream."""
        scale = self.output_scale
        return values if scale is None else values * scale.detach()

    def output_columns(self) -> Tensor:
        """Return what the neurons give to the residual stream, [D, N], float64."""
        return self.scaled(self.down_columns().detach().double().T).T

    def output_bias(self) -> Tensor | None:
        """Return what `down`'s bias gives to the residual stream, [D], float64."""
        bias = self.down.bias
        return None if bias is None else self.scaled(bias.detach().double())

    @torch.no_grad()
    def write_output(self, columns: Tensor, bias: Tensor | None) -> None:
        """Set `down` so that the residual stream gets these columns and this bias.

        Where the scale is zero nothing reaches the stream; that stays as it is.

        Args:
            columns: [D, N], as of `output_columns`.
            bias: [D], as of `output_bias`; None where `down` has none.
        """
        scale = self.output_scale
        if scale is not None:
            reached = scale.abs() > 1e-9
            inverse = torch.where(reached, 1 / scale.double(), 0.0)
            columns = torch.where(
                reached[:, None], columns * inverse[:, None], self.down_columns()
            )
            if bias is not None:
                bias = torch.where(reached, bias * inverse, self.down.bias)
        self.down_columns().copy_(columns)
        if bias is not None:
            self.down.bias.copy_(bias)

    def parameters_by_axis(self, neurons: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Return every parameter that belongs to neurons, with their places in it.

        Args:
            neurons: positions [K] of the neurons, int64.

        Returns:
            (parameter, axis, indices): the rows of each `up` matrix, its bias, and the
            columns of `down`; `down`'s bias belongs to no neuron.
        """
        places: list[tuple[Tensor, int, Tensor]] = []
        for projection, blocks in self.up:
            width = len(matrix_of(projection)) // blocks
            rows = torch.cat([neurons + block * width for block in range(blocks)])
            axis = 1 if isinstance(projection, Conv1D) else 0
            places.append((projection.weight, axis, rows))
            if projection.bias is not None:
                places.append((projection.bias, 0, rows))
        axis = 0 if isinstance(self.down, Conv1D) else 1
        places.append((self.down.weight, axis, neurons))
        return places


def matrix_of(projection: Projection) -> Tensor:
    """Return the matrix [outputs, inputs] of a projection, not a copy."""
    weight = projection.weight
    return weight.T if isinstance(projection, Conv1D) else weight


def family_of(model_type: str) -> Architecture:
    """Return the row of a transformer family, whatever the config says further.

    Raises:
        FedPFTError: there is no row for it.
    """
    if model_type not in ARCHITECTURES:
        raise FedPFTError(
            f"unsupported model type {model_type!r}; supported: "
            f"{', '.join(model_types())}; add a row ARCHITECTURES[{model_type!r}] in "
            "architectures.py (docs/families.md)"
        )
    return ARCHITECTURES[model_type]


def model_types(decoders_only: bool = False) -> list[str]:
    """Return the model types that have a row; rows of variants are none themselves."""
    variants = {row.variant[2] for row in ARCHITECTURES.values() if row.variant}
    return sorted(
        name
        for name, row in ARCHITECTURES.items()
        if name not in variants and (row.decoder or not decoders_only)
    )


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the row of a model with this config.

    Raises:
        FedPFTError: there is no row for its family.
    """
    row = family_of(config.model_type)
    if row.variant:
        field, value, name = row.variant
        if getattr(config, field) == value:
            return ARCHITECTURES[name]
    return row


def model_class_of(row: Architecture, objective: Objective) -> Any:
    """Return the class whose `from_pretrained` loads models of a row."""
    if row.model_class is None:
        return AUTO_MODELS[row.modality, objective]
    return getattr(transformers, row.model_class)


def new_model(
    row: Architecture, config: PreTrainedConfig, objective: Objective
) -> PreTrainedModel:
    """Build a model of a row with initial weights."""
    if row.model_class is None:
        auto = AUTO_MODELS[row.modality, objective]
        model: PreTrainedModel = auto.from_config(config)
        return model
    built: PreTrainedModel = model_class_of(row, objective)(config)
    return built


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a parameter belongs to one of the modules, by their names."""
    return name.startswith(tuple(f"{module}." for module in modules))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer layers of a model, first to last."""
    row = architecture_of(model.config)
    return list(model.base_model.get_submodule(row.layers).children())


def layer_prefix(model: PreTrainedModel) -> str:
    """Return what the parameter names of layer i start with, before `i.`."""
    row = architecture_of(model.config)
    return f"{model.base_model_prefix}.{row.layers}."


def ffn_of(model: PreTrainedModel, layer: nn.Module) -> FFN:
    """Return the feed-forward network of one layer of a model."""
    row = architecture_of(model.config)
    return FFN(
        up=tuple((_projection(layer, path), blocks) for path, blocks in row.up),
        down=_projection(layer, row.down),
        output_norm=layer.get_submodule(row.output_norm) if row.output_norm else None,
        output_scale=_scale(layer, row),
    )


def ffns_of(model: PreTrainedModel) -> list[FFN]:
    """Return the feed-forward network of every layer, first to last."""
    return [ffn_of(model, layer) for layer in layers_of(model)]


def _projection(layer: nn.Module, path: str) -> Projection:
    module = layer.get_submodule(path)
    assert isinstance(module, Projection), f"{path} is {type(module).__name__}"
    return module


def _scale(layer: nn.Module, row: Architecture) -> Tensor | None:
    """Return the vector [D] that multiplies what `down` gives, or None."""
    if row.output_scale is None:
        return None
    module, _, name = row.output_scale.rpartition(".")
    scale: Tensor | float | None = getattr(layer.get_submodule(module), name)
    if isinstance(scale, int | float):
        matrix = matrix_of(_projection(layer, row.down))
        scale = torch.full((len(matrix),), float(scale), device=matrix.device)
    return scale
