"""Random configurations end in a `Config` that works, or in one clear line."""

import copy
import json
import math
from collections import Counter
from contextlib import contextmanager

import huggingface_hub
import pytest
from flwr.serverapp.strategy import FedAvg
from hypothesis import example, given
from hypothesis import strategies as st

from fedpft_flower.config import (
    _CHOICES,
    _RANGES,
    Config,
    FedPFTError,
    flat_defaults,
    flatten,
    nest,
)
from fedpft_flower.foundation import load_fm
from fedpft_flower.methods import METHODS, method_of
from fedpft_flower.partitions import PARTITIONS, load_partition
from fedpft_flower.public import load_public
from fedpft_flower.run_directory import RunDirectory
from fedpft_flower.selection import SELECTIONS
from fedpft_flower.server import ProxyServer
from fedpft_flower.strategies import _RANGES as ARGUMENTS
from fedpft_flower.strategies import STRATEGIES, _arguments, inner_strategy, strategy_of
from fedpft_flower.tasks import load_task
from tests.fuzzing import (
    LONG,
    bounded,
    check_line,
    examples,
    odd_numbers,
    odd_objects,
    odd_texts,
)

DEFAULTS = flat_defaults()


@st.composite
def near(draw, key):
    """Draw a value for a key that may be right: often at the edge of its range."""
    if key in _CHOICES:
        return draw(st.sampled_from([*_CHOICES[key], "", "magic"]))
    if key not in _RANGES:
        return draw(odd_texts)
    low, high, _ = _RANGES[key]
    edges = [low, high, math.nextafter(high, math.inf), math.nextafter(low, math.inf)]
    whole = isinstance(DEFAULTS[key], int)
    if whole:
        edges = [int(edge) for edge in (low, low + 1, low + 2, high, high + 1)]
    return draw(st.one_of(st.sampled_from(edges), odd_numbers))


def inside(key):
    """Return a strategy of values that a key takes, or takes with another one."""
    if key in _CHOICES:
        return st.sampled_from(_CHOICES[key])
    if key not in _RANGES:
        kind = type(DEFAULTS[key])
        return st.booleans() if kind is bool else st.text(max_size=8)
    low, high, _ = _RANGES[key]
    if isinstance(DEFAULTS[key], int):
        return st.integers(int(low), int(high))
    return st.floats(low, high, exclude_min=True)


def mostly(usual, odd):
    """Return a strategy that draws four usual values for an odd one."""
    return st.integers(0, 4).flatmap(lambda n: usual if n else odd)


@st.composite
def configs(draw, keys=tuple(DEFAULTS)):
    """Draw flat configurations: few keys, some nearly right, some altogether wrong."""
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5))
    odd = st.one_of(odd_objects, odd_texts)
    given = {
        key: draw(mostly(inside(key), st.one_of(near(key), odd))) for key in chosen
    }
    if draw(st.integers(0, 9)) == 9:
        stranger = st.one_of(odd_texts, st.sampled_from(keys).map(lambda k: k[1:]))
        given[draw(stranger)] = draw(odd_objects)
    return given


def refusal(call, *arguments):
    """Return what a call returns, and the line with which it refused."""
    try:
        with bounded():
            return call(*arguments), ""
    except FedPFTError as error:
        check_line(str(error))
        return None, str(error)


def read(given):
    """Return the configuration, or None where a line says which key is wrong."""
    config, said = refusal(Config.from_run_config, given)
    assert config or any(repr(key)[1:-1][:40] in said for key in given), said
    return config


@contextmanager
def both_outcomes(share):
    """Check that at least this share of the examples went well, and of them failed."""
    tally = Counter()
    yield tally
    assert min(tally[True], tally[False]) >= share * sum(tally.values()), tally


def test_a_configuration_is_read_or_refused_in_one_line():
    @examples(640)
    @given(configs())
    @example({"train.lr": 10**400})
    @example({"rounds": 10**5000})
    @example({"sub-fm.whole-layers": "9" * 5000})
    @example({LONG: 1})
    @example({"fm.name": "one\ntwo", "rounds": "one\ntwo"})
    @example({"fm.name": "a\0b"})
    @example({"align.steps": 0})
    def check(given):
        config = read(given)
        tally[config is not None] += 1
        if config is not None:
            assert Config.from_run_config(config.flat()) == config
            assert Config.from_run_config(flatten(nest(config.flat()))) == config

    with both_outcomes(0.1) as tally:
        check()


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is not str])
def test_every_number_has_a_range(key):
    for value in (math.nan, math.inf, -math.inf, -(2**62), 2**63 - 1):
        if type(DEFAULTS[key]) is bool:
            return
        if type(DEFAULTS[key]) is int and type(value) is float:
            continue
        if key in _RANGES and 0 <= value <= _RANGES[key][1]:
            continue
        _, said = refusal(Config.from_run_config, {key: value})
        assert said.startswith(f"{key} = "), f"{key} = {value} is taken"


# ------------------------------------------------------- what a configuration leads to


def json_or_not(given):
    """Write arguments as JSON, and those that JSON cannot hold as Python does."""
    try:
        return json.dumps(given)
    except (TypeError, ValueError):
        return repr(given)[:9000]


