import gzip
import json
import stat
from dataclasses import replace
from io import BytesIO
from itertools import chain

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoTokenizer

from fedpft_flower.columns import with_texts
from fedpft_flower.config import DataConfig, FedPFTError, PartitionConfig
from fedpft_flower.docstrings import LIBRARIES, load_docstrings
from fedpft_flower.encoding import content_hash, encode
from fedpft_flower.images import decoded_images
from fedpft_flower.partitions import load_partition
from fedpft_flower.public import _sentences, load_public
from fedpft_flower.reading import _read_hub, read_splits
from fedpft_flower.tasks import load_site, load_task, source_of

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


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_file_formats_give_the_same_rows(tmp_path, suffix):
    records = [
        dict(zip(("text", "label"), row.split(","), strict=True)) for row in ROWS
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix.startswith("csv"):
        write_csv(path, ROWS)
    elif suffix.startswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        Dataset.from_list(records).to_parquet(path)
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    task = load_task(DataConfig(task="text", path=str(path)), 0)
    splits = (task.train, task.validation, task.test)
    assert sorted(text for split in splits for text in split["text"]) == sorted(
        record["text"] for record in records
    )


def test_a_text_beside_a_table_changes_nothing(tmp_path):
    write_csv(tmp_path / "rows.csv", [f"film {i},{i % 2}.0" for i in range(40)])
    alone = load_task(DataConfig(task="text", path=str(tmp_path)), 0)
    (tmp_path / "LICENSE.txt").write_text("all rights\n")
    beside = load_task(DataConfig(task="text", path=str(tmp_path)), 0)
    assert sorted(beside.labels) == sorted(alone.labels)
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "corpus" / name).write_text("one\ntwo\n")
    (tmp_path / "corpus" / "index.csv").write_text("file\na\nb\n")
    config = DataConfig(
        task="text", path="unused", public_path=str(tmp_path / "corpus")
    )
    assert len(load_public(config, 0)) == 4


def test_a_text_file_is_a_row_a_line(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one line\n\nand another\n")
    config = DataConfig(task="text", path="unused", public_path=str(path))
    assert sorted(load_public(config, 0)["text"]) == ["and another", "one line"]


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
        (
            {"test_split": "train", "validation_split": "train"},
            "both trained and tested",
        ),
        ({"path": "missing.csv"}, "does not exist"),
        ({"path": "some/where/else"}, "does not exist"),
        ({"min_words": 99}, "no training row is left"),
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
        (["good,1", "bad,"], "row 1 .counted from 0. of train has no label"),
        (["good,0.5", "bad,0.25"], "holds fractions such as 0.[25]"),
        (["good, film,1", "bad, film,0"], "more fields than the header"),
        ([], "cannot be read"),
        (["good,1", "bad,1"], "two or more"),
        (["good,0", "bad,1"], "too few to hold out"),
    ],
)
def test_gaps_and_too_little_data_are_refused(tmp_path, rows, said):
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(FedPFTError, match=said):
        load_task(DataConfig(task="text", path=path), 0)


def test_a_long_csv_file_may_change_its_mind_about_a_column(tmp_path):
    """`datasets` reads 10,000 rows at a time, and fixes types by the first of them."""
    rows = [f"text {i},{i % 2},{i},{i}" for i in range(10_500)]
    rows[10_200] = "text 10200,0,,3.5"
    path = write_csv(tmp_path / "a.csv", rows, header="text,label,votes,score")
    task = load_task(DataConfig(task="text", path=path), 0)
    assert task.labels == ("0", "1")
    assert len(task.train) + len(task.validation) + len(task.test) == 10_500
    rows[10_300] = "text 10300,,1,1"
    path = write_csv(tmp_path / "b.csv", rows, header="text,label,votes,score")
    with pytest.raises(FedPFTError, match=r"row 10300 .* of train has no label"):
        load_task(DataConfig(task="text", path=path), 0)


