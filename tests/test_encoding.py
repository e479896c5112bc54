import stat

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from benchmarks.plain_loop import load
from fedpft_flower import tokens
from fedpft_flower.config import Config, DataConfig, FedPFTError
from fedpft_flower.encoding import (
    TextRows,
    encode,
    endless_batches,
    shuffled_batches,
    within_tokens,
)
from fedpft_flower.server import _tell_cuts


def test_batches_cover_an_epoch_once_in_seeded_order(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    data = Dataset.from_dict(
        {"text": ["good film"] * 5 + ["bad"] * 6, "label": list(range(11))}
    )
    rows = TextRows(data, tokenizer, 16)
    seen = [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=1)]
    assert sorted(map(len, seen)) == [3, 4, 4]
    assert sorted(row for batch in seen for row in batch) == list(range(11))
    assert seen == [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=1)]
    assert seen != [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=2)]
    endless = endless_batches(rows, 4, seed=1)
    assert len([next(endless) for _ in range(7)]) == 7


def test_padding_is_dynamic_and_masked(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    data = Dataset.from_dict({"text": ["good", "good film very bad", "bad film"]})
    rows = encode(data, tokenizer, "text", DataConfig(max_length=5))
    assert rows.lengths() == [3, 5, 4]  # cut at 5, with [CLS] and [SEP]
    batch = rows.batch([0, 2])
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert "labels" not in batch


@pytest.mark.parametrize(("long", "told"), [(1, False), (2, True)])
def test_texts_that_are_cut_are_told_where_they_are_more_than_few(
    bert_directory, caplog, long, told
):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    texts = ["good " * 9] * long + ["good"] * (100 - long)
    _tell_cuts("test", TextRows(Dataset.from_dict({"text": texts}), tokenizer, 8), 8)
    said = "test: 2 of 100 texts reach data.max-length = 8 tokens"
    assert (said in caplog.text) == told == bool(caplog.text)


def test_rows_of_a_batch_are_of_similar_length(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    texts = ["good " * (1 + 7 * i % 30) for i in range(64)]
    rows = TextRows(Dataset.from_dict({"text": texts}), tokenizer, 64)
    padded = sum(b["input_ids"].numel() for b in shuffled_batches(rows, 8, seed=0))
    assert padded < 1.2 * sum(rows.lengths())
    first = [
        next(shuffled_batches(rows, 8, seed=s))["input_ids"].shape[1] for s in range(6)
    ]
    assert len(set(first)) > 1  # short batches do not always come first


def test_a_budget_of_tokens_takes_whole_rows_drawn_at_random(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    texts = ["good " * (1 + 7 * i % 30) for i in range(64)]
    rows = TextRows(Dataset.from_dict({"text": texts}), tokenizer, 64)
    lengths, everything = rows.lengths(), sum(rows.lengths())
    for budget in (40, 200, everything // 2, everything - 1):
        used = within_tokens(rows, budget, seed=1).lengths()
        assert budget - max(lengths) < sum(used) <= budget
        most = within_tokens(rows, everything - 1, seed=1).lengths()
        assert most[: len(used)] == used  # nested
    half = within_tokens(rows, everything // 2, seed=1).lengths()
    assert half != lengths[: len(half)]
    assert half != within_tokens(rows, everything // 2, seed=2).lengths()
    for budget in (0, everything):
        assert within_tokens(rows, budget, seed=1).lengths() == lengths
    with pytest.raises(FedPFTError, match=r"public-tokens = 2 holds no public row"):
        within_tokens(rows, 2, seed=1)


@pytest.fixture
def counted(bert_directory, tmp_path, monkeypatch):
    """Return a tokenizer in an empty cache, and how often texts were tokenised."""
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path))
    calls, really = [], tokens._tokenise

    def tokenise(*arguments):
        calls.append(1)
        return really(*arguments)

    monkeypatch.setattr(tokens, "_tokenise", tokenise)
    return AutoTokenizer.from_pretrained(bert_directory), calls, tmp_path / "encoded"


def pairs(*texts):
    return Dataset.from_dict({"text": texts, "text_pair": texts[::-1], "label": [1, 0]})


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_texts_are_tokenised_once_and_kept_by_content(counted):
    tokenizer, calls, place = counted
    first = TextRows(pairs("good film", "very bad"), tokenizer, 16)
    again = TextRows(pairs("good film", "very bad"), tokenizer, 16)
    assert len(calls) == 1
    assert same(first.batch([1, 0]), again.batch([1, 0]))
    TextRows(pairs("good film", "very bad"), tokenizer, 4)  # another length
    TextRows(pairs("good film", "bad very"), tokenizer, 16)  # another text
    assert len(calls) == 3
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {path.suffix for path in place.iterdir()} == {".safetensors"}


def test_a_cut_file_is_made_again_and_old_ones_go(counted, monkeypatch):
    tokenizer, calls, place = counted
    first = TextRows(pairs("good film", "very bad"), tokenizer, 16)
    (file,) = place.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    again = TextRows(pairs("good film", "very bad"), tokenizer, 16)
    assert len(calls) == 2
    assert same(first.batch([0, 1]), again.batch([0, 1]))
    monkeypatch.setattr(tokens, "KEEP", 2)
    for i in range(4):
        TextRows(pairs("good", str(i)), tokenizer, 16)
    assert len(list(place.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_named(counted, monkeypatch, tmp_path):
    tokenizer, _, _ = counted
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FedPFTError, match="set FEDPFT_CACHE"):
        TextRows(pairs("good", "bad"), tokenizer, 16)


def test_a_text_without_tokens_is_one_masked_in_padding(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    real = tokenizer.__class__.__call__

    class Bare:
        """Add no special tokens, as some tokenizers do not."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *texts, **settings):
            return real(tokenizer, *texts, add_special_tokens=False, **settings)

    rows = TextRows(Dataset.from_dict({"text": ["", "", "good"]}), Bare(), 8)
    batch = rows.batch([0, 1])
    assert batch["input_ids"].tolist() == [[tokenizer.pad_token_id]] * 2
    assert batch["attention_mask"].tolist() == [[1], [1]]


def test_the_package_does_not_depend_on_what_was_encoded_before(
    settings, bert_directory, tmp_path
):
    lines = [f"{'good' if i % 2 else 'bad'} film,{i % 2}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    settings |= {
        "method": "fedpft-n",
        "fm.name": str(bert_directory),
        "data.task": "text",
        "data.path": str(tmp_path / "rows.csv"),
        "data.max-length": 16,
    }
    config = Config.from_run_config(settings)
    cold, warm = (load(config)[2].package() for _ in range(2))
    assert cold.processor_files == warm.processor_files
