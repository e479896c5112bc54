import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from fedpft_flower.commands import read_config
from fedpft_flower.config import (
    Config,
    FedPFTError,
    derive_seed,
    flat_defaults,
    flatten,
    names_in,
    nest,
)
from fedpft_flower.methods import METHODS, method_of
from fedpft_flower.public import load_public
from fedpft_flower.tasks import TASKS, load_task

ROOT = Path(__file__).parent.parent
CONFS = sorted((ROOT / "conf").glob("*.toml"))


def test_pyproject_holds_the_same_keys_types_and_defaults():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shown = flatten(project["tool"]["flwr"]["app"]["config"])
    defaults = flat_defaults()
    assert shown == defaults
    assert {k: type(v) for k, v in shown.items()} == {
        k: type(v) for k, v in defaults.items()
    }


def test_there_are_experiments():
    assert CONFS


@pytest.mark.parametrize("path", CONFS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_experiment_loads(path):
    config = read_config(path, [])
    assert config.method in METHODS
    assert config.data.task in TASKS


def test_flat_and_nested_round_trip():
    config = Config.from_run_config(
        {"rounds": 3, "train.lr": 1, "sub-fm.selection": "x"}
    )
    assert config.train.lr == 1.0
    assert Config.from_run_config(flatten(nest(config.flat()))) == config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.lr", "fast", "train.lr = 'fast' is str; give a float"),
        ("rounds", 2.5, "rounds = 2.5 is float; give a int"),
        ("rounds", True, "rounds = True is bool"),
        ("rounds", 0, "rounds = 0 is outside"),
        ("train.lr", float("nan"), "train.lr = nan"),
        ("sub-fm.keep-fraction", 0.0, "sub-fm.keep-fraction"),
        ("sub-fm.keep-fraction", 1.5, "sub-fm.keep-fraction"),
        ("sub-fm.whole-layers", "0,last", "'last' is not a layer number"),
        ("align.proportion", 2.0, "align.proportion"),
        ("align.steps", 0, "align.steps, align.tokens, align.seconds are all 0"),
        ("partition.kind", "iidd", "choose one of iid, dirichlet"),
        ("train.lrr", 1.0, "unknown configuration key 'train.lrr'; did you mean"),
        ("train.batch-size", 0, "train.batch-size"),
        ("fm.name", "", "fm.name is empty; give a directory, a hub name, or 'minilm'"),
    ],
)
def test_nonsense_is_refused_in_one_line(key, value, said):
    with pytest.raises(FedPFTError) as caught:
        Config.from_run_config({key: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_are_laid_over_the_file(tmp_path):
    conf = tmp_path / "x.toml"
    conf.write_text('method = "fedpft-n"\n[train]\nlr = 0.5\n')
    config = read_config(conf, ["rounds=7", "train.lr-decay=none", 'data.labels="a,b"'])
    assert (config.method, config.rounds, config.train.lr) == ("fedpft-n", 7, 0.5)
    assert (config.train.lr_decay, config.data.labels) == ("none", "a,b")


@pytest.mark.parametrize("pair", ["rounds", "=3"])
def test_a_broken_pair_is_refused(tmp_path, pair):
    conf = tmp_path / "x.toml"
    conf.write_text("")
    with pytest.raises(FedPFTError, match="key=value"):
        read_config(conf, [pair])


def test_broken_toml_and_missing_file_are_refused(tmp_path):
    broken = tmp_path / "x.toml"
    broken.write_text("method = ")
    for path in (broken, tmp_path / "none.toml"):
        with pytest.raises(FedPFTError, match="cannot read"):
            read_config(path, [])


def test_unknown_method_names_the_known_ones():
    with pytest.raises(FedPFTError, match="fedpft-n"):
        method_of(Config(method="fedprox"))


def test_every_method_names_its_paper():
    assert all("arXiv" in row.paper for row in METHODS.values())


def test_seeds_of_different_purposes_differ():
    seeds = {derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a")}
    assert len(seeds) == 3
    assert derive_seed(0, "a") == derive_seed(0, "a")


@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_every_conf_is_a_run_that_a_copy_of_its_data_can_have(path, tmp_path):
    """Data of the same columns stand for what is on the hub."""
    config = read_config(path, [])
    if config.data.task not in ("text", "image"):
        pytest.skip(f"data.task = {config.data.task!r} reads no such columns")
    data, kinds = (
        config.data,
        {"text": "some words here", "image": Image.new("RGB", (8, 8))},
    )
    kind = "image" if data.task == "image" else "text"
    inputs = names_in(data.image_column if kind == "image" else data.text_columns)
    values = {column: [kinds[kind]] * 40 for column in inputs}
    rows = Dataset.from_dict({**values, data.label_column: [0, 1] * 20})
    tests = names_in(data.test_split)
    splits = {"train": rows, **dict.fromkeys(tests, rows)}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    public = Dataset.from_dict({data.public_column or kind: [kinds[kind]] * 30})
    DatasetDict({"train": public}).save_to_disk(tmp_path / "public")
    here = replace(
        data,
        path=str(tmp_path / "data"),
        subset="",
        public_path=str(tmp_path / "public"),
        public_subset="",
    )
    task = load_task(here, config.seed)
    assert [len(task.test), *map(len, task.more_tests.values())] == [40] * len(tests)
    found = load_public(here, config.seed)
    assert len(found) == 30
    assert ("text_pair" in found.column_names) == (len(inputs) == 2)
