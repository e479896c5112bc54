"""One tiny random config per family: the conformance suite runs over all of them."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import (
    AUTO_MODELS,
    architecture_of,
    ffns_of,
    layers_of,
)

WIDTH, LAYERS, CLASSES, VOCABULARY = 24, 3, 4, 60

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": WIDTH,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40},
    "roberta": {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40},
    "distilbert": {
        "dim": 16,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
    },
    "llama": {
        **_SIZES,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    },
    "modernbert": {
        **_SIZES,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "global_attn_every_n_layers": 2,
        "mlp_bias": True,
        # At its usual 0.02 so small a model hardly feels its FFNs.
        "initializer_range": 0.2,
    },
    "vit": {**_SIZES, "image_size": 8, "patch_size": 4},
}


def tiny_model(family: str, seed: int = 0, layers: int = LAYERS) -> PreTrainedModel:
    """Build a random model whose biases are not zero, so that nothing cancels out."""
    sizes = CONFIGS[family]
    depth = {k: layers for k in ("num_hidden_layers", "n_layers") if k in sizes}
    config = AutoConfig.for_model(family, num_labels=CLASSES, **{**sizes, **depth})
    torch.manual_seed(seed)
    model = AUTO_MODELS[architecture_of(family).modality].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(family: str, seed: int = 0, rows: int = 5) -> dict[str, torch.Tensor]:
    """Build a batch; texts have different lengths, so there is padding."""
    generator = torch.Generator().manual_seed(seed)
    if architecture_of(family).modality == "image":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 9 - row % 4 :] = 0
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def recorded(model, layer, batches) -> dict[str, np.ndarray]:
    """Return h, a, f, stream, output and weights of a layer, by plain hooks.

    Each is [tokens, ...] over all batches, float64, without padding; weights are those
    of the tokens, with the sum 1.
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
    weights = 1 / (joined["stream"].var(1) + 1e-6)
    joined["weights"] = weights / weights.sum()
    return joined


def covariance(x, weights) -> np.ndarray:
    """Return the covariance [N, N] of the columns of x [tokens, N], weighted."""
    return np.cov(x.T, bias=True, aweights=weights)
