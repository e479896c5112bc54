"""Encode rows as batches of model inputs: texts once, images when they are asked for.

Encoded texts are kept on disk by content, so that a node which runs every message in a
new process does not tokenise its rows again each round.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpft_flower.architectures import AUTO_PROCESSORS, Architecture
from fedpft_flower.batches import Batch
from fedpft_flower.config import (
    DataConfig,
    FedPFTError,
    Modality,
    Objective,
    derive_seed,
    first_line,
)
from fedpft_flower.disk import keep, last_used, private_cache
from fedpft_flower.images import crop_and_flip, decoded_images

logger = logging.getLogger(__name__)

# So many batches are shuffled together, sorted by length, and cut: rows of a batch are
# then of similar length, and little of it is padding.
BUCKET = 8
NO_TARGET = -100  # label of a token that no loss and no metric counts
# Of processed images in memory, for each data set: 400 of 224 x 224 pixels.
KEPT_BYTES = 256_000_000
KEEP = 2000  # encoded data sets on disk; the oldest are removed


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
        """
        self._tokenizer = tokenizer
        self._features = _tokens(rows, tokenizer, max_length, blocks)
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
        features = _generation_tokens(rows, tokenizer, config)
        super().__init__(features["ends"])
        self._ids = features["input_ids"].long()
        self._prompts = features["prompts"].tolist()
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


# ------------------------------------------------------------- tokens, kept on disk

# Each feature of all rows in one int32 vector, and `ends`: where rows end in it.
Tokens = dict[str, Tensor]


def _tokens(rows: Dataset, tokenizer: Any, max_length: int, blocks: bool) -> Tokens:
    """Return the tokens of rows of texts, or of pairs of them."""
    texts = rows.select_columns([c for c in rows.column_names if c.startswith("text")])
    longest = min(max_length, tokenizer.model_max_length)
    how = f"{longest}/blocks" if blocks else f"{longest}"
    return _kept(
        texts, tokenizer, how, lambda: _tokenise(texts, tokenizer, longest, blocks)
    )


def _kept(
    texts: Dataset, tokenizer: Any, how: str, tokenise: Callable[[], Tokens]
) -> Tokens:
    """Return the tokens of texts from the disk, or tokenise and keep them there."""
    key = f"{_texts_hash(texts)}/{_fingerprint(tokenizer)}/{how}"
    place = (
        private_cache("encoded")
        / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    )
    try:
        kept = load_file(place)
        os.utime(place)
    except (OSError, SafetensorError):  # not there, or cut
        kept = tokenise()
        _keep(kept, place)
    return kept


def _texts_hash(texts: Dataset) -> str:
    """Return a hash of texts as they lie in memory: of a million in a second.

    Equal texts may lie otherwise and are then tokenised again.
    """
    digest = hashlib.sha256(json.dumps(texts.column_names).encode())
    for table in texts.with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _tokenise(texts: Dataset, tokenizer: Any, longest: int, blocks: bool) -> Tokens:
    if blocks and not tokenizer.is_fast:
        raise FedPFTError(
            "data.public-long = 'blocks' needs a tokenizer of the fast kind, and the "
            "FM's is none; set 'cut'"
        )
    columns = [texts[name][:] for name in sorted(texts.column_names)]
    encoded = tokenizer(
        *columns,
        truncation=True,
        max_length=longest,
        return_overflowing_tokens=blocks,
    )
    encoded.pop("overflow_to_sample_mapping", None)
    # A model needs one token at least, and not every tokenizer adds some.
    filler = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1}
    encoded = {
        name: [row or [filler.get(name, 0)] for row in values]
        for name, values in encoded.items()
    }
    return _in_vectors(encoded)


def _in_vectors(encoded: Mapping[str, Sequence[Sequence[int]]]) -> Tokens:
    features = {
        name: torch.tensor([v for row in values for v in row], dtype=torch.int32)
        for name, values in encoded.items()
    }
    sizes = [len(ids) for ids in encoded["input_ids"]]
    return {**features, "ends": torch.tensor(sizes, dtype=torch.int64).cumsum(0)}


def _generation_tokens(rows: Dataset, tokenizer: Any, config: DataConfig) -> Tokens:
    """Return `input_ids` as `_tokens` does, and how many of a row are the prompt's."""
    names = [n for n in ("text", "prompt", "response") if n in rows.column_names]
    texts = rows.select_columns(names)
    longest = min(config.max_length, tokenizer.model_max_length)
    if names == ["text"]:
        return _kept(
            texts,
            tokenizer,
            f"{longest}/generation, each block with its start",
            lambda: _text_blocks(texts["text"][:], tokenizer, longest),
        )
    template = config.prompt_template
    return _kept(
        texts,
        tokenizer,
        f"{longest}/generation/{template}",
        lambda: _responses(texts, tokenizer, longest, template),
    )


def _put(prompt: str, template: str, tokenizer: Any) -> str:
    """Put a prompt as the template says."""
    if template != "chat":
        return template.replace("{prompt}", prompt)
    turns = [{"role": "user", "content": prompt}]
    try:
        put: str = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # none is there, or one that raises anything
        raise FedPFTError(
            f"data.prompt-template = 'chat': the FM's tokenizer cannot put a prompt "
            f"({error}); write a template, such as '{{prompt}}\\n'"
        ) from error
    return put


