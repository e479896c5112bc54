"""Mutated replies at the server: left out, named and counted; the good ones count."""

import copy
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.plain_loop import PlainLoop
from client_app import app as client_app
from fedpft_flower import federation as federation_module
from fedpft_flower import grid
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.federation import Federation
from fedpft_flower.grid import CountingGrid
from fedpft_flower.ledger import Ledger
from fedpft_flower.strategies import inner_strategy
from fedpft_flower.strategy import FedPFT
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    HELLO,
    INSTALL,
    METRICS,
    TRAIN,
    pack_tensors,
)
from tests.conftest import LocalGrid
from tests.fuzzing import (
    bounded,
    changed_arrays,
    changed_keys,
    changed_records,
    check_line,
    examples,
    header,
    odd_lists,
    odd_numbers,
    odd_scalars,
    odd_texts,
    raw,
    small_federation,
)

NODES = 3
KEYS = [f"partition-{index:06d}" for index in range(NODES)]


class Replayed(LocalGrid):
    """Replay what sound nodes said once, changed by `faults`, among `strays`."""

    def __init__(self, hub, nodes):
        super().__init__(hub.answer, NODES, hub.settings)
        shares = {c.node_config["partition-id"]: c for c in self.contexts.values()}
        self.contexts = {100 + i: shares[i] for i in nodes}
        self.strays = []  # functions of a sound reply that give a further one

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return [
            *(more for stray in self.strays for more in map(stray, replies) if more),
            *replies,
            *(more for stray in self.strays for more in map(stray, replies) if more),
        ]


class Hub:
    """Be a server whose nodes' sound replies to a first round are known."""

    def __init__(self, settings):
        self.settings = settings
        self.config = Config.from_run_config(settings)
        self.loop = PlainLoop(self.config, NODES)
        self.server = self.loop.server
        self.server.prepare()
        # Alignment takes time and is tested elsewhere: what it would be given counts.
        self.server.gradient_error = lambda: {"relative": 0.0}
        self.server._measure_limits = lambda: None
        self.server._realign = self._given
        self.rates = {}
        self.state = self.server.state()
        self.said = {}
        grid = Replayed(self, range(NODES))
        grid._app = self._remember
        self.reference = {tuple(range(NODES)): self.run(grid)[1]}

    def _given(self, current, rates):
        self.rates = {f"rates/{i}": rate for i, rate in enumerate(rates)}
        return {}

    def _remember(self, message, context):
        reply = client_app(message, context)
        assert not reply.has_error(), reply.error.reason
        place = context.node_config["partition-id"]
        self.said[message.metadata.message_type, place] = reply.content
        return reply

    def answer(self, message, context):
        """Answer as the node did; every node knows how to install."""
        kind, place = message.metadata.message_type, context.node_config["partition-id"]
        said = self.said.get((kind, place), self.said.get((kind, 0)))
        return Message(copy.deepcopy(said), reply_to=message)

    def run(self, grid, training=False):
        """Return the strategy, and the server's state, after a round on a grid."""
        if not same(self.server.state(), self.state):
            self.server.restore(self.state)
        self.rates = {}
        counting = CountingGrid(grid, Ledger())
        federation = Federation(counting, 1.0, 0.0, self.loop.task.labels)
        federation.training = training
        inner = inner_strategy("FedAvg", "", NODES)
        strategy = FedPFT(self.server, federation, inner)
        try:
            with bounded():
                arrays = pack_tensors(self.server.adapter)[0]
                strategy.start(counting, arrays, num_rounds=1)
        except FedPFTError as error:
            check_line(str(error))
            strategy.said = str(error)
        return strategy, self.server.state() | self.rates

    def expected(self, good):
        """Return the server's state after the round of these nodes alone."""
        good = tuple(sorted(good))
        if not good:
            return self.state
        if good not in self.reference:
            strategy, state = self.run(Replayed(self, good), training=True)
            assert strategy.done == 1 and not strategy.rounds[1]["failures"]
            self.reference[good] = state
        return self.reference[good]


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory, bert_directory):
    place = tmp_path_factory.mktemp("hub")
    settings = small_federation(place, bert_directory) | {
        "data.public-rows": 4,
        "train.local-steps": 2,
        "train.fraction": 1.0,
        "train.max-retries": 0,
        "align.batch-size": 4,
        "wait-seconds": 0.0,
    }
    quick = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPFT_CACHE", str(place / "cache"))
        for name in ("run_id", "node_id", "task_id"):
            patch.setattr(TaskIdentity, f"_{name}", 1)
        for module in (federation_module, grid):
            patch.setattr(module, "time", quick)
        yield Hub(settings)


