"""Measure how much of the FM whoever holds only the sub-FM can grow back.

python -m benchmarks.healing [KEY=VALUE ...] [--seeds N ...] [--tokens N] [--out DIR]

The attacker holds what a client receives: the sub-FM as it is installed, and no FM to
learn from. He widens every FFN to the FM's own number of neurons (new input weights
drawn like the kept ones, new output weights zero, so that nothing changes at first)
and trains the FFNs, all else is the FM's already, on texts of his own, without labels:
tokens hidden from an encoder, or the next token for a decoder, told from the hidden
states by a matrix of his own, which learns alone at first, and the token embedding.
Here his texts are the server's public rows, which favours him; a tenth is held out.

How much is back is told by what the FM's owner can measure, at several numbers of
tokens spent: the test accuracy of a linear probe on pooled hidden states (fitted on the
training rows), and the squared distance of hidden states from the FM's on the rows held
out, as a share of the FM's variance. Recovered is the share of the gap between sub-FM
and FM: 0 is the sub-FM, 1 the FM, below 0 is worse than what was sent.
"""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import markdown_table, parser, run_main, spread
from benchmarks.plain_loop import load
from fedpft_flower.adapters import base_model
from fedpft_flower.architectures import architecture_of, family_of, ffns_of
from fedpft_flower.batches import Batch, inputs_of
from fedpft_flower.codec import decode_weights, encode_weights
from fedpft_flower.commands import read_config
from fedpft_flower.config import Config, FedPFTError, derive_seed
from fedpft_flower.devices import device_here, move
from fedpft_flower.encoding import (
    Rows,
    encode_public,
    endless_batches,
    hold_out,
    shuffled_batches,
)
from fedpft_flower.package import Package
from fedpft_flower.plan import Plan
from fedpft_flower.processors import processor_from
from fedpft_flower.received import config_from
from fedpft_flower.software import quiet
from fedpft_flower.sub_fm import build_skeleton, load_weights

BATCH = 32
HIDDEN_SHARE = 0.15  # of an encoder's tokens
WARM_UP = 0.1  # of the tokens, on the matrix alone: FFNs do not pay for its beginning
PROBE_ROWS = 2000


@dataclass(frozen=True)
class Point:
    """Hold what is back after so many tokens; shares are of the gap to the FM."""

    seed: int
    tokens: int
    loss: float
    probe: float
    probe_recovered: float
    distance: float
    distance_recovered: float


