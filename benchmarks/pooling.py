"""Compare heads on MiniLM: frozen pooler, trained pooler, mean pooling.

Central LoRA training on the embedded task, the same steps for each:
    python -m benchmarks.pooling --steps 150 --seeds 0 1 2
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import islice

import peft
import torch
from torch import Tensor, nn

from benchmarks import run_main
from fedpft_flower.adapters import attach_adapter
from fedpft_flower.architectures import architecture_of
from fedpft_flower.config import Config, derive_seed
from fedpft_flower.encoding import TextRows, endless_batches
from fedpft_flower.foundation import load_fm
from fedpft_flower.tasks import load_task

HEADS = {"frozen pooler": ["classifier"], "trained pooler": []}


class MeanPooled(nn.Module):
    """Classify by the mean of the last hidden states of real tokens."""

    def __init__(self, config: Config, labels: tuple[str, ...], seed: int) -> None:
        super().__init__()
        fm = load_fm(config.fm.name, labels, "text", seed).model
        lora = peft.LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            init_lora_weights="gaussian" if config.lora.init == "gaussian" else True,
            target_modules=list(architecture_of(fm.config).attention),
        )
        torch.manual_seed(derive_seed(seed, "lora"))
        self.base = peft.get_peft_model(fm.get_submodule("bert"), lora)
        self.classifier = nn.Linear(fm.config.hidden_size, len(labels))

    def forward(self, **batch: Tensor) -> Tensor:
        """Return logits [B, C]."""
        mask = batch["attention_mask"].unsqueeze(-1)
        states = self.base(**batch).last_hidden_state * mask
        logits: Tensor = self.classifier(states.sum(dim=1) / mask.sum(dim=1))
        return logits


class Stock(nn.Module):
    """Classify as the stock model does, with the given head modules trained."""

    def __init__(
        self, config: Config, labels: tuple[str, ...], seed: int, head: list[str]
    ) -> None:
        super().__init__()
        fm = load_fm(config.fm.name, labels, "text", seed, head)
        self.model = attach_adapter(fm.model, config.lora, fm.head, seed)

    def forward(self, **batch: Tensor) -> Tensor:
        """Return logits [B, C]."""
        logits: Tensor = self.model(**batch).logits
        return logits


def main() -> None:
    """Train every head with every seed and print test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    config = Config()
    task = load_task(config.data, 0)
    print("| head | " + " | ".join(f"seed {s}" for s in options.seeds) + " | mean |")
    print("|" + "---|" * (len(options.seeds) + 2))
    for name in [*HEADS, "mean pooling"]:
        found = []
        for seed in options.seeds:
            processor = load_fm(config.fm.name, task.labels, "text", seed).processor
            train = TextRows(task.train, processor, config.data.max_length)
            test = TextRows(task.test, processor, config.data.max_length)
            model: nn.Module = (
                Stock(config, task.labels, seed, HEADS[name])
                if name in HEADS
                else MeanPooled(config, task.labels, seed)
            )
            fit(model, endless_batches(train, 16, seed), options.steps, config, seed)
            found.append(accuracy(model, test))
        cells = " | ".join(f"{value:.3f}" for value in found)
        print(f"| {name} | {cells} | {statistics.mean(found):.3f} |", flush=True)


def fit(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    steps: int,
    config: Config,
    seed: int,
) -> None:
    """Train by AdamW with a linearly falling rate."""
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=config.train.lr)
    for step, batch in enumerate(islice(batches, steps)):
        optimiser.param_groups[0]["lr"] = config.train.lr * (1 - step / steps)
        labels = batch.pop("labels")
        loss = nn.functional.cross_entropy(model(**batch), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model: nn.Module, rows: TextRows) -> float:
    """Return the share of rows that are classified correctly."""
    model.eval()
    correct = 0
    for start in range(0, len(rows), 64):
        batch = rows.batch(range(start, min(start + 64, len(rows))))
        labels = batch.pop("labels")
        correct += int((model(**batch).argmax(dim=-1) == labels).sum())
    return correct / len(rows)


if __name__ == "__main__":
    run_main(main)
