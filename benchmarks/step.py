"""Measure a client's training step: on the sub-FM against the FM, and with less memory.

python -m benchmarks.step [KEY=VALUE ...] [--lengths N ...] [--repeats N]

A step is forward and backward pass, clipping and AdamW on one batch of random tokens,
all rows of one length. FM and sub-FM take turns; seconds are the median of the repeats,
on one thread, as a virtual client has. PyTorch counts the floating point operations of
a step. Kept is what autograd holds between the two passes, weights left out.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import markdown_table, parser, run_main, spread
from benchmarks.plain_loop import load
from fedpft_flower.adapters import base_model
from fedpft_flower.batches import Batch
from fedpft_flower.commands import read_config
from fedpft_flower.compute import Compute
from fedpft_flower.config import FedPFTError
from fedpft_flower.devices import has_bf16
from fedpft_flower.flops import flops_of
from fedpft_flower.server import ProxyServer
from fedpft_flower.software import quiet
from fedpft_flower.training import add_gradients, recomputed, train_mode

WARM_UP = 2
# With less memory: rows at a time, and whether insides of layers are computed again.
SAVERS = {
    "whole batch": (0, False),
    "parts of 4 rows": (4, False),
    "recomputed": (0, True),
    "parts of 4 rows, recomputed": (4, True),
}


def main() -> None:
    """Measure, and print three tables."""
    arguments = parser(__doc__)
    arguments.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128])
    arguments.add_argument("--repeats", type=int, default=9)
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    config = read_config(None, ["method=fedpft-n", *options.settings])
    server = load(config)[2]
    if config.data.task not in ("docstrings", "text"):
        raise FedPFTError(f"data.task = {config.data.task!r}: give one of texts")
    size = config.train.batch_size
    batches = [random_batch(server, size, length) for length in options.lengths]
    print(against_fm(server, batches, options.repeats))
    print()
    print(savers(server.sub_fm, batches[len(batches) // 2], options.repeats))
    print()
    print(numbers(server.sub_fm, batches[len(batches) // 2], options.repeats))


def random_batch(server: ProxyServer, rows: int, length: int) -> Batch:
    """Return rows of random tokens of one length, with labels."""
    config = server.sub_fm.config
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1000, config.vocab_size, (rows, length), generator=generator)
    labels = torch.randint(config.num_labels, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stepper(
    model: PeftModel, size: int = 0, again: bool = False
) -> Callable[[Batch], None]:
    """Return what does one training step, some rows at a time."""
    train_mode(model, frozen_dropout=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5)

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        with recomputed(model) if again else nullcontext():
            add_gradients(model, batch, size)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()

    return step


def seconds_of(runs: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Return the seconds of several pieces of work, in turns."""
    found: list[list[float]] = [[] for _ in runs]
    for repeat in range(WARM_UP + repeats):
        for run, taken in zip(runs, found, strict=True):
            began = time.monotonic()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                taken.append(time.monotonic() - began)
    return found


def against_fm(server: ProxyServer, batches: Sequence[Batch], repeats: int) -> str:
    """Return a table: how much faster a step is on the sub-FM, by its operations."""
    rows = []
    models = [server.fm, server.sub_fm]
    for batch in batches:
        fm, sub_fm = seconds_of([partial(stepper(m), batch) for m in models], repeats)
        ratio = statistics.median(fm) / statistics.median(sub_fm)
        work_fm, work_sub_fm = (
            flops_of(partial(add_gradients, m, batch, 0)) for m in models
        )
        work = work_fm / work_sub_fm
        ratios = (f"{value:.2f}" for value in (ratio, work, ratio / work))
        length = batch["input_ids"].shape[1]
        rows.append([length, spread(fm, 3), spread(sub_fm, 3), *ratios])
    titles = ("FM, s", "sub-FM, s", "ratio", "of operations", "one by other")
    return markdown_table(["tokens a row", *titles], rows)


def kept_by(model: PeftModel, batch: Batch) -> int:
    """Return how many bytes autograd holds behind a forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss  # until here it held the graph, so that no storage was used twice
    return sum(kept.values())


def savers(model: PeftModel, batch: Batch, repeats: int) -> str:
    """Return a table: what less memory costs on the sub-FM."""
    length = batch["input_ids"].shape[1]
    titles = (f"{length} tokens a row", "s", "of the first's", "kept, MB")
    rows = []
    steps = [partial(stepper(model, *saver), batch) for saver in SAVERS.values()]
    seconds = seconds_of(steps, repeats)
    first = statistics.median(seconds[0])
    for (name, (size, again)), taken in zip(SAVERS.items(), seconds, strict=True):
        part = {n: values[: size or None] for n, values in batch.items()}
        with recomputed(model) if again else nullcontext():
            kept = kept_by(model, part)
        ratio = statistics.median(taken) / first
        rows.append((name, spread(taken, 3), f"{ratio:.2f}", f"{kept / 1e6:.0f}"))
    return markdown_table(titles, rows)


def numbers(model: PeftModel, batch: Batch, repeats: int) -> str:
    """Return a table: steps in other numbers, how long and how exact they are."""
    length = batch["input_ids"].shape[1]
    titles = (f"{length} tokens a row", "s", "of the first's", "gradient error")
    rows = []
    ways = {"as it is": Compute(), "written-out attention": Compute(eager=True)}
    if has_bf16(device_of(model)):  # else it is worked out in float32, slowly
        ways |= {
            "bfloat16": Compute(bf16=True),
            "bfloat16, written-out attention": Compute(bf16=True, eager=True),
        }
    gradients = [gradient(model, batch, way) for way in ways.values()]
    errors = [(g - gradients[0]).norm() / gradients[0].norm() for g in gradients]
    seconds = seconds_of(  # which changes the adapter
        [partial(step_so, stepper(model), model, way, batch) for way in ways.values()],
        repeats,
    )
    first = statistics.median(seconds[0])
    for name, taken, error in zip(ways, seconds, errors, strict=True):
        ratio = statistics.median(taken) / first
        rows.append((name, spread(taken, 3), f"{ratio:.2f}", f"{error:.1e}"))
    return markdown_table(titles, rows)


def step_so(
    step: Callable[[Batch], None], model: PeftModel, way: Compute, batch: Batch
) -> None:
    """Do a step as this way says."""
    with way.steps([base_model(model)]), way.step(device_of(model)):
        step(batch)


def device_of(model: PeftModel) -> torch.device:
    """Return where a model is."""
    return next(model.parameters()).device


def gradient(model: PeftModel, batch: Batch, way: Compute) -> Tensor:
    """Return the adapter's flat gradient without dropout."""
    model.eval()
    model.zero_grad(set_to_none=True)
    with way.steps([base_model(model)]), way.step(device_of(model)):
        add_gradients(model, batch, 0)
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


if __name__ == "__main__":
    run_main(main)
