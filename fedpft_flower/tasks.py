"""Load the data of a task, split it, and index its labels.

A task is a row of `TASKS`. Loaded rows have the columns `text` (and `text_pair`) or
`image`, and `label` as an index into the label set; `client` where a column says whose
they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from flwr_datasets import FederatedDataset

from fedpft_flower.architectures import Modality
from fedpft_flower.config import DataConfig, FedPFTError, derive_seed, names_in
from fedpft_flower.docstrings import LIBRARIES, load_docstrings

HELD_OUT = 0.1  # share of the training rows that replaces a missing split


@dataclass(frozen=True)
class TaskData:
    """Hold the splits of a task; `notes` says where each one comes from.

    `train` is None at a server that holds none: every node then has rows of its own.
    """

    train: Dataset | None
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Describe one task: its inputs, its loader, and its own public corpus if any."""

    modality: Modality
    load: Callable[[DataConfig, int], TaskData]
    public: Callable[[], Dataset] | None = None
    # Role -> column of the inputs, for a user's own data.
    inputs: Callable[[DataConfig], dict[str, str]] | None = None


# ------------------------------------------------------------------------- loading


@lru_cache(maxsize=2)
def load_task(config: DataConfig, seed: int) -> TaskData:
    """Load the splits of a task; cached by content, since workers are reused.

    Raises:
        FedPFTError: an unknown task, unreadable data, a missing column or split, or a
            label outside the set.
    """
    data = task_of(config.task).load(config, seed)
    return TaskData(
        train=None if data.train is None else _for_training(data.train, config, seed),
        validation=_sample(
            data.validation, config.max_validation_rows, seed, "validation"
        ),
        test=_sample(data.test, config.max_test_rows, seed, "test"),
        labels=data.labels,
        notes=data.notes,
    )


def load_site(config: DataConfig, labels: Sequence[str], seed: int) -> Dataset:
    """Load the training rows of one node from its own files.

    Args:
        config: as of the run, with the node's own path.
        labels: the label set [C], which the server fixes.
        seed: seed of `max_train_rows`.

    Raises:
        FedPFTError: the files cannot be read or have other columns, or a label is
            outside the set.
    """
    task = task_of(config.task)
    if task.inputs is None:
        raise FedPFTError(
            f"data-path = {config.path!r} is not used by data.task = {config.task!r}; "
            "set data.task to 'text' or 'image'"
        )
    source = read_splits(config.path, "data-path", config.subset)
    rows = _split(source, config.train_split, "train-split")
    columns = {**task.inputs(config), "label": config.label_column}
    rows = _typed(_columns(rows, columns, _SETTINGS), config.train_split)
    return _for_training(_labelled(rows, labels, config.train_split), config, seed)


def _for_training(rows: Dataset, config: DataConfig, seed: int) -> Dataset:
    if config.min_words and "text" in rows.column_names:
        long = [len(text.split()) >= config.min_words for text in rows["text"]]
        rows = rows.select(np.flatnonzero(long))
    if not len(rows):
        raise FedPFTError(
            f"no training row is left (data.min-words = {config.min_words}); lower it, "
            "or give rows"
        )
    return _sample(rows, config.max_train_rows, seed, "train")


def load_public(config: DataConfig, seed: int) -> Dataset:
    """Load the public, unlabelled rows that align the sub-FM.

    Raises:
        FedPFTError: there is no public corpus, or it cannot be read.
    """
    task = task_of(config.task)
    if config.public_path:
        source = read_splits(
            config.public_path, "data.public-path", config.public_subset
        )
        split = _split(source, config.public_split, "data.public-split")
        kind = "image" if task.modality == "image" else "text"
        column = config.public_column or kind
        key = {kind: "data.public-column"}
        public = _cast(_columns(split, {kind: column}, key), kind)
        if kind == "text":
            public = public.filter(lambda row: bool((row["text"] or "").strip()))
    elif task.public is not None:
        public = task.public()
    else:
        raise FedPFTError(
            "alignment needs a public corpus and data.public-path is empty; give one "
            "(a directory, file or hub name), or choose method = 'fedpft-n'"
        )
    if not len(public):
        raise FedPFTError("data.public-path has no usable row; give another corpus")
    return _sample(public, config.public_rows, seed, "public")


