"""Read rows from files, directories and hubs."""

import csv
import glob
import gzip
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    Image,
    Value,
    disable_caching,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.table import InMemoryTable

from fedpft_flower.config import FedPFTError, OwnRowsError, first_line
from fedpft_flower.disk import (
    OUT_OF_REACH,
    existing_path,
    private_cache,
    reachable_path,
)
from fedpft_flower.image_folders import read_image_folders
from fedpft_flower.splits import SPLIT_NAME, Splits, by_split, split_in

# Else a data set that `datasets` saved would get files of what is made of it, where it
# may lie for reading alone.
disable_caching()

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

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
_HIDDEN = (".", "__")  # what names of files and folders begin with that are no rows
_TEXTS = (Value("string"), Value("large_string"))


def read_splits(
    path: str,
    key: str,
    images: str = "",
    subset: str = "",
    separator: str = ",",
    hub: bool = True,
) -> Splits:
    """Return the splits of a file, a directory or a hub data set, by name.

    Args:
        path: where the rows are.
        key: the setting that says so, for messages.
        images: the column of images; "" where inputs are texts. A directory of images
            without a table that has it has a class per folder.
        subset: the configuration of a hub data set, or "" (a copy of one has it too).
        separator: of the columns of CSV files.
        hub: whether a hub may be asked for what is not here.

    Raises:
        FedPFTError: there is nothing that `datasets` reads.
    """
    try:
        place = reachable_path(path)
    except PermissionError as error:
        raise OwnRowsError(
            f"{key} = {path!r} {OUT_OF_REACH}", f"{key} {OUT_OF_REACH}"
        ) from error
    with _named(path, key, place):
        if place is not None and place.is_file():
            return _read_file(place, images, separator)
        if place is not None:
            return _read_directory(place, images, subset, separator)
        if not (hub and is_on_hub(path)):
            remedy = (
                "does not exist; give a path, a whole one for `flwr run`, or hub name"
            )
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


