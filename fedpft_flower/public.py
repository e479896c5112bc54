"""Load the public, unlabelled rows that align the sub-FM."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from datasets import Dataset

from fedpft_flower.columns import cast_input, choose_columns, with_texts
from fedpft_flower.config import DataConfig, FedPFTError, derive_seed, names_in
from fedpft_flower.reading import Row, is_on_hub, read_sample
from fedpft_flower.splits import split_called
from fedpft_flower.tasks import sample, source_of, task_of


def load_public(config: DataConfig, seed: int) -> Dataset:
    """Load the public, unlabelled rows that align the sub-FM.

    Where the task is about pairs of texts they become pairs too, so that the models
    are aligned on inputs like the task's.

    Raises:
        FedPFTError: there is no public corpus, it cannot be read, or a budget of
            tokens is set for images.
    """
    task = task_of(config.task)
    if config.public_tokens and task.modality == "image":
        raise FedPFTError(
            f"data.public-tokens = {config.public_tokens} bounds public texts, and "
            f"data.task = {config.task!r} has images; use data.public-rows"
        )
    if config.public_path:
        public = _own_public(config, seed)
    elif task.public is not None:
        public = task.public()
    else:
        raise FedPFTError(
            "alignment needs a public corpus and data.public-path is empty; give one "
            "(a directory, file or hub name), or a method that does not align"
        )
    if not len(public):
        raise FedPFTError("data.public-path has no usable row; give another corpus")
    public = sample(public, config.public_rows, seed, "public")
    if config.public_tokens:  # not all of a corpus need be tokenised
        order = np.random.default_rng(derive_seed(seed, "public tokens"))
        shuffled = order.permutation(len(public)).tolist()
        columns = [
            name for name in ("text", "text_pair") if name in public.column_names
        ]
        rows = (public[row] for row in shuffled)
        count = len(list(_enough(config, columns, rows)))
        public = public.select(sorted(shuffled[:count]))
    if _takes_pairs(config) and "text_pair" not in public.column_names:
        public = paired(public, seed)
    return public


def _public_split(config: DataConfig, seed: int) -> Dataset:
    """Return the split of the public corpus; of one on a hub no more than needed."""
    path, subset, name = config.public_path, config.public_subset, config.public_split
    if (config.public_rows or config.public_tokens) and is_on_hub(path):
        columns = names_in(config.public_column) or ("text",)
        enough = partial(_enough, config, columns)
        drawn = derive_seed(seed, "public rows")
        return read_sample(path, "data.public-path", subset, name, drawn, enough)
    images = config.public_column or "image"
    place = replace(config, path=path, subset=subset, image_column=images)
    return split_called(source_of(place, "data.public-path"), name, "data.public-split")


# Tokens of a pair that is made of two sentences of a text, about.
_PAIR = 10


def _enough(
    config: DataConfig, columns: Sequence[str], rows: Iterable[Row]
) -> Iterator[Row]:
    """Yield rows up to `public_rows`, and to what has about `public_tokens` or more.

    A word is a token at least, and so are eight letters of a script without spaces; a
    row that is cut has no more tokens than `max_length`.

    Raises:
        FedPFTError: a row lacks one of the columns.
    """
    limited = islice(rows, config.public_rows or None)
    if not config.public_tokens:
        yield from limited
        return
    task, tokens = task_of(config.task), 0.0
    whole = config.makes_blocks(task.objective) and len(columns) == 1
    most = math.inf if whole else config.max_length
    made = _takes_pairs(config) and len(columns) == 1
    for row in limited:
        if lacking := [column for column in columns if column not in row]:
            raise FedPFTError(
                f"data.public-column: no column {lacking[0]!r}; this data has "
                f"{', '.join(row)}"
            )
        yield row
        texts = [str(row[column] or "") for column in columns]
        least = sum(max(len(text.split()), len(text) // 8) for text in texts)
        tokens += min(most, least, *([_PAIR] if made else []))
        if tokens >= config.public_tokens:
            return


def _takes_pairs(config: DataConfig) -> bool:
    task = task_of(config.task)
    return task.inputs is not None and "text_pair" in task.inputs(config)


def _own_public(config: DataConfig, seed: int) -> Dataset:
    task = task_of(config.task)
    kind = task.modality
    pairs = kind == "text" and task.objective == "classify"
    roles = (kind, "text_pair") if pairs else (kind,)
    columns = names_in(config.public_column) or (kind,)
    if len(columns) > len(roles):
        raise FedPFTError(
            f"data.public-column = {config.public_column!r}; name one column"
            f"{', or two of texts that are pairs' if pairs else ''}"
        )
    wanted = dict(zip(roles, columns, strict=False))
    public = choose_columns(
        _public_split(config, seed), wanted, dict.fromkeys(roles, "data.public-column")
    )
    for role in wanted:
        public = cast_input(public, role)
    if kind == "image":
        return public
    return with_texts(public, list(wanted))


def paired(rows: Dataset, seed: int) -> Dataset:
    """Make pairs of texts out of texts.

    A pair is two sentences in a row; for every other text the second one is that of
    another text, so that some pairs belong together and others do not.

    Args:
        rows: with the column `text`.
        seed: of what is chosen.

    Returns:
        As many rows, with the columns `text` and `text_pair`.
    """
    generator = np.random.default_rng(derive_seed(seed, "pairs"))
    firsts, seconds = [], []
    for text in rows["text"][:]:
        parts = _sentences(text)
        place = int(generator.integers(len(parts) - 1))
        firsts.append(parts[place])
        seconds.append(parts[place + 1])
    moved = seconds[1::2]
    seconds[1::2] = moved[1:] + moved[:1]
    return Dataset.from_dict({"text": firsts, "text_pair": seconds})


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text, two at least: of a single one its halves."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|(?<=。)", text) if part.strip()]
    if len(parts) > 1:
        return parts
    words = text.split()
    middle = (len(words) + 1) // 2
    return [" ".join(words[:middle]), " ".join(words[middle:] or words)]