def _text_blocks(texts: Sequence[str], tokenizer: Any, longest: int) -> Tokens:
    end = tokenizer.eos_token_id
    blocks = [
        block
        for ids in _open_ended(texts, tokenizer)
        for block in _blocks([*ids, end], longest, tokenizer.bos_token_id)
    ]
    nothing = torch.zeros(len(blocks), dtype=torch.int32)
    return {**_in_vectors({"input_ids": blocks}), "prompts": nothing}


def _blocks(ids: Sequence[int], longest: int, start: int | None) -> list[Sequence[int]]:
    """Cut tokens into blocks; a block of one has nothing to predict.

    Where the tokenizer put its start token first, every block begins with it.
    """
    before, rest = ([start], ids[1:]) if ids[0] == start else ([], ids)
    step = max(1, longest - len(before))
    cut = [[*before, *rest[at : at + step]] for at in range(0, len(rest), step)]
    return [block for block in cut if len(block) > 1]


def _responses(texts: Dataset, tokenizer: Any, longest: int, template: str) -> Tokens:
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    prompts = [_put(prompt, template, tokenizer) for prompt in texts["prompt"][:]]
    # A chat template writes the special tokens itself.
    asked = _open_ended(prompts, tokenizer, special=template != "chat")
    answered = _open_ended(texts["response"][:], tokenizer, special=False)
    rows, lengths = [], []
    for before, ids in zip(asked, answered, strict=True):
        response = [*ids, end][: longest - 1]
        prompt = before or [end]  # without any token nothing predicts the first
        room = longest - len(response)
        if len(prompt) > room:
            kept_start = prompt[:1] if prompt[0] == start and room > 1 else []
            prompt = [*kept_start, *prompt[len(prompt) - room + len(kept_start) :]]
        rows.append([*prompt, *response])
        lengths.append(len(prompt))
    prompts_of = torch.tensor(lengths, dtype=torch.int32)
    return {**_in_vectors({"input_ids": rows}), "prompts": prompts_of}


def _open_ended(
    texts: Sequence[str], tokenizer: Any, special: bool = True
) -> list[list[int]]:
    """Return the tokens of texts, without an end token that a tokenizer may add."""
    encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    adds_end = special and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return [list(ids[:-1]) if adds_end else list(ids) for ids in encoded]


@lru_cache(maxsize=4)
def _fingerprint(tokenizer: Any) -> str:
    """Return the hash of all that decides how a tokenizer encodes: its files."""
    digest = hashlib.sha256()
    for name, body in processor_files(tokenizer).items():
        digest.update(name.encode() + body)
    return digest.hexdigest()


def load_processor(place: Path, row: Architecture) -> Any:
    """Load the tokenizer or image processor of a model from its saved files.

    Args:
        place: their folder.
        row: the model's family. Decoders count positions from the first token, so they
            are padded at the end, which not every tokenizer saves.
    """
    processor = AUTO_PROCESSORS[row.modality].from_pretrained(
        place, local_files_only=True, trust_remote_code=False
    )
    if row.decoder:
        processor.padding_side = "right"
    return processor


def processor_from(files: Mapping[str, bytes], row: Architecture) -> Any:
    """Load a processor as `load_processor` does, from the contents of its files.

    Raises:
        FedPFTError: `transformers` does not load it from them.
    """
    with TemporaryDirectory() as directory:
        for name, body in files.items():
            (Path(directory) / name).write_bytes(body)
        try:
            return load_processor(Path(directory), row)
        except Exception as error:  # a tokenizer's own class raises almost anything
            raise FedPFTError(
                "the FM's processor cannot be loaded from the files that it saves "
                f"({first_line(error)}), so no node could have it; give the FM one of "
                "the classes that transformers saves whole"
            ) from error


# Words, numbers, signs and another script: what every tokenizer makes many tokens of.
_PROBE = "Neurons of feed-forward networks, 12.5 % kept: naïve or not? 神经元"


def check_same_tokens(one: Any, other: Any) -> None:
    """Check that a tokenizer encodes as it did before it was saved.

    Raises:
        FedPFTError: it does not, so that nodes would see other tokens than the FM was
            made for.
    """
    try:
        first = one(_PROBE)["input_ids"]
    except Exception:  # a vocabulary of its own, of a code perhaps, with nothing for it
        return
    if first != (second := other(_PROBE)["input_ids"]):
        raise FedPFTError(
            f"the FM's tokenizer ({type(one).__name__}) encodes otherwise once it was "
            f"saved (one text as {len(first)} and {len(second)} tokens), as nodes get "
            "it; give the FM a tokenizer.json"
        )


def processor_files(processor: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer or image processor, by their names.

    A fast tokenizer writes how it last cut and padded into them.
    """
    with TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        paths = sorted(Path(directory).iterdir())
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _keep(features: Tokens, place: Path) -> None:
    keep(place, lambda draft: save_file(features, draft))
    kept = sorted(place.parent.glob("*.safetensors"), key=last_used)
    for old in kept[:-KEEP]:
        old.unlink(missing_ok=True)
