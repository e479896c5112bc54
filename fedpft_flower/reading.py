"""Read rows from files, directories and hubs, and the labels in their columns."""

import csv
import glob
import gzip
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
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
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from fedpft_flower.config import FedPFTError, Modality, OwnRowsError, first_line
from fedpft_flower.disk import existing_path, private_cache, reachable_path

logger = logging.getLogger(__name__)

Splits = Mapping[str, Dataset]
Row = Mapping[str, Any]
T = TypeVar("T")

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",  # a row a line, in the column `text`
}
# Of a JSON Lines file that `datasets` reads at once: a column has one type in them.
JSON_BYTES = 1 << 28
# Rows of a streamed data set that a sample is drawn from.
BUFFER = 5000
_TABLES = {*_FORMATS, ".arrow"} - {".txt"}  # which in a directory may say anything


def read_splits(
    path: str,
    key: str,
    modality: Modality = "text",
    subset: str = "",
    separator: str = ",",
    hub: bool = True,
) -> Splits:
    """Return the splits of a file, a directory or a hub data set, by name.

    Args:
        path: where the rows are.
        key: the setting that says so, for messages.
        modality: of the inputs; directories of images have a class per folder.
        subset: the configuration of a hub data set, or "" (a copy of one has it too).
        separator: of the columns of CSV files.
        hub: whether a hub may be asked for what is not here.

    Raises:
        FedPFTError: there is nothing that `datasets` reads.
    """
    try:
        place = reachable_path(path)
    except PermissionError as error:
        why = "lies where the user that runs this may not look; let that user in"
        raise OwnRowsError(f"{key} = {path!r} {why}", f"{key} {why}") from error
    with _named(path, key, place):
        if place is not None and place.is_file():
            return _read_file(place, separator)
        if place is not None:
            return _read_directory(place, modality, subset, separator)
        if not (hub and is_on_hub(path)):
            remedy = "does not exist; give a path or hub name"
            raise OwnRowsError(f"{key} = {path!r} {remedy}", f"{key} {remedy}")
        return _read_hub(path, subset)


def is_on_hub(path: str) -> bool:
    """Tell whether a path is read from a hub: there is no such file or directory."""
    return existing_path(path) is None and not _looks_like_path(path)


def read_sample(
    path: str,
    key: str,
    subset: str,
    split: str,
    seed: int,
    enough: Callable[[Iterator[Row]], Iterator[Row]],
) -> Dataset:
    """Return some rows of a hub data set, without fetching it whole.

    Shards are read in a random order, and rows drawn from a buffer of some thousands.

    Args:
        path: the hub name.
        key: the setting that says so, for messages.
        subset: the configuration of the data set, or "".
        split: which one.
        seed: of the choice.
        enough: ends the stream of rows where there are enough.

    Raises:
        FedPFTError: there is nothing that `datasets` reads, or no such split.
    """
    with _named(path, key, None):
        stream = load_dataset(path, subset or None, split=split, streaming=True)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, Image):  # as its bytes, not as its pixels
                stream = stream.cast_column(column, Image(decode=False))
        stream = stream.shuffle(seed=seed % 2**32, buffer_size=BUFFER)
        rows = list(enough(iter(stream)))
    return Dataset.from_list(rows, features=stream.features)


@contextmanager
def _named(path: str, key: str, place: Path | None) -> Iterator[None]:
    """Let errors of reading name the setting, the path and a remedy."""
    try:
        with _quiet():
            yield
    except FedPFTError as error:
        if place is None:
            raise
        told = error.told if isinstance(error, OwnRowsError) else str(error)
        raise OwnRowsError(f"{key} = {path!r}: {error}", f"{key}: {told}") from None
    except Exception as error:  # datasets raises many kinds, all about this one path
        what = "cannot be read" if place else "is no path here, and the hub has it not"
        raise OwnRowsError(
            f"{key} = {path!r} {what} ({_reason(error)})",
            f"{key} {what}; this node's log says more",
        ) from error


def _looks_like_path(path: str) -> bool:
    """Tell a path from a hub name, which is `name` or `owner/name`."""
    suffix = _suffix(Path(path))
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or suffix in _TABLES


