"""Measure tokens a second of what takes the time of a run, against a bare loop.

python -m benchmarks.throughput [--layers N] [--hidden D] [--rows B] [--length T]

A random BERT (BERT-base's size unless told otherwise) on the GPU that there is, or the
CPU: a client's training, the same of the whole FM, the distillation and the evaluation,
as this package does them and as a bare PyTorch loop does, in turns, in float32, and in
bfloat16 where the device multiplies it itself. The share of peak is the operations that
PyTorch counts, by what a product of two large matrices reaches in the same numbers; the
bare loop does the same operations.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks import markdown_table, parser, run_main, spread
from benchmarks.scaling import write_fm
from benchmarks.step import seconds_of
from fedpft_flower.adapters import attach_adapter, base_model
from fedpft_flower.alignment import distil, layer_level
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.batches import Batch, inputs_of
from fedpft_flower.compute import Compute
from fedpft_flower.config import LoraConfig, SubFMConfig, TrainConfig
from fedpft_flower.descent import Schedule
from fedpft_flower.devices import device_here, has_bf16
from fedpft_flower.encoding import Rows, endless_batches
from fedpft_flower.evaluation import EVALUATION_BATCH, predict
from fedpft_flower.flops import FlopMeter, flops_of
from fedpft_flower.foundation import load_fm
from fedpft_flower.planners import keep_salient, size_of
from fedpft_flower.software import quiet
from fedpft_flower.sub_fm import build_sub_fm, compressed_ffns
from fedpft_flower.training import train_adapter, train_mode

CLASSES = ("a", "b")
KEEP = 0.25


class RandomRows:
    """Give rows of random tokens, all of one length, labelled at random."""

    def __init__(self, count: int, length: int, words: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(2, words, (count, length), generator=generator)
        self._labels = torch.randint(len(CLASSES), (count,), generator=generator)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ids)

    def lengths(self) -> list[int]:
        """Return the number of tokens of every row."""
        return [self._ids.shape[1]] * len(self)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return inputs [B, T] and labels [B]."""
        ids = self._ids[list(indices)]
        mask = torch.ones_like(ids)
        labels = self._labels[list(indices)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def varied(self, seed: int) -> Rows:
        """Return the same rows."""
        return self


class Work:
    """Hold FM and sub-FM, and do so many batches of each kind of work with them."""

    def __init__(self, place: Path, rows: int, length: int, batches: int) -> None:
        fm = load_fm(str(place), CLASSES, "text", 0)
        ffns, head = ffns_of(fm.model), fm.head
        sizes = list(map(size_of, layers_of(fm.model), ffns))
        scores = [torch.rand(ffn.width) for ffn in ffns]
        self.plan = keep_salient(scores, sizes, SubFMConfig(keep_fraction=KEEP))
        sub_fm = build_sub_fm(fm.model, self.plan)
        self.fm = attach_adapter(fm.model, LoraConfig(), head, 0)
        self.sub_fm = attach_adapter(sub_fm, LoraConfig(), head, 0)
        self.batches, self.size = batches, rows
        words = self.fm.config.vocab_size
        self.rows = RandomRows(rows * batches, length, words)
        self.device = device_here()
        # As clients have, who count the operations of a model's first step alone.
        self.meters = {m: FlopMeter() for m in (self.fm, self.sub_fm)}
        self.evaluated = RandomRows(EVALUATION_BATCH * batches, length, words)

    def train(self, precision: str) -> None:
        """Train as a client does."""
        self._train(self.sub_fm, precision)

    def train_fm(self, precision: str) -> None:
        """Train the FM itself, as a client of full-model tuning does."""
        self._train(self.fm, precision)

    def _train(self, model: PeftModel, precision: str) -> None:
        config = TrainConfig(batch_size=self.size, lr=1e-5, precision=precision)
        meter = self.meters[model]
        train_adapter(model, self.rows, config, config.lr, seed=0, meter=meter)

    def align(self, precision: str) -> None:
        """Distil as the server does."""
        distil(
            self.fm,
            self.sub_fm,
            self.plan,
            layer_level(compressed_ffns(base_model(self.sub_fm), self.plan)),
            endless_batches(self.rows, self.size, seed=0),
            Schedule(1e-5, self.batches, precision=precision),
            0.0,
            lambda progress: None,
        )

    def evaluate(self, precision: str) -> None:
        """Evaluate the FM as the server does: always in its own numbers."""
        predict(self.fm, self.evaluated)

    # ------------------------------------------------------------- the bare loops

    def on_device(self, rows: RandomRows, size: int) -> Iterator[Batch]:
        """Yield all rows in order, where the models are."""
        for start in range(0, len(rows), size):
            batch = rows.batch(range(start, start + size))
            yield {name: values.to(self.device) for name, values in batch.items()}

    def bare_train(self, precision: str) -> None:
        """Train by a bare loop."""
        self._bare_train(self.sub_fm, precision)

    def bare_train_fm(self, precision: str) -> None:
        """Train the FM itself by a bare loop."""
        self._bare_train(self.fm, precision)

    def _bare_train(self, model: PeftModel, precision: str) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-5)
        train_mode(model, frozen_dropout=False)
        for batch in self.on_device(self.rows, self.size):
            with Compute(precision == "bf16").step(self.device):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
        model.eval()

    def bare_align(self, precision: str) -> None:
        """Distil by a bare loop: all hidden states, the same FFN weights."""
        teacher, student = (base_model(m).base_model for m in (self.fm, self.sub_fm))
        ffns = compressed_ffns(base_model(self.sub_fm), self.plan)
        trained = [parameter for parameter, _ in layer_level(ffns)]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.Adam(trained, lr=1e-5)
        for batch in self.on_device(self.rows, self.size):
            del batch["labels"]
            with Compute(precision == "bf16").step(self.device):
                with torch.no_grad():
                    target = _states(teacher, batch)
                losses: list[Tensor] = [
                    (one.float() - other.float()).square().mean()
                    / one.float().square().mean()
                    for one, other in zip(target, _states(student, batch), strict=True)
                ]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None

    @torch.no_grad()
    def bare_evaluate(self, precision: str) -> None:
        """Evaluate by a bare loop."""
        logits = [
            self.fm(**inputs_of(batch)).logits
            for batch in self.on_device(self.evaluated, EVALUATION_BATCH)
        ]
        torch.cat(logits).cpu()