# -------------------------------------------------------------------- replies to train


def of_kind(kind, change):
    """Return a fault that changes the replies to one kind of message."""

    def fault(message, reply):
        if message.metadata.message_type != kind:
            return reply
        return change(message, reply)

    return fault


def with_content(records):
    return lambda message, reply: Message(RecordDict(dict(records)), reply_to=message)


def with_error(code, reason):
    return lambda message, reply: Message(Error(code, reason), reply_to=message)


errors = st.builds(
    Error,
    st.one_of(st.integers(-5, 300), st.sampled_from([2**31, -(2**40)])),
    st.one_of(st.none(), odd_texts, st.just("Traceback\n  File\nKeyError: 'x'\n")),
)
BAD_NUMBERS = {
    "num-examples": [0, -1, 0.5, 2**62, 1e300],
    "train_loss": [-1.0, 1e300],
    "steps": [-1, 1e300],
    "seconds": [-1.0, 1e300],
    "step-seconds": [-1.0, 1e300],
    "flops": [-1.0, 1e300],
    "peak-memory": [-1, 1e300],
    "peak-gpu-memory": [-1, 1e300],
    "bf16": [-1.0, 2.0],
}
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@st.composite
def bad_metrics(draw, metrics):
    """Return metrics that no sound node gives."""
    named = dict(metrics)
    key = draw(st.sampled_from(sorted(named)))
    if draw(st.booleans()):
        return {k: v for k, v in named.items() if k != key} | (
            {draw(st.sampled_from(["loss", "inactive-rates.9", "inactive-rates.x"])): 1}
            if draw(st.booleans())
            else {}
        )
    if key in BAD_NUMBERS:
        lists = st.sampled_from([[], [1], [1.0, 2.0]])
        numbers = st.sampled_from(BAD_NUMBERS[key] + NOT_FINITE)
        return {**named, key: draw(st.one_of(lists, numbers))}
    rates = list(named[key])
    bad = [[], rates[1:], [*rates, 0.5], [-0.1, *rates[1:]], [1.5, *rates[1:]], 0.5]
    bad += [[value, *rates[1:]] for value in NOT_FINITE] + [[7] * len(rates)]
    return {**named, key: draw(st.sampled_from(bad))}


@st.composite
def bad_replies(draw, sound):
    """Draw a reply that the server must leave out."""
    arrays, metrics = dict(sound[ARRAYS]), dict(sound[METRICS])
    how = draw(st.sampled_from(["error", "array", "arrays", "metrics", "records"]))
    if how == "error":
        return draw(errors)
    if how == "array":
        arrays = draw(changed_arrays(arrays))
    elif how == "arrays":
        none = Array(np.zeros((1, 2, 3), "f4"))  # of a shape that nothing has
        arrays = draw(changed_keys(arrays, st.just(none)))
    elif how == "metrics":
        metrics = draw(bad_metrics(metrics))
    records = {ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord(metrics)}
    return draw(changed_records(records)) if how == "records" else records


class Reply:
    """Show a drawn reply briefly."""

    def __init__(self, drawn, sound):
        self.drawn, self.sound = drawn, sound

    def __repr__(self):
        if isinstance(self.drawn, Error):
            return repr(self.drawn)[:300]
        return repr(
            {
                f"{name}/{key}": repr(value)[:200]
                for name, record in self.drawn.items()
                for key, value in record.items()
                if value != self.sound.get(name, {}).get(key)
            }
        )

    @property
    def is_sound(self):
        """Tell a change that changes nothing the server reads."""
        if isinstance(self.drawn, Error) or set(self.drawn) != {ARRAYS, METRICS}:
            return False
        arrays, metrics = self.drawn[ARRAYS], self.drawn[METRICS]
        same_arrays = list(arrays.items()) == list(self.sound[ARRAYS].items())
        return same_arrays and dict(metrics) == dict(self.sound[METRICS])

    def fault(self, message, reply):
        if isinstance(self.drawn, Error):
            return Message(self.drawn, reply_to=message)
        return Message(RecordDict(dict(self.drawn)), reply_to=message)


