"""Align the sub-FM with the FM on public data, by distillation.

Loss of both distillations (Peng et al. 2024, sub-FM alignment), the mean over the
aligned layers of

    MSE(h_FM, h_sub) / mean(h_FM^2)
    + alpha * MSE(W_out W_in, W'_out W'_in) / mean((W_out W_in)^2)

with h the output of a layer on real tokens, weighted alike in both means by
`sensitivity` where a share says so (ours); a layer that stands in for dropped ones
follows the last of them, and has no second term. The authors' code computes the second
term from detached weights, so there it has no gradient; the method needs one, and here
it has one. Teacher and student are always given the same adapter by the caller.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import FFN, ffns_of, layers_of
from fedpft_flower.batches import Batch, real_tokens
from fedpft_flower.config import derive_seed
from fedpft_flower.descent import Loss, Progress, Schedule, Trainable, descend
from fedpft_flower.passes import ended_behind, outputs_of
from fedpft_flower.plan import Plan
from fedpft_flower.sensitivity import StreamPoint, sensitivities, weigh
from fedpft_flower.sub_fm import compressed_ffns

# Of the FM's hidden states of held-out rows, which are needed again and again.
HELD_OUT_BYTES = 256e6


# -------------------------------------------------------------------------- losses


def state_loss(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the mean over layers of MSE(h_FM, h_sub) / mean(h_FM^2).

    Args:
        teacher: outputs [tokens, D] of the FM's layers, without padding.
        student: outputs [tokens, D] of the sub-FM's layers at the same places.
        weights: of every layer's tokens [tokens] in both means; None: all alike.
    """
    losses = []
    for i, (h_fm, h_sub) in enumerate(zip(teacher, student, strict=True)):
        wanted = h_fm.float()
        error, size = (wanted - h_sub).square(), wanted.square()
        if weights is not None:  # no product of matrices: those may be in bfloat16
            error, size = (weights[i][:, None] * part for part in (error, size))
        losses.append(error.mean() / size.mean())
    return torch.stack(losses).mean()


def weight_products(ffn: FFN) -> list[Tensor]:
    """Return W_out W_x, [D, D], for every block of input weights W_x."""
    columns = ffn.down_columns().float()
    return [columns @ rows.float() for rows in ffn.up_rows()]