def _states(model: nn.Module, batch: Batch) -> Sequence[Tensor]:
    """Return the outputs of all layers."""
    states: Sequence[Tensor] = model(**batch, output_hidden_states=True).hidden_states
    return states[1:]


def main() -> None:
    """Measure and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--hidden", type=int, default=768)
    arguments.add_argument("--rows", type=int, default=32, help="of a training batch")
    arguments.add_argument("--length", type=int, default=128, help="tokens of a row")
    arguments.add_argument("--batches", type=int, default=20)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    quiet()
    with TemporaryDirectory() as name:
        place = Path(name) / "fm"
        write_fm(place, options.layers, options.hidden, options.length)
        work = Work(place, options.rows, options.length, options.batches)
        print(table(work, options.repeats))


def table(work: Work, repeats: int) -> str:
    """Return Markdown: a row for each kind of work and precision."""
    precisions = ["fp32", "bf16"] if has_bf16(work.device) else ["fp32"]
    found = []
    for precision in precisions:
        peak = peak_rate(work.device, precision)
        for name, ours, bare, rows in (
            ("client's training", work.train, work.bare_train, work.rows),
            ("the same of the FM", work.train_fm, work.bare_train_fm, work.rows),
            ("distillation", work.align, work.bare_align, work.rows),
            ("evaluation", work.evaluate, work.bare_evaluate, work.evaluated),
        ):
            if precision == "bf16" and name == "evaluation":
                continue  # it is in the FM's own numbers
            tokens = sum(rows.lengths())
            operations = flops_of(partial(ours, "fp32"))
            both = [partial(run, precision) for run in (ours, bare)]
            own, others = seconds_of(both, repeats)
            rates = [[tokens / s for s in one] for one in (own, others)]
            ratios = [b / a for a, b in zip(own, others, strict=True)]
            share = operations / statistics.median(own) / peak
            cells = [spread(rates[0], 0), spread(rates[1], 0), spread(ratios, 2)]
            found.append((name, precision, *cells, f"{100 * share:.0f} %"))
    titles = ("tokens/s", "bare loop", "of the bare loop", "share of peak")
    shown = markdown_table(["work", "numbers", *titles], found)
    return f"on {name_of(work.device)}\n\n{shown}"


def name_of(device: torch.device) -> str:
    """Return what a table calls a device."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def peak_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second of a product of two large square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.randn(size, size, device=device).to(dtype)
    product = torch.mm(one, one)
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        torch.mm(one, one, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - began)
    return 2 * size**3 / statistics.median(seconds)


if __name__ == "__main__":
    run_main(main)