@st.composite
def rounds(draw, hub):
    """Draw which nodes reply badly, and how; seldom all of them."""
    places = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True))
    sound = {i: hub.said[TRAIN, i] for i in places}
    return {i: Reply(draw(bad_replies(sound[i])), sound[i]) for i in places}


def check_round(hub, faults, strays=()):
    """Check that a round with bad replies is the round of the good ones alone."""
    grid = Replayed(hub, range(NODES))
    grid.faults = {i: of_kind(TRAIN, reply.fault) for i, reply in faults.items()}
    grid.strays = list(strays)
    strategy, state = hub.run(grid)
    bad = {i for i, reply in faults.items() if not reply.is_sound}
    good = set(range(NODES)) - bad
    failures = strategy.rounds[1]["failures"]
    assert sorted(failures) == sorted(KEYS[i] for i in bad), failures
    for name, reason in failures.items():
        assert name not in reason
        check_line(reason)
    assert (strategy.done == 1) == bool(good)
    assert same(state, hub.expected(good))
    if good:
        table = strategy.rounds[1]["per-client"]
        assert sorted(k for k, v in table.items() if v["outcome"] == "ok") == [
            KEYS[i] for i in sorted(good)
        ]


def test_bad_replies_are_left_out_and_the_good_ones_count(hub):
    tally = {True: 0, False: 0}

    @examples(160)
    @given(rounds(hub))
    def check(faults):
        tally[all(not reply.is_sound for reply in faults.values())] += 1
        check_round(hub, faults)

    check()
    assert tally[True] >= 100, tally


def extra(kind, name="extra"):
    """Return a sound reply with one more record."""
    records = {
        "metrics": MetricRecord({"x": 1}),
        "arrays": ArrayRecord({"x": Array(np.zeros(1, "f4"))}),
    }

    def make(sound):
        return Reply({**sound, name: records[kind]}, sound)

    return make


def metric(**values):
    def make(sound):
        named = {name.replace("_", "-"): value for name, value in values.items()}
        named = {n if n != "train-loss" else "train_loss": v for n, v in named.items()}
        changed = MetricRecord({**sound[METRICS], **named})
        return Reply({**sound, METRICS: changed}, sound)

    return make


def first_array(array):
    def make(sound):
        arrays = {**sound[ARRAYS], next(iter(sound[ARRAYS])): array}
        return Reply({**sound, ARRAYS: ArrayRecord(arrays)}, sound)

    return make


@pytest.mark.parametrize(
    "make",
    [
        extra("metrics"),
        extra("arrays"),
        metric(num_examples=2**62),
        metric(num_examples=0.5),
        metric(num_examples=[3]),
        metric(train_loss=1e300),
        metric(train_loss=-1.0),
        first_array(raw(b"")),
        first_array(raw(b"PK\x05\x06" + bytes(18))),
        first_array(raw(header("(2, 10000000000000)"))),
        lambda sound: Reply(Error(2, "a\x1b[31mb"), sound),
        lambda sound: Reply(Error(2, "x" * 10**6), sound),
        lambda sound: Reply({CONFIG: ConfigRecord({"missing": "x"})}, sound),
    ],
)
@pytest.mark.parametrize("places", [(0,), (0, 1, 2)])
def test_a_reply_that_once_broke_the_round_is_left_out(hub, make, places):
    check_round(hub, {i: make(hub.said[TRAIN, i]) for i in places})


def under(number):
    """Return a stray that answers another message than any that waits."""

    def stray(reply):
        other = copy.deepcopy(reply)
        other.metadata.__dict__["_reply_to_message_id"] = number
        return other

    return stray


def missing(reply):
    """Return a second answer to the same message, which asks for an install."""
    again = copy.copy(reply)
    again.__dict__["_metadata"] = copy.copy(reply.metadata)
    again.__dict__["_content"] = RecordDict({CONFIG: ConfigRecord({"missing": "x"})})
    again.metadata.__dict__["_reply_to_message_id"] = "unknown"
    return again


@pytest.mark.parametrize("stray", [under("unknown"), under(""), missing, copy.deepcopy])
def test_replies_to_nothing_and_second_replies_change_nothing(hub, stray):
    check_round(hub, {}, [stray])
    bad = metric(num_examples=0)(hub.said[TRAIN, 1])
    check_round(hub, {1: bad}, [stray])


# ------------------------------------------------- replies to greetings and to installs

odd_values = st.one_of(odd_scalars, odd_lists)


