"""Choose and check the columns of rows: inputs, and the labels in them."""

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value

from fedpft_flower.config import FedPFTError, OwnRowsError

logger = logging.getLogger(__name__)


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


def alike_labels(labels: Sequence[str]) -> list[str]:
    """Return the first labels that differ in case or blanks alone, or none."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault("".join(label.casefold().split()), []).append(label)
    return next((ones for ones in found.values() if len(ones) > 1), [])


def look_like_values(labels: Collection[str], rows: Dataset) -> bool:
    """Tell whether labels are too many to be classes, as those of a wrong column."""
    return len(labels) > max(10, len(rows) / 5)


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
