"""Load the data of a task, split it, and index its labels.

A task is a row of `TASKS`. Loaded rows of a classification have the columns `text`
(and `text_pair`) or `image`, and `label` as an index into the label set; those of a
generation `text`, or `prompt` and `response`. All have `client` where a column says
whose they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from fedpft_flower.columns import (
    TEXT_ROLES,
    choose_columns,
    complete_rows,
    configured_label,
    has_labels,
    has_texts,
    in_order,
    label_texts,
    labels_of,
)
from fedpft_flower.config import (
    DataConfig,
    FedPFTError,
    Modality,
    Objective,
    OwnRowsError,
    PartitionConfig,
    derive_seed,
    names_in,
    row_called,
)
from fedpft_flower.docstrings import LIBRARIES, load_docstrings
from fedpft_flower.reading import read_splits
from fedpft_flower.splits import Splits, split_called

HELD_OUT = 0.1  # share of the training rows that replaces a missing split


@dataclass(frozen=True)
class TaskData:
    """Hold the splits of a task; `notes` says where each one comes from.

    `labels` is empty where there is nothing to classify.
    `train` is None at a server that holds none: every node then has rows of its own.
    """

    train: Dataset | None
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]
    notes: dict[str, str] = field(default_factory=dict)
    # Further test splits, each reported apart.
    more_tests: dict[str, Dataset] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, Dataset]:
        """Return the splits that the server judges models on, by name."""
        return {"validation": self.validation, "test": self.test, **self.more_tests}


@dataclass(frozen=True)
class Task:
    """Describe one task: its inputs, its loader, and its own public corpus if any."""

    modality: Modality
    load: Callable[[DataConfig, int], TaskData]
    public: Callable[[], Dataset] | None = None
    # Role -> column of the inputs, for a user's own data.
    inputs: Callable[[DataConfig], dict[str, str]] | None = None
    objective: Objective = "classify"


# ------------------------------------------------------------------------- loading


@lru_cache(maxsize=2)
def load_task(config: DataConfig, seed: int) -> TaskData:
    """Load the splits of a task; kept by these settings, since workers are reused.

    Raises:
        FedPFTError: an unknown task, unreadable data, a missing column or split, or a
            label outside the set.
    """
    data = task_of(config.task).load(config, seed)
    return TaskData(
        train=None if data.train is None else _for_training(data.train, config, seed),
        validation=sample(
            data.validation, config.max_validation_rows, seed, "validation"
        ),
        test=sample(data.test, config.max_test_rows, seed, "test"),
        labels=data.labels,
        notes=data.notes,
        more_tests={
            name: sample(rows, config.max_test_rows, seed, name)
            for name, rows in data.more_tests.items()
        },
    )


def load_site(config: DataConfig, labels: Sequence[str], seed: int) -> Dataset:
    """Load the training rows of one node from its own files.

    Args:
        config: as of the run, with the node's own path.
        labels: the label set [C], which the server fixes.
        seed: seed of `max_train_rows`.

    Raises:
        FedPFTError: the files cannot be read or have other columns, or a label is
            outside the set (an `OwnRowsError` where that quotes the rows).
    """
    task = task_of(config.task)
    if task.inputs is None:
        why = f"is not used by data.task = {config.task!r}; set data.task to"
        raise OwnRowsError(
            f"data-path = {config.path!r} {why} {_own_tasks()}",
            f"data-path {why} {_own_tasks()}",
        )
    source = source_of(config, "data-path", hub=False)
    split_called(source, config.train_split, "train-split")
    rows = _part(source, config.train_split, columns_of(config))
    if task.objective == "classify":
        rows = _labelled(rows, labels, config.train_split)
    return _for_training(rows, config, seed)


def columns_of(config: DataConfig) -> dict[str, str]:
    """Return role -> column of what a task uses of the user's own rows.

    Raises:
        FedPFTError: the task has data of its own.
    """
    task = task_of(config.task)
    if task.inputs is None:
        raise FedPFTError(
            f"data.task = {config.task!r} has no files; set data.task to {_own_tasks()}"
        )
    columns = task.inputs(config)
    if task.objective == "classify":
        columns["label"] = config.label_column
    return columns


def _own_tasks() -> str:
    return ", ".join(repr(name) for name, row in TASKS.items() if row.inputs)


def _for_training(rows: Dataset, config: DataConfig, seed: int) -> Dataset:
    learnt = {"text", "response"} & set(rows.column_names)
    if config.min_words and learnt:
        (column,) = learnt
        long = [len(text.split()) >= config.min_words for text in rows[column][:]]
        rows = rows.select(np.flatnonzero(long))
    if not len(rows):
        raise FedPFTError(
            f"no training row is left (data.min-words = {config.min_words}); lower it, "
            "or give rows"
        )
    return sample(rows, config.max_train_rows, seed, "train")


def task_of(name: str) -> Task:
    """Return the row of a task.

    Raises:
        FedPFTError: there is no such task.
    """
    return row_called(name, TASKS, "data.task")


def check_kind(data: DataConfig, partition: PartitionConfig) -> None:
    """Check that a task's rows can be shared among virtual clients like this.

    Raises:
        FedPFTError: there are no labels to share them by.
    """
    by_label = partition.kind in ("dirichlet", "pathological")
    if by_label and task_of(data.task).objective != "classify":
        raise FedPFTError(
            f"partition.kind = {partition.kind!r} shares rows by their label, and "
            f"data.task = {data.task!r} has none; choose 'iid', 'natural' or 'sizes'"
        )


def _refuse_path(config: DataConfig) -> None:
    if config.path:
        raise FedPFTError(
            f"data.path = {config.path!r} is not used by data.task = {config.task!r}; "
            f"set data.task to {_own_tasks()}"
        )


def _load_docstrings(config: DataConfig, seed: int) -> TaskData:
    _refuse_path(config)
    everything = load_docstrings()
    libraries = everything["library"][:]
    splits: dict[str, Dataset] = {}
    for name in ("train", "validation", "test"):
        rows = np.flatnonzero(np.asarray(everything["split"][:]) == name)
        part = everything.select(rows)
        splits[name] = Dataset.from_dict(
            {
                "text": part["text"][:],
                "label": [LIBRARIES.index(libraries[row]) for row in rows],
            }
        )
    notes = dict.fromkeys(splits, "docstrings, split by content hash")
    return TaskData(**splits, labels=LIBRARIES, notes=notes)


def _public_docstrings() -> Dataset:
    everything = load_docstrings()
    rows = np.flatnonzero(np.asarray(everything["split"][:]) == "public")
    return everything.select(rows).select_columns(["text"])


def _load_digits(config: DataConfig, seed: int) -> TaskData:
    _refuse_path(config)
    images, labels = _digits()
    generator = np.random.default_rng(derive_seed(seed, "digits"))
    order = generator.permutation(np.arange(_PUBLIC_DIGITS, len(images)))
    cuts = {"train": order[:1000], "validation": order[1000:1200], "test": order[1200:]}
    splits = {
        name: Dataset.from_dict(
            {
                "image": [images[i] for i in rows],
                "label": [int(labels[i]) for i in rows],
            },
            features=Features({"image": Image(), "label": ClassLabel(num_classes=10)}),
        )
        for name, rows in cuts.items()
    }
    names = tuple(str(digit) for digit in range(10))
    notes = dict.fromkeys(cuts, "scikit-learn digits, seeded split")
    return TaskData(**splits, labels=names, notes=notes)


def _public_digits() -> Dataset:
    images, _ = _digits()
    return Dataset.from_dict(
        {"image": images[:_PUBLIC_DIGITS]}, features=Features({"image": Image()})
    )


_PUBLIC_DIGITS = 300  # the first rows of digits, never in any split


def _digits() -> tuple[list[Any], Any]:
    # Here, since no other task needs scikit-learn.
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.asarray(digits.images * 255 / 16, dtype=np.uint8)
    return [Picture.fromarray(image).convert("RGB") for image in grey], digits.target


def _text_inputs(config: DataConfig) -> dict[str, str]:
    columns = names_in(config.text_columns)
    if not 1 <= len(columns) <= 2:
        raise FedPFTError(
            f"data.text-columns = {config.text_columns!r}; name one column, or two "
            "separated by a comma for pairs"
        )
    return dict(zip(("text", "text_pair"), columns, strict=False))


def _generation_inputs(config: DataConfig) -> dict[str, str]:
    columns = names_in(config.text_columns)
    if len(columns) == 2:
        return dict(zip(("prompt", "response"), columns, strict=True))
    if len(columns) != 1:
        raise FedPFTError(
            f"data.text-columns = {config.text_columns!r}; name one column of texts, "
            "or two separated by a comma: of prompts and of responses"
        )
    return {"text": columns[0]}


def _image_inputs(config: DataConfig) -> dict[str, str]:
    return {"image": config.image_column}


def _load_own(config: DataConfig, seed: int) -> TaskData:
    """Load splits of the user's own data; a missing one is a seeded part of another.

    Without a test split, `validation` becomes the test set; what is then missing is
    held out from train. Without train, `validation` and `test` share what there is.
    """
    if not config.path:
        raise FedPFTError(
            f"data.task = {config.task!r} needs data.path: a directory, a file, or a "
            "hub name"
        )
    columns, source = columns_of(config), source_of(config, "data.path")
    parts: dict[str, Dataset] = {}
    notes: dict[str, str] = {}
    roles = _roles(config, source)
    for role, split in roles.items():
        wanted = dict(columns)
        if role == "train" and config.client_column:
            wanted["client"] = config.client_column
        parts[role], notes[role] = _part(source, split, wanted), split
    more = {
        split: _part(source, split, columns)
        for split in _more_tests(config, source, {*roles, *roles.values(), "public"})
    }
    if not parts:
        for part in source.values():  # a column that is nowhere is what is wrong
            choose_columns(part, columns, _SETTINGS)
        raise FedPFTError(
            f"data.path = {config.path!r} has the splits {', '.join(source)}; say what "
            "they are: data.train-split, data.validation-split, data.test-split"
        )
    names = tuple[str, ...]()
    classify = task_of(config.task).objective == "classify"
    if classify:
        names = _label_names(parts, config)
    _complete(parts, notes, seed)
    if classify:
        parts = {r: _labelled(part, names, notes[r]) for r, part in parts.items()}
        more = {s: _labelled(part, names, s) for s, part in more.items()}
    return TaskData(
        train=parts.get("train"),
        validation=parts["validation"],
        test=parts["test"],
        labels=names,
        notes=notes | {split: split for split in more},
        more_tests=more,
    )


def source_of(config: DataConfig, key: str, hub: bool = True) -> Splits:
    """Return the splits at `data.path`, as they stand there.

    Args:
        config: where and how to read.
        key: the setting that names the path, for messages.
        hub: whether a hub may be asked for what is not here.

    Raises:
        FedPFTError: there is nothing that can be read.
    """
    images = config.image_column if task_of(config.task).modality == "image" else ""
    return read_splits(config.path, key, images, config.subset, config.separator, hub)


def _roles(config: DataConfig, source: Splits) -> dict[str, str]:
    """Return role -> split: those asked for by name, and where free, of that name.

    A split without labels is nothing to evaluate on.
    """
    named = {
        "train": config.train_split,
        "test": next(iter(names_in(config.test_split)), ""),
        "validation": config.validation_split,
    }
    asked = {role: split for role, split in named.items() if role != split}
    for role, split in asked.items():
        part = split_called(source, split, f"data.{role}-split")
        if role != "train":
            _check_labels(part, config, role, split)
        if list(asked.values()).count(split) > 1:
            raise FedPFTError(
                f"data.{role}-split = {split!r}, and another split too; no row may be "
                "both trained and tested on"
            )
    further = names_in(config.test_split)[1:]
    usual = {
        role: next(
            (n for n in names if n in source and (n == role or n not in further)), ""
        )
        for role, names in _USUAL.items()
    }
    return asked | {
        role: split
        for role, split in usual.items()
        if split
        and role not in asked
        and split not in asked.values()
        and (role == "train" or _can_evaluate(source[split], config))
    }


# How the splits of a role are called.
_USUAL = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
}


def _can_evaluate(part: Dataset, config: DataConfig) -> bool:
    """Tell whether a split says what is right: has labels, or texts to generate."""
    classify = task_of(config.task).objective == "classify"
    given = has_labels if classify else has_texts
    return given(part, _answers(config))


def _answers(config: DataConfig) -> str:
    """Return the column that says what is right: of the label, or of the last text."""
    columns = columns_of(config)
    return columns.get("label") or [*columns.values()][-1]


def _check_labels(part: Dataset, config: DataConfig, role: str, split: str) -> None:
    if not _can_evaluate(part, config):
        what = "labels" if task_of(config.task).objective == "classify" else "texts"
        raise FedPFTError(
            f"data.{role}-split = {split!r} has no {what} in column "
            f"{_answers(config)!r}; name another split or column"
        )


def _more_tests(config: DataConfig, source: Splits, taken: set[str]) -> list[str]:
    """Return the second and further names of `data.test-split`."""
    splits = list(names_in(config.test_split)[1:])
    for split in splits:
        _check_labels(
            split_called(source, split, "data.test-split"), config, "test", split
        )
        if split in taken or splits.count(split) > 1:
            raise FedPFTError(
                f"data.test-split = {config.test_split!r} names {split!r}, which has "
                "another use already; name each split once"
            )
    return splits


def _complete(parts: dict[str, Dataset], notes: dict[str, str], seed: int) -> None:
    """Fill in the splits that the server needs, and note where they are from."""
    if "train" not in parts:
        (lacking,) = {"validation", "test"} - parts.keys() or (None,)
        if lacking:
            (there,) = parts
            split, share = notes[there], 0.5
            parts[there], parts[lacking] = _hold_out(parts[there], seed, lacking, share)
            notes[there] = notes[lacking] = f"half of {split}, seeded"
        return
    if "test" not in parts and "validation" in parts:
        parts["test"], notes["test"] = parts.pop("validation"), notes.pop("validation")
    for role in ("test", "validation"):
        if role not in parts:
            parts["train"], parts[role] = _hold_out(
                parts["train"], seed, role, HELD_OUT
            )
            notes[role] = f"{HELD_OUT:.0%} of {notes['train']}, seeded"


TASKS: dict[str, Task] = {
    "docstrings": Task("text", _load_docstrings, _public_docstrings),
    "digits": Task("image", _load_digits, _public_digits),
    "text": Task("text", _load_own, inputs=_text_inputs),
    "image": Task("image", _load_own, inputs=_image_inputs),
    "generation": Task(
        "text", _load_own, inputs=_generation_inputs, objective="generate"
    ),
}

_SETTINGS = {
    **dict.fromkeys(TEXT_ROLES, "data.text-columns"),
    "image": "data.image-column",
    "label": "data.label-column",
    "client": "data.client-column",
}


def _part(source: Splits, split: str, columns: Mapping[str, str]) -> Dataset:
    """Return a split's rows, each with every column, under the names of their roles."""
    return complete_rows(choose_columns(source[split], columns, _SETTINGS), split)