def _suffix(path: Path) -> str:
    """Return what tells the format of a file; of a packed one (.gz) what is before."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(place: Path, images: str, separator: str) -> Splits:
    if _suffix(place) not in _FORMATS:
        raise FedPFTError(
            f"unknown file type {_suffix(place)!r}; give one of {', '.join(_FORMATS)}"
        )
    literal = _quotes_are_signs([place])
    return {"train": _read_split([place], images, separator, literal)}


def _read_tables(files: Sequence[Path], separator: str, literal: bool) -> Dataset:
    """Read files of one type that hold the rows of one split.

    Args:
        files: of one type.
        separator: of the columns of CSV files.
        literal: whether quotes are signs like others.
    """
    suffix = _suffix(files[0])
    rows: Dataset = _loaded(
        _FORMATS[suffix],
        data_files={"train": [glob.escape(str(file)) for file in files]},
        split="train",
        **_options(files, separator, literal),
    )
    return _with_numbers(rows) if _FORMATS[suffix] == "csv" else rows


def _read_split(
    files: Sequence[Path], images: str, separator: str, literal: bool
) -> Dataset:
    """Read the tables of a split; images that one names are looked for beside it.

    Those that are not there are where the process is, or not at all.

    Args:
        files: of one type.
        images: the column of images; "" where inputs are texts.
        separator: of the columns of CSV files.
        literal: whether quotes are signs like others.
    """
    rows = _read_tables(files, separator, literal)
    if not images or rows.features.get(images) not in _TEXTS:
        return rows
    placed: list[str | None] = []
    for file in files:  # in whose order the rows come
        part = rows if len(files) == 1 else _read_tables([file], separator, literal)
        placed += [_placed(name, file.parent.absolute()) for name in part[images][:]]
    # A whole new table: of one whose columns were removed and added the rows may lack.
    table: pa.Table = rows.with_format("arrow")[:]
    at = table.schema.get_field_index(images)
    column = pa.array(placed, table.schema.field(at).type)
    return Dataset(InMemoryTable(table.set_column(at, images, column)))


def _placed(name: str | None, folder: Path) -> str | None:
    return str(at) if name and (at := folder / name).is_file() else name


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


def _loaded(*args: Any, **kwargs: Any) -> Any:
    """Return what `datasets` loads, by way of this user's cache.

    A copy there that was cut, by a loss of power perhaps, is made anew.
    """
    cache = str(private_cache("rows"))
    try:
        return load_dataset(*args, cache_dir=cache, **kwargs)
    except (pa.ArrowInvalid, OSError, EOFError):
        anew = {"download_mode": DownloadMode.FORCE_REDOWNLOAD}
        return load_dataset(*args, cache_dir=cache, **anew, **kwargs)


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


def _read_directory(place: Path, images: str, subset: str, separator: str) -> Splits:
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        saved: Dataset | DatasetDict = load_from_disk(str(place))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    found, links = _all_below(place)
    tables = sorted(path for path in found if _suffix(path) in _TABLES)
    # What `datasets` reads as the rows of images beside it.
    are_images = any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in found)
    named = any(path.stem.lower() == "metadata" for path in tables)
    told = bool(images) and are_images and named
    if images and not told:
        if are_images:
            tables = _tables_of_images(tables, images, separator)
        if not tables:
            _refuse_links(links)
            return read_image_folders(place, found, str(private_cache("rows")))
    if _is_described(place):  # else a hub's subset, as of the run, means nothing here
        described: Splits = _loaded(str(place), subset or None)
        return described
    splits = _split_files(place, tables) or _split_below(place, tables, found)
    if told or not splits:
        rows: Splits = _loaded(str(place))
        return rows
    literal = _quotes_are_signs(tables)
    return {
        name: _read_split(ones, images, separator, literal)
        for name, ones in splits.items()
    }


def _tables_of_images(
    tables: Sequence[Path], images: str, separator: str
) -> list[Path]:
    """Return the tables beside images that are the rows, which have a column of them.

    Others, of the names of classes perhaps, leave it to folders what an image is.
    """
    rows = []
    for path in tables:
        if _suffix(path) in (".parquet", ".arrow"):
            rows.append(path)
            continue
        columns: Sequence[str] = ()
        with suppress(Exception):  # it need be no table, and says so below
            literal = _quotes_are_signs([path])
            columns = _read_tables([path], separator, literal).column_names
        if images in columns:
            rows.append(path)
        else:
            logger.warning("%s has no column %r of images: left out", path, images)
    return rows


def _split_below(
    place: Path, tables: Sequence[Path], found: Sequence[Path]
) -> dict[str, list[Path]]:
    """Return split -> files of a directory of tables of one format.

    Which split one is of, words in names of folders and files tell, as `datasets` has
    it. Nothing where it is more a directory of texts.
    """
    formats = {_FORMATS.get(_suffix(path)) for path in tables}
    texts = [path for path in found if _suffix(path) == ".txt" and path.is_file()]
    if len(formats) != 1 or None in formats or len(texts) > len(tables):
        return {}
    splits: dict[str, list[Path]] = {}
    for path in tables:
        splits.setdefault(split_in(path.relative_to(place)), []).append(path)
    others = splits.pop("", [])
    if not splits:
        return {"train": others}
    for path in others:
        logger.warning("%s is called like no split: left out", path)
    return splits


def _all_below(place: Path) -> tuple[list[Path], list[Path]]:
    """Return all files and folders below a directory, and those that are links to some.

    Nobody looks into these. Hidden ones are no rows: those of a Mac beside each file,
    or of a notebook.

    Raises:
        FedPFTError: this process's user may not look into one: its rows would lack.
    """

    def refuse(error: OSError) -> None:
        folder = f"{error.filename} {OUT_OF_REACH}"
        raise OwnRowsError(folder, f"a folder in it {OUT_OF_REACH}") from error

    found, links = [], []
    for folder, folders, files in os.walk(place, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        seen = [name for name in files if not name.startswith(_HIDDEN)]
        below = [Path(folder) / name for name in folders]
        found += below + [Path(folder) / name for name in seen]
        links += [path for path in below if path.is_symlink()]
    return found, links


def _refuse_links(links: Sequence[Path]) -> None:
    """Refuse links to folders of images: a class, or a part of one, would lack."""
    if links:
        why = "is a link, which is not followed; put the folder itself there"
        raise OwnRowsError(f"{links[0]} {why}", f"a folder in it {why}")


def _is_described(place: Path) -> bool:
    """Tell whether a directory says itself which files are what, as hubs have them."""
    card = place / "README.md"
    told = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return (
        "\nconfigs:" in told
        or "\ndataset_info:" in told
        or (place / "dataset_infos.json").is_file()
    )


def _split_files(place: Path, tables: Sequence[Path]) -> dict[str, list[Path]]:
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
    others = [pair for pair in named if not SPLIT_NAME.fullmatch(pair[0])]
    if "train" not in by_split(pair for pair in named if pair not in others):
        others = []
    used = [pair for pair in named if pair not in others]
    suffixes = {_suffix(path) for _, path in used}
    if len(suffixes) != 1 or not suffixes <= _FORMATS.keys():
        return {}
    for _, path in others:
        logger.warning("%s is called like no split: left out", path)
    return by_split(used)


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