def task_of(name: str) -> Task:
    """Return the row of a task.

    Raises:
        FedPFTError: there is no such task.
    """
    if name not in TASKS:
        raise FedPFTError(f"data.task = {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def _refuse_path(config: DataConfig) -> None:
    if config.path:
        raise FedPFTError(
            f"data.path = {config.path!r} is not used by data.task = {config.task!r}; "
            "set data.task to 'text' or 'image'"
        )


def _load_docstrings(config: DataConfig, seed: int) -> TaskData:
    _refuse_path(config)
    everything = load_docstrings()
    libraries = everything["library"]
    splits: dict[str, Dataset] = {}
    for name in ("train", "validation", "test"):
        rows = np.flatnonzero(np.asarray(everything["split"]) == name)
        part = everything.select(rows)
        splits[name] = Dataset.from_dict(
            {
                "text": part["text"],
                "label": [LIBRARIES.index(libraries[row]) for row in rows],
            }
        )
    notes = dict.fromkeys(splits, "docstrings, split by content hash")
    return TaskData(**splits, labels=LIBRARIES, notes=notes)


def _public_docstrings() -> Dataset:
    everything = load_docstrings()
    rows = np.flatnonzero(np.asarray(everything["split"]) == "public")
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
    row = task_of(config.task)
    assert row.inputs is not None
    columns = {**row.inputs(config), "label": config.label_column}
    source = read_splits(config.path, "data.path", config.subset)
    parts: dict[str, Dataset] = {}
    notes: dict[str, str] = {}
    for role, split in (
        ("train", config.train_split),
        ("test", config.test_split),
        ("validation", config.validation_split),
    ):
        if split != role:  # asked for by name: it must be there
            _split(source, split, f"data.{role}-split")
        if split not in source:
            continue
        if role == "train" or _has_labels(source[split], config.label_column):
            wanted = dict(columns)
            if role == "train" and config.client_column:
                wanted["client"] = config.client_column
            parts[role] = _typed(_columns(source[split], wanted, _SETTINGS), split)
            notes[role] = split
    if not parts:
        raise FedPFTError(
            f"data.path = {config.path!r} has the splits {', '.join(source)}; say what "
            "they are: data.train-split, data.validation-split, data.test-split"
        )
    names = _label_names([*parts.values()], config)
    _complete(parts, notes, seed)
    ready = {r: _labelled(part, names, notes[r]) for r, part in parts.items()}
    return TaskData(
        train=ready.get("train"),
        validation=ready["validation"],
        test=ready["test"],
        labels=names,
        notes=notes,
    )


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
}

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


Splits = Mapping[str, Dataset]


def read_splits(path: str, key: str, subset: str) -> Splits:
    """Return the splits of a file, a directory or a hub data set, by name.

    Args:
        path: where the rows are.
        key: the setting that says so, for messages.
        subset: the configuration of a hub data set, or "".

    Raises:
        FedPFTError: there is nothing that `datasets` reads.
    """
    try:
        place = Path(path).expanduser()
        if place.is_file():
            if place.suffix not in _FORMATS:
                raise FedPFTError(
                    f"{key} = {path!r}: unknown file type {place.suffix!r}; give one "
                    f"of {', '.join(_FORMATS)}"
                )
            files = {"train": str(place)}
            whole: Splits = load_dataset(_FORMATS[place.suffix], data_files=files)
            return whole
        if not place.is_dir() and (place.is_absolute() or path.startswith((".", "~"))):
            raise FedPFTError(
                f"{key} = {path!r} does not exist; give a path or hub name"
            )
        return _read_directory(place, subset) if place.is_dir() else _hub(path, subset)
    except FedPFTError:
        raise
    except Exception as error:  # datasets raises many kinds, all about this one path
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FedPFTError(
            f"{key} = {path!r} cannot be read by `datasets` ({reason}); give a "
            "directory, file or hub name that load_dataset reads"
        ) from error


def _read_directory(place: Path, subset: str) -> Splits:
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        saved: Dataset | DatasetDict = load_from_disk(str(place))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    loaded: Splits = load_dataset(str(place), subset or None)
    return loaded