def product_loss(
    teacher: Sequence[Sequence[Tensor]], student: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return the mean over layers of MSE(P, P') / mean(P^2), P = W_out W_in.

    Gated FFNs take the mean over gate and up. Both arguments hold, for every layer,
    the matrices of `weight_products`.
    """
    losses = [
        torch.stack(
            [
                (p_fm - p_sub).square().mean() / p_fm.square().mean()
                for p_fm, p_sub in zip(layer_fm, layer_sub, strict=True)
            ]
        ).mean()
        for layer_fm, layer_sub in zip(teacher, student, strict=True)
    ]
    return torch.stack(losses).mean()


# ------------------------------------------------------------------- what may change


def layer_level(ffns: Sequence[FFN]) -> list[Trainable]:
    """Let whole FFNs change, and the norm behind them where there is one."""
    modules: list[nn.Module] = []
    for ffn in ffns:
        modules += [linear for linear, _ in ffn.up] + [ffn.down]
        modules += [ffn.output_norm] if ffn.output_norm is not None else []
    return [
        (parameter, None) for module in modules for parameter in module.parameters()
    ]


def emulator_level(layers: Sequence[nn.Module]) -> list[Trainable]:
    """Let whole layers change: those that stand in for dropped ones."""
    return [(parameter, None) for layer in layers for parameter in layer.parameters()]


def neuron_level(ffns: Sequence[FFN], neurons: Sequence[Tensor]) -> list[Trainable]:
    """Let only the chosen neurons change: their rows, input biases and columns.

    Args:
        ffns: the FFNs of the compressed layers.
        neurons: the chosen positions, one int64 tensor an FFN.
    """
    trainable: list[Trainable] = []
    for ffn, chosen in zip(ffns, neurons, strict=True):
        for parameter, axis, places in ffn.parameters_by_axis(chosen):
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            places = places.to(parameter.device)
            trainable.append((parameter, mask.index_fill_(axis, places, True)))
    return trainable


def most_inactive(rates: Sequence[Tensor], proportion: float) -> list[Tensor]:
    """Choose the neurons with the highest rate of inactivity, layer by layer.

    Args:
        rates: inactive rates [K] of every layer.
        proportion: share of each layer's neurons to choose (p of the paper).

    Returns:
        Ascending positions, round(p * K) of them, at least one; equal rates choose the
        lower position.
    """
    chosen = []
    for rate in rates:
        count = max(1, round(proportion * len(rate)))
        order = torch.sort(rate, descending=True, stable=True).indices
        chosen.append(order[:count].sort().values)
    return chosen


# ------------------------------------------------------------------------- the loop


def distil(
    fm: PeftModel,
    sub_fm: PeftModel,
    plan: Plan,
    trainable: Sequence[Trainable],
    batches: Iterator[Batch],
    schedule: Schedule,
    product_weight: float,
    report: Callable[[Progress], None],
    held_out: Sequence[Batch] = (),
    memory: float = 0.0,
    share: float = 0.0,
    seed: int = 0,
) -> Progress:
    """Train a part of the sub-FM to follow the FM on public batches.

    Dropout is off in both.

    Args:
        fm: the teacher.
        sub_fm: the student, holding the same adapter.
        plan: what the student kept.
        trainable: the parameters that may change.
        batches: endless public inputs.
        schedule: how fast and how long.
        product_weight: alpha of the loss.
        report: called after every step.
        held_out: public inputs to watch for overfit, where the schedule has a patience.
        memory: bytes for what the teacher has, to compute it once a row; its
            sensitivity is then that of the first time.
        share: of the tokens' weights that is by `sensitivity`.
        seed: of what sensitivity is measured with.

    Returns:
        The last step's progress.

    Raises:
        FedPFTError: the loss is not finite.
    """
    fm.eval()
    sub_fm.eval()
    target_of = _targets(fm, plan, held_out, memory, share, seed)
    loss_of = _DistillationLoss(fm, sub_fm, plan, target_of, product_weight)
    # By another name where a step costs more: what is fastest is kept by it.
    name = "alignment loss by sensitivity" if share else "alignment loss"
    remedy = f"lower the learning rate {schedule.lr:g} (align.lr, align.during-lr)"
    models = [base_model(fm), base_model(sub_fm)]
    loss = Loss(loss_of, name, remedy)
    with _learning([parameter for parameter, _ in trainable]):
        return descend(models, trainable, batches, loss, schedule, report, held_out)


class _DistillationLoss:
    """Return the loss of a batch: of hidden states, and of the FFNs' products."""

    def __init__(
        self,
        fm: PeftModel,
        sub_fm: PeftModel,
        plan: Plan,
        target_of: Callable[[Batch], "Target"],
        product_weight: float,
    ) -> None:
        # Without what is behind the layers: nobody asks for its logits.
        self._student = base_model(sub_fm).base_model
        self._all = layers_of(base_model(sub_fm))
        self._layers = [self._all[place] for place in plan.places(plan.aligned)]
        self._target_of, self._weight = target_of, product_weight
        self._ffns, self._products = list[FFN](), list[list[Tensor]]()
        if product_weight:
            self._ffns = compressed_ffns(base_model(sub_fm), plan)
            fm_ffns = ffns_of(base_model(fm))
            with torch.no_grad():
                self._products = [weight_products(fm_ffns[i]) for i in plan.compressed]

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        target = self._target_of(batch)
        with (
            outputs_of(self._layers) as outputs,
            ended_behind(self._layers[-1], self._all),
        ):
            self._student(**batch)
        found = [real_tokens(h, batch.get("attention_mask")) for h in outputs]
        loss = state_loss(target.states, found, target.weights)
        if self._ffns:
            with torch.autocast(loss.device.type, enabled=False):  # as the teacher's
                products = [weight_products(ffn) for ffn in self._ffns]
            loss = loss + self._weight * product_loss(self._products, products)
        return loss, len(found[0])


def _targets(
    fm: PeftModel,
    plan: Plan,
    held_out: Sequence[Batch],
    memory: float,
    share: float,
    seed: int,
) -> Callable[[Batch], "Target"]:
    """Return what the student follows on a batch; of one held out it is kept anyway."""
    fm_layers = layers_of(base_model(fm))
    layers = [fm_layers[plan.teacher(layer)] for layer in plan.aligned]
    usual, patient = (
        Teacher(base_model(fm), layers, room, share, seed)
        for room in (memory, max(memory, HELD_OUT_BYTES))
    )
    held = {id(batch) for batch in held_out}
    return lambda batch: patient(batch) if id(batch) in held else usual(batch)


@dataclass(frozen=True)
class Target:
    """Hold what the student follows on a batch."""

    states: Sequence[Tensor]  # [tokens, D] of each layer
    weights: Sequence[Tensor] | None = None  # [tokens] of each layer; None: all alike


class Teacher:
    """Give what the FM has on a batch, computed once a row while memory allows."""

    def __init__(
        self,
        fm: PreTrainedModel,
        layers: Sequence[nn.Module],
        memory: float,
        share: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Begin without any row.

        Args:
            fm: the FM, which does not change, in evaluation mode.
            layers: whose outputs to give.
            memory: bytes that may be kept; rows beyond it are computed every time.
            share: of the tokens' weights that is by `sensitivity`.
            seed: of what sensitivity is measured with.
        """
        self._fm, self._layers = fm, layers
        self._keeps, self._free = memory > 0, memory
        self._share, self._seed = share, seed
        # Of each row, by layer: states [tokens, D] and sensitivities [tokens], if any.
        self._rows: dict[bytes, tuple[Tensor, ...]] = {}

    def __call__(self, batch: Batch) -> Target:
        """Return the layers' outputs, and the weights of their tokens."""
        keys = _row_keys(batch) if self._keeps or self._share else []
        if keys and all(key in self._rows for key in keys):
            rows = zip(*(self._rows[key] for key in keys), strict=True)
            return self._target(*(list(torch.cat(kind, dim=1)) for kind in rows))
        parts = self._measure(batch, keys)
        if self._keeps:
            self._keep(keys, parts, batch.get("attention_mask"))
        return self._target(*parts)

    def _measure(self, batch: Batch, keys: Sequence[bytes]) -> list[list[Tensor]]:
        if self._share:
            # By content: how often others were measured before makes no difference.
            seed = derive_seed(self._seed, "sensitivity", b"".join(keys).hex())
            points = [StreamPoint(layer) for layer in self._layers]
            return list(sensitivities(self._fm, points, batch, seed))
        with (
            torch.no_grad(),
            outputs_of(self._layers) as outputs,
            ended_behind(self._layers[-1], layers_of(self._fm)),
        ):
            self._fm.base_model(**batch)  # nobody asks for its logits
        return [[real_tokens(h, batch.get("attention_mask")) for h in outputs]]

    def _target(
        self, states: Sequence[Tensor], measured: Sequence[Tensor] = ()
    ) -> Target:
        if not measured:
            return Target(states)
        alike = torch.ones_like(measured[0])
        return Target(states, [weigh(alike, s, self._share) for s in measured])

    def _keep(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Sequence[Tensor]],
        mask: Tensor | None,
    ) -> None:
        """Keep what was found of every row that there is room for."""
        alike = [len(parts[0][0]) // len(keys)] * len(keys)
        lengths = alike if mask is None else mask.sum(dim=1).tolist()
        kinds = [torch.stack(list(part)).split(lengths, dim=1) for part in parts]
        for key, *row in zip(keys, *kinds, strict=True):
            size = sum(part.numel() * part.element_size() for part in row)
            if key not in self._rows and size <= self._free:
                self._rows[key] = tuple(part.clone() for part in row)
                self._free -= size


def _row_keys(batch: Batch) -> list[bytes]:
    """Return a hash of every row's inputs, whatever its padding."""
    mask = batch.get("attention_mask")
    keys = []
    for row in range(len(next(iter(batch.values())))):
        digest = hashlib.sha256()
        for values in batch.values():
            one = values[row]
            if mask is not None and values.shape == mask.shape:
                one = one[mask[row].bool()]
            digest.update(one.contiguous().cpu().numpy().tobytes())
        keys.append(digest.digest())
    return keys


@contextmanager
def _learning(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let these frozen parameters take gradients for a while."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
