"""Data as they are found: the run says what it does with them, or reads them right."""

import csv
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image as Picture
from transformers import AutoTokenizer

from fedpft_flower.columns import labels_of, texts_in_common
from fedpft_flower.config import Config, DataConfig, FedPFTError
from fedpft_flower.disk import existing_path
from fedpft_flower.encoding import encode
from fedpft_flower.foundation import source_of_fm
from fedpft_flower.loading import _apart, tell_task
from fedpft_flower.public import load_public
from fedpft_flower.reading import read_splits
from fedpft_flower.run_directory import RunDirectory
from fedpft_flower.tasks import TaskData, load_site, load_task


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def draw(root, *places, count=6):
    """Write images into folders; the red of each says which folder it is in."""
    for number, place in enumerate(places):
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Picture.new("RGB", (8, 8), color=(number, i, 0))
            picture.save(root / place / f"{i}.png")
    return str(root)


# ------------------------------------------------------------------ folders and caches


def test_a_folder_that_one_may_not_look_into_is_told(tmp_path, monkeypatch):
    """Its rows would be missing without a word."""
    place, real = draw(tmp_path, "cat", "dog"), os.scandir

    def guarded(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(FedPFTError, match="/dog lies where the user that runs"):
        read_splits(place, "data.path", "image")


def test_a_cached_copy_that_was_cut_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    first = read_splits(path, "data.path")["train"]["text"][:]
    (kept,) = (tmp_path / "cache" / "rows").rglob("*.arrow")
    for size in (kept.stat().st_size // 2, 0):
        os.truncate(kept, size)
        assert read_splits(path, "data.path")["train"]["text"][:] == first


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(FedPFTError, match="set FEDPFT_CACHE to a directory"):
        read_splits(path, "data.path")


# ------------------------------------------------------------------------------- labels


def test_a_null_among_texts_as_labels_is_named(tmp_path):
    rows = [{"text": f"text {i}", "label": ("a", "b")[i % 2]} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", [*rows, {"text": "x", "label": None}])
    with pytest.raises(FedPFTError, match=r"row 60 .* of train has no label"):
        load_task(DataConfig(task="text", path=path), 0)


def test_labels_that_are_one_number_have_one_order_in_every_process():
    program = (
        "from fedpft_flower.columns import in_order\n"
        "print(in_order({'1', '01', '001', '2', '02', '0'}))"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert orders == {"('0', '001', '01', '1', '02', '2')\n"}


@pytest.mark.parametrize(
    ("configured", "written"),
    [("0.5,1.0,1.5", [0.5, 1.0, 1.5]), ("01,02,10", [1, 2, 10])],
)
def test_numbers_are_configured_as_they_stand_in_the_data(
    tmp_path, configured, written
):
    rows = [{"text": f"t {i}", "stars": written[i % 3]} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = DataConfig(task="text", path=path, labels=configured, label_column="stars")
    task = load_task(config, 0)
    assert task.labels == tuple(configured.split(","))
    for row in task.train:
        assert written[row["label"]] == written[int(row["text"].split()[1]) % 3]


def test_labels_of_other_types_stay_as_they_are_written(tmp_path):
    values = [Decimal("1.0"), Decimal("2.5")] * 30
    rows = {"text": [f"t {i}" for i in range(60)], "label": values}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert load_task(DataConfig(task="text", path=path), 0).labels == ("1.0", "2.5")


def test_a_refused_column_of_labels_is_called_as_in_the_data(tmp_path):
    rows = [{"text": f"t {i}", "price": i / 8} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = DataConfig(task="text", path=path, label_column="price")
    with pytest.raises(FedPFTError, match=r"data.label-column = 'price' holds"):
        load_task(config, 0)
    lists = Dataset.from_dict({"label": [["a"], ["b"]]})
    with pytest.raises(FedPFTError, match=r"'tags' holds"):
        labels_of(lists, "label", "tags")


def test_nothing_is_written_beside_a_saved_data_set(tmp_path):
    rows = [{"text": f"t {i}", "label": "xy"[i % 2]} for i in range(60)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    task = load_task(DataConfig(task="text", path=str(tmp_path / "saved")), 0)
    assert len(task.train) + len(task.validation) + len(task.test) == 60
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_tells_its_rows_its_labels_and_which_are_alike(tmp_path, caplog):
    rows = [
        {"text": f"t {i}", "label": ("yes", "Yes ", "no")[i % 3]} for i in range(60)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = Config.from_run_config({"data.task": "text", "data.path": path})
    caplog.set_level("INFO")
    tell_task(load_task(config.data, 0), config)
    assert "test: 6 rows (10% of train, seeded)" in caplog.text
    assert "3 labels: Yes , no, yes" in caplog.text
    assert "labels 'Yes ' and 'yes' differ in case or blanks alone" in caplog.text


# ------------------------------------------------------------------------------- images


@pytest.mark.parametrize("odd", ["train", "train_station", "test_tube", "dev"])
def test_a_class_may_be_called_like_a_split(tmp_path, odd):
    path = draw(tmp_path, "train/bus", f"train/{odd}", "test/bus", f"test/{odd}")
    found = read_splits(path, "data.path", "image")
    assert {split: len(part) for split, part in found.items()} == {
        "train": 12,
        "test": 12,
    }
    alone = draw(tmp_path / "alone", "bus", odd)
    (part,) = read_splits(alone, "data.path", "image").values()
    assert part.features["label"].names == sorted(["bus", odd])
    assert len(part) == 12


@pytest.mark.parametrize(
    "stray", ["unlabelled/a", ".hidden/train", "__MACOSX/train", ""]
)
def test_what_lies_beside_splits_of_images_is_left_out(tmp_path, stray, caplog):
    places = [f"{split}/{name}" for split in ("train", "test") for name in ("a", "b")]
    draw(tmp_path / "odd [1]" / "inner", *places)
    draw(tmp_path / "odd [1]" / "inner", stray, count=2)
    found = read_splits(str(tmp_path), "data.path", "image")
    assert {split: len(part) for split, part in found.items()} == {
        "train": 12,
        "test": 12,
    }
    assert found["train"].features["label"].names == ["a", "b"]
    assert ("left out" in caplog.text) == (not stray.startswith((".", "__")))


def test_splits_of_images_may_have_long_names(tmp_path):
    places = [f"{split}/{name}" for split in ("train", "test-clean") for name in "ab"]
    path = draw(tmp_path, *places, "test-other/a")
    found = read_splits(path, "data.path", "image")
    assert set(found) == {"train", "test-clean", "test-other"}


def test_a_site_may_have_one_class_and_others_in_its_test(tmp_path):
    path = draw(tmp_path, "train/a", "test/a", "test/b")
    rows = load_site(DataConfig(task="image", path=path), ("a", "b"), 0)
    assert len(rows) == 6
    assert len(read_splits(path, "data.path", "image")["test"]) == 12


def test_a_file_may_be_called_like_a_split(tmp_path):
    path = draw(tmp_path, "cat", "dog")
    Picture.new("RGB", (8, 8)).save(tmp_path / "cat" / "test.png")
    Picture.new("RGB", (8, 8)).save(tmp_path / "dog" / "val-01.png")
    found = read_splits(path, "data.path", "image")
    assert {split: len(part) for split, part in found.items()} == {"train": 14}


@pytest.mark.parametrize("only", [False, True])
def test_a_class_that_is_a_link_is_refused(tmp_path, only):
    draw(tmp_path / "elsewhere", "dog")
    path = draw(tmp_path / "rows", *(() if only else ("cat",)))
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    with pytest.raises(FedPFTError, match="dog is a link, which is not foll") as caught:
        load_task(DataConfig(task="image", path=path), 0)
    assert "dog" not in caught.value.told
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    linked = str(tmp_path / "linked")
    assert len(read_splits(linked, "data.path", "image")["train"]) == 6


@pytest.mark.parametrize("unlabelled", ["test", "test/unknown"])
def test_images_without_classes_are_nothing_to_test_on(tmp_path, unlabelled, caplog):
    path = draw(tmp_path, "train/cat", "train/dog", unlabelled, count=20)
    task = load_task(DataConfig(task="image", path=path), 0)
    assert task.labels == ("cat", "dog")
    assert len(task.train) + len(task.validation) + len(task.test) == 40
    assert "'test' has no folder for each class: left out" in caplog.text
    for row in task.test:
        assert np.asarray(row["image"])[0, 0, 0] == row["label"]


@pytest.mark.parametrize("name", ["classes.csv", "notes.json", "train.csv", ".a.csv"])
def test_a_table_that_is_not_of_images_leaves_them_to_their_folders(
    tmp_path, name, caplog
):
    path = draw(tmp_path, "train/bus", "train/test_tube", "test/bus", "test/test_tube")
    (tmp_path / name).write_text("code,called\nb,bus\n")
    found = read_splits(path, "data.path", "image")
    assert {split: len(part) for split, part in found.items()} == {
        "train": 12,
        "test": 12,
    }
    assert found["train"].features["label"].names == ["bus", "test_tube"]
    assert ("has no column 'image' of images: left out" in caplog.text) == (
        name != ".a.csv"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_table_names_images_beside_it(tmp_path, whole, monkeypatch):
    """In folders that are no classes, wherever the process is."""
    draw(tmp_path / "set", "part_1", "part_2")
    for split, part in (("train", 1), ("test", 2)):
        rows = [f"part_{part}/{i}.png,{'xy'[i % 2]}" for i in range(6)]
        table = tmp_path / "set" / f"{split}.csv"
        table.write_text("\n".join(["file,kind", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    path = "set" if whole else str(tmp_path / "set" / "train.csv")
    config = DataConfig(task="image", image_column="file", label_column="kind")
    part = load_site(replace(config, path=path), ("x", "y"), 0)
    assert [np.asarray(row["image"])[0, 0].tolist() for row in part] == [
        [0, i, 0] for i in range(6)
    ]
    assert part["label"][:] == [0, 1] * 3
    if whole:
        test = read_splits(path, "data.path", "file")["test"]
        assert test["file"][0] == str(tmp_path / "set" / "part_2" / "0.png")


def test_tables_in_folders_name_images_of_their_own_folder(tmp_path):
    draw(tmp_path, "part_1", "part_2", count=2)
    for part in (1, 2):
        rows = [f"{i}.png,{part}" for i in range(2)]
        table = tmp_path / f"part_{part}" / "rows.csv"
        table.write_text("\n".join(["image,label", *rows]) + "\n")
    part = load_site(DataConfig(task="image", path=str(tmp_path)), ("1", "2"), 0)
    for row in part:
        assert row["image"].getpixel((0, 0))[0] == row["label"]
    assert len(part) == 4


def test_images_that_are_called_like_splits_decide_nothing_of_a_table(tmp_path):
    draw(tmp_path, "images/a", "images/test", count=2)
    Picture.new("RGB", (8, 8)).save(tmp_path / "images" / "dog_test_2.png")
    rows = ["images/a/0.png,x", "images/test/1.png,y", "images/dog_test_2.png,x"]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    found = read_splits(str(tmp_path), "data.path", "image")
    assert {split: len(part) for split, part in found.items()} == {"train": 3}
    assert found["train"]["label"][:] == ["x", "y", "x"]


def test_metadata_beside_images_are_read_as_datasets_does(tmp_path):
    path = draw(tmp_path, "train", count=4)
    rows = [f"{i}.png,{'xy'[i % 2]}" for i in range(4)]
    table = tmp_path / "train" / "metadata.csv"
    table.write_text("\n".join(["file_name,kind", *rows]) + "\n")
    part = load_site(
        DataConfig(task="image", path=path, label_column="kind"), ("x", "y"), 0
    )
    assert [row["image"].getpixel((0, 0))[1] for row in part] == [0, 1, 2, 3]
    assert part["label"][:] == [0, 1, 0, 1]


def test_a_column_of_images_that_no_table_has_is_named(tmp_path):
    (tmp_path / "train.csv").write_text("file,kind\n1.png,x\n2.png,y\n")
    config = DataConfig(task="image", path=str(tmp_path))
    with pytest.raises(FedPFTError, match="no column 'image'; this data has file, kin"):
        load_site(config, ("x", "y"), 0)


def test_splits_below_classes_are_refused(tmp_path):
    path = draw(
        tmp_path, *(f"{c}/{s}" for c in ("cat", "dog") for s in ("train", "test"))
    )
    with pytest.raises(FedPFTError, match=r"CLASS/SPLIT.* put them into SPLIT/CLASS"):
        load_task(DataConfig(task="image", path=path), 0)


# ------------------------------------------------------------------------------- tables


def test_quotes_in_a_tsv_file_are_signs_like_others(tmp_path):
    texts = [f'"He said {i}' if i % 7 == 0 else f"she said {i}" for i in range(60)]
    path = tmp_path / "a.tsv"
    rows = [f"{text}\t{i % 2}" for i, text in enumerate(texts)]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (part,) = read_splits(str(path), "data.path").values()
    assert part["text"][:] == texts
    assert part["label"][:] == [i % 2 for i in range(60)]


def test_quotes_in_a_tsv_file_may_hold_several_lines(tmp_path):
    texts = [f"first {i}\nsecond, \ttabbed" for i in range(9)]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("text", "label"), *((text, "x") for text in texts)])
    (part,) = read_splits(str(tmp_path / "a.tsv"), "data.path").values()
    assert part["text"][:] == texts


def test_quotes_that_hold_fields_hold_them(tmp_path):
    """One column of several lines, a blank row, a field that is long, all quoted."""
    files = {
        "a.tsv": (["text"], [["two\nlines"], ["one"]] * 5),
        "b.tsv": (["text", "label"], [["", ""], ["a", "x"], ["b", "y"]]),
        "c.tsv": (["text", "label"], [["word " * 40_000, "x"], ["b", "y"]]),
    }
    for name, (header, rows) in files.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
            writer.writerows([header, *rows])
        (part,) = read_splits(str(tmp_path / name), "data.path").values()
        assert part.column_names == header
        assert part["text"][:] == [row[0] for row in rows]


def test_quotes_mean_the_same_in_all_tables_of_a_directory(tmp_path):
    bare = [f'"He said {i}\t{i % 2}' for i in range(9)]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *bare]) + "\n")
    (tmp_path / "test.tsv").write_text('text\tlabel\n"all" is well\t1\n')
    found = read_splits(str(tmp_path), "data.path")
    assert found["train"]["text"][0] == '"He said 0'
    assert found["test"]["text"][:] == ['"all" is well']


def test_a_sample_to_submit_decides_nothing(tmp_path, caplog):
    (tmp_path / "train.csv").write_text("id,text,label\n1,a,x\n2,b,y\n")
    (tmp_path / "test.csv").write_text("id,text\n3,c\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n3,x\n")
    found = read_splits(str(tmp_path), "data.path")
    assert found["train"].column_names == ["id", "text", "label"]
    assert found["test"]["text"][:] == ["c"]
    assert "sample_submission.csv is called like no split: left out" in caplog.text


@pytest.mark.parametrize(
    "stray",
    ["._train.csv", ".ipynb_checkpoints/train.csv", "a_test.pdf", "test/LICENSE.txt"],
)
@pytest.mark.parametrize("table", ["sst_train.csv", "train/a [1].csv", "mine.csv"])
def test_what_lies_beside_a_table_changes_nothing_of_it(tmp_path, table, stray):
    """NA and None are words, and columns are texts until all rows have numbers."""
    for name, text in ((table, "text,label\nNA,1\nNone,x\n"), (stray, "\0\1,\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (part,) = read_splits(str(tmp_path), "data.path").values()
    assert part["text"][:] == ["NA", "None"] and part["label"][:] == ["1", "x"]


def test_splits_that_only_parts_of_names_tell_may_have_unlike_columns(tmp_path, caplog):
    place = tmp_path / "rows"
    place.mkdir()
    (place / "sst_train.csv").write_text("id,text,label\n1,a,x\n2,b,y\n")
    (place / "sst_test.csv").write_text("id,text\n3,c\n")
    (place / "more.csv").write_text("id\n4\n")
    (tmp_path / "link").symlink_to(place)
    found = read_splits(str(tmp_path / "rows" / ".." / "link"), "data.path")
    assert found["train"]["label"][:] == ["x", "y"]
    assert found["test"].column_names == ["id", "text"]
    assert "more.csv is called like no split: left out" in caplog.text


def test_texts_beside_one_table_are_the_rows(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    (tmp_path / "index.csv").write_text("file,year\n0.txt,1999\n")
    (part,) = read_splits(str(tmp_path), "data.path").values()
    assert sorted(part["text"][:]) == ["text 0", "text 1", "text 2"]


# --------------------------------------------------------------------------- generation


PROMPTS = {"task": "generation", "text_columns": "article,summary"}


@pytest.mark.parametrize("summary", ["absent", None, "  "])
def test_a_test_split_without_what_is_to_be_written_is_not_used(tmp_path, summary):
    rows = [{"article": f"long {i}", "summary": f"short {i}"} for i in range(60)]
    write_lines(tmp_path / "train.jsonl", rows)
    hidden = [{"article": f"other {i}", "summary": summary} for i in range(9)]
    if summary == "absent":
        hidden = [{"article": row["article"]} for row in hidden]
    write_lines(tmp_path / "test.jsonl", hidden)
    task = load_task(DataConfig(path=str(tmp_path), **PROMPTS), 0)
    assert len(task.train) + len(task.validation) + len(task.test) == 60
    assert task.notes["test"].endswith("of train, seeded")


def test_a_column_that_is_nowhere_is_named(tmp_path):
    rows = [{"article": f"long {i}", "summary": f"short {i}"} for i in range(9)]
    for split in ("validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    config = DataConfig("generation", str(tmp_path), text_columns="article,sumary")
    with pytest.raises(FedPFTError, match=r"no column 'sumary'; this data has article"):
        load_task(config, 0)


def test_how_many_rows_are_cut_is_counted(generator_directory):
    rows = Dataset.from_dict(
        {
            "prompt": ["good film", "good film good film good film", "a"],
            "response": ["bad", "bad", "bad film bad film bad film"],
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(generator_directory)
    config = DataConfig(task="generation", max_length=6, prompt_template="{prompt}")
    encoded = encode(rows, tokenizer, "text", config, "generate")
    long = [len(tokenizer(text)["input_ids"]) for text in rows["response"]]
    assert encoded.cut[1] == sum(length + 1 > 5 for length in long) == 1
    assert encoded.cut[0] == 1  # beside a short response a long prompt


# ------------------------------------------------------------- rows that stand twice


def test_texts_in_common():
    one = Dataset.from_dict({"text": ["a", "b", "a"], "text_pair": ["x", "y", "z"]})
    other = Dataset.from_dict(
        {"text_pair": ["x", "y"], "text": ["a", "x"], "n": [1, 2]}
    )
    assert texts_in_common(one, [other]).tolist() == [True, False, False]
    chosen = one.select([2, 0])
    assert texts_in_common(chosen, [other, one]).tolist() == [True, True]


def task_of_texts(train, test, labels=("a", "b")):
    parts = [
        Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
        for texts in (train, test[:1], test)
    ]
    return TaskData(*parts, labels=labels)


def test_nothing_public_is_also_judged_on(caplog):
    task = task_of_texts(["t"], ["held out", "other"])
    public = Dataset.from_dict({"text": ["public", "other", "held out", "t"]})
    assert _apart(public, task)["text"][:] == ["public", "t"]
    assert "2 of 4 public rows are also rows to validate or test on" in caplog.text
    caplog.clear()
    assert len(_apart(public.select([1, 2]), task)) == 2
    assert "every public row is also one to validate or test on" in caplog.text


def test_a_corpus_that_is_the_task_itself_keeps_no_test_row(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = DataConfig(task="text", path=path, public_path=path)
    task = load_task(config, 0)
    left = _apart(load_public(config, 0), task)
    assert sorted(left["text"]) == sorted(task.train["text"])


def test_repeats_and_a_column_that_holds_no_classes_are_told(caplog):
    task = task_of_texts(
        ["same", "b", "c"], ["same", "new"], tuple(map(str, range(20)))
    )
    config = Config(data=DataConfig(task="text", label_column="year"))
    tell_task(task, config)
    assert "1 of 2 rows of test have the texts of training rows" in caplog.text
    assert "20 labels for 3 training rows" in caplog.text and "'year'" in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    private = Config.from_run_config(
        {"privacy.mechanism": "server", "weighting": "uniform", "data.task": "text"}
    )
    tell_task(task, private)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "validation",
        "test",
        "20 labels",
    ]


# --------------------------------------------------------------------------- places


def test_a_place_that_one_may_not_look_at_is_told_from_one_that_is_not(
    tmp_path, monkeypatch
):
    real = Path.stat

    def stat(path, **options):
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    closed = str(tmp_path / "closed" / "rows.csv")
    with pytest.raises(FedPFTError, match="where the user that runs this may not look"):
        load_task(DataConfig(task="text", path=closed), 0)
    with pytest.raises(FedPFTError, match=r"fm.name = .* may not look"):
        source_of_fm(closed)
    config = Config(out_dir=str(tmp_path / "out"), resume=str(tmp_path / "closed"))
    with pytest.raises(FedPFTError, match=r"resume: .* may not look"):
        RunDirectory(config, 1)
    assert existing_path(closed) is None
    with pytest.raises(FedPFTError, match="does not exist"):
        load_task(DataConfig(task="text", path=str(tmp_path / "none.csv")), 0)