def main() -> None:
    """Heal with every seed; write `healing.csv` and `healing.png`, print a table."""
    arguments = parser(__doc__)
    arguments.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--tokens", type=int, default=200_000, help="to spend")
    arguments.add_argument(
        "--points", type=int, default=5, help="measured, and the start"
    )
    arguments.add_argument("--lr", type=float, default=1e-4)
    arguments.add_argument("--out", type=Path, default=Path("healing"))
    options = arguments.parse_args()
    if min(options.tokens, options.points) < 1:
        raise FedPFTError("--tokens and --points must be positive; give 1 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    quiet()
    base, points = read_config(None, options.settings).flat(), list[Point]()
    for seed in options.seeds:
        config = Config.from_run_config({**base, "seed": seed})
        # Each point has twice the tokens of the one before.
        marks = [options.tokens >> back for back in range(options.points)][::-1]
        for point in heal(config, marks, options.lr):
            points.append(point)
            print(
                f"seed {seed}, {point.tokens} tokens: probe {point.probe:.3f}, "
                f"distance {point.distance:.3f}",
                flush=True,
            )
    write_csv(points, options.out / "healing.csv")
    draw(points, options.out / "healing.png")
    print(table(points))


def heal(config: Config, marks: Sequence[int], lr: float) -> Iterator[Point]:
    """Grow the sub-FM back and yield what is recovered, first before any training.

    Args:
        config: the run whose sub-FM is attacked.
        marks: numbers of tokens, ascending, after which to measure.
        lr: of AdamW.

    Raises:
        FedPFTError: the run has no texts, no public or no training rows, or layers that
            are dropped.
    """
    task, public, server = load(config)
    if (
        public is None
        or task.train is None
        or not task.labels
        or "text" not in public.column_names
    ):
        raise FedPFTError(
            f"data.task = {config.data.task!r}: healing needs labelled texts and a "
            "public corpus; choose a task of texts and set data.public-path"
        )
    server.prepare()
    fm, package = base_model(server.fm), server.package()
    installed = decode_weights(encode_weights(package.weights, config.wire.frozen))
    package = replace(package, weights=installed)
    tokenizer = tokenizer_of(package)
    rows = encode_public(public, tokenizer, "text", config.data, "classify")
    held, own = hold_out(rows, max(1, len(rows) // 10), derive_seed(config.seed, "own"))
    mixed = task.train.shuffle(seed=config.seed)  # files may be sorted by label
    probe_rows = mixed.select(range(min(PROBE_ROWS, len(mixed))))
    split = server.encode(probe_rows), server.encode(task.test)
    healed = regrow(package, config.seed)
    batches = list(shuffled_batches(held, BATCH, seed=0))
    goal = probe_accuracy(fm, *split)
    probe, far = probe_accuracy(healed, *split), distance(healed, fm, batches)
    start = (probe, far)
    yield Point(config.seed, 0, math.nan, probe, 0.0, far, 0.0)
    alone = WARM_UP * marks[-1]
    learning = pretrain(healed, own, tokenizer, lr, config.seed, alone)
    spent, loss = 0, math.nan
    for mark in marks:
        while spent < mark:
            tokens, loss = next(learning)
            spent += tokens
        probe, far = probe_accuracy(healed, *split), distance(healed, fm, batches)
        gap = goal - start[0]
        yield Point(
            config.seed,
            spent,
            loss,
            probe,
            (probe - start[0]) / gap if gap > 0 else math.nan,
            far,
            1 - far / start[1] if start[1] else math.nan,
        )


def tokenizer_of(package: Package) -> Any:
    """Return the tokenizer that a client receives."""
    row = family_of(str(package.model_config["model_type"]))
    return processor_from(package.processor_files, row)


def regrow(package: Package, seed: int) -> PreTrainedModel:
    """Build a model of the FM's widths out of what a client receives.

    It answers as the sub-FM does.

    Raises:
        FedPFTError: layers were dropped, of which nothing is there to grow from.
    """
    widths = package.plan.widths
    if len(package.plan.layers) < len(widths):
        raise FedPFTError("healing grows neurons, not dropped layers; choose fedpft")
    whole = Plan(widths, {i: tuple(range(n)) for i, n in enumerate(widths)})
    model = build_skeleton(config_from(package.model_config), whole, package.objective)
    kept, downs = {}, set()
    for layer, ffn in enumerate(ffns_of(model)):
        first = torch.arange(len(package.plan.kept[layer]))
        for parameter, axis, indices in ffn.parameters_by_axis(first):
            kept[id(parameter)] = (axis, indices)
        downs.add(id(ffn.down.weight))
    generator = torch.Generator().manual_seed(derive_seed(seed, "regrow"))
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in model.all_tied_weights_keys:
            continue
        sent = package.weights.get(name)
        if sent is None:  # the head, which the probe takes the place of
            weights[name] = torch.zeros(tensor.shape)
        elif id(tensor) in kept and sent.shape != tensor.shape:
            axis, indices = kept[id(tensor)]
            new = torch.zeros(tensor.shape)
            if id(tensor) not in downs:
                new.normal_(generator=generator).mul_(sent.std()).add_(sent.mean())
            weights[name] = new.index_copy_(axis, indices, sent.cpu())
        else:
            weights[name] = sent.cpu().clone()
    load_weights(model, weights)
    move(model, device_here())
    model.eval()
    return model


def pretrain(
    model: PreTrainedModel,
    rows: Rows,
    tokenizer: Any,
    lr: float,
    seed: int,
    alone: float = 0.0,
) -> Iterator[tuple[int, float]]:
    """Train the FFNs on texts without labels, a step at a time.

    Args:
        model: the model to heal.
        rows: texts.
        tokenizer: of the FM.
        lr: of AdamW.
        seed: of order and hidden tokens.
        alone: tokens on which the matrix that tells tokens learns alone, ten times as
            fast.

    Yields:
        The tokens of the step's batch, padding left out, and its loss.
    """
    turn = token_head(model)
    ffns = ffn_parameters(model)
    model.requires_grad_(False)
    for parameter in ffns:
        parameter.requires_grad_(True)
    trained = [*ffns, *turn.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": ffns, "lr": 0.0},
        {"params": list(turn.parameters())},
    ]
    optimizer = torch.optim.AdamW(groups, lr=10 * lr, weight_decay=0.01)
    spent = 0
    generator = torch.Generator().manual_seed(derive_seed(seed, "hide"))
    for batch in endless_batches(rows, BATCH, derive_seed(seed, "heal")):
        loss = token_loss(model, turn, batch, tokenizer, generator)
        if loss is None:
            continue
        tokens = int(batch["attention_mask"].sum())
        spent += tokens
        if spent > alone:
            for group in optimizer.param_groups:
                group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        yield tokens, float(loss.detach())


def token_head(model: PreTrainedModel) -> nn.Linear:
    """Return the attacker's own matrix from states to tokens, the identity at first.

    The FM's own head for tokens, if it ever had one, is not among what was sent.

    Raises:
        FedPFTError: the family's embedding has not the width of its states.
    """
    width = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[1]
    size = model.config.hidden_size
    if width != size:
        raise FedPFTError(
            f"{model.config.model_type}: hidden states of {size} are not told apart by "
            f"an embedding of {width}; choose another family"
        )
    turn = nn.Linear(size, size).to(model.device)
    nn.init.eye_(turn.weight)
    nn.init.zeros_(turn.bias)
    return turn


def ffn_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights and biases of all FFNs."""
    return [
        parameter
        for ffn in ffns_of(model)
        for linear in (*(up for up, _ in ffn.up), ffn.down)
        for parameter in linear.parameters()
    ]


def token_loss(
    model: PreTrainedModel,
    turn: nn.Linear,
    batch: Batch,
    tokenizer: Any,
    generator: torch.Generator,
) -> Tensor | None:
    """Return the mean loss of hidden, or of next, tokens; None where there are none."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    decoder = architecture_of(model.config).decoder
    if decoder:
        inputs, chosen = batch, mask.clone()
        chosen[:, 0] = False
    else:
        inputs, chosen = hide(batch, tokenizer, generator)
    if not bool(chosen.any()):
        return None
    states, picked = hidden(model, inputs), chosen
    if decoder:  # the state before a token tells it
        states, picked = states[:, :-1], chosen[:, 1:]
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    logits = turn(states[picked.to(states.device)]) @ embedding.T
    return nn.functional.cross_entropy(logits, ids[chosen].to(logits.device))


def hide(
    batch: Batch, tokenizer: Any, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    """Hide some tokens behind the mask token; return inputs and places [B, T]."""
    ids = batch["input_ids"]
    special = torch.tensor(tokenizer.all_special_ids)
    plain = batch["attention_mask"].bool() & ~torch.isin(ids, special)
    chosen = plain & (torch.rand(ids.shape, generator=generator) < HIDDEN_SHARE)
    hidden_id = tokenizer.mask_token_id
    if hidden_id is None:
        raise FedPFTError("this FM's tokenizer has no mask token; choose another FM")
    return {**batch, "input_ids": ids.masked_fill(chosen, hidden_id)}, chosen


def hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the last hidden states [B, T, D]."""
    inputs = {n: t.to(model.device) for n, t in inputs_of(batch).items()}
    states: Tensor = model.base_model(**inputs).last_hidden_state
    return states.float()


@torch.no_grad()
def distance(
    model: PreTrainedModel, fm: PreTrainedModel, batches: list[Batch]
) -> float:
    """Return the squared distance of hidden states, as a share of the FM's variance."""
    pairs = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        pairs.append([hidden(one, batch).cpu()[real] for one in (model, fm)])
    own, goal = (torch.cat(states) for states in zip(*pairs, strict=True))
    spread_of = (goal - goal.mean(dim=0)).square().sum()
    return float((own - goal).square().sum() / spread_of)


def probe_accuracy(model: PreTrainedModel, train: Rows, test: Rows) -> float:
    """Return the test accuracy of a linear probe on pooled hidden states."""
    (fit, labels), (rows, truth) = _features(model, train), _features(model, test)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return float(probe.fit(fit, labels).score(rows, truth))


@torch.no_grad()
def _features(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    pooled, labels = [], []
    for start in range(0, len(rows), BATCH):
        batch = rows.batch(range(start, min(start + BATCH, len(rows))))
        mask = batch["attention_mask"][..., None].float()
        states = hidden(model, batch).cpu()
        pooled.append((states * mask).sum(dim=1) / mask.sum(dim=1))
        labels.append(batch["labels"])
    return torch.cat(pooled), torch.cat(labels)


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Write one line for every seed and number of tokens."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([one.name for one in fields(Point)])
        writer.writerows(map(astuple, points))


def _by_place(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of all seeds after the same share of the tokens."""
    seeds = sorted({point.seed for point in points})
    runs = [[p for p in points if p.seed == seed] for seed in seeds]
    return [list(ones) for ones in zip(*runs, strict=True)]


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw the recovered shares against tokens: median, and least to most."""
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    groups = _by_place(points)
    tokens = [statistics.median(p.tokens for p in ones) for ones in groups]
    for key, label in (
        ("probe_recovered", "accuracy of a linear probe"),
        ("distance_recovered", "hidden states"),
    ):
        values = [[getattr(p, key) for p in ones] for ones in groups]
        panel.plot(tokens, list(map(statistics.median, values)), "o-", label=label)
        panel.fill_between(
            tokens, list(map(min, values)), list(map(max, values)), alpha=0.2
        )
    panel.axhline(0, color="grey", linewidth=1)
    panel.set(
        xlabel="tokens spent",
        ylabel="recovered share of the gap",
        title="What is grown back from the sub-FM alone",
    )
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(points: Sequence[Point]) -> str:
    """Return the curve as Markdown: median (least to most) over seeds."""
    shown = {
        "probe": "probe accuracy",
        "probe_recovered": "recovered",
        "distance": "distance",
        "distance_recovered": "recovered",
    }
    rows = [
        [ones[0].tokens, *(spread([getattr(p, key) for p in ones], 3) for key in shown)]
        for ones in _by_place(points)
    ]
    return markdown_table(["tokens", *shown.values()], rows)


if __name__ == "__main__":
    run_main(main)
