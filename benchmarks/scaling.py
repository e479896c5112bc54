"""Measure how a round grows with clients, with the FM's layers and with rows.

Every point is a run of its own by `fedpft-run`, on a random BERT and random rows: what
grows is what the system does, whatever is learnt. Three axes, one value changed at a
time, the others at their first:
    python -m benchmarks.scaling --out docs/scaling

Writes `points.json` after every point; the same command goes on from there. The figure
of a round is the median of those after the first.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")

import tomli_w
from matplotlib import pyplot as plt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import ROOT, markdown_table, parser, run_main
from benchmarks.finished import only_run, run_app, start_up
from fedpft_flower.config import nest
from fedpft_flower.disk import put

HIDDEN = 64
WORDS = [f"word{number}" for number in range(200)]
WORDS_A_ROW, MOST_TOKENS = 8, 16
ROUNDS = 4

# What is changed one at a time, and what each is where another changes.
BASE = {"clients": 10, "layers": 6, "rows": 8_000}
AXES: dict[str, list[int]] = {
    "clients": [10, 100, 1_000],
    "layers": [6, 12, 24],
    "rows": [1_000, 10_000, 100_000, 1_000_000],
}
SHOWN = {
    "clients": "clients a round, all of the federation",
    "layers": f"layers of the FM, {HIDDEN} wide",
    "rows": "training rows, of all clients together",
}


@dataclass(frozen=True)
class Point:
    """Hold what one run took: seconds, and bytes at their peak."""

    axis: str
    value: int
    # From the shell until round 1 begins.
    start: float
    # Of a round.
    seconds: float
    server: int
    client: int


# What is fitted and drawn, of a point, and its unit.
FIGURES = {
    "start": ("start until round 1", "s"),
    "seconds": ("round", "s"),
    "server": ("server, peak memory", "GB"),
    "client": ("client, peak memory", "GB"),
}


def main() -> None:
    """Measure the points that are missing, and write table and picture."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "points.json"
    known = json.loads(kept.read_text()) if kept.exists() else []
    points = [Point(**entry) for entry in known]
    done = {(point.axis, point.value) for point in points}
    for axis in options.axes:
        for value in AXES[axis]:
            if (axis, value) not in done:
                points.append(measure(axis, value))
                print(points[-1], file=sys.stderr, flush=True)
                keep(points, kept)
    draw(points, options.out / "scaling.png")
    print(table(points))


def keep(points: Sequence[Point], path: Path) -> None:
    """Write all points as JSON."""
    text = json.dumps([asdict(point) for point in points], indent=1) + "\n"
    put(path, lambda draft: draft.write_text(text))


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, default=ROOT / "docs" / "scaling")
    arguments.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    return arguments.parse_args()


# --------------------------------------------------------------------------- a point


def measure(axis: str, value: int) -> Point:
    """Run one point."""
    sizes = BASE | {axis: value}
    with TemporaryDirectory() as name:
        place = Path(name)
        write_fm(place / "fm", sizes["layers"])
        write_rows(place / "rows", max(sizes["rows"], 8 * sizes["clients"]))
        return _run(axis, value, sizes["clients"], place)


def write_fm(
    place: Path, layers: int, hidden: int = HIDDEN, length: int = MOST_TOKENS
) -> None:
    """Write a random BERT of this size, with a tokenizer of whole words."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(place)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=max(1, hidden // 64),
        num_hidden_layers=layers,
        max_position_embeddings=length,
    )
    BertModel(config).save_pretrained(place)


def write_rows(place: Path, count: int) -> None:
    """Write so many random training rows, and a few to validate, test and align."""
    place.mkdir()
    draw_words = random.Random(0).choices
    sizes = {"train": count, "validation": 100, "test": 100}
    for split, rows in sizes.items():
        with (place / f"{split}.csv").open("w") as file:
            file.write("text,label\n")
            for row in range(rows):
                words = " ".join(draw_words(WORDS, k=WORDS_A_ROW))
                file.write(f"{words},{'ab'[row % 2]}\n")
    lines = [" ".join(draw_words(WORDS, k=WORDS_A_ROW)) for _ in range(2_000)]
    (place.parent / "public.csv").write_text("\n".join(["text", *lines]) + "\n")


def settings_of(place: Path) -> dict[str, str | int | float]:
    """Return the run's settings, of what was written to a place."""
    return {
        "fm.name": str(place / "fm"),
        "out-dir": str(place / "runs"),
        "data.task": "text",
        "data.path": str(place / "rows"),
        "data.public-path": str(place / "public.csv"),
        "data.max-length": MOST_TOKENS,
        "partition.kind": "iid",
        "rounds": ROUNDS,
        "train.fraction": 1.0,
        "train.local-steps": 2,
        "align.steps": 10,
        "plug-in.steps": 0,
    }


def _run(axis: str, value: int, clients: int, place: Path) -> Point:
    (place / "run.toml").write_text(tomli_w.dumps(nest(settings_of(place))))
    began = time.time()
    run_app(place / "run.toml", [], clients)
    made, rounds = only_run(place / "runs")
    return Point(
        axis,
        value,
        start=start_up(made, rounds, began),
        seconds=statistics.median(entry["seconds"] for entry in rounds[2:]),
        server=max(entry["peak-memory-server"] for entry in rounds),
        client=max(entry["peak-memory-client"] for entry in rounds[1:]),
    )


# ------------------------------------------------------------------------- the report


def exponent(one: Point, other: Point, figure: str) -> float:
    """Return p of y ~ x^p between two points."""
    grown = getattr(other, figure) / getattr(one, figure)
    return math.log(grown) / math.log(other.value / one.value)


def by_axis(points: Sequence[Point]) -> Mapping[str, list[Point]]:
    """Return the points of every axis, smallest value first."""
    return {
        axis: sorted((p for p in points if p.axis == axis), key=lambda p: p.value)
        for axis in AXES
        if any(p.axis == axis for p in points)
    }


def table(points: Sequence[Point]) -> str:
    """Return all points as Markdown, and the exponents between the last two."""
    rows = []
    for axis, found in by_axis(points).items():
        for point in found:
            memory = (f"{size / 1e9:.2f}" for size in (point.server, point.client))
            seconds = (f"{point.start:.1f}", f"{point.seconds:.2f}")
            rows.append([axis, f"{point.value:,}", *seconds, *memory])
        if len(found) > 1:
            one, other = found[-2:]
            grown = (f"{exponent(one, other, figure):.2f}" for figure in FIGURES)
            rows.append([axis, "exponent, last two", *grown])
    heads = (f"{name}, {unit}" for name, unit in FIGURES.values())
    return markdown_table(["axis", "value", *heads], rows)


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw seconds and memory against every axis, both logarithmic."""
    found = by_axis(points)
    figure, panels = plt.subplots(
        2, len(found), figsize=(4 * len(found), 6), layout="constrained", squeeze=False
    )
    for column, (axis, ones) in enumerate(found.items()):
        values = [point.value for point in ones]
        for name, (label, unit) in FIGURES.items():
            panel = panels[0 if unit == "s" else 1][column]
            scale = 1.0 if unit == "s" else 1e9
            heights = [getattr(point, name) / scale for point in ones]
            panel.loglog(values, heights, marker="o", label=label)
            panel.set(xlabel=SHOWN[axis], ylabel="seconds" if unit == "s" else unit)
            panel.grid(alpha=0.3, which="both")
            panel.legend()
    put(path, lambda draft: figure.savefig(draft, dpi=120))
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
