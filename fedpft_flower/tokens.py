"""Tokenise texts, and keep their tokens on disk by content.

So a node which runs every message in a new process does not tokenise its rows again
each round.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpft_flower.config import DataConfig, FedPFTError
from fedpft_flower.disk import keep, last_used, private_cache
from fedpft_flower.processors import processor_files

KEEP = 2000  # encoded data sets on disk; the oldest are removed


# Each feature of all rows in one int32 vector, and `ends`: where rows end in it.
Tokens = dict[str, Tensor]


def text_tokens(rows: Dataset, tokenizer: Any, max_length: int, blocks: bool) -> Tokens:
    """Return the tokens of rows of texts, or of pairs of them.

    Raises:
        FedPFTError: blocks are asked for, and the tokenizer cannot make them.
    """
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


def generation_tokens(rows: Dataset, tokenizer: Any, config: DataConfig) -> Tokens:
    """Return `input_ids` as `text_tokens` does, and how many are the prompt's.

    With prompts also `cut`: how many prompts and responses were too long.

    Raises:
        FedPFTError: a chat template is asked for and cannot put a prompt.
    """
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
        f"{longest}/generation, cuts counted/{template}",
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
    rows, lengths, cut = [], [], [0, 0]
    for before, ids in zip(asked, answered, strict=True):
        response = [*ids, end][: longest - 1]
        cut[1] += len(response) <= len(ids)
        prompt = before or [end]  # without any token nothing predicts the first
        room = longest - len(response)
        if len(prompt) > room:
            cut[0] += 1
            kept_start = prompt[:1] if prompt[0] == start and room > 1 else []
            prompt = [*kept_start, *prompt[len(prompt) - room + len(kept_start) :]]
        rows.append([*prompt, *response])
        lengths.append(len(prompt))
    prompts_of = torch.tensor(lengths, dtype=torch.int32)
    tokens = _in_vectors({"input_ids": rows})
    return {**tokens, "prompts": prompts_of, "cut": torch.tensor(cut)}


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


def _keep(features: Tokens, place: Path) -> None:
    keep(place, lambda draft: save_file(features, draft))
    kept = sorted(place.parent.glob("*.safetensors"), key=last_used)
    for old in kept[:-KEEP]:
        old.unlink(missing_ok=True)
