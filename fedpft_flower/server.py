"""Own the FM: plan, cut, align, plug in, evaluate. No federation framework here.

`ProxyServer` can be driven by a plain loop (benchmarks/plain_loop.py), which gives
the same adapter as the same run through Flower.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from fedpft_flower.activity import activation_rms, inactive_rates
from fedpft_flower.adapters import (
    Adapter,
    attach_adapter,
    base_model,
    check_adapter,
    get_adapter,
    load_adapter,
    plug_in,
)
from fedpft_flower.alignment import (
    distil,
    emulator_level,
    layer_level,
    most_inactive,
    neuron_level,
)
from fedpft_flower.architectures import FFN, ffns_of, layers_of
from fedpft_flower.batches import Batch
from fedpft_flower.config import Config, FedPFTError, Objective, derive_seed
from fedpft_flower.descent import Schedule, Trainable
from fedpft_flower.encoding import (
    GenerationRows,
    Rows,
    TextRows,
    encode,
    encode_public,
    endless_batches,
    hold_out,
    mixed_batches,
    shuffled_batches,
    within_tokens,
)
from fedpft_flower.evaluation import judge
from fedpft_flower.fidelity import (
    GradientError,
    adapter_gradients,
    compare_gradients,
    likeness,
)
from fedpft_flower.foundation import FoundationModel
from fedpft_flower.least_squares import refit
from fedpft_flower.methods import method_of
from fedpft_flower.metrics import Metrics, metric_of
from fedpft_flower.package import Package
from fedpft_flower.passes import count_tokens
from fedpft_flower.plan import Plan
from fedpft_flower.planners import kept_counts, size_of
from fedpft_flower.processors import saved_and_loaded
from fedpft_flower.progress import DescentLog, FitLog, LoggedBatches
from fedpft_flower.quantisation import check_frozen
from fedpft_flower.received import config_fields, config_from
from fedpft_flower.refinement import refine
from fedpft_flower.selection import score, selection_of
from fedpft_flower.sensitivity import Sensitivity, measure, streams
from fedpft_flower.sub_fm import build_sub_fm, compressed_ffns, cut, frozen_weights
from fedpft_flower.tasks import TaskData
from fedpft_flower.training import round_lr

logger = logging.getLogger(__name__)

GRADIENT_BATCHES = 8
# Of a batch; a generating model has logits as long as its vocabulary for every token.
GRADIENT_ROWS: dict[Objective, int] = {"classify": 8, "generate": 2}
# Public rows on which FM and sub-FM are compared.
LIKENESS_BATCHES = 8
LIKENESS_ROWS: dict[Objective, int] = {"classify": 256, "generate": 32}
ACTIVITY_BATCHES = 16
# Of public rows, where a distillation watches for overfit; at most a fifth of them.
HELD_OUT_BATCHES = 2
# Public tokens for each kept neuron of a layer: looked at, and at least needed. With
# fewer, a least-squares refit fits the tokens that it sees and no others.
CALIBRATION_TOKENS, LEAST_TOKENS = 40, 25
# Of a layer's neurons: how many the selection is given tokens for.
USUAL_SHARE = 0.25

# Beginnings of the names in a saved state.
_ADAPTER, _WEIGHT, _LIMIT = "adapter/", "sub-fm/", "activity-limit/"


class ProxyServer:
    """Own the FM, its sub-FM and the adapter that both hold."""

    def __init__(
        self,
        config: Config,
        fm: FoundationModel,
        task: TaskData,
        public: Dataset | None,
        plan: Plan | None = None,
    ) -> None:
        """Plan and cut the sub-FM, and attach the adapter to it and to the FM.

        Args:
            config: the run.
            fm: the FM, which becomes this server's own.
            task: validation and test rows, and the label set.
            public: public unlabelled rows; None where nothing needs them.
            plan: the plan of a run that goes on; None makes one.

        Raises:
            FedPFTError: the plan asks for what the FM does not have; a public corpus is
                needed and there is none, or holds no row within its budget; rows are
                longer than the FM takes; no node would take the FM's processor or
                config, or quantise it as asked.
        """
        self.config, self.method = config, method_of(config)
        # Rows are encoded here as at the nodes: by what was saved.
        self._processor_files, self._processor = saved_and_loaded(
            fm.processor, fm.architecture
        )
        self._head = fm.head
        self._architecture, self._objective = fm.architecture, fm.objective
        # What a run is judged by.
        self.metric = metric_of(config.data)
        self._model_config = config_fields(fm.model.config)
        config_from(self._model_config)  # what no node would take ends here
        _check_fits(config, fm, public)
        self._public = self.encode_public(public) if public is not None else None
        # Of calibration tokens, by the number of neurons they are for.
        self._sensitive: dict[int, Sensitivity | None] = {}
        self._splits = {
            name: self.encode(rows, keep=True) for name, rows in task.judged.items()
        }
        for name, rows in self._splits.items():
            _tell_cuts(name, rows, config.data.max_length)
        # Seconds that choosing neurons took.
        self.selection_seconds = 0.0
        self.plan = plan or self._choose(fm.model)
        self._check_plan()
        self.fm_weights = frozen_weights(fm.model, self._head)
        # Whether the sub-FM is the FM, bit for bit.
        self._is_fm = self.plan.is_whole and fm.model.dtype == torch.float32
        sub_fm = build_sub_fm(fm.model, self.plan, self._objective)
        self._weights = frozen_weights(sub_fm, self._head)
        self.fm = attach_adapter(
            fm.model, config.lora, self._head, config.seed, self.plan.adapters
        )
        self.sub_fm = attach_adapter(
            sub_fm, config.lora, self._head, config.seed, self.plan.adapter_places
        )
        self.adapter: Adapter = get_adapter(self.sub_fm)
        plug_in(self.fm, self.adapter, self.plan)
        # What was found of a model ("fm", "sub-fm") on a split, until it changes.
        self._judged: dict[tuple[str, str], tuple[Metrics, list[bool]]] = {}
        # The FM's side of the gradient error, by batch, until its adapter changes.
        self._gradients: list[tuple[Tensor, ...]] = []
        # Of activity, [K] for each compressed layer (see `Package`); none at first.
        self.limits: list[Tensor] = []
        # Rises whenever what `package` returns changes.
        self.version = 0

    def _choose(self, model: PreTrainedModel) -> Plan:
        """Score the FM's neurons and plan the sub-FM."""
        config, ffns = self.config, ffns_of(model)
        began = time.monotonic()
        widths = [ffn.width for ffn in ffns]
        counts = kept_counts(config.sub_fm, widths)
        pairs = list(zip(counts, widths, strict=True))
        compressed = [width for count, width in pairs if count < width]
        name = self.method.selection
        batches: Iterable[Batch] = []
        sensitivity: Sensitivity | None = None
        if compressed and selection_of(name).needs != "nothing":
            logger.info("choosing neurons by selection %r", name)
            # As many tokens whatever is kept, so that a smaller sub-FM's neurons are in
            # a larger one; but enough for each that is kept.
            most = max(count for count, width in pairs if count < width)
            enough = math.ceil(most * LEAST_TOKENS / CALIBRATION_TOKENS)
            looked_at = max(round(USUAL_SHARE * max(compressed)), enough)
            calibration, sensitivity = self._calibration(model, looked_at, most)
            batches = LoggedBatches(calibration, "choosing neurons")
        scores = score(
            model, name, counts, batches, config.align, config.seed, sensitivity
        )
        sizes = list(map(size_of, layers_of(model), ffns))
        plan = self.method.planner(scores, sizes, config.sub_fm)
        self.selection_seconds = time.monotonic() - began
        return plan

    def _check_plan(self) -> None:
        steps, plan = self.method.steps_before, self.plan
        dropped = len(plan.layers) < len(plan.widths)
        numbered = self._architecture.numbered
        if dropped and numbered and self._model_config.get(numbered):
            raise FedPFTError(
                f"method = {self.config.method!r} drops layers, and the attention of "
                "this FM depends on their numbers; choose a method that keeps all"
            )
        refits = {"bias", "least-squares"} & {*steps, self.method.during}
        if refits and plan.aligned and not plan.compressed:
            raise FedPFTError(
                f"method = {self.config.method!r} keeps whole layers only, and "
                f"{sorted(refits)[0]!r} refits compressed ones; choose 'distill' or "
                "'none' for align.before and align.during"
            )
        if steps and plan.adapters and not plan.aligned:
            raise FedPFTError(
                f"method = {self.config.method!r} has nothing to align: only layers "
                "with adapters are kept; raise sub-fm.layer-budget or "
                "sub-fm.keep-fraction, or choose method = 'fedot'"
            )

    # ---------------------------------------------------------------- what it offers

    @property
    def share_withheld(self) -> float:
        """Return the share of the FM's weights (without head) that is never sent."""
        parameters = self.parameters
        return 1.0 - parameters["sub-fm"] / parameters["fm"]

    @property
    def classes(self) -> int | None:
        """Return how many classes there are; None where text is generated."""
        if self._objective == "generate":
            return None
        return len(self._model_config["id2label"])

    @property
    def parameters(self) -> dict[str, int]:
        """Return how many values FM and sub-FM have without head, adapter and head."""
        head = {n: t for n, t in self.adapter.items() if ".lora_" not in n}
        parts = {
            "fm": self.fm_weights,
            "sub-fm": self._weights,
            "adapter": self.adapter,
            "head": head,
        }
        return {
            name: sum(tensor.numel() for tensor in tensors.values())
            for name, tensors in parts.items()
        }

    def package(self) -> Package:
        """Return what a client needs of the sub-FM as it is now."""
        return Package(
            model_config=self._model_config,
            plan=self.plan,
            head=self._head,
            weights=self._snapshot(),
            activity_limits=self.limits,
            processor_files=self._processor_files,
            objective=self._objective,
        )

    def encode(self, rows: Dataset, keep: bool = False) -> Rows:
        """Encode rows of the task as the FM and its sub-FM take them."""
        kind, data = self._architecture.modality, self.config.data
        return encode(rows, self._processor, kind, data, self._objective, keep)

    def encode_public(self, rows: Dataset) -> Rows:
        """Encode public rows, whose labels are not used."""
        kind, data = self._architecture.modality, self.config.data
        public = encode_public(rows, self._processor, kind, data, self._objective)
        seed = derive_seed(self.config.seed, "public tokens")
        return within_tokens(public, data.public_tokens, seed)

    def lr(self, current: int) -> float:
        """Return the learning rate of a round."""
        return round_lr(self.config.train, current, self.config.rounds)

    def wants_activity(self, current: int) -> bool:
        """Tell whether the clients of this round should measure activity."""
        clients = self.config.align.activity == "clients"
        measures = clients and self.method.measures_activity
        return measures and self._realigns_after(current)

    def check_update(self, adapter: Mapping[str, Tensor]) -> float:
        """Check a client's adapter: names, shapes, finite values, how far it moved.

        With differential privacy updates are clipped instead of left out.

        Returns:
            How far it moved (L2 norm over all tensors).

        Raises:
            FedPFTError: it does not fit, or moved by more than `max-update-norm`.
        """
        check_adapter(adapter, self.adapter)
        most = 0.0 if self.config.privacy.on else self.config.train.max_update_norm
        moved = sum(
            float((adapter[name].double() - own.double()).square().sum())
            for name, own in self.adapter.items()
        )
        if most and moved**0.5 > most:
            raise FedPFTError(
                f"the adapter moved by {moved**0.5:.4g} (L2 norm), more than "
                f"train.max-update-norm = {most:g}"
            )
        return float(moved**0.5)

    def check_rates(self, rates: Sequence[Tensor], current: int) -> None:
        """Check a client's inactive rates: all that were asked for, each in [0, 1].

        Raises:
            FedPFTError: they are not.
        """
        wanted = self._compressed() if self.wants_activity(current) else []
        if [rate.shape for rate in rates] != [(ffn.width,) for ffn in wanted]:
            raise FedPFTError("activity statistics have another shape")
        if not all(bool(((rate >= 0) & (rate <= 1)).all()) for rate in rates):
            raise FedPFTError("activity statistics are outside [0, 1]")

    def state(self) -> dict[str, Tensor]:
        """Return all that a run changes: adapter, aligned weights, activity limits.

        Generators are not among it: every seed derives from the run's and the round.
        """
        changing = {n: self._weights[n].to("cpu", copy=True) for n in self._changing()}
        return {
            **{f"{_ADAPTER}{name}": tensor for name, tensor in self.adapter.items()},
            **{f"{_WEIGHT}{name}": tensor for name, tensor in changing.items()},
            **{f"{_LIMIT}{i:06d}": limit for i, limit in enumerate(self.limits)},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned; both models then hold that adapter.

        Raises:
            FedPFTError: the state is of another model or plan.
        """
        parts = {
            kind: {
                n.removeprefix(kind): t for n, t in state.items() if n.startswith(kind)
            }
            for kind in (_ADAPTER, _WEIGHT, _LIMIT)
        }
        if parts[_WEIGHT].keys() != self._changing():
            raise FedPFTError(
                "the saved sub-FM has other aligned weights than this one"
            )
        for name, tensor in parts[_WEIGHT].items():
            self._weights[name].copy_(tensor)
        self.limits = [limit for _, limit in sorted(parts[_LIMIT].items())]
        self._plug_in(parts[_ADAPTER])
        self.version += 1

    # --------------------------------------------------------------------- the method

    def prepare(self) -> Metrics:
        """Align the sub-FM with the FM before the first round, where the method does.

        Returns:
            What selection and alignment used, and the gradient error before and after.

        Raises:
            FedPFTError: there are too few public rows, or what they give is not finite.
        """
        metrics: Metrics = {"selection-seconds": self.selection_seconds}
        if self._public is not None:
            metrics["gradient-before"] = self.gradient_error()
        steps = self.method.steps_before if self.plan.aligned else []
        for step in steps:
            if step == "distill":
                align = self.config.align
                schedule = self._schedule(
                    align.lr,
                    align.steps,
                    tokens=align.tokens,
                    seconds=align.seconds,
                    patience=self.method.patience,
                )
                metrics |= self._distil("align", self._alignable(), schedule, 0)
            else:
                assert step in ("bias", "least-squares")
                metrics[step] = self._refit(bias_only=step == "bias")
        if steps:
            metrics["gradient-after"] = self.gradient_error()
        self._measure_limits()
        return metrics

    def end_round(
        self, current: int, adapter: Adapter, rates: list[Tensor] | None
    ) -> Metrics:
        """Store and plug in the aggregated adapter, and realign when this is due.

        FM and sub-FM both hold the aggregated adapter before anything is aligned.

        Args:
            current: the round that ends, from 1.
            adapter: the aggregated adapter.
            rates: inactive rates [K] of each compressed layer, averaged over clients;
                needed when `wants_activity(current)`.

        Raises:
            FedPFTError: the adapter does not fit or is not finite, or an alignment that
                is due has nothing to go by, or a loss that is not finite.
        """
        self._plug_in(adapter)
        if not self._realigns_after(current):
            return {}
        metrics: Metrics = {"gradient-before": self.gradient_error()}
        metrics |= self._realign(current, rates)
        metrics["gradient-after"] = self.gradient_error()
        self._measure_limits()
        return metrics

    def refine(self) -> Metrics:
        """Refine the plugged-in adapter in the FM, and keep it where that helps.

        What helps is what lowers the loss on the validation split: a few hundred rows
        tell losses apart where they cannot tell accuracies. The sub-FM's adapter stays
        as it is.

        Returns:
            What it used, first and last loss, the FM's loss and metric before and after
            on the validation split, and whether the refined adapter was kept; of one
            that failed the error instead; nothing where the method does not refine, or
            every neuron is kept.
        """
        plug, steps = self.config.plug_in, self.method.refine
        if not steps or self.plan.is_whole:
            return {}
        batches = self._refinement_batches()
        told, (before, _) = DescentLog("refine"), self._judge("fm", "validation")
        try:
            refine(self.fm, self.sub_fm, batches, self._schedule(plug.lr, steps), told)
        except FedPFTError as error:  # the trained adapter is worth keeping
            logger.warning("refine: %s; the adapter stays as it was", error)
            self._unrefine()
            return {"kept": False, "error": str(error)}
        self._forget("fm")
        after, _ = self._judge("fm", "validation")
        # Where validation rows were among the inputs this leans towards keeping: the
        # FM follows the sub-FM on the very rows, though not their labels.
        kept = after["loss"] < before["loss"]
        if not kept:
            self._unrefine()
        logger.info(
            "refine: on validation loss %.3f -> %.3f, %s %.3f -> %.3f, %s",
            before["loss"],
            after["loss"],
            self.metric,
            before[self.metric],
            after[self.metric],
            "kept" if kept else "not kept",
        )
        return {
            **told.metrics(),
            "validation-share": self._refined_on_validation,
            "validation-loss-before": before["loss"],
            "validation-loss-after": after["loss"],
            "validation-before": before[self.metric],
            "validation-after": after[self.metric],
            "kept": kept,
        }

    def _refinement_batches(self) -> Iterator[Batch]:
        """Return endless public inputs, and inputs of validation rows among them."""
        assert self._public is not None
        size = self.config.plug_in.batch_size
        seed = derive_seed(self.config.seed, "refine")
        public = endless_batches(self._public, size, seed)
        share = self._refined_on_validation
        if not share:
            return public
        rows, order = self._splits["validation"], derive_seed(seed, "validation")
        return mixed_batches(public, endless_batches(rows, size, order), share)

    @property
    def _refined_on_validation(self) -> float:
        """Return the share of the refinement's batches that are validation rows."""
        if self._objective == "generate":  # there inputs say what is right
            return 0.0
        return self.method.refine_on_validation

    def _unrefine(self) -> None:
        plug_in(self.fm, self.adapter, self.plan)
        self._forget("fm")

    def evaluate(self, split: str) -> Metrics:
        """Evaluate the adapter in the FM and in the sub-FM.

        Args:
            split: "validation" (for every choice), "test" or the name of a further test
                split (only to report).
        """
        return self.judge(split)[0]

    def judge(self, split: str) -> tuple[Metrics, dict[str, str]]:
        """Evaluate, and tell which rows FM ("fm") and sub-FM ("sub-fm") get right.

        Returns:
            What `evaluate` returns; and for both models a "1" for every row that is
            right and a "0" for every other, in the order of the rows.
        """
        fm, sub_fm = self._judge("fm", split), self._judge("sub-fm", split)
        metrics = {**_prefixed("fm", fm[0]), **_prefixed("sub-fm", sub_fm[0])}
        return metrics, {"fm": _digits(fm[1]), "sub-fm": _digits(sub_fm[1])}

    def untouched(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the FM's own values of what is sent, one tensor after the other."""
        return cut(base_model(self.fm), self.fm_weights, self.plan)

    def likeness(self) -> Metrics:
        """Compare FM and sub-FM on public rows, both with their current adapter.

        Returns:
            The fields of `Likeness`; nothing without a public corpus.
        """
        if self._public is None:
            return {}
        seed = derive_seed(self.config.seed, "likeness")
        size = LIKENESS_ROWS[self._objective] // LIKENESS_BATCHES
        rows = shuffled_batches(self._public, size, seed)
        batches = islice(rows, LIKENESS_BATCHES)
        return asdict(likeness(self.fm, self.sub_fm, batches, self._objective))

    def gradient_error(self) -> dict[str, float]:
        """Return the gradient error of the sub-FM at the current adapter.

        Returns:
            Relative L2 and cosine, and their spread; nothing without a public corpus.
        """
        if self._public is None:
            return {}
        if self._is_fm:  # equal models have equal gradients
            return asdict(GradientError(0.0, 0.0, 1.0, 0.0))
        seed = self.config.seed
        order = derive_seed(seed, "gradient")
        size = GRADIENT_ROWS[self._objective]
        rows = shuffled_batches(self._public, size, order)
        batches = list(islice(rows, GRADIENT_BATCHES))
        if not self._gradients:
            self._gradients = list(adapter_gradients(self.fm, batches, seed))
        found = adapter_gradients(self.sub_fm, batches, seed)
        return asdict(compare_gradients(self._gradients, found))

    # ----------------------------------------------------------------------- its parts

    def _judge(self, name: str, split: str) -> tuple[Metrics, list[bool]]:
        """Evaluate a model on a split, unless it has not changed since."""
        if name == "sub-fm" and self._is_fm:
            name = "fm"
        if (name, split) not in self._judged:
            model = self.fm if name == "fm" else self.sub_fm
            rows = self._splits[split]
            self._judged[name, split] = judge(model, rows, self._objective)
        return self._judged[name, split]

    def _forget(self, *names: str) -> None:
        """Forget what was found of models that have changed."""
        for key in [key for key in self._judged if key[0] in names]:
            del self._judged[key]
        if "fm" in names:
            self._gradients = []
            self._sensitive.clear()

    def _plug_in(self, adapter: Adapter) -> None:
        check_adapter(adapter, self.adapter)
        self._forget("fm", "sub-fm")
        self.adapter = {name: adapter[name].detach().clone() for name in self.adapter}
        plug_in(self.fm, self.adapter, self.plan)
        load_adapter(self.sub_fm, self.adapter)

    def _snapshot(self) -> dict[str, Tensor]:
        """Return the frozen weights on the CPU, where codecs round alike everywhere.

        Of those that lie there only what alignment may change is copied: the last few
        snapshots stay, to send changes.
        """
        changing = self._changing()
        return {
            name: weight.to("cpu", copy=name in changing)
            for name, weight in self._weights.items()
        }

    def _changing(self) -> set[str]:
        """Return the names of the frozen weights that alignment may ever change."""
        places = {parameter.data_ptr() for parameter, _ in self._alignable()}
        return {n for n, w in self._weights.items() if w.data_ptr() in places}

    def _compressed(self) -> list[FFN]:
        return compressed_ffns(base_model(self.sub_fm), self.plan)

    def _alignable(self) -> list[Trainable]:
        """Return all that alignment may ever change."""
        layers = layers_of(base_model(self.sub_fm))
        emulator = [layers[place] for place in self.plan.places(self.plan.emulator)]
        return layer_level(self._compressed()) + emulator_level(emulator)

    def _realigns_after(self, current: int) -> bool:
        # After the last round nobody trains on the sub-FM any more.
        due = current % self.config.align.every == 0 and current < self.config.rounds
        return self.method.during != "none" and bool(self.plan.compressed) and due

    def _realign(self, current: int, rates: list[Tensor] | None) -> Metrics:
        if self.method.during == "least-squares":
            return {"least-squares": self._refit()}
        align, ffns = self.config.align, self._compressed()
        if align.activity == "public":
            body, batches = base_model(self.sub_fm), self._activity_batches()
            rates = inactive_rates(body, ffns, batches, self.limits)
        if rates is None or [len(r) for r in rates] != [ffn.width for ffn in ffns]:
            raise FedPFTError(
                f"round {current}: no client measured activity; set align.activity = "
                "'public'"
            )
        trainable = neuron_level(ffns, most_inactive(rates, align.proportion))
        schedule = self._schedule(
            align.during_lr,
            align.during_steps,
            tokens=align.during_tokens,
            seconds=align.during_seconds,
        )
        return self._distil("realign", trainable, schedule, current)

    def _schedule(self, lr: float, steps: int, **limits: Any) -> Schedule:
        return Schedule(lr, steps, **limits, precision=self.config.server_precision)

    def _refit(self, bias_only: bool = False) -> Metrics:
        """Refit output weights by least squares; the seconds and every layer's fit."""
        told = FitLog()
        self._forget("sub-fm")
        most = max(len(self.plan.kept[layer]) for layer in self.plan.compressed)
        batches, sensitivity = self._calibration(base_model(self.fm), most, most)
        refit(
            self.fm,
            self.sub_fm,
            self.plan,
            batches,
            self.config.align,
            told,
            bias_only,
            sensitivity,
        )
        return told.metrics()

    def _calibration(
        self, model: PreTrainedModel, size: int, kept: int
    ) -> tuple[list[Batch], Sensitivity | None]:
        """Return public batches of tokens for so many neurons, and their weights.

        The latter only where the method counts sensitivity; measured once for so many
        neurons, until the FM's adapter changes.
        """
        batches = self._calibration_batches(model, size, kept)
        if size not in self._sensitive:
            model.eval()
            sites = streams(layers_of(model), ffns_of(model))
            share, seed = self.method.sensitivity, self.config.seed
            self._sensitive[size] = measure(model, sites, batches, share, seed)
        return batches, self._sensitive[size]

    def _calibration_batches(
        self, model: PreTrainedModel, size: int, kept: int
    ) -> list[Batch]:
        """Return batches of public tokens for so many neurons of a layer.

        Where there are too few for those that are kept, it says so.
        """
        assert self._public is not None
        align = self.config.align
        wanted = align.calibration_tokens or CALIBRATION_TOKENS * size
        seed = derive_seed(self.config.seed, "calibration")
        batches, tokens = list[Batch](), 0
        for batch in shuffled_batches(self._public, align.batch_size, seed):
            if tokens >= wanted and len(batches) >= 2:
                break
            batches.append(batch)
            tokens += count_tokens(model, batch)
        if tokens < LEAST_TOKENS * kept:
            logger.warning(
                "%d public tokens for %d kept neurons a layer are few; let "
                "data.public-rows, data.public-tokens and align.calibration-tokens "
                "give %d or more",
                tokens,
                kept,
                LEAST_TOKENS * kept,
            )
        return batches

    def _distil(
        self, what: str, trainable: list[Trainable], schedule: Schedule, current: int
    ) -> Metrics:
        assert self._public is not None
        align, held_out = self.config.align, list[Batch]()
        seed, rows = derive_seed(self.config.seed, "align", current), self._public
        if schedule.patience:
            count = min(HELD_OUT_BATCHES * align.batch_size, len(rows) // 5)
            if not count:
                raise FedPFTError(
                    f"align.patience = {schedule.patience}, but of {len(rows)} public "
                    "rows none can be held out; raise data.public-rows or "
                    "data.public-tokens, or set align.patience = 0"
                )
            kept_back, rows = hold_out(rows, count, derive_seed(seed, "held out"))
            held_out = list(shuffled_batches(kept_back, align.batch_size, seed))
        told = DescentLog(what)
        self._forget("sub-fm")
        last = distil(
            self.fm,
            self.sub_fm,
            self.plan,
            trainable,
            endless_batches(rows, align.batch_size, seed),
            schedule,
            align.product_weight,
            told,
            held_out,
            align.memory_mb * 1e6,
            self.method.sensitivity,
            seed,
        )
        return told.metrics() | {"ended-early": last.share < 1.0}

    def _measure_limits(self) -> None:
        """Set the limits of activity from the public corpus, for the current sub-FM."""
        self.version += 1
        if not (self.method.measures_activity and self.plan.compressed):
            return
        body, batches = base_model(self.sub_fm), self._activity_batches()
        rms = activation_rms(body, self._compressed(), batches)
        self.limits = [self.config.align.inactive_threshold * r for r in rms]

    def _activity_batches(self) -> Iterator[Batch]:
        assert self._public is not None
        seed = derive_seed(self.config.seed, "activity")
        size = self.config.align.batch_size
        return islice(shuffled_batches(self._public, size, seed), ACTIVITY_BATCHES)


def _check_fits(config: Config, fm: FoundationModel, public: Dataset | None) -> None:
    """Check what a run asks of its FM and its public corpus."""
    _check_length(config.data.max_length, fm)
    if method_of(config).needs_public and public is None:
        raise FedPFTError(
            f"method = {config.method!r} needs a public corpus and there is none; "
            "set data.public-path"
        )
    check_frozen(fm.model, config.train.frozen)


# Of a split's texts, the share that may be cut before a run says so.
_FEW_CUTS = 0.01


def _tell_cuts(split: str, rows: Rows, length: int) -> None:
    """Say how many texts of a split are cut; figures are of what is left."""
    if isinstance(rows, GenerationRows) and any(rows.cut):
        logger.warning(
            "%s: %d prompts and %d responses of %d are cut to data.max-length = %d "
            "tokens together; figures are of what is left",
            split,
            *rows.cut,
            len(rows),
            length,
        )
    if isinstance(rows, TextRows):
        cut = sum(tokens >= length for tokens in rows.lengths())
        if cut > _FEW_CUTS * len(rows):
            logger.warning(
                "%s: %d of %d texts reach data.max-length = %d tokens, what is behind "
                "is cut; raise it if what matters may stand there",
                split,
                cut,
                len(rows),
                length,
            )


def _check_length(length: int, fm: FoundationModel) -> None:
    positions = getattr(fm.model.config, "max_position_embeddings", None)
    if fm.architecture.modality != "text" or positions is None:
        return
    most = positions - fm.architecture.reserved_positions
    if length > most:
        raise FedPFTError(
            f"data.max-length = {length}, but this FM takes {most} tokens; lower it"
        )


def _prefixed(model: str, metrics: Metrics) -> Metrics:
    return {f"{model}-{name}": value for name, value in metrics.items()}


def _digits(right: Sequence[bool]) -> str:
    return "".join("1" if one else "0" for one in right)
