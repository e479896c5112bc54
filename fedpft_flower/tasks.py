"""Load, split, partition and encode the data of a task.

A task is a row of `TASKS`. Loaded rows have the columns `text` (and `text_pair`) or
`image`, and `label` as an index into the label set.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset,
)
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

from fedpft_flower.activity import Batch
from fedpft_flower.architectures import Modality
from fedpft_flower.config import (
    DataConfig,
    FedPFTError,
    PartitionConfig,
    derive_seed,
    names_in,
)
from fedpft_flower.docstrings import LIBRARIES, load_docstrings

HELD_OUT = 0.1  # share of the training rows that replaces a missing split


@dataclass(frozen=True)
class TaskData:
    """Hold the splits of a task; `notes` says where each one comes from."""

    train: Dataset
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


class Rows(Protocol):
    """Encode rows of a data set as batches of model inputs."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def lengths(self) -> list[int]:
        """Return what each row costs, to put similar ones into one batch."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return model inputs of these rows, with `labels` [B] where rows have them."""
        ...


# ------------------------------------------------------------------------- loading


@lru_cache(maxsize=2)
def load_task(config: DataConfig, seed: int) -> TaskData:
    """Load the splits of a task; cached by content, since workers are reused.

    Raises:
        FedPFTError: an unknown task, unreadable data, a missing column or split, or a
            label outside the set.
    """
    data = task_of(config.task).load(config, seed)
    train = data.train
    if config.min_words and "text" in train.column_names:
        long = [len(text.split()) >= config.min_words for text in train["text"]]
        train = train.select(np.flatnonzero(long))
    if not len(train):
        raise FedPFTError(
            f"data.min-words = {config.min_words} leaves no training row; lower it"
        )
    return TaskData(
        train=_sample(train, config.max_train_rows, seed, "train"),
        validation=_sample(
            data.validation, config.max_validation_rows, seed, "validation"
        ),
        test=_sample(data.test, config.max_test_rows, seed, "test"),
        labels=data.labels,
        notes=data.notes,
    )


def load_public(config: DataConfig, seed: int) -> Dataset:
    """Load the public, unlabelled rows that align the sub-FM.

    Raises:
        FedPFTError: there is no public corpus, or it cannot be read.
    """
    task = task_of(config.task)
    if config.public_path:
        source = _read(config.public_path, "data.public-path")
        split = _split(source, config.public_split, "data.public-split")
        kind = "image" if task.modality == "image" else "text"
        column = config.public_column or kind
        public = _cast(_columns(split, {kind: column}, "data.public-column"), kind)
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


def _load_text(config: DataConfig, seed: int) -> TaskData:
    columns = names_in(config.text_columns)
    if not 1 <= len(columns) <= 2:
        raise FedPFTError(
            f"data.text-columns = {config.text_columns!r}; name one column, or two "
            "separated by a comma for pairs"
        )
    wanted = dict(zip(("text", "text_pair"), columns, strict=False))
    return _load_own(config, seed, wanted, "data.text-columns")


def _load_images(config: DataConfig, seed: int) -> TaskData:
    return _load_own(config, seed, {"image": config.image_column}, "data.image-column")


def _load_own(
    config: DataConfig, seed: int, inputs: dict[str, str], key: str
) -> TaskData:
    """Load splits of the user's own data; a missing one is a seeded part of train.

    Without a test split, `validation` becomes the test set; what is then missing is
    held out from train.
    """
    if not config.path:
        raise FedPFTError(
            f"data.task = {config.task!r} needs data.path: a directory, a file, or a "
            "hub name"
        )
    source = _read(config.path, "data.path")
    columns = {**inputs, "label": config.label_column}
    train = _split(source, config.train_split, "data.train-split")
    parts = {"train": _typed(_columns(train, columns, key), config.train_split)}
    names = _label_names(parts["train"], config)
    notes = {"train": config.train_split}
    for role, split in (
        ("test", config.test_split),
        ("validation", config.validation_split),
    ):
        if split != role:  # asked for by name: it must be there
            _split(source, split, f"data.{role}-split")
        if split in source and _has_labels(source[split], config.label_column):
            parts[role] = _typed(_columns(source[split], columns, key), split)
            notes[role] = split
    if "test" not in parts and "validation" in parts:
        parts["test"], notes["test"] = parts.pop("validation"), notes.pop("validation")
    for role in ("test", "validation"):
        if role not in parts:
            parts["train"], parts[role] = _hold_out(parts["train"], seed, role)
            notes[role] = f"{HELD_OUT:.0%} of {config.train_split}, seeded"
    ready = {r: _labelled(part, names, notes[r]) for r, part in parts.items()}
    return TaskData(**ready, labels=names, notes=notes)