def test_a_long_json_file_may_change_its_mind_about_a_column(tmp_path):
    """`datasets` reads 10 MB at a time, and fixes types by the first of them."""
    rows = [
        {"text": "t" * 1000 + str(i), "label": i % 2, "votes": None} for i in range(60)
    ]
    rows = rows * 200
    rows[-1] = {**rows[-1], "votes": "some", "more": 1}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert path.stat().st_size > 11 << 20
    task = load_task(DataConfig(task="text", path=str(path)), 0)
    assert len(task.train) + len(task.validation) + len(task.test) == len(rows)


def test_a_test_split_with_a_blank_column_of_labels_has_none(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [f"text {i}," for i in range(30)])
    task = load_task(DataConfig(task="text", path=str(tmp_path)), 0)
    assert "10% of train" in task.notes["test"]


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
        encode(task.train, processor, "image", DataConfig()).batch([0])


def test_an_image_too_large_to_open_is_told_by_its_row(monkeypatch):
    """Pillow refuses those that would fill the memory, by an error of its own."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    images = [{"bytes": png(size), "path": None} for size in (2, 5)]
    rows = Dataset.from_dict({"image": images}).cast_column("image", ImageFeature())
    with pytest.raises(FedPFTError, match=r"row 1 .* cannot be decoded"):
        decoded_images(rows, [0, 1])


def png(size):
    image = BytesIO()
    Image.new("RGB", (size, size)).save(image, "png")
    return image.getvalue()


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
    rows = Dataset.from_dict({"line": ["a", " ", None, "", "b", "\u3000"]})
    rows.select([5, 4, 3, 2, 1, 0]).save_to_disk(tmp_path / "gaps")
    gaps = replace(config, public_path=str(tmp_path / "gaps"))
    assert sorted(load_public(gaps, 0)["text"]) == ["a", "b"]
    assert with_texts(rows.select([4, 1, 0]), ["line"])["line"][:] == ["b", "a"]
    with pytest.raises(FedPFTError, match="alignment needs a public corpus"):
        load_public(DataConfig(task="text", path="unused"), 0)


def test_a_budget_of_tokens_spares_most_of_a_corpus(tmp_path):
    texts = ["word " * (1 + i % 9) for i in range(900)]
    path = tmp_path / "p.parquet"
    Dataset.from_dict({"text": texts}).to_parquet(path)
    config = DataConfig(
        task="text", path="unused", public_path=str(path), public_rows=0
    )
    found = load_public(replace(config, public_tokens=100), 0)["text"][:]
    words = [len(text.split()) for text in found]
    assert 100 <= sum(words) < 100 + 9
    assert max(words) > 5 and found != texts[: len(found)]  # drawn at random
    cut = load_public(replace(config, public_tokens=100, max_length=2), 0)
    assert 50 <= len(cut) < 60
    whole = replace(config, public_tokens=100, max_length=2, public_long="blocks")
    assert len(load_public(whole, 0)) == len(found)


def test_digits_public_images_are_apart():
    task, public = load_task(DIGITS, 0), load_public(DIGITS, 0)
    assert len(task.train) == 1000 and len(public) == 300
    assert set(public.column_names) == {"image"}
    with pytest.raises(FedPFTError, match=r"bounds public texts.* data.public-rows"):
        load_public(replace(DIGITS, public_tokens=9), 0)


def test_pairs_are_encoded_together(bert_directory, tmp_path):
    rows = [f"good film,bad film {i},{i % 2}" for i in range(40)]
    path = write_csv(tmp_path / "a.csv", rows, header="q,a,label")
    task = load_task(DataConfig(task="text", path=path, text_columns="q,a"), 0)
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    batch = encode(task.train, tokenizer, "text", DataConfig(max_length=32)).batch([0])
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
    batch = encode(task.train, processor, "image", DataConfig()).batch([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32


def test_a_folder_called_images_below_each_class_is_looked_through(tmp_path, caplog):
    """The layout of Tiny-ImageNet, whose other splits name their classes in a file."""
    from PIL import Image as Picture

    sizes = {"train/cat": 20, "train/dog": 20, "val": 5}
    for place, (folder, count) in enumerate(sizes.items()):
        (tmp_path / folder / "images").mkdir(parents=True)
        for i in range(count):
            picture = Picture.new("RGB", (8, 8), color=(place, i, 0))
            picture.save(tmp_path / folder / "images" / f"{i}.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tcat\n")
    config = DataConfig(task="image", path=str(tmp_path))
    task = load_task(config, 0)
    assert task.labels == ("cat", "dog")
    assert len(task.train) + len(task.validation) + len(task.test) == 40
    for part in (task.train, task.validation, task.test):
        for row in part:
            assert row["image"].convert("RGB").getpixel((0, 0))[0] == row["label"]
    assert "'validation' has no folder for each class: left out" in caplog.text
    one = DataConfig(task="image", path=str(tmp_path / "train" / "dog"))
    assert source_of(one, "data.path")["train"].features["label"].names == ["dog"]


def test_pair_of_directories_that_datasets_saved(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    task = load_task(DataConfig(task="text", path=path), 0)
    splits = {"train": task.train, "test": task.test}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    task.train.save_to_disk(tmp_path / "one")
    both = load_task(DataConfig(task="text", path=str(tmp_path / "both")), 0)
    assert sorted(both.test["text"]) == sorted(task.test["text"])
    one = load_task(DataConfig(task="text", path=str(tmp_path / "one")), 0)
    assert len(one.train) + len(one.validation) + len(one.test) == len(task.train)


def test_hub_data_is_read_split_by_split(tmp_path):
    """A directory stands for the hub, which flwr-datasets reads in the same way."""
    path = write_splits(tmp_path, train=[0, 1] * 4, test=[1, 0])
    found = _read_hub(path, "")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 8, "test": 2}


def test_a_public_corpus_on_a_hub_is_streamed(tmp_path, monkeypatch):
    """A directory stands for the hub, which `datasets` streams in the same way."""
    write_splits(tmp_path, train=[0, 1] * 200)
    monkeypatch.setattr("fedpft_flower.public.is_on_hub", lambda path: True)
    monkeypatch.setattr("fedpft_flower.public.source_of", None)  # not read whole
    config = DataConfig(
        task="text",
        path="unused",
        public_path=str(tmp_path),
        public_column="s",
        public_rows=30,
    )
    texts = load_public(config, 0)["text"][:]
    assert len(texts) == 30
    assert load_public(config, 0)["text"][:] == texts
    assert load_public(config, 1)["text"][:] != texts
    # Texts such as "train 17", of two words: a budget needs half as many rows.
    budget = replace(config, public_rows=0, public_tokens=50)
    assert len(load_public(budget, 0)) == 25
    assert len(load_public(replace(budget, public_rows=10), 0)) == 10
    assert len(load_public(replace(budget, public_tokens=10**6), 0)) == 400
    with pytest.raises(FedPFTError, match=r"no column 'z2'; this data has s, y, z"):
        load_public(replace(budget, public_column="z2"), 0)
    with pytest.raises(FedPFTError, match=r"data.public-path = .* \(.*odd.*\)"):
        load_public(replace(config, public_split="odd"), 0)
    images = load_task(DIGITS, 0).train.select(range(20))
    DatasetDict({"train": images}).save_to_disk(tmp_path / "saved")
    images.to_parquet(tmp_path / "images" / "train.parquet")
    config = replace(
        config,
        task="image",
        public_path=str(tmp_path / "images"),
        public_column="image",
        public_rows=5,
    )
    found = load_public(config, 0)
    assert len(found) == 5
    assert found[0]["image"].size == images[0]["image"].size


def test_a_server_may_hold_no_training_rows(tmp_path):
    path = write_splits(tmp_path, validation=[1, 0] * 5, test=[0, 1] * 6)
    task = load_task(DataConfig(path=path, **COLUMNS), 0)
    assert task.train is None
    assert task.labels == ("no", "yes")
    assert [len(task.validation), len(task.test)] == [10, 12]
    with pytest.raises(FedPFTError, match=r"no split 'train'.*data-path"):
        load_partition(DataConfig(path=path, **COLUMNS), PartitionConfig(), 0, 2, 0)
    (tmp_path / "test.parquet").unlink()
    task = load_task.__wrapped__(DataConfig(path=path, **COLUMNS), 0)
    assert task.train is None
    assert [len(task.validation), len(task.test)] == [5, 5]
    assert "half of validation" in task.notes["test"]


def test_splits_of_other_names_are_asked_for(tmp_path):
    rows = Dataset.from_dict({"s": ["a", "b"] * 30, "y": [0, 1] * 30})
    DatasetDict({"mine": rows, "held": rows}).save_to_disk(tmp_path)
    config = DataConfig(path=str(tmp_path), **COLUMNS)
    with pytest.raises(FedPFTError, match=r"the splits mine, held; say what they are"):
        load_task(config, 0)
    assert len(load_task(replace(config, train_split="mine"), 0).train) == 48


def test_usual_names_of_a_validation_split_are_known(tmp_path):
    parts = {"train": [0, 1] * 30, "valid": [0, 1] * 4, "test": [1, 0] * 3}
    rows = {
        n: Dataset.from_dict({"s": ["a"] * len(y), "y": y}) for n, y in parts.items()
    }
    DatasetDict(rows).save_to_disk(tmp_path)
    task = load_task(DataConfig(path=str(tmp_path), **COLUMNS), 0)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [60, 8, 6]
    both = DataConfig(path=str(tmp_path), test_split="test,valid", **COLUMNS)
    assert [len(s) for s in load_task(both, 0).more_tests.values()] == [8]


def test_tables_that_are_named_by_their_splits_are_read_apart(tmp_path):
    """`datasets` would make one split of both, and asks for the same columns."""
    write_splits(tmp_path, train=[0, 1] * 30, validation_matched=[0, 1] * 4)
    write_splits(tmp_path, validation_mismatched=[1, 0] * 3)
    (tmp_path / "train.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    write_splits(tmp_path, train=[0, 1] * 10)
    (tmp_path / "train.parquet").rename(tmp_path / "train-00001-of-00002.parquet")
    Dataset.from_dict({"s": ["x"]}).to_parquet(tmp_path / "test.parquet")
    config = DataConfig(path=str(tmp_path), **COLUMNS)
    splits = "validation_matched,validation_mismatched"
    task = load_task(replace(config, test_split=splits), 0)
    assert len(task.train) + len(task.validation) == 80
    assert [len(task.test), len(task.more_tests["validation_mismatched"])] == [8, 6]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train test", "train test"),
        ("train train_extra dev", "train validation"),
        ("train_data test_data", "train test"),
        ("train_v2 test_v2", "train test"),
        ("train-00000-of-00002 train-00001-of-00002", "train"),
        ("train dev_matched dev_mismatched", "train dev_matched dev_mismatched"),
        ("train validation_a_0 validation_a_1 validation_b_0", None),
    ],
)
def test_which_split_a_table_is(tmp_path, names, splits):
    for name in names.split():
        write_csv(tmp_path / f"{name}.csv", [f"{name},a"])
    found = read_splits(str(tmp_path), "data.path")
    rows = {split: sorted(part["text"]) for split, part in found.items()}
    if splits is None:
        assert rows["validation_a"] == ["validation_a_0", "validation_a_1"]
        assert rows["validation_b"] == ["validation_b_0"]
    else:
        assert set(rows) == set(splits.split())
    assert sorted(chain(*rows.values())) == sorted(names.split())


def test_a_directory_that_describes_itself_is_read_as_it_says(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n---\n"
    (tmp_path / "README.md").write_text(card)
    write_csv(tmp_path / "train.csv", ["x,a"])
    write_csv(tmp_path / "test.csv", ["y,a"])
    assert set(read_splits(str(tmp_path), "data.path")) == {"train"}
    with pytest.raises(FedPFTError, match="'sst2' not found"):
        read_splits(str(tmp_path), "data.path", subset="sst2")


def test_a_hubs_subset_means_nothing_to_a_site_with_plain_files(tmp_path):
    write_csv(tmp_path / "train.csv", ["x,a", "y,b"])
    for place in (tmp_path, tmp_path / "train.csv"):
        config = DataConfig(task="text", path=str(place), subset="sst2")
        assert load_site(config, ("a", "b"), 0)["label"][:] == [0, 1]


def test_a_directory_of_csv_files_is_read_as_a_file_is(tmp_path):
    rows = [f"text {i};{('NA', 'None')[i % 2]}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text;label", *rows]))
    (tmp_path / "dev.csv").write_text("\n".join(["text;label", *rows[:6]]))
    config = DataConfig(task="text", path=str(tmp_path), separator=";")
    task = load_task(config, 0)
    assert task.labels == ("NA", "None")
    assert [len(task.train), len(task.test)] == [36, 6]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").rename(tmp_path / f"odd-{name}-rows.csv")
    assert load_task.__wrapped__(config, 0).labels == ("NA", "None")


def test_the_label_set_is_that_of_the_rows_to_train_on(tmp_path):
    """A rare class may be missing in the others, whichever is looked at first."""
    for name, labels in (("train", "abc"), ("validation", "ab"), ("test", "ba")):
        rows = [f"text {i},{label}" for i, label in enumerate(labels * 20)]
        write_csv(tmp_path / f"{name}.csv", rows)
    config = DataConfig(task="text", path=str(tmp_path))
    assert load_task(config, 0).labels == ("a", "b", "c")
    named = replace(config, labels="c,b,a,d")
    assert load_task(named, 0).labels == ("c", "b", "a", "d")
    (tmp_path / "train.csv").unlink()
    write_csv(tmp_path / "test.csv", [f"text {i},{'bd'[i % 2]}" for i in range(20)])
    assert load_task.__wrapped__(config, 0).labels == ("a", "b", "d")


def test_rows_whose_class_is_withheld_are_left_out(tmp_path, caplog):
    path = write_splits(tmp_path, train=[0, 1, -1] * 20, test=[1, 0, -1])
    task = load_task(DataConfig(path=path, **COLUMNS), 0)
    assert len(task.train) + len(task.validation) == 40
    assert task.test["label"][:] == [1, 0]
    assert "20 rows of train have no label (-1): left out" in caplog.text


def test_further_test_splits_are_loaded_apart(tmp_path):
    labels = {"train": [0, 1] * 30, "matched": [0, 1] * 4, "mismatched": [1, 0] * 3}
    splits = {
        name: Dataset.from_dict({"s": [f"{name} {i}" for i in range(len(y))], "y": y})
        for name, y in labels.items()
    }
    DatasetDict(splits).save_to_disk(tmp_path)
    config = DataConfig(path=str(tmp_path), **COLUMNS)
    task = load_task(replace(config, test_split="matched,mismatched"), 0)
    assert len(task.test) == 8
    assert {name: len(rows) for name, rows in task.more_tests.items()} == {
        "mismatched": 6
    }
    assert task.notes["test"] == "matched"
    assert task.more_tests["mismatched"]["label"][:2] == [1, 0]
    few = load_task(
        replace(config, test_split="matched,mismatched", max_test_rows=2), 0
    )
    assert [len(few.test), len(few.more_tests["mismatched"])] == [2, 2]
    for names, said in (
        ("matched,odd", r"data.test-split = 'odd'; this data has"),
        ("matched,train", "'train', which has another use"),
        ("matched,mismatched,mismatched", "'mismatched', which has another use"),
    ):
        with pytest.raises(FedPFTError, match=said):
            load_task(replace(config, test_split=names), 0)


# ----------------------------------------------------------------------- rows of a site


def test_a_site_reads_its_own_rows_with_the_labels_of_the_server(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["fine,good", "poor,bad", "great,good"])
    config = DataConfig(task="text", path=path)
    rows = load_site(config, ("good", "bad", "unseen"), 0)
    assert rows["label"][:] == [0, 1, 0]
    with pytest.raises(FedPFTError, match=r"label 'good' in train is outside.*bad, so"):
        load_site(config, ("bad", "so-so"), 0)
    with pytest.raises(FedPFTError, match="is not used by"):
        load_site(replace(config, task="digits"), ("bad", "good"), 0)
    with pytest.raises(FedPFTError, match=r"data-path = .* does not exist"):
        load_site(replace(config, path=str(tmp_path / "b.csv")), ("bad", "good"), 0)
    with pytest.raises(FedPFTError, match="no training row is left"):
        load_site(replace(config, min_words=3), ("bad", "good"), 0)


# ---------------------------------------------------------------- files as they come


def test_a_split_plays_one_role_only(tmp_path):
    """What is asked for as train is not found again as test under its own name."""
    path = write_splits(tmp_path, validation=[0, 1] * 40, test=[1, 0] * 50)
    task = load_task(DataConfig(path=path, train_split="test", **COLUMNS), 0)
    assert task.notes == {
        "train": "test",
        "test": "validation",
        "validation": "10% of test, seeded",
    }
    assert not set(task.train["text"]) & {*task.test["text"], *task.validation["text"]}
    task = load_task(DataConfig(path=path, validation_split="test", **COLUMNS), 0)
    assert not set(task.validation["text"]) & set(task.test["text"])


def test_a_split_asked_for_by_name_must_have_labels(tmp_path):
    path = write_splits(tmp_path, train=[0, 1] * 30, extra=[-1] * 9)
    rows = load_dataset(
        path, data_files={"train": "train.parquet", "x": "extra.parquet"}
    )
    rows.save_to_disk(tmp_path / "both")
    config = DataConfig(path=str(tmp_path / "both"), test_split="x", **COLUMNS)
    with pytest.raises(FedPFTError, match=r"data.test-split = 'x' has no labels"):
        load_task(config, 0)


@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        ("a.CSV", [f"None {i},{('NA', 'None')[i % 2]}" for i in range(60)], {}),
        (
            "a.csv",
            [f"a, b {i};{('x', 'y')[i % 2]}" for i in range(60)],
            {"separator": ";"},
        ),
        ("a.tsv", [f"a, b {i}\t{('x', 'y')[i % 2]}" for i in range(60)], {}),
        ("a.csv", [f",{('x', 'y')[i % 2]}" for i in range(60)], {}),
    ],
)
def test_csv_files_of_many_kinds(tmp_path, name, rows, settings):
    between = settings.get("separator", "\t" if name.endswith("tsv") else ",")
    path = write_csv(tmp_path / name, rows, f"text{between}label")
    task = load_task(DataConfig(task="text", path=path, **settings), 0)
    assert len(task.train) + len(task.validation) + len(task.test) == 60
    assert len(task.labels) == 2
    assert {text.split(between)[0] for text in task.train["text"]} <= {
        row.split(between)[0] for row in rows
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\nfilm äöü,1\n".encode("latin-1"), "save it as UTF-8"),
        (b"", "it has no rows"),
        (b"text;label\na, b;1\na, b, c;0\n", "quote texts, or set data.separator"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(FedPFTError) as caught:
        load_task(DataConfig(task="text", path=str(tmp_path / "a.csv")), 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_the_same_labels_however_they_were_read(tmp_path):
    integers = write_csv(tmp_path / "a.csv", ["x,0", "y,1", "z,1"])
    floats = write_csv(tmp_path / "b.csv", ["x,0.0", "y,1.0", "z,1.0"])
    for path in (integers, floats):
        rows = load_site(DataConfig(task="text", path=path), ("0", "1"), 0)
        assert rows["label"][:] == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0.0, float("nan")] * 9, "row 1 .* has no label"), ([["a"], ["b"]] * 9, "holds")],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, said):
    texts = [f"text {i}" for i in range(len(labels))]
    Dataset.from_dict({"text": texts, "label": labels}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(FedPFTError, match=said):
        load_task(DataConfig(task="text", path=str(tmp_path / "a.parquet")), 0)


def test_a_node_never_asks_a_hub(monkeypatch):
    monkeypatch.setattr("fedpft_flower.reading._read_hub", None)
    with pytest.raises(FedPFTError, match=r"data-path = 'owner/name' does not exist"):
        load_site(DataConfig(task="text", path="owner/name"), ("a", "b"), 0)


def test_copies_of_rows_are_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    path = write_csv(tmp_path / "a.csv", ROWS)
    load_task.__wrapped__(DataConfig(task="text", path=path), 0)
    assert stat.S_IMODE((tmp_path / "cache" / "rows").stat().st_mode) == 0o700
    assert list((tmp_path / "cache" / "rows").rglob("*.arrow"))


def test_a_folder_of_images_of_one_class_is_a_site(tmp_path):
    from PIL import Image as Picture

    (tmp_path / "dog").mkdir()
    for i in range(3):
        Picture.new("L", (9, 9)).save(tmp_path / "dog" / f"{i}.png")
    config = DataConfig(task="image", path=str(tmp_path))
    assert load_site(config, ("cat", "dog"), 0)["label"][:] == [1, 1, 1]


def public_of(tmp_path, column="text", **rows):
    path = str(tmp_path / "public.csv")
    pandas.DataFrame(rows).to_csv(path, index=False)
    config = DataConfig(
        task="text",
        path="unused",
        text_columns="question,sentence",
        public_path=path,
        public_column=column,
    )
    return load_public(config, 0)


def test_public_texts_become_pairs_for_a_task_of_pairs(tmp_path):
    texts = [f"{n} first. {n} second! {n} third?" for n in ("a", "b", "c", "d", "e")]
    public = public_of(tmp_path, text=[*texts, "one single line"])
    assert sorted(public.column_names) == ["text", "text_pair"]
    together = 0
    for place, (one, other) in enumerate(
        zip(public["text"], public["text_pair"], strict=True)
    ):
        if one == "one single":
            continue
        source, order = one.split()
        assert order in ("first.", "second!")
        if place % 2:  # the second one is another text's
            assert other.split()[0] != source
        else:
            following = {"first.": "second!", "second!": "third?"}[order]
            assert other in (f"{source} {following}", "line")
            together += other != "line"
    assert together >= 2
    again = public_of(tmp_path, text=[*texts, "one single line"])
    assert again["text_pair"] == public["text_pair"]


def test_public_pairs_are_taken_as_they_are(tmp_path):
    columns = {"q": ["one?", "two?", " "], "s": ["1", "2", "3"]}
    public = public_of(tmp_path, "q,s", **columns)
    assert sorted(zip(public["text"], public["text_pair"], strict=True)) == [
        ("one?", "1"),
        ("two?", "2"),
    ]
    with pytest.raises(FedPFTError, match="name one column, or two of texts"):
        public_of(tmp_path, "q,s,t", **columns)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It is 6.5 m (a.b). Yes.", ["It is 6.5 m (a.b).", "Yes."]),
        ("one two three", ["one two", "three"]),
        ("word", ["word", "word"]),
        ("他来了。她走了。", ["他来了。", "她走了。"]),
    ],
)
def test_sentences(text, parts):
    assert _sentences(text) == parts