def _label_names(parts: Mapping[str, Dataset], config: DataConfig) -> tuple[str, ...]:
    """Return the label set: the configured one, or what rows tell of it.

    They are those to train on; without any, all there are.
    """
    names = names_in(config.labels)
    if not names:
        rows = [parts["train"]] if "train" in parts else list(parts.values())
        named = config.label_column
        found = [labels_of(part, "label", named) for part in rows]
        names = found[0] if len({*found}) == 1 else in_order(set().union(*found))
    if len(set(names)) < max(2, len(names)):
        raise FedPFTError(f"data.labels: {names} needs two or more different labels")
    return names


def _labelled(part: Dataset, names: Sequence[str], split: str) -> Dataset:
    """Turn the label column into indices of `names`."""
    texts = label_texts(part, "label")
    written = [configured_label(name, part, "label") for name in names]
    places = {name: i for i, name in enumerate(written)}
    outside = sorted(set(texts) - places.keys())
    if outside:
        known = f"the label set ({', '.join(names)})"
        raise OwnRowsError(
            f"label {outside[0]!r} in {split} is outside {known}; mend the data or set "
            "data.labels",
            f"{len(outside)} labels in {split} are outside {known}; this node's log "
            "has one of them",
        )
    rest = part.remove_columns("label")
    return rest.add_column("label", [places[text] for text in texts])


def _hold_out(
    rows: Dataset, seed: int, role: str, share: float
) -> tuple[Dataset, Dataset]:
    if len(rows) < 2 / share:
        raise FedPFTError(
            f"{len(rows)} rows are too few to hold out a {role} split; give one with "
            f"data.{role}-split"
        )
    parts = rows.train_test_split(share, seed=derive_seed(seed, role) % 2**32)
    return parts["train"], parts["test"]


def sample(rows: Dataset, most: int, seed: int, purpose: str) -> Dataset:
    """Return so many rows at most (0: all), drawn by the seed, in their order."""
    if not most or len(rows) <= most:
        return rows
    generator = np.random.default_rng(derive_seed(seed, "sample", purpose))
    return rows.select(sorted(generator.permutation(len(rows))[:most].tolist()))