@st.composite
def odd_hellos(draw, sound):
    """Draw an introduction that is not quite right."""
    config, sizes = dict(sound[CONFIG]), dict(sound[METRICS])
    how = draw(st.sampled_from(["config", "config", "sizes", "error", "records"]))
    if how == "error":
        return draw(errors)
    if how == "config":
        config = draw(changed_keys(config, odd_values))
    elif how == "sizes":
        sizes = draw(changed_keys(sizes, st.one_of(odd_numbers, st.just([1]))))
    records = {CONFIG: ConfigRecord(config), METRICS: MetricRecord(sizes)}
    return draw(changed_records(records)) if how == "records" else records


def check_nodes(strategy):
    """Check that what the server believes of its nodes is of the right kind."""
    for node in strategy.federation.nodes.values():
        assert node.key and node.key.isprintable() and len(node.key) < 1000
        assert type(node.named) is bool and type(node.store) is str
        assert type(node.partitions) is int and node.partitions >= 0
        assert type(node.examples) is int and node.examples > 0
        assert all(type(version) is str for version in node.differing.values())
    for held in strategy.federation._held.values():
        assert all(type(content) is str for content in held)


@pytest.mark.parametrize("value", [None, 5, 0.5, "", "x\ny", [1], b"x"])
@pytest.mark.parametrize(
    "key", ["key", "named", "store", "held", "source", "libraries"]
)
def test_a_greeting_of_the_wrong_type_is_left_out(hub, key, value):
    said = dict(hub.said[HELLO, 1][CONFIG])
    said[key] = value
    records = {
        CONFIG: ConfigRecord({k: v for k, v in said.items() if v is not None}),
        METRICS: hub.said[HELLO, 1][METRICS],
    }
    grid = Replayed(hub, range(NODES))
    grid.faults = {1: of_kind(HELLO, Reply(records, {}).fault)}
    strategy, _ = hub.run(grid, training=True)
    check_nodes(strategy)
    if (key, value) in (("store", ""), ("store", "x\ny")):
        return  # any text names a store
    assert set(strategy.rounds[1]["failures"]) == {"node 101"}
    check_line(": ".join(strategy.federation.refused[101]))


@pytest.mark.parametrize("training", [False, True])
def test_odd_greetings_end_in_one_line_or_without_the_node(hub, training):
    tally = {"ended": 0, "without": 0, "with": 0}

    @examples(45)
    @given(odd_hellos(hub.said[HELLO, 1]).map(lambda d: Reply(d, hub.said[HELLO, 1])))
    @example(Reply({}, hub.said[HELLO, 1]))
    def check(reply):
        grid = Replayed(hub, range(NODES))
        grid.faults = {1: of_kind(HELLO, reply.fault)}
        strategy, state = hub.run(grid, training)
        check_nodes(strategy)
        ended = strategy.done != 1
        known = 101 in strategy.federation.nodes
        tally["ended" if ended else "with" if known else "without"] += 1
        if ended:
            assert not training, strategy.said
            assert same(state, hub.state)
        else:
            good = {0, 1, 2} if known else {0, 2}
            if not known and 101 in strategy.federation.refused:
                assert "node 101" in strategy.rounds[1]["failures"]
            table = strategy.rounds[1]["per-client"]
            trained = {name for name, one in table.items() if one["outcome"] == "ok"}
            if trained == {KEYS[i] for i in good}:
                assert same(state, hub.expected(good))

    check()
    assert tally["without" if training else "ended"] >= 20, tally


@pytest.mark.parametrize("training", [False, True])
def test_odd_replies_to_installs_end_in_one_line_or_without_the_node(hub, training):
    @examples(20)
    @given(
        st.one_of(
            errors,
            changed_records(dict(hub.said[INSTALL, 0])),
            st.builds(
                lambda values: {CONFIG: ConfigRecord(values)},
                changed_keys({"installed": True}, odd_values),
            ),
        ).map(lambda drawn: Reply(drawn, hub.said[INSTALL, 0]))
    )
    def check(reply):
        grid = Replayed(hub, range(NODES))
        grid.faults = dict.fromkeys(range(NODES), of_kind(INSTALL, reply.fault))
        strategy, state = hub.run(grid, training)
        if strategy.done == 1:
            assert same(state, hub.expected(range(NODES)))
        else:
            check_line(strategy.said)
            assert same(state, hub.state)

    check()
