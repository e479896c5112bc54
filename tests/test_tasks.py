import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer

from fedpft_flower.config import DataConfig, FedPFTError, PartitionConfig
from fedpft_flower.docstrings import LIBRARIES, load_docstrings
from fedpft_flower.tasks import (
    TextRows,
    content_hash,
    encode,
    endless_batches,
    load_partition,
    load_public,
    load_task,
    shuffled_batches,
)

DIGITS = DataConfig(task="digits")


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


ROWS = [f"good film {i},{('bad', 'good')[i % 2]}" for i in range(60)]


def test_docstrings_are_balanced_and_public_text_is_apart():
    rows = load_docstrings()
    texts = {
        split: {
            t for t, s in zip(rows["text"], rows["split"], strict=True) if s == split
        }
        for split in ("train", "validation", "test", "public")
    }
    assert sum(map(len, texts.values())) == len(rows)  # no text twice
    assert len(texts["public"]) > 1000
    task = load_task(DataConfig(), 0)
    assert task.labels == LIBRARIES
    assert np.bincount(task.train["label"]).tolist() == [200] * 10
    words = " ".join(task.train["text"]).lower().split()
    assert not {"numpy", "pandas", "sklearn", "sympy", "networkx"} & set(words)
    assert content_hash(rows) == content_hash(load_docstrings())


def test_one_file_is_split_and_the_notes_say_so(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    task = load_task(DataConfig(task="text", path=path), 3)
    assert task.labels == ("bad", "good")
    assert [len(s) for s in (task.train, task.validation, task.test)] == [48, 6, 6]
    texts = [set(s["text"]) for s in (task.train, task.validation, task.test)]
    assert len(set.union(*texts)) == 60
    assert "10% of train" in task.notes["test"]
    again = load_task.__wrapped__(DataConfig(task="text", path=path), 3)
    other = load_task.__wrapped__(DataConfig(task="text", path=path), 4)
    assert again.test["text"] == task.test["text"] != other.test["text"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path, suffix):
    records = [
        dict(zip(("text", "label"), row.split(","), strict=True)) for row in ROWS
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        write_csv(path, ROWS)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        Dataset.from_list(records).to_parquet(path)
    task = load_task(DataConfig(task="text", path=str(path)), 0)
    splits = (task.train, task.validation, task.test)
    assert sorted(text for split in splits for text in split["text"]) == sorted(
        record["text"] for record in records
    )


def write_splits(place, **splits):
    features = Features(
        {
            "s": Value("string"),
            "y": ClassLabel(names=["no", "yes"]),
            "z": Value("int64"),
        }
    )
    for name, labels in splits.items():
        rows = {
            "s": [f"{name} {i}" for i in range(len(labels))],
            "y": labels,
            "z": [0] * len(labels),
        }
        Dataset.from_dict(rows, features).to_parquet(place / f"{name}.parquet")
    return str(place)


COLUMNS = {"task": "text", "text_columns": "s", "label_column": "y"}


def test_validation_becomes_test_where_there_is_none(tmp_path):
    path = write_splits(tmp_path, train=[0, 1] * 30, validation=[1, 0] * 5)
    task = load_task(DataConfig(path=path, **COLUMNS), 0)
    assert task.labels == ("no", "yes")
    assert task.notes["test"] == "validation"
    assert sorted(task.test["text"]) == sorted(f"validation {i}" for i in range(10))
    assert len(task.validation) == 6 and len(task.train) == 54


def test_a_test_split_without_labels_is_not_used(tmp_path):
    path = write_splits(
        tmp_path, train=[0, 1] * 30, validation=[1, 0] * 5, test=[-1] * 9
    )
    task = load_task(DataConfig(path=path, **COLUMNS), 0)
    assert task.notes["test"] == "validation"


def test_caps_and_shortest_texts(tmp_path):
    rows = [f"{'word ' * (i % 5 + 1)},{i % 2}" for i in range(200)]
    path = write_csv(tmp_path / "a.csv", rows)
    config = DataConfig(
        task="text", path=path, min_words=3, max_train_rows=50, max_test_rows=7
    )
    task = load_task(config, 0)
    assert len(task.train) == 50 and len(task.test) == 7
    assert min(len(text.split()) for text in task.train["text"]) == 3


def test_label_order_from_the_config(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    task = load_task(DataConfig(task="text", path=path, labels="good,bad"), 0)
    label = dict(zip(task.train["text"], task.train["label"], strict=True))
    assert task.labels == ("good", "bad")
    assert all(label[text] == (int(text.split()[-1]) + 1) % 2 for text in label)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"text_columns": "sentence"},
            "no column 'sentence'; this data has text, label",
        ),
        ({"label_column": "y"}, "no column 'y'"),
        ({"labels": "bad,fine"}, "label 'good' in train is outside"),
        ({"labels": "bad"}, "two or more"),
        ({"text_columns": "a,b,c"}, "name one column, or two"),
        ({"train_split": "training"}, "data.train-split = 'training'"),
        ({"min_words": 99}, "leaves no training row"),
        ({"path": "/no/such/file.csv"}, "does not exist"),
        ({"path": ""}, "needs data.path"),
    ],
)
def test_bad_data_is_refused_in_one_line(tmp_path, settings, said):
    path = write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(FedPFTError) as caught:
        load_task(DataConfig(**{"task": "text", "path": path, **settings}), 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["good,1", ",0"], "row 1 of train has no text"),
        (["good,1", "bad,"], "row 1 of train has no label"),
        (["good,1", "bad,1"], "two or more"),
        (["good,0", "bad,1"], "too few to hold out"),
    ],
)
def test_gaps_and_too_little_data_are_refused(tmp_path, rows, said):
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(FedPFTError, match=said):
        load_task(DataConfig(task="text", path=path), 0)


