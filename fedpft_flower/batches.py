"""Name what models take and give: batches, and what is real in them, not padding."""

from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def inputs_of(batch: Batch) -> Batch:
    """Return a batch without its labels."""
    return {name: values for name, values in batch.items() if name != "labels"}


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states [B, T, D] among what a layer returned."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors [tokens, D] of the tokens that are not padding.

    Args:
        values: [B, T, D], or any shape that ends in D when there is no mask.
        mask: attention mask [B, T], or None when every token is real.
    """
    flat = values.reshape(-1, values.shape[-1])
    if mask is None:
        return flat
    # By places, since the gradient of a choice by booleans is added up token by token.
    places = mask.reshape(-1).nonzero().squeeze(1)
    return flat.index_select(0, places.to(flat.device))


def real_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's logits [B, C] of rows, or [tokens, V] of real tokens."""
    return real_answers(model(**batch).logits, batch.get("attention_mask"))


def real_answers(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits [B, C] of rows, or of tokens the real ones [tokens, V].

    Args:
        logits: [B, C], or [B, T, V].
        mask: attention mask [B, T], or None when every token is real.
    """
    return logits if logits.dim() == 2 else real_tokens(logits, mask)


def unit_cotangents(logits: Tensor, seed: int) -> Tensor:
    """Return random vectors of length 1, the same for every model and device.

    Args:
        logits: [B, C] or [tokens, V], which they have the shape and device of.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(logits.shape, generator=generator).to(logits.device)
    cotangents: Tensor = drawn / drawn.norm(dim=-1, keepdim=True)
    return cotangents
