"""Compare recipes for the sub-FM over tasks and seeds, by the plain loop.

python -m benchmarks.recipes SPEC.toml --out DIR [--only TEXT] [--threads N]

A spec has `seeds`, `nodes`, `lrs`, and settings in tables `task.NAME`, `recipe.NAME`.
`lrs` is a grid of `train.lr`: for each task, each recipe takes the one that is best on
the validation split with the first seed. A cell that has a result is not run again;
`{NAME}` in a setting is the environment variable NAME.
"""

import argparse
import json
import os
import re
import statistics
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from benchmarks import run_main
from benchmarks.plain_loop import PlainLoop
from fedpft_flower.config import Config, flatten
from fedpft_flower.encoding import Rows
from fedpft_flower.evaluation import predict

KEPT_ROUNDS = ("round", "fm-accuracy", "sub-fm-accuracy", "alignment")


@dataclass(frozen=True)
class Cell:
    """Name one run."""

    task: str
    recipe: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Return the name of its result's file."""
        return f"{self.task}-{self.recipe}-lr{self.lr:g}-s{self.seed}"


class Sweep:
    """Run the cells of a spec."""

    def __init__(self, spec: Path, out: Path, only: str) -> None:
        text = spec.read_text(encoding="utf-8")
        # Environment variables that the spec names, and what they stand for.
        self._named = {
            f"{{{name}}}": os.environ[name]
            for name in re.findall(r"\{(\w+)\}", text)
            if name in os.environ
        }
        for name, value in self._named.items():
            text = text.replace(name, value)
        self.spec: dict[str, Any] = tomllib.loads(text)
        self.out, self.only = out, only
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Run every cell that has no result, the grid of learning rates first."""
        for cell in self.cells():
            place = self._place(cell)
            if place.exists() or self.only not in cell.name:
                continue
            began = time.monotonic()
            result = self._run(cell)
            draft = place.with_suffix(".partial")
            draft.write_text(self._unfilled(result), encoding="utf-8")
            draft.replace(place)
            found = ", ".join(
                f"{model} {_accuracy(hits):.4f}"
                for model, hits in result["hits"].items()
            )
            print(f"{cell.name}: {found}, {time.monotonic() - began:.0f} s", flush=True)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells in the order in which they are run."""
        first, *others = self.spec["seeds"]
        pairs = [(t, r) for t in self.spec["task"] for r in self.spec["recipe"]]
        for task, recipe in pairs:
            for lr in self._grid(task, recipe):
                yield Cell(task, recipe, first, lr)
        for seed in others:
            for task, recipe in pairs:
                best = self.best_lr(task, recipe)
                if best is not None:
                    yield Cell(task, recipe, seed, best)

    def best_lr(self, task: str, recipe: str) -> float | None:
        """Return the grid's best learning rate on validation, if all have run."""
        seed, scores = self.spec["seeds"][0], {}
        for lr in self._grid(task, recipe):
            result = self.result(Cell(task, recipe, seed, lr))
            if result is None:
                return None
            scores[lr] = result["rounds"][-1]["fm-accuracy"]
        return max(scores, key=scores.__getitem__)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result, if there is one."""
        place = self._place(cell)
        return json.loads(place.read_text()) if place.exists() else None

    def _unfilled(self, result: dict[str, Any]) -> str:
        """Return a result as JSON that names no place on this machine."""
        text = json.dumps(result, indent=1)
        for name, value in self._named.items():
            text = text.replace(json.dumps(value), json.dumps(name))
        return text

    def _place(self, cell: Cell) -> Path:
        return self.out / f"{cell.name}.json"

    def _grid(self, task: str, recipe: str) -> list[float]:
        table = self.spec["recipe"][recipe] | self.spec["task"][task]
        return [float(lr) for lr in table.get("lrs") or self.spec["lrs"]]

    def _config(self, cell: Cell) -> Config:
        settings: dict[str, Any] = {}
        for part in (self.spec["task"][cell.task], self.spec["recipe"][cell.recipe]):
            settings |= flatten({k: v for k, v in part.items() if k != "lrs"})
        settings |= {"seed": cell.seed, "train.lr": cell.lr}
        return Config.from_run_config(settings)

    def _run(self, cell: Cell) -> dict[str, Any]:
        config = self._config(cell)
        loop = PlainLoop(config, self.spec["nodes"])
        rounds = [
            {key: entry[key] for key in KEPT_ROUNDS if key in entry}
            for entry in loop.run()
        ]
        server, rows = loop.server, loop.server.encode(loop.task.test)
        hits = {"plugged in": _hits(server.fm, rows)}
        hits["sub-FM"] = (
            hits["plugged in"] if server.plan.is_whole else _hits(server.sub_fm, rows)
        )
        refinement = server.refine()
        if refinement:
            hits["refined"] = _hits(server.fm, rows)
        state = {name: one.contiguous() for name, one in server.state().items()}
        (self.out / "states").mkdir(exist_ok=True)
        save_file(state, self.out / "states" / f"{cell.name}.safetensors")
        return {
            "config": config.flat(),
            "nodes": self.spec["nodes"],
            "plan": server.plan.to_json(),
            "share-withheld": server.share_withheld,
            "rounds": rounds,
            "refinement": refinement,
            "hits": hits,
        }


def table(sweep: Sweep) -> str:
    """Return test accuracies as Markdown: mean (sample deviation) over seeds.

    `plugged in` is the FM with the averaged adapter, `refined` the same after its
    refinement; gradient error and cosine are those before training. `points` is the
    FM's distance from the first recipe, with a 95 % interval.
    """
    lines = [
        "| task | recipe | lr | seeds | plugged in | refined | sub-FM | points "
        "| gradient error | cosine |",
        "|" + "---|" * 10,
    ]
    for task in sweep.spec["task"]:
        first: list[dict[str, Any]] = []
        for recipe in sweep.spec["recipe"]:
            lr = sweep.best_lr(task, recipe)
            if lr is None:
                continue
            cells = [Cell(task, recipe, seed, lr) for seed in sweep.spec["seeds"]]
            found = [r for r in map(sweep.result, cells) if r is not None]
            columns = [
                *(
                    [_accuracy(r["hits"][model]) for r in found if model in r["hits"]]
                    for model in ("plugged in", "refined", "sub-FM")
                ),
                [_gradient(r)[0] for r in found],
                [_gradient(r)[1] for r in found],
            ]
            shown = list(map(_mean, columns))
            shown.insert(3, _points(found, first) if first else "-")
            first = first or found
            row = " | ".join(shown)
            lines.append(f"| {task} | {recipe} | {lr:g} | {len(found)} | {row} |")
    return "\n".join(lines)


def _points(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """Return a difference of accuracies in points, and its 95 % interval."""
    pairs = zip(map(_fm_hits, found), map(_fm_hits, first), strict=False)
    difference = np.stack([100 * (one - other) for one, other in pairs])
    low, high = interval(difference)
    return f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def interval(values: NDArray[np.float64], draws: int = 4000) -> tuple[float, float]:
    """Return the middle 95 % of the mean by a bootstrap over seeds and examples.

    Args:
        values: of every seed and example [S, N]; differences make it a paired one.
        draws: how many samples.
    """
    generator = np.random.default_rng(0)
    seeds, examples = values.shape
    means = np.empty(draws)
    for draw in range(draws):
        rows = generator.integers(seeds, size=seeds)
        columns = generator.integers(examples, size=examples)
        means[draw] = values[rows].mean(axis=0)[columns].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _hits(model: nn.Module, rows: Rows) -> str:
    """Return a 1 for every row that a model classifies rightly, and a 0 for others."""
    logits, labels = predict(model, rows)
    return "".join(map(str, (logits.argmax(dim=-1) == labels).int().tolist()))


def _fm_hits(result: dict[str, Any]) -> NDArray[np.float64]:
    hits = result["hits"]
    return np.array(list(hits.get("refined", hits["plugged in"])), dtype=np.float64)


def _accuracy(hits: str) -> float:
    return hits.count("1") / len(hits)


def _gradient(result: dict[str, Any]) -> tuple[float, float]:
    """Return relative gradient error and cosine before training."""
    alignment = result["rounds"][0]["alignment"]
    error = alignment.get("gradient-after", alignment.get("gradient-before"))
    return (error["relative"], error["cosine"]) if error else (0.0, 1.0)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cells whose name has this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sweep = Sweep(options.spec, options.out, options.only)
    sweep.run()
    print(table(sweep))


if __name__ == "__main__":
    run_main(main)
