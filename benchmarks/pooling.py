"""Compare heads on MiniLM: frozen pooler, trained pooler, mean pooling.

Central LoRA training on the embedded task, the same steps for each:
    python -m benchmarks.pooling --steps 150 --seeds 0 1 2
"""

import statistics
from collections.abc import Iterator
from itertools import islice

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks import header, line, parser, run_main
from fedpft_flower.adapters import attach_adapter
from fedpft_flower.architectures import architecture_of
from fedpft_flower.config import Config, derive_seed
from fedpft_flower.encoding import TextRows, endless_batches
from fedpft_flower.evaluation import evaluate
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
        classifier = nn.Linear(fm.config.hidden_size, len(labels))
        self.classifier = classifier.to(fm.device)

    def forward(self, **batch: Tensor) -> SequenceClassifierOutput:
        """Return logits [B, C], as a stock model does."""
        states = self.base(**batch).last_hidden_state
        mask = batch["attention_mask"].to(states.device).unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        logits = self.classifier(means)
        return SequenceClassifierOutput(logits=logits)


def with_head(
    name: str, config: Config, labels: tuple[str, ...], seed: int
) -> nn.Module:
    """Return MiniLM with LoRA and the head of this name."""
    if name not in HEADS:
        return MeanPooled(config, labels, seed)
    fm = load_fm(config.fm.name, labels, "text", seed, HEADS[name])
    return attach_adapter(fm.model, config.lora, fm.head, seed)


def main() -> None:
    """Train every head with every seed and print test accuracies."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = arguments.parse_args()
    config = Config()
    task = load_task(config.data, 0)
    processor = load_fm(config.fm.name, task.labels, "text", 0).processor
    train = TextRows(task.train, processor, config.data.max_length)
    test = TextRows(task.test, processor, config.data.max_length)
    print(header(["head", *(f"seed {seed}" for seed in options.seeds), "mean"]))
    for name in [*HEADS, "mean pooling"]:
        found = []
        for seed in options.seeds:
            model = with_head(name, config, task.labels, seed)
            fit(model, endless_batches(train, 16, seed), options.steps, config, seed)
            found.append(evaluate(model, test)["accuracy"])
        figures = (f"{value:.3f}" for value in (*found, statistics.mean(found)))
        print(line([name, *figures]), flush=True)


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
        logits = model(**batch).logits
        loss = nn.functional.cross_entropy(logits, labels.to(logits.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


if __name__ == "__main__":
    run_main(main)