TASKS: dict[str, Task] = {
    "docstrings": Task("text", _load_docstrings, _public_docstrings),
    "digits": Task("image", _load_digits, _public_digits),
    "text": Task("text", _load_text),
    "image": Task("image", _load_images),
}

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def _read(path: str, key: str) -> DatasetDict:
    try:
        place = Path(path).expanduser()
        if place.is_file():
            if place.suffix not in _FORMATS:
                raise FedPFTError(
                    f"{key} = {path!r}: unknown file type {place.suffix!r}; give one "
                    f"of {', '.join(_FORMATS)}"
                )
            files = {"train": str(place)}
            return load_dataset(_FORMATS[place.suffix], data_files=files)
        if not place.is_dir() and (place.is_absolute() or path.startswith((".", "~"))):
            raise FedPFTError(
                f"{key} = {path!r} does not exist; give a path or hub name"
            )
        return load_dataset(str(place) if place.is_dir() else path)
    except FedPFTError:
        raise
    except Exception as error:  # datasets raises many kinds, all about this one path
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FedPFTError(
            f"{key} = {path!r} cannot be read by `datasets` ({reason}); give a "
            "directory, file or hub name that load_dataset reads"
        ) from error


def _split(source: DatasetDict, name: str, key: str) -> Dataset:
    if name not in source:
        raise FedPFTError(f"{key} = {name!r}; this data has {', '.join(source)}")
    return source[name]


def _columns(part: Dataset, wanted: dict[str, str], key: str) -> Dataset:
    for role, column in wanted.items():
        if column not in part.column_names:
            setting = "data.label-column" if role == "label" else key
            raise FedPFTError(
                f"{setting}: no column {column!r}; this data has "
                f"{', '.join(part.column_names)}"
            )
    names = list(wanted.values())
    if len(set(names)) < len(names):
        raise FedPFTError(f"{key} and data.label-column name one column twice: {names}")
    chosen = part.select_columns(names)
    return chosen.rename_columns({c: r for r, c in wanted.items() if c != r})


def _label_names(train: Dataset, config: DataConfig) -> tuple[str, ...]:
    feature = train.features["label"]
    if config.labels:
        names = names_in(config.labels)
    elif isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    else:
        try:
            names = tuple(str(value) for value in sorted(train.unique("label")))
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


def _labelled(part: Dataset, names: tuple[str, ...], split: str) -> Dataset:
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


def _hold_out(train: Dataset, seed: int, role: str) -> tuple[Dataset, Dataset]:
    if len(train) < 2 / HELD_OUT:
        raise FedPFTError(
            f"{len(train)} training rows are too few to hold out a {role} split; give "
            f"one with data.{role}-split"
        )
    parts = train.train_test_split(HELD_OUT, seed=derive_seed(seed, role) % 2**32)
    return parts["train"], parts["test"]


def _sample(rows: Dataset, most: int, seed: int, purpose: str) -> Dataset:
    if not most or len(rows) <= most:
        return rows
    generator = np.random.default_rng(derive_seed(seed, "sample", purpose))
    return rows.select(sorted(generator.permutation(len(rows))[:most].tolist()))


# -------------------------------------------------------------------- partitioning