# How a table is called that holds a split, or a shard of one.
_SPLIT_FILE = re.compile(
    r"(?P<name>(?P<role>train|training|validation|valid|val|dev|test|testing|eval)"
    r"([-_.][a-z]+)*)([-_.]?[0-9]+(-of-[0-9]+)?)?"
)
_SYNONYMS = {
    "training": "train",
    **dict.fromkeys(("valid", "val", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval"), "test"),
}


def _suffix(path: Path) -> str:
    """Return what tells the format of a file; of a packed one (.gz) what is before."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(place: Path, separator: str) -> Splits:
    if _suffix(place) not in _FORMATS:
        raise FedPFTError(
            f"unknown file type {_suffix(place)!r}; give one of {', '.join(_FORMATS)}"
        )
    return {"train": _read_tables([place], separator, _quotes_are_signs([place]))}


def _read_tables(files: Sequence[Path], separator: str, literal: bool) -> Dataset:
    """Read files of one type that hold the rows of one split.

    Args:
        files: of one type.
        separator: of the columns of CSV files.
        literal: whether quotes are signs like others.
    """
    suffix = _suffix(files[0])
    rows: Dataset = load_dataset(
        _FORMATS[suffix],
        data_files={"train": list(map(str, files))},
        split="train",
        cache_dir=str(private_cache("rows")),
        **_options(files, separator, literal),
    )
    return _with_numbers(rows) if _FORMATS[suffix] == "csv" else rows


def _options(files: Sequence[Path], separator: str, literal: bool) -> dict[str, Any]:
    """Return how these files are read; CSV as texts, all with the first one's columns.

    Raises:
        FedPFTError: rows have more fields than the header.
    """
    suffixes = {_suffix(file) for file in files}
    formats = {_FORMATS.get(suffix) for suffix in suffixes}
    if formats == {"json"}:
        return {"chunksize": JSON_BYTES}
    if formats != {"csv"}:
        return {}
    # Words such as NA and None are texts and labels like others.
    options: dict[str, Any] = {
        "na_filter": False,
        "sep": "\t" if suffixes == {".tsv"} else separator,
    }
    if literal:
        options["quoting"] = csv.QUOTE_NONE
    head = pd.read_csv(files[0], nrows=1, dtype=str, **options)
    if len(head) and not isinstance(head.index, pd.RangeIndex):
        raise FedPFTError(
            "rows have more fields than the header; quote texts, or set data.separator"
        )
    # `datasets` would fix each column's type by the first rows, and fail at others.
    columns = Features({str(column): Value("string") for column in head.columns})
    return {**options, "features": columns}


def _quotes_are_signs(files: Sequence[Path]) -> bool:
    """Tell whether quotes in TSV files are signs like others, and hold no field."""
    tsv = [file for file in files if _suffix(file) == ".tsv"]
    return len(tsv) == len(files) and any(map(_has_bare_quotes, tsv))


def _has_bare_quotes(file: Path) -> bool:
    """Tell whether quotes would join lines of a TSV file that are rows each.

    They are where every line has as many tabs, and some.
    """
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="") as lines:
        tabs = [line.count("\t") for line in lines if line.strip("\r\n")]
    if len(set(tabs)) != 1 or not tabs[0]:
        return False
    with opened(file, "rt", encoding="utf-8", newline="") as lines:
        rows, count = csv.reader(lines, delimiter="\t"), 0
        try:
            for row in rows:
                count += bool(row)
        except csv.Error:  # a field is too long for it: does it go over lines?
            return rows.line_num > count + 1
    return count < len(tabs)


def _with_numbers(rows: Dataset) -> Dataset:
    """Make numbers of the columns of a CSV file in which every row has one."""
    names = rows.column_names
    for column in names:
        texts = rows.data.column(column)
        for kind in ("int64", "float64"):
            with suppress(pa.ArrowInvalid):
                numbers = pc.cast(texts, kind).to_numpy()
                # These alone are in memory; a cast would write all columns anew.
                rows = rows.remove_columns(column).add_column(column, numbers)
                break
    return rows.select_columns(names)


def _read_directory(
    place: Path, modality: Modality, subset: str, separator: str
) -> Splits:
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        saved: Dataset | DatasetDict = load_from_disk(str(place))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    cache = str(private_cache("rows"))
    found = list(place.rglob("*"))
    tables = sorted(path for path in found if _suffix(path) in _TABLES)
    if modality == "image" and not tables:
        return _read_images(place, found, cache)
    if _is_described(place):  # else a hub's subset, as of the run, means nothing here
        described: Splits = load_dataset(str(place), subset or None, cache_dir=cache)
        return described
    literal = _quotes_are_signs(tables)
    if splits := _split_files(place, tables, modality):
        return {
            name: _read_tables(ones, separator, literal)
            for name, ones in splits.items()
        }
    suffixes = {_suffix(path) for path in found if path.is_file()}
    # Texts beside tables, a licence perhaps, leave it to `datasets` what is what.
    known = {suffix: _FORMATS[suffix] for suffix in _FORMATS.keys() & _TABLES}
    formats = {known.get(suffix) for suffix in suffixes - {".md", ""}}
    options = {} if None in formats else _options(tables, separator, literal)
    rows: Splits = load_dataset(str(place), cache_dir=cache, **options)
    if formats != {"csv"}:
        return rows
    return {name: _with_numbers(part) for name, part in rows.items()}


def _read_images(place: Path, found: Sequence[Path], cache: str) -> Splits:
    """Return the splits of a directory of images, labelled by their folders.

    In the layout CLASS/images/FILE, as Tiny-ImageNet has it, the class is the folder
    above. A split without a class that there is to train on (all its images in one
    folder, perhaps) has no labels and is left out.
    """
    splits = _image_splits(place, found)
    read = _read_image_folders(place, splits, cache)
    above = all(part.features["label"].names == ["images"] for part in read.values())
    folders = {
        split: [
            (path.parent.parent if above else path.parent).name
            for image in part.cast_column("image", Image(decode=False))["image"][:]
            if (path := Path(image["path"]))
        ]
        for split, part in read.items()
    }
    most = max(len(set(names)) for names in folders.values())
    classed = {s for s, names in folders.items() if len(set(names)) > 1 or most == 1}
    if learnt := set(folders.get("train", ())):
        classed = {s for s, names in folders.items() if learnt & set(names)}
    for split in folders.keys() - classed:
        logger.warning(
            "%s: split %r has no folder for each class: left out", place, split
        )
    if not above and classed == read.keys():
        return read
    label = ClassLabel(names=sorted({n for s in classed for n in folders[s]}))
    return {
        split: read[split]
        .remove_columns("label")
        .add_column("label", label.str2int(folders[split]))
        .cast_column("label", label)
        for split in read
        if split in classed
    }


def _read_image_folders(
    place: Path, splits: Mapping[str, list[str]] | None, cache: str
) -> Splits:
    """Return images labelled by their folders, a single one too: a site's, perhaps."""
    # Under keys of its own, since not every name of a split is one to `datasets`.
    keys = {f"s{i}": split for i, split in enumerate(splits or ())}
    read: Splits = load_dataset(
        "imagefolder",
        data_dir=str(place),
        data_files={key: splits[split] for key, split in keys.items()}
        if splits
        else None,
        drop_labels=False,
        cache_dir=cache,
    )
    return {keys.get(key, key): part for key, part in read.items()}


def _image_splits(place: Path, found: Sequence[Path]) -> dict[str, list[str]] | None:
    """Return split -> patterns of the files of a directory of images.

    Folders at the top are splits where one to train on has classes below, or where all
    are called so; else everything is one: by itself `datasets` takes a class called
    "train", or a file called "test.jpg", for a split. None where there are no images
    but archives, perhaps: it looks into them.

    Raises:
        FedPFTError: every class has folders of splits, which nothing here reads.
    """
    files = [
        path
        for path in (path.relative_to(place) for path in found)
        if path.suffix.lower() in ImageFolder.EXTENSIONS
        and not any(part.startswith((".", "__")) for part in path.parts)
    ]
    if not files:
        return None
    base = _shared_folder(files)
    below = [path.relative_to(base) for path in files]
    tops = {path.parts[0] if len(path.parts) > 1 else "" for path in below}
    classed = {path.parts[0] for path in below if len(_folders(path)) > 1}
    named = {top for top in tops if _SPLIT_FILE.fullmatch(top.lower())}
    if named == tops or "train" in _by_split((top, top) for top in named & classed):
        for top in sorted(tops - named):
            what = place / base / top if top else f"images at the top of {place / base}"
            logger.warning("%s: called like no split: left out", what)
        return _by_split(
            (top, (glob.escape(str(base / top)) + "/**")) for top in sorted(named)
        )
    parents = {path.parent.name for path in below}
    if len(tops) > 1 and _by_split((name, name) for name in parents):
        raise FedPFTError(
            f"images lie in CLASS/SPLIT, as in {files[0].parent}; put them into "
            "SPLIT/CLASS"
        )
    return {"train": ["**"]}


def _folders(file: Path) -> tuple[str, ...]:
    """Return the folders that a file is in, but for one called `images` around it."""
    folders = file.parent.parts
    return folders[:-1] if folders[-1:] == ("images",) else folders


def _shared_folder(files: Sequence[Path]) -> Path:
    """Return the folder that all files are in, above what is called like a split."""
    shared = Path(os.path.commonpath([file.parent for file in files]))
    for place, part in enumerate(shared.parts):
        if _SPLIT_FILE.fullmatch(part.lower()):
            return Path(*shared.parts[:place])
    return shared


def _is_described(place: Path) -> bool:
    """Tell whether a directory says itself which files are what, as hubs have them."""
    card = place / "README.md"
    told = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return (
        "\nconfigs:" in told
        or "\ndataset_info:" in told
        or (place / "dataset_infos.json").is_file()
    )


def _split_files(
    place: Path, tables: Sequence[Path], modality: Modality
) -> dict[str, list[Path]]:
    """Return split -> files of a directory whose every table is named by its split.

    `datasets` takes such tables for one table, so they would need equal columns, and
    `validation_matched` and `validation_mismatched` would be one split. Where there is
    one to train on, a table called otherwise, a sample to submit perhaps, is left out.
    """
    named = [
        (Path(path.name.lower().removesuffix(".gz")).stem, path) for path in tables
    ]
    if any(path.parent != place for path in tables):
        return {}
    others = [pair for pair in named if not _SPLIT_FILE.fullmatch(pair[0])]
    if "train" not in _by_split(pair for pair in named if pair not in others):
        others = []
    used = [pair for pair in named if pair not in others]
    suffixes = {_suffix(path) for _, path in used}
    known = {".parquet"} if modality == "image" else _FORMATS.keys()
    if len(suffixes) != 1 or not suffixes <= known:
        return {}
    for _, path in others:
        logger.warning("%s is called like no split: left out", path)
    return _by_split(used)


def _by_split(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Return split -> what is called so; nothing where a name is none of a split.

    Several names of one role to evaluate are several splits.
    """
    roles: dict[str, dict[str, list[T]]] = {}
    for called, one in named:
        match = _SPLIT_FILE.fullmatch(called.lower())
        if match is None:
            return {}
        role = _SYNONYMS.get(match["role"], match["role"])
        name = role if match["name"] == match["role"] else match["name"]
        roles.setdefault(role, {}).setdefault(name, []).append(one)
    splits: dict[str, list[T]] = {}
    for role, by_name in roles.items():
        if role == "train" or len(by_name) == 1:
            splits[role] = [one for ones in by_name.values() for one in ones]
        else:
            splits |= by_name
    return splits


def _read_hub(name: str, subset: str) -> Splits:
    # Here, since a node with rows of its own needs neither this package nor its plots.
    from flwr_datasets import FederatedDataset

    hub = FederatedDataset(
        dataset=name, subset=subset or None, partitioners={}, shuffle=False
    )
    splits = get_dataset_split_names(name, subset or None)
    return {split: hub.load_split(split) for split in splits}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from logging what is then raised."""
    logger = logging.getLogger("datasets")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: BaseException) -> str:
    """Return the first line of the error at the bottom, and what may help."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    if isinstance(error, UnicodeDecodeError):
        return f"{line}; save it as UTF-8"
    if "Error tokenizing" in line:
        return f"{line}; quote texts, or set data.separator"
    if "cast" in line or "as a scalar" in line:
        return f"{line}; a column changes its type: give it one, or leave it out"
    if "no data" in line or "EmptyData" in type(error).__name__:
        return f"{line}; it has no rows"
    return f"{line}; give a directory, file or hub name that `datasets` reads"


# ------------------------------------------------------------------- columns, labels


def choose_columns(
    part: Dataset, wanted: Mapping[str, str], settings: Mapping[str, str]
) -> Dataset:
    """Return the wanted columns under the names of their roles.

    Args:
        part: rows.
        wanted: role -> column.
        settings: role -> the setting that names it, for messages.

    Raises:
        FedPFTError: a column is not there, or named twice.
    """
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


def complete_rows(part: Dataset, split: str) -> Dataset:
    """Give inputs the type that encoding needs.

    Rows with the class -1 are left out: so `datasets` marks those without a label.

    Raises:
        FedPFTError: a value is missing or of a type that does not fit.
    """
    if isinstance(part.features.get("label"), ClassLabel):
        part = _with_class(part, split)
    for column in part.column_names:
        missing = _missing(part, column)
        if missing:
            raise FedPFTError(
                f"row {missing[0]} (counted from 0) of {split} has no {column} "
                f"({len(missing)} such rows); fill it or leave it out"
            )
        part = cast_input(part, column)
    return part


def _with_class(part: Dataset, split: str) -> Dataset:
    """Leave out the rows with the class -1, unless that are all."""
    labels = part["label"][:]
    there = [i for i, one in enumerate(labels) if one is None or one >= 0]
    if not 0 < len(there) < len(part):
        return part
    lacking = len(part) - len(there)
    logger.warning("%d rows of %s have no label (-1): left out", lacking, split)
    return part.select(there)


def _missing(part: Dataset, column: str) -> list[int]:
    values = _column(part, column)
    gone = values.is_null(nan_is_null=True).to_numpy()
    if column == "label" and part.features[column] in _TEXTS:
        texts = part[column][:]  # one may be null
        gone |= np.array([not (text or "").strip() for text in texts], dtype=bool)
    missing: list[int] = gone.nonzero()[0].tolist()
    return missing


_TEXTS = (Value("string"), Value("large_string"))
TEXT_ROLES = ("text", "text_pair", "prompt", "response")
_INPUTS = {**dict.fromkeys(TEXT_ROLES, Value("string")), "image": Image()}


def cast_input(part: Dataset, column: str) -> Dataset:
    """Give an input column the type that encoding needs; leave others as they are.

    Raises:
        FedPFTError: its values cannot become that.
    """
    wanted = _INPUTS.get(column)
    if wanted is None or part.features[column] == wanted:
        return part
    try:
        return part.cast_column(column, wanted)
    except (TypeError, ValueError, pa.ArrowException) as error:
        held = part.features[column]  # of labels it has the names
        what, remedy = (
            f"column for {column} holds",
            f"which is no {column}; name another",
        )
        raise OwnRowsError(
            f"{what} {held}, {remedy} column",
            f"{what} {type(held).__name__}, {remedy} column",
        ) from error


def with_texts(part: Dataset, columns: Sequence[str]) -> Dataset:
    """Leave out rows where one of these texts is missing or blank.

    They are looked at chunk by chunk, and none becomes a Python object: the corpus may
    be larger than the memory.
    """
    full = np.ones(len(part), dtype=bool)
    for column in columns:
        at = 0
        for texts in _column(part, column).chunks:
            long = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
            full[at : at + len(texts)] &= np.array(pc.fill_null(long, False))
            at += len(texts)
    return part.select(np.flatnonzero(full))


def texts_in_common(part: Dataset, others: Sequence[Dataset]) -> np.ndarray:
    """Tell which rows have the same inputs as a row of others.

    Args:
        part: rows of texts.
        others: rows with the same columns of texts, or more.

    Returns:
        Booleans [rows].
    """
    columns = [name for name in TEXT_ROLES if name in part.column_names]
    common = np.zeros(len(part), dtype=bool)
    at = 0
    for own in _joined(part, columns):
        there = common[at : at + len(own)]
        for rows in others:
            for known in _joined(rows, columns):
                there |= np.array(pc.is_in(own, value_set=known))
        at += len(own)
    return common


def _joined(rows: Dataset, columns: Sequence[str]) -> Iterator[pa.Array]:
    """Yield the texts of each row in one, some rows at a time."""
    for table in rows.select_columns(list(columns)).with_format("arrow").iter(10_000):
        texts = [pc.cast(table.column(name), pa.string()) for name in columns]
        yield pc.binary_join_element_wise(*texts, "\0").combine_chunks()


def _column(part: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column as Arrow has it, of the rows that were selected."""
    if part._indices is None:
        return part.data.column(name)
    return part.select_columns([name]).with_format("arrow")[:].column(name)


_INTEGER = re.compile(r"-?[0-9]+")
_NUMBERS = re.compile("u?int|float")  # types of columns


def labels_of(part: Dataset, column: str, named: str = "") -> tuple[str, ...]:
    """Return the different labels of a column, numbers in their order, texts in theirs.

    Args:
        part: rows.
        column: with the labels.
        named: what the data calls it, where that differs.

    Raises:
        FedPFTError: the column holds no labels.
    """
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    named = named or column
    values = [v for v in _different(part, column, named) if v is not None]
    if any(isinstance(v, float) and not v.is_integer() for v in values):
        raise FedPFTError(
            f"data.label-column = {named!r} holds fractions such as "
            f"{next(v for v in values if not float(v).is_integer())!r}, which are no "
            "classes; name another column, or list them in data.labels"
        )
    return in_order({label_text(value) for value in values})


def in_order(labels: Collection[str]) -> tuple[str, ...]:
    """Return labels in the order of the label set: by number where all are numbers."""
    numbers = all(_INTEGER.fullmatch(label) for label in labels)
    if not numbers:
        return tuple(sorted(labels))
    # Texts such as "1" and "01" are two labels, in an order that every process finds.
    return tuple(sorted(labels, key=lambda label: (int(label), label)))


def has_labels(part: Dataset, column: str) -> bool:
    """Tell a labelled split from one whose labels are withheld: all -1, null, blank."""
    if column not in part.column_names:
        return False
    return any(
        str(one).strip() for one in set(_different(part, column, column)) - {-1, None}
    )


def has_texts(part: Dataset, column: str) -> bool:
    """Tell a split with texts from one whose texts are withheld: all null, blank."""
    if column not in part.column_names or part.features[column] == Value("null"):
        return False
    return part.features[column] not in _TEXTS or bool(len(with_texts(part, [column])))


def label_texts(part: Dataset, column: str) -> list[str]:
    """Return the label of every row, as the label set writes it."""
    feature, values = part.features[column], part[column][:]
    if isinstance(feature, ClassLabel):
        return [feature.names[v] if v >= 0 else str(v) for v in values]
    return [label_text(value) for value in values]


def configured_label(name: str, part: Dataset, column: str) -> str:
    """Write a label that a configuration names as `label_texts` writes it: 1.0 as 1."""
    kind = getattr(part.features[column], "dtype", "")
    if isinstance(part.features[column], ClassLabel) or not _NUMBERS.match(kind):
        return name
    if _INTEGER.fullmatch(name):
        return str(int(name))
    try:
        return label_text(float(name))
    except ValueError:  # no number: True, or a mistake
        return name


def label_text(value: Any) -> str:
    """Write a label as text; whole numbers alike, whether read as 1 or as 1.0."""
    whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return str(int(value)) if whole else str(value)


def _different(part: Dataset, column: str, named: str) -> Iterable[Any]:
    try:
        return list(part.unique(column))
    except (TypeError, pa.ArrowException) as error:
        raise FedPFTError(
            f"data.label-column = {named!r} holds {part.features[column]}; name a "
            "column of texts or numbers"
        ) from error
