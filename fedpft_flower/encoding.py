"""Encode rows as batches of model inputs: texts once, images when asked for."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpft_flower.batches import Batch
from fedpft_flower.config import (
    DataConfig,
    FedPFTError,
    Modality,
    Objective,
    derive_seed,
)
from fedpft_flower.images import crop_and_flip, decoded_images
from fedpft_flower.tokens import generation_tokens, text_tokens

logger = logging.getLogger(__name__)

# So many batches are shuffled together, sorted by length, and cut: rows of a batch are
# then of similar length, and little of it is padding.
BUCKET = 8
NO_TARGET = -100  # label of a token that no loss and no metric counts
# Of processed images in memory, for each data set: 400 of 224 x 224 pixels.
KEPT_BYTES = 256_000_000


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

    def varied(self, seed: int) -> "Rows":
        """Return the same rows, each batch varied anew where that is asked for."""
        ...


class _Tokenised:
    """Know where the rows of tokenised texts begin and end in one vector."""

    def __init__(self, ends: Tensor) -> None:
        self._ends: list[int] = ends.tolist()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ends)

    def lengths(self) -> list[int]:
        """Return the number of tokens of every row."""
        lengths: list[int] = np.diff(self._ends, prepend=0).tolist()
        return lengths

    def _place(self, row: int) -> slice:
        return slice(self._ends[row - 1] if row else 0, self._ends[row])


class TextRows(_Tokenised):
    """Encode texts by the FM's tokenizer, once; batches are padded dynamically."""

    def __init__(
        self, rows: Dataset, tokenizer: Any, max_length: int, blocks: bool = False
    ) -> None:
        """Tokenise the texts, or take their tokens from the disk.

        Args:
            rows: with the column `text`, or also `text_pair`, and maybe `label`.
            tokenizer: the FM's.
            max_length: longer texts are cut, in tokens.
            blocks: do not cut them, make several rows of them; without labels.

        Raises:
            FedPFTError: blocks are asked for, and the tokenizer cannot make them.
        """
        self._tokenizer = tokenizer
        self._features = text_tokens(rows, tokenizer, max_length, blocks)
        super().__init__(self._features.pop("ends"))
        self._labels = None if blocks else _labels(rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return padded inputs [B, T] and `labels` [B]."""
        chosen = {
            name: [values[self._place(i)].tolist() for i in indices]
            for name, values in self._features.items()
        }
        batch: Batch = dict(self._tokenizer.pad(chosen, return_tensors="pt"))
        if self._labels is not None:
            batch["labels"] = self._labels[list(indices)]
        return batch

    def varied(self, seed: int) -> Rows:
        """Return the same rows: texts are not varied."""
        return self


class GenerationRows(_Tokenised):
    """Encode texts for a decoder, which learns to continue them.

    Plain texts end with the tokenizer's end token, and become blocks of `max_length`
    tokens where they are longer. With a prompt, only the response and the end token
    behind it are learnt; what is too long loses the prompt's beginning (behind the
    tokenizer's start token), then the response's end.
    """

    def __init__(self, rows: Dataset, tokenizer: Any, config: DataConfig) -> None:
        """Tokenise the texts, or take their tokens from the disk.

        Args:
            rows: with the column `text`, or `prompt` and `response`.
            tokenizer: the FM's, with an end token.
            config: the longest row, and how a prompt is put.

        Raises:
            FedPFTError: a chat template is asked for and cannot put a prompt, or no
                text has two tokens.
        """
        self._padding = tokenizer.pad_token_id
        features = generation_tokens(rows, tokenizer, config)
        super().__init__(features["ends"])
        self._ids = features["input_ids"].long()
        self._prompts = features["prompts"].tolist()
        # How many prompts and responses were cut.
        self.cut: list[int] = features.get("cut", torch.zeros(2)).int().tolist()
        if not len(self):
            raise FedPFTError(
                f"none of {len(rows)} texts has two tokens, so nothing can be learnt; "
                "name another column in data.text-columns"
            )

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return inputs and `labels` [B, T], padded at the end."""
        rows, labels = [], []
        for row in indices:
            ids = self._ids[self._place(row)]
            targets = ids.clone()
            targets[: self._prompts[row]] = NO_TARGET
            rows.append(ids)
            labels.append(targets)
        masks = [torch.ones_like(ids) for ids in rows]
        return {
            "input_ids": pad_sequence(rows, True, self._padding),
            "attention_mask": pad_sequence(masks, True, 0),
            "labels": pad_sequence(labels, True, NO_TARGET),
        }

    def varied(self, seed: int) -> Rows:
        """Return the same rows: texts are not varied."""
        return self


class ImageRows:
    """Encode images by the FM's own image processor, when a batch asks for them.

    Where they are to be kept, what does not vary is processed once, as far as
    `KEPT_BYTES` reach: a server evaluates the same rows after every round.
    """

    def __init__(
        self,
        rows: Dataset,
        processor: Any,
        augment: str = "none",
        generator: np.random.Generator | None = None,
        keep: bool = False,
    ) -> None:
        self._rows, self._processor, self._augment = rows, processor, augment
        self._generator, self._labels = generator, _labels(rows)
        self._kept: dict[int, Batch] = {}  # row -> its inputs
        self._free = KEPT_BYTES if keep else 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def lengths(self) -> list[int]:
        """Return 1 for every row: images of one model have one size."""
        return [1] * len(self)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return `pixel_values` [B, channels, height, width] and `labels` [B]."""
        batch = self._known(indices) or self._inputs(indices)
        if self._labels is not None:
            batch["labels"] = self._labels[list(indices)]
        return batch

    def _inputs(self, indices: Sequence[int]) -> Batch:
        images = decoded_images(self._rows, indices)
        if self._generator is not None:
            images = [crop_and_flip(image, self._generator) for image in images]
        batch: Batch = dict(self._processor(images, return_tensors="pt"))
        if self._generator is None:
            self._keep(indices, batch)
        return batch

    def _known(self, indices: Sequence[int]) -> Batch:
        """Return the inputs of rows that are all kept, else nothing."""
        if not all(row in self._kept for row in indices):
            return {}
        rows = [self._kept[row] for row in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _keep(self, indices: Sequence[int], batch: Batch) -> None:
        size = sum(v.nbytes for v in batch.values()) // len(indices)
        for place, row in enumerate(indices):
            if row not in self._kept and size <= self._free:
                self._kept[row] = {n: v[place].clone() for n, v in batch.items()}
                self._free -= size

    def varied(self, seed: int) -> Rows:
        """Return the same rows, cropped and flipped at random where asked for."""
        if self._augment == "none":
            return self
        generator = np.random.default_rng(derive_seed(seed, "augment"))
        return ImageRows(self._rows, self._processor, self._augment, generator)


class Part:
    """Give some of the rows of others."""

    def __init__(self, rows: Rows, chosen: Sequence[int]) -> None:
        self._rows, self._chosen = rows, chosen

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._chosen)

    def lengths(self) -> list[int]:
        """Return what each row costs, to put similar ones into one batch."""
        lengths = self._rows.lengths()
        return [lengths[i] for i in self._chosen]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return model inputs of these rows."""
        return self._rows.batch([self._chosen[i] for i in indices])

    def varied(self, seed: int) -> Rows:
        """Return the same rows, varied where the others are."""
        return Part(self._rows.varied(seed), self._chosen)


def encode(
    rows: Dataset,
    processor: Any,
    modality: Modality,
    config: DataConfig,
    objective: Objective = "classify",
    keep: bool = False,
) -> Rows:
    """Encode rows of a task for a model of this modality and objective.

    Processed images are only kept in memory where that is asked for.
    """
    if modality == "image":
        return ImageRows(rows, processor, config.augment, keep=keep)
    if objective == "generate":
        return GenerationRows(rows, processor, config)
    return TextRows(rows, processor, config.max_length)


def encode_public(
    rows: Dataset,
    processor: Any,
    modality: Modality,
    config: DataConfig,
    objective: Objective = "classify",
) -> Rows:
    """Encode public rows, which have no labels, for a model of this modality."""
    if modality == "image":
        return ImageRows(rows, processor, keep=True)
    # Pairs are made of the sentences of whole texts already.
    blocks = config.makes_blocks(objective) and "text_pair" not in rows.column_names
    return TextRows(rows, processor, config.max_length, blocks)


def within_tokens(rows: Rows, tokens: int, seed: int) -> Rows:
    """Return rows drawn at random, as many as the budget holds whole, or all.

    Args:
        rows: of texts.
        tokens: the budget; 0 sets none.
        seed: of the draw; of the same rows a smaller budget has a part of a larger's.

    Raises:
        FedPFTError: the budget holds none.
    """
    if not tokens:
        return rows
    lengths = rows.lengths()
    if (found := sum(lengths)) <= tokens:
        if found < tokens:
            logger.warning(
                "data.public-tokens = %d, and the public rows have %d; raise "
                "data.public-rows, or give more",
                tokens,
                found,
            )
        return rows
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    used = itertools.accumulate(lengths[row] for row in order)
    held = sum(1 for _ in itertools.takewhile(lambda total: total <= tokens, used))
    if not held:
        raise FedPFTError(
            f"data.public-tokens = {tokens} holds no public row; the first that was "
            f"drawn has {lengths[order[0]]} tokens"
        )
    return Part(rows, order[:held])


def hold_out(rows: Rows, count: int, seed: int) -> tuple[Part, Part]:
    """Split rows at random: `count` that are held out, and all others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return Part(rows, order[:count]), Part(rows, order[count:])


def shuffled_batches(rows: Rows, size: int, seed: int) -> Iterator[Batch]:
    """Yield one epoch of shuffled batches of similar length; one may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    lengths = rows.lengths()
    batches: list[list[int]] = []
    for start in range(0, len(order), size * BUCKET):
        bucket = order[start : start + size * BUCKET]
        bucket.sort(key=lengths.__getitem__)
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    for place in torch.randperm(len(batches), generator=generator).tolist():
        yield rows.batch(batches[place])


def endless_batches(rows: Rows, size: int, seed: int) -> Iterator[Batch]:
    """Yield shuffled batches for ever, each epoch in another order."""
    epoch = 0
    while True:
        yield from shuffled_batches(rows, size, derive_seed(seed, "epoch", epoch))
        epoch += 1


def mixed_batches(
    one: Iterator[Batch], other: Iterator[Batch], share: float
) -> Iterator[Batch]:
    """Yield endless batches of two kinds; a share, evenly spread, is the second's."""
    due = 0.0
    while True:
        due += share
        if due >= 1:
            due -= 1
            yield next(other)
        else:
            yield next(one)


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


def _labels(rows: Dataset) -> Tensor | None:
    return torch.tensor(rows["label"][:]) if "label" in rows.column_names else None
