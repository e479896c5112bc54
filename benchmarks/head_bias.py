"""Measure what a bias fitted to a few labels is worth, for runs that are finished.

python -m benchmarks.head_bias RUN [RUN ...]

Every RUN is the directory of a finished run of a classifier. To the logits of its FM
with the adapter that it ended with a constant is added, one for each class, fitted by
cross-entropy on the server's validation rows. Test metrics are only reported.
"""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import run_main
from benchmarks.finished import measure_runs, server_of
from fedpft_flower.adapters import load_adapter
from fedpft_flower.config import FedPFTError
from fedpft_flower.evaluation import predict
from fedpft_flower.export import final_adapter
from fedpft_flower.runs import FinishedRun
from fedpft_flower.tasks import task_of

TITLES = ("run", "accuracy", "with the bias", "loss", "with the bias", "bias")
ITERATIONS = 100


def row(run: FinishedRun) -> list[str]:
    """Return a run's row of the table.

    Raises:
        FedPFTError: the run is no classifier's, or its adapter is not whole.
    """
    if task_of(run.config.data.task).objective != "classify":
        raise FedPFTError(f"{run.path} is no run of a classifier; give one that is")
    server, task, _ = server_of(run)
    load_adapter(server.fm, final_adapter(run))
    bias = fitted_bias(*predict(server.fm, server.encode(task.validation)))
    logits, labels = predict(server.fm, server.encode(task.test))
    found = [(accuracy(x, labels), loss(x, labels)) for x in (logits, logits + bias)]
    figures = [f"{value:.3f}" for pair in zip(*found, strict=True) for value in pair]
    shown = " ".join(f"{value:+.2f}" for value in bias.tolist())
    return [run.path.name, *figures, shown]


def fitted_bias(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the bias [C], with mean 0, that lowers the cross-entropy most.

    Args:
        logits: [B, C].
        labels: [B].
    """
    bias = torch.zeros(logits.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(logits + bias, labels)
        value.backward()
        return value

    optimiser.step(closure)
    fitted = bias.detach()
    return fitted - fitted.mean()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return float((logits.argmax(1) == labels).float().mean())


def loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy."""
    return float(nn.functional.cross_entropy(logits, labels))


if __name__ == "__main__":
    run_main(partial(measure_runs, __doc__, TITLES, row))