@lru_cache(maxsize=2)
def _partitioner(
    data: DataConfig, partition: PartitionConfig, count: int, seed: int
) -> DirichletPartitioner | IidPartitioner:
    train = load_task(data, seed).train
    if len(train) < count:
        raise FedPFTError(
            f"{len(train)} training rows for {count} nodes leave an empty partition; "
            "use fewer nodes or more rows"
        )
    rows = derive_seed(seed, "partition") % 2**32
    if partition.kind == "iid":
        chosen = IidPartitioner(count)
        chosen.dataset = train.shuffle(seed=rows)
        return chosen
    chosen = DirichletPartitioner(
        num_partitions=count,
        partition_by="label",
        alpha=partition.alpha,
        # Small enough that a draw meets it even with strong skew; never empty.
        min_partition_size=max(1, min(10, len(train) // (10 * count))),
        self_balancing=False,
        seed=rows,
    )
    chosen.dataset = train
    return chosen


def load_partition(
    data: DataConfig, partition: PartitionConfig, index: int, count: int, seed: int
) -> Dataset:
    """Return the training rows of virtual client `index` of `count`.

    Raises:
        FedPFTError: a partition would be empty.
    """
    try:
        part = _partitioner(data, partition, count, seed).load_partition(index)
    except ValueError as error:
        raise FedPFTError(
            f"partition.kind = {partition.kind!r} with alpha {partition.alpha} leaves "
            f"an empty partition among {count} nodes; raise partition.alpha or use "
            "fewer nodes"
        ) from error
    if not len(part):
        raise FedPFTError(f"partition {index} of {count} is empty; use fewer nodes")
    return part


# ------------------------------------------------------------------------ encoding


class TextRows:
    """Encode texts by the FM's tokenizer, once; batches are padded dynamically."""

    def __init__(self, rows: Dataset, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        pair = (list(rows["text_pair"]),) if "text_pair" in rows.column_names else ()
        longest = min(max_length, tokenizer.model_max_length)
        encoded = tokenizer(
            list(rows["text"]), *pair, truncation=True, max_length=longest
        )
        self._features = dict(encoded)
        labelled = "label" in rows.column_names
        self._labels = torch.tensor(rows["label"][:]) if labelled else None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._features["input_ids"])

    def lengths(self) -> list[int]:
        """Return the number of tokens of every row."""
        return [len(ids) for ids in self._features["input_ids"]]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return padded inputs [B, T] and `labels` [B]."""
        chosen = {k: [v[i] for i in indices] for k, v in self._features.items()}
        batch: Batch = dict(self._tokenizer.pad(chosen, return_tensors="pt"))
        if self._labels is not None:
            batch["labels"] = self._labels[list(indices)]
        return batch


class ImageRows:
    """Encode images by the FM's own image processor, when a batch asks for them."""

    def __init__(self, rows: Dataset, processor: Any, max_length: int) -> None:
        self._rows, self._processor = rows, processor
        labelled = "label" in rows.column_names
        self._labels = torch.tensor(rows["label"][:]) if labelled else None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def lengths(self) -> list[int]:
        """Return 1 for every row: images of one model have one size."""
        return [1] * len(self)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return `pixel_values` [B, channels, height, width] and `labels` [B]."""
        images = _images(self._rows, indices)
        batch: Batch = dict(self._processor(images, return_tensors="pt"))
        if self._labels is not None:
            batch["labels"] = self._labels[list(indices)]
        return batch


_ENCODERS: dict[Modality, Any] = {"text": TextRows, "image": ImageRows}


def encode(rows: Dataset, processor: Any, modality: Modality, max_length: int) -> Rows:
    """Encode rows for a model of this modality."""
    encoded: Rows = _ENCODERS[modality](rows, processor, max_length)
    return encoded


def shuffled_batches(rows: Rows, size: int, seed: int) -> Iterator[Batch]:
    """Yield one epoch of shuffled batches; the last one may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    for start in range(0, len(order), size):
        yield rows.batch(order[start : start + size])


def endless_batches(rows: Rows, size: int, seed: int) -> Iterator[Batch]:
    """Yield shuffled batches for ever, each epoch in another order."""
    epoch = 0
    while True:
        yield from shuffled_batches(rows, size, derive_seed(seed, "epoch", epoch))
        epoch += 1


def content_hash(rows: Dataset) -> str:
    """Return the SHA-256 of a data set's rows; images count by their file's bytes."""
    digest = hashlib.sha256(json.dumps(sorted(rows.column_names)).encode())
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for row in batch.select(sorted(batch.column_names)).to_pylist():
            image = row.get("image")
            if isinstance(image, dict):
                row["image"] = image["bytes"] or Path(image["path"]).read_bytes()
            digest.update(repr(row).encode())
    return digest.hexdigest()


def check_images(rows: Dataset) -> None:
    """Decode every image of a data set once, so that a broken one is found early.

    Raises:
        FedPFTError: an image cannot be decoded.
    """
    if "image" in rows.column_names:
        for i in range(len(rows)):
            _images(rows, [i])


def _images(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    try:
        return [image.convert("RGB") for image in rows[list(indices)]["image"]]
    except (OSError, ValueError, AttributeError) as error:  # not an image, or cut
        raise FedPFTError(
            f"an image of rows {list(indices)[:3]} cannot be decoded: {error}"
        ) from error
