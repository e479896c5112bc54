"""Compare the sub-FM with the FM on public data, both with the current adapter.

Answers and hidden states tell what it can do: the better a sub-FM resembles the FM, the
more of it a client holds. The adapter's gradients tell how well training on it stands
for training on the FM.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import layers_of
from fedpft_flower.batches import (
    Batch,
    inputs_of,
    real_answers,
    real_logits,
    real_tokens,
    unit_cotangents,
)
from fedpft_flower.config import Objective, derive_seed
from fedpft_flower.passes import outputs_of

# ---------------------------------------------------------- answers, hidden states


@dataclass(frozen=True)
class Likeness:
    """Hold how alike two models are on the same inputs."""

    # Of the last layer's output over real tokens: |h_sub - h_FM| / |h_FM|, L2.
    state_error: float
    # Share of rows, or of tokens where text is generated, with the same answer.
    agreement: float
    # Where text is generated, the mean loss of the next token of both: their own
    # ability, without any task.
    fm_loss: float | None = None
    sub_fm_loss: float | None = None


@torch.no_grad()
def likeness(
    fm: PeftModel,
    sub_fm: PeftModel,
    batches: Iterable[Batch],
    objective: Objective = "classify",
) -> Likeness:
    """Compare the last hidden states and the answers of FM and sub-FM.

    Args:
        fm: the FM with the adapter.
        sub_fm: the sub-FM with it.
        batches: public inputs; `attention_mask` [B, T] marks real tokens.
        objective: what the models do.
    """
    fm.eval()
    sub_fm.eval()
    error = size = 0.0
    answers = same = targets = 0
    losses = [0.0, 0.0]
    for batch in batches:
        inputs = inputs_of(batch)
        mask = inputs.get("attention_mask")
        (state, logits), (sub_state, sub_logits) = (
            _run(model, inputs) for model in (fm, sub_fm)
        )
        error += float((sub_state - state).square().sum())
        size += float(state.square().sum())
        said, sub_said = (
            # Answers first: logits of a generating model are large.
            real_answers(values.argmax(dim=-1, keepdim=True), mask)
            for values in (logits, sub_logits)
        )
        answers += len(said)
        same += int((said == sub_said).sum())
        if objective == "generate":
            for place, values in enumerate((logits, sub_logits)):
                loss, count = _next_token_loss(values, inputs)
                losses[place] += loss
            targets += count
    means = [loss / targets for loss in losses] if targets else [None, None]
    return Likeness((error / size) ** 0.5, same / answers, *means)


def _run(model: PeftModel, inputs: Batch) -> tuple[Tensor, Tensor]:
    """Return the last layer's output [tokens, D] and the logits [B, C] or [B, T, V]."""
    last = layers_of(base_model(model))[-1]
    with outputs_of([last]) as outputs:
        logits: Tensor = model(**inputs).logits
    state = real_tokens(outputs[0], inputs.get("attention_mask"))
    return state.double(), logits.float()


def _next_token_loss(logits: Tensor, inputs: Batch) -> tuple[float, int]:
    """Return the summed cross-entropy of next tokens, and how many there are."""
    wanted = inputs["input_ids"][:, 1:].to(logits.device)
    real = inputs["attention_mask"][:, 1:].bool().to(logits.device)
    loss = nn.functional.cross_entropy(
        logits[:, :-1][real], wanted[real], reduction="sum"
    )
    return float(loss), int(real.sum())


# ------------------------------------------------------------------------ gradients


@dataclass(frozen=True)
class GradientError:
    """Hold the error of the sub-FM's adapter gradients, over batches: mean, spread."""

    relative: float
    relative_spread: float
    cosine: float
    cosine_spread: float


def adapter_gradients(
    model: PeftModel, batches: Iterable[Batch], seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the gradients of a model's adapter, batch by batch, on the CPU.

    The scalar is the logits times seeded unit cotangents, the same for every model, so
    no labels are needed.
    """
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for i, batch in enumerate(batches):
        logits = real_logits(model, batch)
        cotangent = unit_cotangents(logits, derive_seed(seed, "cotangent", i))
        gradients = torch.autograd.grad((logits * cotangent).sum(), trained)
        yield tuple(gradient.cpu() for gradient in gradients)


def compare_gradients(
    target: Iterable[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]
) -> GradientError:
    """Return the error of the sub-FM's gradients.

    Tensors are paired in order, since dropped layers change names, never the order.
    Those whose FM gradient is zero are left out (LoRA's A has none while B = 0). The
    convergence bound of the paper is in terms of this error.

    Args:
        target: what `adapter_gradients` yields of the FM.
        found: what it yields of the sub-FM, on the same batches.

    Returns:
        Relative L2 error and cosine, mean and sample standard deviation over batches.
    """
    relative, cosine = [], []
    for of_fm, of_sub_fm in zip(target, found, strict=True):
        pairs = [p for p in zip(of_fm, of_sub_fm, strict=True) if bool(p[0].any())]
        g_fm = torch.cat([gradient.flatten() for gradient, _ in pairs])
        g_sub = torch.cat([gradient.flatten() for _, gradient in pairs])
        relative.append(float((g_sub - g_fm).norm() / g_fm.norm()))
        cosine.append(float(torch.cosine_similarity(g_sub, g_fm, dim=0)))
    return GradientError(*_mean_and_spread(relative), *_mean_and_spread(cosine))


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    spread = float(tensor.std()) if len(values) > 1 else 0.0
    return float(tensor.mean()), spread