def _hub(name: str, subset: str) -> Splits:
    hub = FederatedDataset(
        dataset=name, subset=subset or None, partitioners={}, shuffle=False
    )
    splits = get_dataset_split_names(name, subset or None)
    return {split: hub.load_split(split) for split in splits}


def _split(source: Splits, name: str, key: str) -> Dataset:
    if name not in source:
        raise FedPFTError(f"{key} = {name!r}; this data has {', '.join(source)}")
    return source[name]


_SETTINGS = {
    "text": "data.text-columns",
    "text_pair": "data.text-columns",
    "image": "data.image-column",
    "label": "data.label-column",
    "client": "data.client-column",
}


def _columns(
    part: Dataset, wanted: Mapping[str, str], settings: Mapping[str, str]
) -> Dataset:
    """Return the wanted columns under the names of their roles."""
    for role, column in wanted.items():
        if column not in part.column_names:
            raise FedPFTError(
                f"{settings[role]}: no column {column!r}; this data has "
                f"{', '.join(part.column_names)}"
            )
    names = list(wanted.values())
    if len(set(names)) < len(names):
        keys = sorted({settings[role] for role in wanted})
        raise FedPFTError(f"{' and '.join(keys)} name one column twice: {names}")
    chosen = part.select_columns(names)
    return chosen.rename_columns({c: r for r, c in wanted.items() if c != r})


def _label_names(parts: Sequence[Dataset], config: DataConfig) -> tuple[str, ...]:
    """Return the label set: the configured one, or what the first part tells of it."""
    feature = parts[0].features["label"]
    if config.labels:
        names = names_in(config.labels)
    elif isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    else:
        try:
            names = tuple(str(value) for value in sorted(parts[0].unique("label")))
        except (TypeError, pa.ArrowException) as error:
            raise FedPFTError(
                f"data.label-column = {config.label_column!r} holds {feature}; name a "
                "column of texts or numbers"
            ) from error
    if len(set(names)) < max(2, len(names)):
        raise FedPFTError(f"data.labels: {names} needs two or more different labels")
    return names


def _has_labels(part: Dataset, column: str) -> bool:
    """Tell a labelled split from one whose labels are withheld (all -1 or null)."""
    return column in part.column_names and bool(set(part.unique(column)) - {-1, None})


def _typed(part: Dataset, split: str) -> Dataset:
    """Give inputs the type that encoding needs, and refuse missing values."""
    for column in part.column_names:
        missing = part.data.column(column).is_null().to_numpy().nonzero()[0]
        if len(missing):
            raise FedPFTError(
                f"row {missing[0]} of {split} has no {column} ({len(missing)} such "
                "rows); fill it or leave it out"
            )
        part = _cast(part, column)
    return part


_INPUTS = {"text": Value("string"), "text_pair": Value("string"), "image": Image()}


def _cast(part: Dataset, column: str) -> Dataset:
    wanted = _INPUTS.get(column)
    if wanted is None or part.features[column] == wanted:
        return part
    try:
        return part.cast_column(column, wanted)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise FedPFTError(
            f"column for {column} holds {part.features[column]}, which is no {column}; "
            "name another column"
        ) from error


def _labelled(part: Dataset, names: Sequence[str], split: str) -> Dataset:
    """Turn the label column into indices of `names`."""
    feature, values = part.features["label"], part["label"]
    places = {name: i for i, name in enumerate(names)}
    if isinstance(feature, ClassLabel):
        texts = [feature.names[v] if v >= 0 else str(v) for v in values]
    else:
        texts = [str(value) for value in values]
    outside = sorted(set(texts) - places.keys())
    if outside:
        raise FedPFTError(
            f"label {outside[0]!r} in {split} is outside the label set "
            f"({', '.join(names)}); mend the data or set data.labels"
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


def _sample(rows: Dataset, most: int, seed: int, purpose: str) -> Dataset:
    if not most or len(rows) <= most:
        return rows
    generator = np.random.default_rng(derive_seed(seed, "sample", purpose))
    return rows.select(sorted(generator.permutation(len(rows))[:most].tolist()))
