"""Show a site what of its files a run would use, before it joins (`fedpft-data`)."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset

from fedpft_flower.columns import TEXT_ROLES, alike_labels, labels_of, look_like_values
from fedpft_flower.commands import read_config
from fedpft_flower.config import DataConfig, FedPFTError, names_in
from fedpft_flower.endings import one_line_end
from fedpft_flower.images import check_images
from fedpft_flower.tasks import columns_of, load_site, source_of, task_of

FEW = 10  # rows of a class from which on it is mentioned


@dataclass
class Findings:
    """Collect what was found: lines to read, and problems.

    With an error the node would be refused; a warning is only worth a look.
    """

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run(arguments: Sequence[str] | None = None) -> None:
    """Check a site's rows from the command line; exit 1 if a run would refuse them."""
    options = _parser().parse_intermixed_args(arguments)
    datasets.disable_progress_bars()
    with one_line_end():
        pairs = [f"data.path={options.path}", *options.set]
        if (
            not any(pair.startswith("data.task=") for pair in pairs)
            and not options.conf
        ):
            pairs.insert(0, "data.task=text")
        config = read_config(options.conf, pairs)
        found = check(config.data, config.train.batch_size, config.seed)
    print("\n".join(found.lines))
    for kind, texts in (("error", found.errors), ("warning", found.warnings)):
        for text in texts:
            print(f"{kind}: {text}")
    if found.errors:
        sys.exit(1)
    print("a run with these settings would take these rows to train on")


def check(config: DataConfig, batch_size: int, seed: int) -> Findings:
    """Look at a site's rows as a run would.

    Args:
        config: the run's data settings, with the site's own path.
        batch_size: of local training.
        seed: the run's.

    Raises:
        FedPFTError: the files cannot be read at all.
    """
    found = Findings()
    source = source_of(config, "data.path", hub=False)
    others = [name for name in source if name != config.train_split]
    found.lines.append(f"path     {Path(config.path).expanduser().absolute()}")
    found.lines.append(f"split    {config.train_split}{_unused(others)}")
    if config.train_split not in source:
        found.errors.append(
            f"no split {config.train_split!r}; set data.train-split to one of "
            f"{', '.join(source)}"
        )
        return found
    part = source[config.train_split]
    used = list(columns_of(config).values())
    unused = [name for name in part.column_names if name not in used]
    found.lines.append(f"columns  {', '.join(used)}{_unused(unused)}")
    classify = task_of(config.task).objective == "classify"
    if classify and not config.labels:
        found.warnings.append(
            "data.labels is not given, so labels are not compared with the server's"
        )
    try:
        labels = names_in(config.labels) if classify else ()
        if classify and not labels:
            labels = _own_labels(part, config.label_column)
        rows = load_site(config, labels, seed)
        check_images(rows, config.train_split)
    except FedPFTError as error:
        found.errors.append(str(error))
        return found
    _describe(found, rows, part, labels, batch_size)
    return found


def _describe(
    found: Findings, rows: Dataset, part: Dataset, labels: Sequence[str], size: int
) -> None:
    left_out = len(part) - len(rows)
    note = f" ({left_out} of {len(part)} left out)" if left_out else ""
    found.lines.append(f"rows     {len(rows)}{note}")
    if labels:
        _describe_labels(found, rows, labels)
    found.lines += _sizes(rows) if "image" in rows.column_names else _text_lengths(rows)
    if len(rows) < size:
        found.warnings.append(
            f"{len(rows)} rows are fewer than a batch (train.batch-size = {size})"
        )
    if "image" not in rows.column_names:
        found.warnings += _odd_texts(rows)


def _describe_labels(found: Findings, rows: Dataset, labels: Sequence[str]) -> None:
    counts = Counter(labels[place] for place in rows["label"][:])
    shown = ", ".join(f"{label} {counts[label]}" for label in labels)
    found.lines.append(f"labels   {shown}")
    found.warnings += _odd_classes(counts, labels)
    if alike := alike_labels(labels):
        found.warnings.append(
            f"labels {' and '.join(map(repr, alike))} differ in case or blanks alone"
        )
    if look_like_values(labels, rows):
        found.warnings.append(
            f"{len(labels)} labels for {len(rows)} rows; is it the label column?"
        )


def _text_lengths(rows: Dataset) -> Iterator[str]:
    for column in TEXT_ROLES:
        if column in rows.column_names:
            words = [len(text.split()) for text in rows[column][:]]
            middle, most = np.percentile(words, [50, 95])
            yield (
                f"words    {column}: median {middle:.0f}, 95 % at most {most:.0f}, "
                f"longest {max(words)} (data.max-length counts tokens, which are more)"
            )


def _sizes(rows: Dataset) -> list[str]:
    sizes = Counter(image.size for image in rows["image"])
    (width, height), _ = sizes.most_common(1)[0]
    return [f"images   mostly {width} x {height} pixels, {len(sizes)} different sizes"]


def _odd_classes(counts: Counter[str], labels: Sequence[str]) -> Iterator[str]:
    absent = [label for label in labels if not counts[label]]
    few = [label for label in labels if 0 < counts[label] < FEW]
    if absent:
        yield f"no row of {', '.join(absent)}"
    if few:
        yield f"fewer than {FEW} rows of {', '.join(few)}"


def _odd_texts(rows: Dataset) -> Iterator[str]:
    columns = [name for name in TEXT_ROLES if name in rows.column_names]
    texts = list(zip(*(rows[name][:] for name in columns), strict=True))
    empty = sum(not "".join(row).strip() for row in texts)
    again = len(texts) - len(set(texts))
    if empty:
        yield f"{empty} texts are empty"
    if again:
        yield f"{again} texts occur again"
    if "label" not in rows.column_names:
        return
    labelled = set(zip(texts, rows["label"][:], strict=True))
    both = len(labelled) - len(set(texts))
    if both:
        yield f"{both} texts have two labels"


def _own_labels(part: Dataset, column: str) -> tuple[str, ...]:
    # A column that is not there is then named by `load_site`.
    return labels_of(part, column) if column in part.column_names else ()


def _unused(names: Sequence[str]) -> str:
    return f" (not used: {', '.join(names)})" if names else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpft-data",
        description="Show what a run would use of a site's own files.",
    )
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("path", help="file or directory: a node's data-path")
    parser.add_argument(
        "set",
        nargs="*",
        metavar="key=value",
        help="the run's settings, e.g. data.labels=negative,positive",
    )
    parser.add_argument("--conf", type=Path, help="the run's TOML file, if at hand")
    return parser