def test_numbers_may_be_texts_and_labels(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"{i},{i % 12}" for i in range(60)])
    task = load_task(DataConfig(task="text", path=path), 0)
    assert task.labels == tuple(str(i) for i in range(12))  # in numeric order
    assert [int(text) % 12 for text in task.train["text"]] == task.train["label"][:]


def test_an_image_that_cannot_be_decoded_is_refused(tmp_path, vit_directory):
    from transformers import AutoImageProcessor

    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        path.write_bytes(b"not an image")
    rows = [f"{path},{i % 2}" for i, path in enumerate(paths)]
    csv = write_csv(tmp_path / "a.csv", rows, header="image,label")
    task = load_task(DataConfig(task="image", path=csv), 0)
    processor = AutoImageProcessor.from_pretrained(vit_directory)
    with pytest.raises(FedPFTError, match="cannot be decoded"):
        encode(task.train, processor, "image", 0).batch([0])


def test_unreadable_file_and_unknown_type_are_refused(tmp_path):
    broken = tmp_path / "a.parquet"
    broken.write_text("not parquet")
    unknown = tmp_path / "a.xyz"
    unknown.write_text("x")
    for path, said in ((broken, "cannot be read"), (unknown, "unknown file type")):
        with pytest.raises(FedPFTError, match=said):
            load_task(DataConfig(task="text", path=str(path)), 0)


def test_public_corpus(tmp_path):
    path = write_csv(tmp_path / "p.csv", ["one", "two", "three"], header="line")
    config = DataConfig(
        task="text", path="unused", public_path=path, public_column="line"
    )
    assert sorted(load_public(config, 0)["text"]) == ["one", "three", "two"]
    with pytest.raises(FedPFTError, match="alignment needs a public corpus"):
        load_public(DataConfig(task="text", path="unused"), 0)


def test_digits_public_images_are_apart():
    task, public = load_task(DIGITS, 0), load_public(DIGITS, 0)
    assert len(task.train) == 1000 and len(public) == 300
    assert set(public.column_names) == {"image"}


# ------------------------------------------------------------------------ partitions


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_partitions_are_disjoint_complete_and_repeatable(kind, count):
    config = PartitionConfig(kind, alpha=0.5)
    train = load_task(DIGITS, 0).train
    parts = [load_partition(DIGITS, config, i, count, 0) for i in range(count)]
    assert sum(map(len, parts)) == len(train)
    assert min(map(len, parts)) >= 1
    together = sorted(key for part in parts for key in map(row_key, part))
    assert together == sorted(map(row_key, train))
    from fedpft_flower.tasks import _partitioner

    _partitioner.cache_clear()
    again = load_partition(DIGITS, config, count - 1, count, 0)
    assert list(map(row_key, again)) == list(map(row_key, parts[-1]))


def row_key(row):
    return (np.asarray(row["image"]).tobytes(), row["label"])


def test_small_alpha_skews_labels_and_iid_does_not():
    def skew(kind, alpha):
        parts = [
            load_partition(DIGITS, PartitionConfig(kind, alpha), i, 10, 0)
            for i in range(10)
        ]
        shares = [np.bincount(p["label"], minlength=10) / len(p) for p in parts]
        return np.mean([share.max() for share in shares])

    assert skew("dirichlet", 0.1) > 0.4 > 0.25 > skew("iid", 1.0)


def test_more_nodes_than_rows_are_refused():
    with pytest.raises(FedPFTError, match="empty partition"):
        load_partition(DIGITS, PartitionConfig("iid"), 0, 2000, 0)


# -------------------------------------------------------------------------- encoding


def test_batches_cover_an_epoch_once_in_seeded_order(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    data = Dataset.from_dict(
        {"text": ["good film"] * 5 + ["bad"] * 6, "label": list(range(11))}
    )
    rows = TextRows(data, tokenizer, 16)
    seen = [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=1)]
    assert [len(b) for b in seen] == [4, 4, 3]
    assert sorted(row for batch in seen for row in batch) == list(range(11))
    assert seen == [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=1)]
    assert seen != [b["labels"].tolist() for b in shuffled_batches(rows, 4, seed=2)]
    endless = endless_batches(rows, 4, seed=1)
    assert len([next(endless) for _ in range(7)]) == 7


def test_padding_is_dynamic_and_masked(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    data = Dataset.from_dict({"text": ["good", "good film very bad", "bad film"]})
    rows = encode(data, tokenizer, "text", 5)
    assert rows.lengths() == [3, 5, 4]  # cut at 5, with [CLS] and [SEP]
    batch = rows.batch([0, 2])
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert "labels" not in batch


def test_pairs_are_encoded_together(bert_directory, tmp_path):
    rows = [f"good film,bad film {i},{i % 2}" for i in range(40)]
    path = write_csv(tmp_path / "a.csv", rows, header="q,a,label")
    task = load_task(DataConfig(task="text", path=path, text_columns="q,a"), 0)
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    batch = encode(task.train, tokenizer, "text", 32).batch([0])
    assert batch["token_type_ids"].max() == 1


def test_image_folder_of_ones_own(tmp_path, vit_directory):
    from PIL import Image as Picture
    from transformers import AutoImageProcessor

    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(20):
            picture = Picture.new("L", (12 + i, 9), color=10 * i)
            picture.save(tmp_path / "train" / label / f"{i}.png")
    task = load_task(DataConfig(task="image", path=str(tmp_path)), 0)
    assert task.labels == ("cat", "dog")
    processor = AutoImageProcessor.from_pretrained(vit_directory)
    batch = encode(task.train, processor, "image", 0).batch([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