@st.composite
def strategies(draw):
    """Draw a method, a strategy and its arguments, most of them known ones."""
    name = draw(mostly(st.sampled_from(sorted(STRATEGIES)), odd_texts))
    known = sorted(_arguments(STRATEGIES.get(name, FedAvg))) or sorted(ARGUMENTS)
    arguments = st.dictionaries(
        mostly(st.sampled_from(known), odd_texts),
        mostly(
            st.one_of(st.floats(0, 0.4), st.integers(0, 3)),
            st.one_of(odd_numbers, odd_objects),
        ),
        max_size=3,
    )
    return {
        "method": draw(mostly(st.sampled_from(sorted(METHODS)), odd_texts)),
        "strategy": name,
        "strategy-args": draw(mostly(arguments.map(json_or_not), odd_texts)),
    }


def test_methods_and_strategies_are_found_or_refused():
    @examples(200)
    @given(strategies(), st.integers(1, 12))
    @example({"strategy-args": '{"eta": ' + "9" * 5000 + "}", "strategy": "FedAdam"}, 3)
    @example({"strategy-args": '{"eta": Infinity}', "strategy": "FedAdam"}, 3)
    @example({"strategy-args": "[" * 100_000}, 3)
    def check(given, clients):
        config = read(given)
        if config is None:
            return
        refusal(method_of, config)
        named = (config.strategy, config.strategy_args)
        found, _ = refusal(strategy_of, *named)
        inner, _ = refusal(inner_strategy, *named, clients)
        tally[inner is not None] += 1
        if inner is not None:
            kind, arguments = found
            assert type(inner) is kind
            assert all(math.isfinite(getattr(inner, name)) for name in arguments)

    with both_outcomes(0.1) as tally:
        check()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write a small file of rows that every test here reads."""
    place = tmp_path_factory.mktemp("rows")
    words = ["good fast film", "very bad film", "a b c"]
    rows = [f"{words[i % 3]},{'abc'[i % 3]},h{i % 4}" for i in range(48)]
    (place / "rows.csv").write_text("\n".join(["text,label,owner", *rows]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        # Names of a hub are refused at once, as on a machine without a network.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setenv("HOME", str(place / "home"))
        yield place


@pytest.fixture(scope="module")
def own_rows(place):
    return {"data.task": "text", "data.path": str(place / "rows.csv")}


PLAN_KEYS = (
    "method",
    "data.max-length",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.init",
    "lora.targets",
    "sub-fm.keep-fraction",
    "sub-fm.keep-neurons",
    "sub-fm.whole-layers",
    "sub-fm.selection",
    "align.before",
    "align.during",
    "align.jacobian-weight",
    "align.ridge",
    "align.calibration-tokens",
    "plug-in.steps",
    "sub-fm.layer-budget",
    "sub-fm.end-layers",
    "align.proportion",
)
GOOD = {
    "method": st.sampled_from(sorted(METHODS)),
    "lora.targets": st.sampled_from(
        ["query", "query,query", "dense", "bert", "LayerNorm", "classifier", "query "]
    ),
    "lora.r": st.integers(1, 5000),
    "sub-fm.whole-layers": st.sampled_from(["0", "-1", "0,0", "2,-3", "3", "-4", "-0"]),
    "sub-fm.selection": st.sampled_from(sorted(SELECTIONS)),
    "align.before": st.sampled_from(["none", "bias", "least-squares+distill", "+"]),
    "align.during": st.sampled_from(["none", "least-squares", "distill"]),
    "sub-fm.keep-neurons": st.integers(0, 30),
    "sub-fm.keep-fraction": st.floats(0.001, 1),
    "sub-fm.layer-budget": st.floats(0, 1),
    "sub-fm.end-layers": st.integers(1, 5),
    "data.max-length": st.integers(2, 50),
}


@st.composite
def sound(draw, keys, good, most=5):
    """Draw configurations most of whose values are of the right type and range."""
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=most))
    return {key: draw(mostly(good.get(key, inside(key)), near(key))) for key in chosen}


@pytest.fixture(scope="module")
def fm_and_task(bert_directory, own_rows):
    base = {**own_rows, "fm.name": str(bert_directory), "data.max-length": 16}
    config = Config.from_run_config(base)
    task = load_task(config.data, 0)
    return base, load_fm(config.fm.name, task.labels, "text", 0), task


def test_a_server_is_built_or_refused(fm_and_task):
    base, fm, task = fm_and_task

    @examples(60)
    @given(sound(PLAN_KEYS, GOOD))
    @example({"lora.targets": "query,query"})
    @example({"sub-fm.whole-layers": "9" * 5000})
    @example({"sub-fm.end-layers": 1, "method": "fedot", "sub-fm.layer-budget": 5e-324})
    def check(given):
        config = read({**base, **given})
        if config is None:
            return
        public = task.validation.select_columns(["text"])
        server, _ = refusal(ProxyServer, config, copy.deepcopy(fm), task, public)
        tally[server is not None] += 1
        if server is None:
            return
        assert server.plan.layers and server.adapter
        assert 0 <= server.share_withheld < 1
        assert all(bool(t.isfinite().all()) for t in server.adapter.values())

    with both_outcomes(0.1) as tally:
        check()


def test_heads_and_fms_are_loaded_or_refused(bert_directory, place):
    bert, heads = str(bert_directory), st.sampled_from(HEADS)

    @examples(40)
    @given(
        mostly(st.just(bert), odd_texts),
        st.lists(mostly(heads, odd_texts), max_size=2),
    )
    @example("~\0", [])
    @example(str(place / "rows.csv"), [])
    def check(name, head):
        fm, _ = refusal(load_fm, name, ["a", "b", "c"], "text", 0, head)
        tally[fm is not None] += 1
        if fm is not None:
            assert len(set(fm.head)) == len(fm.head)

    with both_outcomes(0.1) as tally:
        check()


HEADS = ["classifier", "bert.pooler", "pooler", "bert", "encoder", "0", "query"]

PARTITION_KEYS = ("partition.kind", "partition.alpha", "partition.classes", "seed")
PARTITION_GOOD = {
    "partition.kind": st.sampled_from(sorted(PARTITIONS)),
    "partition.alpha": st.one_of(st.floats(1e-3, 100), st.floats(5e-324, 1e-3)),
    "partition.classes": st.integers(1, 4),
    "seed": st.integers(0, 2**53),
}


def test_rows_are_shared_out_or_refused(own_rows):
    base = {**own_rows, "data.client-column": "owner"}

    @examples(110)
    @given(sound(PARTITION_KEYS, PARTITION_GOOD), st.integers(1, 80))  # of 48 rows
    @example({"partition.kind": "sizes", "partition.alpha": 5e-324}, 3)
    @example({"partition.kind": "dirichlet", "partition.alpha": 5e-324}, 3)
    @example({"partition.kind": "sizes", "partition.alpha": 1e9}, 30)
    def check(given, count):
        config = read({**base, **given})
        if config is None:
            return
        arguments = (config.data, config.partition)
        parts = [
            refusal(load_partition, *arguments, i, count, 0)[0] for i in range(count)
        ]
        tally[None not in parts] += 1
        there = [len(part) for part in parts if part is not None]
        assert all(there)
        if None not in parts and config.partition.kind != "pathological":
            total = len(load_task(config.data, 0).train)
            assert sum(there) == total

    with both_outcomes(0.1) as tally:
        check()


DATA_KEYS = tuple(key for key in DEFAULTS if key.startswith("data."))
DATA_GOOD = {
    "data.task": st.sampled_from(["text", "text", "image", "juggling"]),
    "data.separator": st.sampled_from([",", ";", "\t", "", ",,", "\0", "(", "\n", '"']),
    "data.text-columns": st.sampled_from(["text", "owner", "text,owner", "text,text"]),
    "data.label-column": st.sampled_from(["label", "text", "owner", "", "label "]),
    "data.client-column": st.sampled_from(["owner", "label", "nobody"]),
    "data.labels": st.sampled_from(["a,b,c", "c,b,a", "a", "a,a", "a,b", "a,b,c,\n"]),
    "data.train-split": st.sampled_from(["train", "test", "validation", "odd"]),
    "data.validation-split": st.sampled_from(["train", "test", "odd"]),
    "data.test-split": st.sampled_from(["train", "test", "odd"]),
    "data.max-train-rows": st.integers(0, 60),
    "data.min-words": st.integers(0, 5),
    "data.public-column": st.sampled_from(["text", "owner", "nothing"]),
}


def test_rows_are_loaded_or_refused(own_rows, place):
    base = {**own_rows, "data.public-path": own_rows["data.path"]}

    @examples(80)
    @given(sound(DATA_KEYS, DATA_GOOD, most=3))
    @example({"data.path": "~\0"})
    @example({"data.public-path": "~\0"})
    @example({"data.task": "image"})
    def check(given):
        config = read({**base, **given})
        if config is None:
            return
        task, _ = refusal(load_task, config.data, config.seed)
        refusal(load_public, config.data, config.seed)
        tally[task is not None] += 1
        if task is not None:
            assert len(task.labels) >= 2 and len(task.validation) and len(task.test)

    with both_outcomes(0.1) as tally:
        check()
    assert sorted(p.name for p in place.iterdir() if p.name != "home") == ["rows.csv"]


def within(text):
    """Tell a path below the home directory from one that leaves it."""
    return ".." not in text and not text.startswith(("/", "~"))


def test_a_run_directory_is_made_or_refused(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    texts = odd_texts.filter(within)

    @examples(60)
    @given(texts, mostly(st.just(""), texts))
    @example("~\0", "")
    @example("\0", "")
    @example("\ud800", "")
    @example("runs", "\0")
    def check(out, resume):
        config = read({"out-dir": out, "resume": resume})
        if config is None:
            return
        made, _ = refusal(RunDirectory, config, 1)
        tally[made is not None] += 1
        if made is not None:
            assert (made.path / "config.toml").is_file()
            made.close()

    with both_outcomes(0.1) as tally:
        check()
