"""Measure what a scale on the plugged-in adapter is worth, for runs that are finished.

python -m benchmarks.adapter_scale RUN [RUN ...]

Every RUN is the directory of a finished run on labelled rows that has its checkpoints.
In the FM only, the LoRA part of the averaged adapter is multiplied by each of `SCALES`;
the head stays. A scale is chosen twice: with labels, by the loss on the validation
split, and without, by KL(p_sub || p_FM) on public rows. Test metrics are only
reported, beside those of the plain load and of the run's own refinement.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from benchmarks import run_main
from benchmarks.finished import measure_runs, server_of
from fedpft_flower.batches import real_logits
from fedpft_flower.checkpoint import Checkpoints
from fedpft_flower.config import FedPFTError
from fedpft_flower.encoding import shuffled_batches
from fedpft_flower.evaluation import evaluate
from fedpft_flower.metrics import metric_of
from fedpft_flower.refinement import logit_loss
from fedpft_flower.runs import FinishedRun

TITLES = ("run", "plain", "by labels", "by public rows", "refined", "sub-FM")
SCALES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
PUBLIC_BATCHES, BATCH = 8, 32


@dataclass(frozen=True)
class Point:
    """Hold what the FM does with its adapter at one scale."""

    scale: float
    validation_loss: float
    public_loss: float
    test: float


def row(run: FinishedRun) -> list[str]:
    """Return a run's row of the table."""
    points, metric = measure(run), metric_of(run.config.data)
    plain = next(point for point in points if point.scale == 1.0)
    cells = [run.path.name, f"{plain.test:.3f}"]
    for loss in ("validation_loss", "public_loss"):
        best = min(points, key=lambda point: getattr(point, loss))
        cells.append(f"{best.test:.3f} (at {best.scale:g})")
    after = run.summary["test-after"]
    cells += [f"{after[f'{model}-{metric}']:.3f}" for model in ("fm", "sub-fm")]
    return cells


@torch.no_grad()
def measure(run: FinishedRun) -> list[Point]:
    """Return what the FM does at every scale.

    Raises:
        FedPFTError: the run kept no checkpoint, or has no public rows.
    """
    config = run.config
    server, task, public = server_of(run)
    if public is None:
        raise FedPFTError(f"{run.path} used no public rows; give a run that did")
    best = run.summary["best-round"] if config.select == "best" else None
    server.restore(Checkpoints(run.path, config.checkpoint.keep).load(best).tensors)
    server.fm.eval()
    server.sub_fm.eval()
    rows = shuffled_batches(server.encode_public(public), BATCH, seed=0)
    batches = list(islice(rows, PUBLIC_BATCHES))
    teacher = [real_logits(server.sub_fm, batch) for batch in batches]
    validation, test = server.encode(task.validation), server.encode(task.test)
    parts = {
        parameter: parameter.clone()
        for name, parameter in server.fm.named_parameters()
        if ".lora_B" in name
    }
    points = []
    for scale in SCALES:
        for parameter, plugged in parts.items():
            parameter.copy_(scale * plugged)
        losses = [
            float(logit_loss(wanted, real_logits(server.fm, batch)))
            for wanted, batch in zip(teacher, batches, strict=True)
        ]
        points.append(
            Point(
                scale,
                evaluate(server.fm, validation)["loss"],
                statistics.mean(losses),
                evaluate(server.fm, test)[server.metric],
            )
        )
    return points


if __name__ == "__main__":
    run_main(partial(measure_runs, __doc__, TITLES, row))
