"""One tiny random config per family: the conformance suite runs over all of them."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import (
    ARCHITECTURES,
    ffns_of,
    layers_of,
    matrix_of,
    new_model,
)
from fedpft_flower.config import Objective

WIDTH, LAYERS, CLASSES, VOCABULARY = 24, 3, 4, 60

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": WIDTH,
}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
_DECODER = {
    **_TEXT,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 1,
}
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4}
_OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "ffn_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "init_std": 0.2,
}
# Its width is a multiple of its size; with SwiGLU two thirds of it.
_DINOV2 = {
    **{name: size for name, size in _IMAGE.items() if name != "intermediate_size"},
    "hidden_size": 12,
    "layerscale_value": 0.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
    "camembert": _TEXT,
    "ernie": _TEXT,
    "electra": {**_TEXT, "embedding_size": 8},
    # As in DeBERTa-v3, and with the convolution of v2's largest models.
    "deberta-v2": {
        **_TEXT,
        "pad_token_id": 1,
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "share_att_key": True,
        "position_biased_input": False,
    },
    "distilbert": {
        "dim": 16,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
    },
    "modernbert": {
        **_TEXT,
        "pad_token_id": 1,
        "global_attn_every_n_layers": 2,
        "mlp_bias": True,
        # At its usual 0.02 so small a model hardly feels its FFNs.
        "initializer_range": 0.2,
    },
    "gpt2": {
        "n_embd": 16,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_inner": WIDTH,
        "vocab_size": VOCABULARY,
        "n_positions": 40,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    },
    "gpt_neox": {**_TEXT, "pad_token_id": 1, "initializer_range": 0.2},
    "opt": _OPT,
    "opt-post-ln": {**_OPT, "do_layer_norm_before": False},
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 4},
    # Some have heads of another size than their config declares.
    "qwen2": {
        **_DECODER,
        "head_dim": 4,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": {**_DECODER, "sliding_window": 4},
    "gemma3_text": {**_DECODER, "sliding_window": 4, "sliding_window_pattern": 2},
    "olmo": {**_DECODER, "initializer_range": 0.2},
    "olmo2": {**_DECODER, "initializer_range": 0.2},
    "olmo3": {**_DECODER, "initializer_range": 0.2, "sliding_window": 4},
    "smollm3": {**_DECODER, "no_rope_layer_interval": 2},
    "arcee": {**_DECODER, "initializer_range": 0.2},
    "phi": {**_DECODER, "initializer_range": 0.2},
    "phi3": {**_DECODER, "initializer_range": 0.2},
    "starcoder2": _DECODER,
    "vit": _IMAGE,
    "deit": _IMAGE,
    "beit": {**_IMAGE, "layer_scale_init_value": 0.5},
    "dinov2": {**_DINOV2, "mlp_ratio": WIDTH // 12},
    "dinov2_with_registers": {**_DINOV2, "mlp_ratio": WIDTH // 12},
    "dinov2-swiglu": {**_DINOV2, "mlp_ratio": WIDTH * 3 // 24, "use_swiglu_ffn": True},
}
# Rows that are variants of a family are no model types themselves; the first that names
# one is what it is built as.
MODEL_TYPES = {
    row.variant[2]: name for name, row in reversed(ARCHITECTURES.items()) if row.variant
}


def tiny_model(
    family: str,
    seed: int = 0,
    layers: int = LAYERS,
    objective: Objective = "classify",
) -> PreTrainedModel:
    """Build a random model whose biases are not zero, so that nothing cancels out."""
    sizes = CONFIGS[family]
    names = ("num_hidden_layers", "n_layers", "n_layer")
    depth = {name: layers for name in names if name in sizes}
    model_type = MODEL_TYPES.get(family, family)
    config = AutoConfig.for_model(model_type, num_labels=CLASSES, **{**sizes, **depth})
    torch.manual_seed(seed)
    model = new_model(ARCHITECTURES[family], config, objective)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(family: str, seed: int = 0, rows: int = 5) -> dict[str, torch.Tensor]:
    """Build a batch; texts have different lengths, so there is padding."""
    generator = torch.Generator().manual_seed(seed)
    if ARCHITECTURES[family].modality == "image":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 9 - row % 4 :] = 0
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def recorded(model, layer, batches) -> dict[str, np.ndarray]:
    """Return h, a, f, stream, output and weights of a layer, by plain hooks.

    f is what the FFN adds to the stream. Each is [tokens, ...] over all batches,
    float64, without padding; weights are those of the tokens, with the sum 1.
    """
    base = base_model(model) if isinstance(model, PeftModel) else model
    block, ffn = layers_of(base)[layer], ffns_of(base)[layer]
    found: dict[str, list[np.ndarray]] = {}
    mask = None

    def keep(name, value):
        value = value[0] if isinstance(value, tuple) else value
        rows = value.detach().reshape(-1, value.shape[-1])
        rows = rows if mask is None else rows[mask.reshape(-1).bool()]
        found.setdefault(name, []).append(rows.double().numpy())

    first = ffn.up[0][0]
    handles = [
        first.register_forward_pre_hook(lambda m, i: keep("h", i)),
        ffn.down.register_forward_pre_hook(lambda m, i: keep("a", i)),
        ffn.down.register_forward_hook(lambda m, i, o: keep("f", o)),
        block.register_forward_hook(lambda m, i, o: keep("output", o)),
    ]
    if ffn.output_norm is not None:
        handles.append(
            ffn.output_norm.register_forward_pre_hook(lambda m, i: keep("stream", i))
        )
    for batch in batches:
        mask = batch.get("attention_mask")
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    joined.setdefault("stream", joined["output"])
    joined["f"] = joined["f"] * layer_scale(ffn)
    weights = 1 / (joined["stream"].var(1) + 1e-6)
    joined["weights"] = weights / weights.sum()
    return joined


def covariance(x, weights) -> np.ndarray:
    """Return the covariance [N, N] of the columns of x [tokens, N], weighted."""
    return np.cov(x.T, bias=True, aweights=weights)


def activation_of(model):
    """Return the function of a family's FFN."""
    config = model.config
    if getattr(config, "use_swiglu_ffn", False):
        return torch.nn.functional.silu  # whatever the config says else
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    name = next(name for name in names if getattr(config, name, None))
    return ACT2FN[getattr(config, name)]


def layer_scale(ffn):
    """Return what multiplies the output of an FFN, [D] or 1."""
    scale = ffn.output_scale
    return 1.0 if scale is None else scale.detach().double().numpy()


def columns_of(ffn) -> np.ndarray:
    """Return what each neuron gives to the residual stream, [D, N]."""
    columns = matrix_of(ffn.down).detach().double().numpy()
    return (columns.T * layer_scale(ffn)).T
