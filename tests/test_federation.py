"""Whole runs through the Flower strategy on an in-process grid, on tiny models."""

import copy
import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    RecordDict,
)
from flwr.serverapp.strategy import FedAvg
from google.protobuf.message import DecodeError
from safetensors.torch import load_file

from benchmarks.plain_loop import PlainLoop
from client_app import app as client_app
from fedpft_flower import app, client, federation, node, run_directory
from fedpft_flower.adapters import get_adapter
from fedpft_flower.app import serve
from fedpft_flower.config import Config, DataConfig, FedPFTError
from fedpft_flower.encoding import encode
from fedpft_flower.foundation import load_fm
from fedpft_flower.methods import METHODS
from fedpft_flower.runs import LOG
from fedpft_flower.server import ProxyServer
from fedpft_flower.software import versions
from fedpft_flower.store import Store, tensors_hash
from fedpft_flower.tasks import load_task
from fedpft_flower.wire import HELLO

NODES = 5


def run(
    local_grid,
    settings,
    faults=None,
    order=1,
    nodes=NODES,
    configs=(),
    app=client_app,
):
    grid = local_grid(app, nodes, settings, order)
    for context, own in zip(grid.contexts.values(), configs, strict=False):
        context.node_config = own
    grid.faults = faults or {}
    context = Context(
        run_id=7,
        node_id=0,
        state=RecordDict(),
        run_config=settings,
        node_config={},
    )
    serve(grid, context)
    return grid, Config.from_run_config(settings)


def results(settings):
    place = Path(settings["out-dir"]) / "7"
    rounds = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((place / "manifest.json").read_text())
    summary = json.loads((place / "summary.json").read_text())
    return place, rounds, summary, manifest


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_plain_loop_gives_the_same_adapter_as_flower(local_grid, settings, method):
    settings["method"] = method
    if METHODS[method].refine:
        # Adam moves by the rate however small a gradient is, so also by what rounding
        # makes of one that is nearly zero: that must stay below the bounds here.
        settings |= {"plug-in.steps": 10, "plug-in.lr": 1e-4}
    _, config = run(local_grid, settings)
    loop = PlainLoop(config, NODES)
    *_, last = loop.run()
    server = loop.server
    server.refine()
    place, rounds, _, manifest = results(settings)
    from safetensors.torch import load_file

    exported = load_file(place / "adapter" / "adapter_model.safetensors")
    plugged_in = get_adapter(server.fm)
    assert set(exported) == set(plugged_in)
    for name, tensor in plugged_in.items():
        torch.testing.assert_close(exported[name], tensor, atol=1e-5, rtol=1e-4)
    assert rounds[-1]["fm-accuracy"] == pytest.approx(last["fm-accuracy"])
    assert manifest["plan"] == server.plan.to_json()
    due = METHODS[method].during != "none"
    assert [("alignment" in r) for r in rounds[1:]] == [due, due, False]
    aligned = "distill" in METHODS[method].before
    assert ("steps" in rounds[0]["alignment"]) == aligned
    if method.startswith("fedot"):
        assert server.plan.layers == (0, 2, 3)
        assert server.plan.emulator == (2,)


def test_nodes_are_greeted_once_while_the_fm_is_not_there_yet(
    local_grid, settings, monkeypatch
):
    came, before = [], []

    def noting(message, context):
        came.append(message.metadata.message_type)
        return client_app(message, context)

    def loading(*given):
        before.extend(came)
        return load_server(*given)

    load_server = app.load_server
    monkeypatch.setattr(app, "load_server", loading)
    run(local_grid, settings | {"rounds": 1}, app=noting)
    assert before == [HELLO] * NODES
    assert came.count(HELLO) == NODES


def test_a_refinement_that_fails_does_not_fail_the_run(
    local_grid, settings, monkeypatch
):
    def fail(*given):
        raise FedPFTError("its loss is nan; lower plug-in.lr")

    monkeypatch.setattr("fedpft_flower.server.refine", fail)
    run(local_grid, settings | {"rounds": 1, "plug-in.steps": 2})
    place, _, summary, manifest = results(settings)
    told = {"kept": False, "error": "its loss is nan; lower plug-in.lr"}
    assert summary["refinement"] == told
    assert summary["test-after"] == summary["test-plain"]
    assert manifest["final-adapter-sha256"] == manifest["adapter-sha256"]
    assert "lower plug-in.lr" in (place / "report.html").read_text()


def test_a_node_that_does_not_answer_is_not_waited_for_twice(
    local_grid, settings, monkeypatch
):
    asked, real = [], federation.Federation._send_hello

    def noting(self, nodes, timeout):
        asked.extend([[*nodes]] if nodes else [])
        return real(self, nodes, timeout)

    monkeypatch.setattr(federation.Federation, "_send_hello", noting)
    monkeypatch.setattr(federation, "GREETING_SECONDS", 0.0)
    grid = local_grid(client_app, NODES + 1, settings)
    for context in grid.contexts.values():
        context.node_config["num-partitions"] = NODES
        if context.node_config["partition-id"] == NODES:
            silent = context.node_id
    grid.faults = {NODES: lambda message, reply: None}
    settings |= {"wait-seconds": 1, "rounds": 1}
    serve(grid, Context(7, 0, {}, RecordDict(), settings))
    # Invited with all others, and greeted again before the round, not in between.
    assert len(asked) == 2 and asked[1] == [silent]


def joined(local_grid, settings, config, fault=lambda message, reply: reply):
    """Run a federation to which node 99, with this node-config, comes in round 1."""
    grid = local_grid(client_app, NODES, settings)
    first = next(iter(grid.contexts.values()))

    def more(message, reply):
        if message.metadata.message_type == "train":
            newcomer = copy.copy(first)
            newcomer.node_id, newcomer.node_config = 99, config
            grid.contexts.setdefault(99, newcomer)
        return reply

    grid.faults = {**dict.fromkeys(range(NODES), more), config["partition-id"]: fault}
    serve(grid, Context(7, 0, {}, RecordDict(), settings))
    return grid


def test_a_silent_newcomer_holds_up_no_round(local_grid, settings, monkeypatch):
    waited, real = [], federation.Federation._hello

    def noting(self, nodes, waits):
        waited.extend([waits] if 99 in nodes else [])
        return real(self, nodes, waits)

    monkeypatch.setattr(federation.Federation, "_hello", noting)
    monkeypatch.setattr(federation, "GRACE_SECONDS", 0.3)
    config = {"partition-id": NODES, "num-partitions": NODES + 1}
    grid = joined(local_grid, settings, config, lambda message, reply: None)
    hellos = [m for m in grid.seen if m.metadata.dst_node_id == 99]
    assert waited == [0.3, 0.0] and len(hellos) == 1  # in rounds 2 and 3
    assert results(settings)[2]["failures"] == 0


def test_a_run_in_which_nothing_is_learnt_says_so_once(local_grid, settings):
    settings |= {"method": "fedpft-n", "rounds": 6, "train.lr": 1e-9}
    run(local_grid, settings)
    said = "after 5 rounds, and guessing among 10 classes has 2.303; if it does not"
    assert log_of(settings).count(said) == 1
    run(local_grid, settings | {"train.lr": 0.01, "out-dir": settings["out-dir"] + "b"})
    assert "guessing" not in log_of({"out-dir": settings["out-dir"] + "b"})


def test_a_node_that_stops_to_answer_is_waited_for_once(
    local_grid, settings, monkeypatch
):
    """As one whose SuperNode lives and whose processes do not start any more."""
    monkeypatch.setattr(federation, "GRACE_SECONDS", 0.3)
    settings |= {"train.clients-per-round": NODES, "timeout-seconds": 0.5, "rounds": 5}
    asked = []

    def stuck(message, reply):
        if asked or message.metadata.message_type == "train":
            asked.append(message.metadata.message_type)
        if 0 < len(asked) < 4:  # Flower says so when a message has lived too long
            return Message(Error(3, "message unavailable"), reply_to=message)
        return reply

    run(local_grid, settings, {2: stuck})
    _, rounds, summary, _ = results(settings)
    # Asked to train once, then greeted until it answers; and then it trains again.
    assert asked[:4] == ["train", *["query.hello"] * 3] and "train" in asked[4:]
    name = "partition-000002"
    assert "no reply in time" in rounds[1]["failures"][name]
    assert name not in rounds[2]["failures"] and name not in rounds[2]["per-client"]
    assert rounds[5]["per-client"][name]["outcome"] == "ok"
    assert summary["failures"] == 1


def test_a_silent_node_without_which_there_are_too_few_is_asked_again(
    local_grid, settings
):
    settings |= {
        "train.clients-per-round": NODES,
        "train.min-replies": NODES,
        "train.max-retries": 2,
        "timeout-seconds": 0.5,
    }
    lost = []

    def lossy_once(message, reply):
        lost.append(1)
        return None if len(lost) == 1 else reply

    run(local_grid, settings, {2: broken(lossy_once)})
    assert results(settings)[2]["failures"] == 0


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SystemExit(1), "error: ended from outside (flwr stop"),
        (MemoryError(), "error: memory ended (MemoryError); lower align.batch-size"),
        (ValueError("strange\nthing"), "error: ValueError: thing; where the run has a"),
    ],
)
def test_a_run_that_ends_otherwise_says_so_in_its_log(
    local_grid, settings, monkeypatch, raised, said
):
    def fail(self, *rest):
        raise raised

    monkeypatch.setattr(ProxyServer, "end_round", fail)
    with pytest.raises(type(raised)):
        run(local_grid, settings)
    (line,) = [line for line in log_of(settings).splitlines() if "error:" in line]
    assert said in line and line.endswith(f"resume={settings['out-dir']}/7")


def test_a_newcomer_that_divides_the_rows_otherwise_is_left_out(local_grid, settings):
    config = {"partition-id": NODES, "num-partitions": NODES + 1}
    grid = joined(local_grid, settings, config)
    assert 99 not in trained(grid)
    _, rounds, _, manifest = results(settings)
    (reason,) = rounds[2]["failures"].values()
    assert f"num-partitions = {NODES + 1}, others {NODES}; give all" in reason
    assert len(manifest["nodes"]) == NODES


def lossy(local_grid, spoils):
    """Return a grid that gives up replies where `spoils` says so.

    As Flower does, it then tells of every message that it is not available.
    """

    class Lossy(local_grid):
        lost = frozenset()

        def pull_messages(self, message_ids):
            ids = list(message_ids)
            told = [
                Message(Error(3, "message unavailable"), reply_to=message)
                for message in self.seen
                if message.metadata.message_id in self.lost.intersection(ids)
            ]
            replies = super().pull_messages(ids)
            kinds = {reply.metadata.message_type for reply in replies}
            if kinds and not self.lost and (error := spoils(kinds)):
                self.lost = {r.metadata.reply_to_message_id for r in replies}
                raise error
            return replies + told

    return Lossy


@pytest.mark.parametrize(
    "error", [DecodeError("no message"), IndexError("no child"), MemoryError()]
)
def test_a_reply_that_flower_cannot_read_does_not_end_the_run(
    local_grid, settings, error
):
    grid = lossy(local_grid, lambda kinds: error if "train" in kinds else None)
    run(grid, settings)
    place, rounds, summary, _ = results(settings)
    assert "a reply cannot be read" in (place / LOG).read_text()
    assert summary["failures"] == 0  # all were asked again
    assert all(len(entry["per-client"]) == 3 for entry in rounds[1:])


def test_a_connection_that_fails_ends_the_run(local_grid, settings):
    grid = lossy(local_grid, lambda kinds: ConnectionError("refused"))
    with pytest.raises(ConnectionError):
        run(grid, settings)


def test_a_message_that_flower_does_not_take_is_the_failure_of_its_node(
    local_grid, settings
):
    """Of a node that has just gone, Flower gives no id."""
    gone = []

    class Leaving(local_grid):
        def push_messages(self, messages):
            messages = list(messages)
            ids = super().push_messages(messages)
            for place, message in enumerate(messages):
                told = message.metadata
                if told.message_type == "query.install" and not gone:
                    gone.append(told.dst_node_id)
                    reply = Message(Error(3, "message unavailable"), reply_to=message)
                    self._replies[ids[place]] = reply
                    ids[place] = ""
            return ids

    grid, _ = run(Leaving, settings | {"rounds": 1})
    name = f"partition-{grid.contexts[gone[0]].node_config['partition-id']:06d}"
    place, _, summary, _ = results(settings)
    assert f"left out: {name}: " in (place / LOG).read_text()
    assert summary["rounds"] == 1


def test_a_node_that_loses_its_copy_and_has_no_room_is_named(local_grid, settings):
    lost = []

    def lose(message, reply):
        kind = message.metadata.message_type
        if kind == "train" and not lost:
            lost.append(message.content["config"]["sub-fm"])
            shutil.rmtree(Store().directory(lost[0]))
            client.forget_sub_fm()
        if kind == "query.install" and lost:
            return Message(Error(2, "no space left"), reply_to=message)
        return reply

    settings |= {"method": "fedpft-b", "rounds": 1, "train.max-retries": 0}
    settings |= {"train.clients-per-round": NODES}
    run(local_grid, settings, dict.fromkeys(range(NODES), lose))
    _, rounds, _, _ = results(settings)
    failures = rounds[1]["failures"]  # of all but the first, which had trained
    assert len(failures) == NODES - 1
    assert all(name.startswith("partition-") for name in failures)
    reasons = sorted(failures.values())  # it was sent to one of them
    assert reasons[:-1] == ["its machine did not keep the sub-FM"] * (NODES - 2)
    assert "no space left" in reasons[-1]


def test_a_second_end_of_a_run_is_none_until_it_is_whole(
    local_grid, settings, monkeypatch
):
    run(local_grid, settings | {"rounds": 1})
    place, *_ = results(settings)
    monkeypatch.setattr(run_directory, "export_adapter", full)
    again = {"rounds": 1, "plug-in.steps": 2, "resume": str(place)}
    with pytest.raises(FedPFTError, match="make room"):
        run(local_grid, settings | again)
    assert not (place / "summary.json").exists()


def full(*given):
    raise OSError("no space left")


def test_one_client_aggregates_to_the_identity(local_grid, settings):
    settings |= {"method": "fedpft-n", "train.clients-per-round": 1, "rounds": 1}
    sent = []

    def keep(message, reply):
        if message.metadata.message_type == "train":
            sent.append(reply.content["arrays"])
        return reply

    run(local_grid, settings, dict.fromkeys(range(NODES), keep))
    _, _, _, manifest = results(settings)
    assert len(sent) == 1
    from fedpft_flower.wire import unpack_tensors

    assert tensors_hash(unpack_tensors(sent[0])) == manifest["adapter-sha256"]


def test_order_of_arrival_and_node_ids_do_not_matter(local_grid, settings):
    hashes = set()
    for order in (1, -1):
        run(local_grid, settings, order=order)
        manifest = results(settings)[3]
        hashes.add((manifest["adapter-sha256"], manifest["sub-fm-sha256"]))
    assert len(hashes) == 1


def test_train_messages_carry_one_array_record_and_install_comes_once(
    local_grid, settings
):
    settings["align.every"] = 2
    grid, _ = run(local_grid, settings)
    installs = [m for m in grid.seen if m.metadata.message_type == "query.install"]
    trains = [m for m in grid.seen if m.metadata.message_type == "train"]
    # All nodes share this machine's store: one whole sub-FM, one change of it.
    assert [bool(m.content["config"]["base"]) for m in installs] == [False, True]
    assert len(trains) == 9
    assert all(list(m.content.array_records) == ["arrays"] for m in trains)
    _, rounds, _, manifest = results(settings)
    assert manifest["sub-fm-sha256"] in Store().hashes()
    table = rounds[1]["bytes"]["down-install"]
    assert table["logical"] == 3 * table["sent"] > 0
    assert set(rounds[2]["bytes"]) >= {"down-adapter", "up-adapter", "up-statistics"}
    # Half of the neurons changed: well below half of a whole install.
    delta = rounds[3]["bytes"]["down-delta"]
    assert 0 < delta["sent"] < 0.5 * table["sent"]


def test_ledger_is_the_sum_of_record_payloads(local_grid, settings):
    settings |= {"method": "fedpft-n", "rounds": 1}
    grid, _ = run(local_grid, settings)
    _, rounds, summary, _ = results(settings)
    trains = [m for m in grid.seen if m.metadata.message_type == "train"]
    arrays = sum(m.content["arrays"].count_bytes() for m in trains)
    assert rounds[1]["bytes"]["down-adapter"]["logical"] == arrays
    assert rounds[1]["bytes"]["up-adapter"]["logical"] == arrays
    assert summary["bytes-down"] == sum(r["bytes-down"] for r in rounds)


def test_a_node_that_lost_its_copy_gets_it_again(local_grid, settings):
    settings["method"] = "fedpft-b"
    lost = []

    def lose(message, reply):
        if message.metadata.message_type == "train" and not lost:
            lost.append(message.content["config"]["sub-fm"])
            shutil.rmtree(Store().directory(lost[0]))
            client.forget_sub_fm()
        return reply

    grid, _ = run(local_grid, settings, {0: lose, 1: lose, 2: lose, 3: lose, 4: lose})
    installs = [m for m in grid.seen if m.metadata.message_type == "query.install"]
    assert len(installs) == 2
    _, rounds, summary, _ = results(settings)
    assert summary["failures"] == 0
    assert all(len(r["per-client"]) == 3 for r in rounds[1:])


def test_copies_of_a_machine_get_the_sub_fm_each(local_grid, settings, tmp_path):
    """Their stores have one name, so what one of them was sent seems to be at all."""
    settings |= {"method": "fedpft-b", "rounds": 1, "train.clients-per-round": NODES}

    def somewhere(message, context):
        cache = tmp_path / f"machine-{context.node_id}"
        store = cache / "sub-fms"
        store.mkdir(parents=True, exist_ok=True)
        (store / "name").write_text("f" * 32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDPFT_CACHE", str(cache))
            client.forget_sub_fm()
            return client_app(message, context)

    grid, _ = run(local_grid, settings, app=somewhere)
    installs = [m for m in grid.seen if m.metadata.message_type == "query.install"]
    assert len(installs) == 1 + 1 + NODES - 2  # one, one again, then each that lacks it
    _, rounds, summary, _ = results(settings)
    assert summary["failures"] == 0
    assert len(rounds[1]["per-client"]) == NODES


def broken(change):
    def fault(message, reply):
        if message.metadata.message_type != "train":
            return reply
        return change(message, reply)

    return fault


def with_arrays(change):
    def replace(message, reply):
        arrays = {k: v.numpy().copy() for k, v in reply.content["arrays"].items()}
        from flwr.app import Array

        changed = change(arrays)
        reply.content["arrays"] = ArrayRecord({k: Array(v) for k, v in changed.items()})
        return reply

    return replace


def with_metrics(change):
    def replace(message, reply):
        change(reply.content["metrics"])
        return reply

    return replace


def with_record(name):
    def replace(message, reply):
        reply.content[name] = ConfigRecord({"text": "x"})
        return reply

    return replace


def poison(arrays):
    next(iter(arrays.values())).flat[0] = np.nan
    return arrays


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_arrays(poison), "not finite"),
        (with_arrays(lambda a: dict(list(a.items())[1:])), "other names"),
        (with_arrays(lambda a: dict(reversed(a.items()))), "other names or another"),
        (with_arrays(lambda a: {k: v[:1] for k, v in a.items()}), "expected"),
        (with_arrays(lambda a: {k: v.astype("f8") for k, v in a.items()}), "expected"),
        (with_arrays(lambda a: {k: v.astype(">f4") for k, v in a.items()}), ""),
        (with_metrics(lambda m: m.pop("peak-memory")), "its metrics are"),
        (with_metrics(lambda m: m.update({"num-examples": 0})), "not positive"),
        (with_record("note"), "not one adapter with metrics"),
        (with_metrics(lambda m: m.update({"train_loss": np.inf})), "is outside [0"),
        (with_metrics(lambda m: m.update({"inactive-rates.0": [0.5]})), "shape"),
        (with_metrics(lambda m: m.update({"inactive-rates.x": [0.5]})), "unusable"),
        (lambda m, r: Message(Error(2, "boom\nlast line"), reply_to=m), "last line"),
        (lambda m, r: Message(Error(3, "not found"), reply_to=m), "no reply in time"),
    ],
)
def test_a_bad_reply_is_left_out_named_and_counted(local_grid, settings, change, said):
    settings |= {"rounds": 1, "train.clients-per-round": NODES}
    run(local_grid, settings, {1: broken(change)})
    _, rounds, summary, _ = results(settings)
    failures = rounds[1]["failures"]
    assert list(failures) == ["partition-000001"]
    assert said in failures["partition-000001"]
    table = rounds[1]["per-client"]
    assert [one["outcome"] == "ok" for _, one in sorted(table.items())] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert table["partition-000001"]["outcome"] == failures["partition-000001"]
    assert summary["failures"] == 1


def test_a_machine_builds_a_sub_fm_once_for_all_its_nodes(
    local_grid, settings, monkeypatch
):
    settings |= {"rounds": 3, "train.clients-per-round": NODES, "align.every": 2}
    client.forget_sub_fm()
    built, real = [], client.build_from_package

    def counting(package, *arguments):
        built.append(package)
        return real(package, *arguments)

    monkeypatch.setattr(client, "build_from_package", counting)
    run(local_grid, settings)
    assert len(built) == 2  # of fedpft: the first sub-FM, and the realigned one


def test_a_reply_weighs_no_more_than_the_rows_that_its_node_came_with(
    local_grid, settings
):
    settings |= {"rounds": 1, "train.clients-per-round": NODES}
    run(local_grid, settings)
    manifest = results(settings)[3]
    boast = with_metrics(lambda m: m.update({"num-examples": 10**9}))
    run(local_grid, settings, {1: broken(boast)})
    place, boasted, _, unmoved = results(settings)
    assert unmoved["adapter-sha256"] == manifest["adapter-sha256"]
    client = boasted[1]["per-client"]["partition-000001"]
    assert client["num-examples"] == manifest["nodes"]["partition-000001"]
    assert "learnt from 1000000000 rows and came with" in (place / LOG).read_text()


def test_what_a_client_says_reaches_log_and_terminal_as_one_line(local_grid, settings):
    """Also what Flower says of a reply quotes it."""
    settings |= {"rounds": 1, "train.clients-per-round": NODES}

    def lie(message, reply):
        for array in reply.content["arrays"].values():
            array.stype = "x'\n[fedpft] error: all is lost\x1b]0;gone\x07" + "y" * 5000
        return reply

    run(local_grid, settings, {1: broken(lie)})
    place, rounds, _, _ = results(settings)
    assert "all is lost" in rounds[1]["failures"]["partition-000001"]
    log = (place / LOG).read_text()
    (line,) = [line for line in log.splitlines() if "all is lost" in line]
    assert "is left out" in line and "\x1b" not in log and len(line) < 1200


def once(code_or_change, when):
    """Fail the first train message that a node gets in the round `when`."""
    seen = []

    def fault(message, reply):
        config = message.content.config_records.get("config", {})
        if message.metadata.message_type != "train" or config["server-round"] != when:
            return reply
        seen.append(1)
        return code_or_change(message, reply) if len(seen) == 1 else reply

    return fault


def test_a_round_is_tried_again_with_those_that_failed_only(local_grid, settings):
    settings |= {
        "train.clients-per-round": NODES,
        "train.min-replies": NODES,
        "timeout-seconds": 1.0,
    }
    run(local_grid, settings)
    expected = results(settings)[3]["adapter-sha256"]
    failing = once(lambda m, r: Message(Error(5, "node offline"), reply_to=m), when=2)
    grid, _ = run(local_grid, settings, {1: failing, 3: once(lambda m, r: None, 2)})
    _, rounds, summary, manifest = results(settings)
    assert manifest["adapter-sha256"] == expected
    assert summary["failures"] == 0
    asked = [m for m in grid.seen if m.metadata.message_type == "train"]
    assert len(asked) == 3 * NODES + 2
    assert all(one["outcome"] == "ok" for one in rounds[2]["per-client"].values())


def test_others_stand_in_for_nodes_that_are_gone(local_grid, settings):
    settings |= {"train.min-replies": 3, "timeout-seconds": 1.0}
    gone = []

    def die(message, reply):
        if message.metadata.message_type == "train" and not gone:
            gone.append(message.metadata.dst_node_id)
            return None
        return reply

    real = local_grid.get_node_ids
    local_grid.get_node_ids = lambda self: [n for n in real(self) if n not in gone]
    try:
        run(local_grid, settings, dict.fromkeys(range(NODES), die))
    finally:
        local_grid.get_node_ids = real
    _, rounds, _, manifest = results(settings)
    for entry in rounds[1:]:
        good = [c for c in entry["per-client"].values() if c["outcome"] == "ok"]
        assert len(good) == 3
    assert len(manifest["nodes"]) == NODES  # also the one that was gone at the end
    assert (
        sum("no reply in time" in x for r in rounds[1:] for x in r["failures"].values())
        == 1
    )


def test_too_few_replies_end_the_run_and_name_the_checkpoint(local_grid, settings):
    settings |= {
        "train.clients-per-round": NODES,
        "train.min-replies": NODES,
        "train.max-retries": 3,
        "timeout-seconds": 0.5,
    }
    never = broken(lambda m, r: None)
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, settings, {2: never})
    said = str(caught.value)
    for part in (
        f"round 1: train.min-replies = {NODES}, and n = {NODES - 1} usable replies",
        "partition-000002: no reply in time",
        "(tried 4 times: train.max-retries)",
        "the last checkpoint is of round 0, go on with resume=",
    ):
        assert part in said
    assert "\n" not in said


def log_of(settings):
    return (Path(settings["out-dir"]) / "7" / LOG).read_text()


def test_an_update_that_is_too_large_is_left_out(local_grid, settings):
    settings |= {"rounds": 1, "train.clients-per-round": NODES}

    def huge(arrays):
        return {name: array * 0 + 1e4 for name, array in arrays.items()}

    run(local_grid, settings, {1: broken(with_arrays(huge))})
    _, rounds, _, _ = results(settings)
    (reason,) = rounds[1]["failures"].values()
    assert "L2 norm), more than train.max-update-norm = 1000" in reason


def moved(local_grid, settings, dies, since=0):
    """Run, and start partition 0 once more under the id 77; its old self stays listed.

    Args:
        local_grid: the class.
        settings: of the run.
        dies: whether the old self no longer answers greetings.
        since: the round in which it happens.

    Returns:
        The grid, and the old self's id.
    """
    grid = local_grid(client_app, NODES, settings)
    first = next(iter(grid.contexts))

    def fault(message, reply):
        told = message.metadata
        asked = told.message_type == HELLO and told.dst_node_id == first
        if dies and asked and 77 in grid.contexts:
            return Message(Error(5, "node unavailable"), reply_to=message)
        round_ = message.content["config"].get("server-round", 0)
        if asked if not since else round_ == since:  # it was known before it moves
            twin = copy.copy(grid.contexts[first])
            twin.node_id = 77
            grid.contexts.setdefault(77, twin)
        return reply

    grid.faults = dict.fromkeys(range(NODES), fault)
    serve(grid, Context(7, 0, {}, RecordDict(), settings))
    return grid, first


def trained(grid, after=0):
    """Return the ids that were asked to train after a round."""
    trains = [m for m in grid.seen if m.metadata.message_type == "train"]
    return {
        m.metadata.dst_node_id
        for m in trains
        if m.content["config"]["server-round"] > after
    }


def test_a_node_that_comes_back_under_a_new_id_takes_its_old_place(
    local_grid, settings
):
    settings |= {"train.clients-per-round": NODES, "method": "fedpft-b"}
    run(local_grid, settings)
    expected = results(settings)[3]["adapter-sha256"]
    grid, first = moved(local_grid, settings, dies=True, since=1)
    _, _, summary, manifest = results(settings)
    assert manifest["adapter-sha256"] == expected
    assert summary["failures"] == 0
    assert 77 in trained(grid, 1) and first not in trained(grid, 1)


def test_a_node_that_restarts_before_training_takes_its_old_place(local_grid, settings):
    """As after hours of alignment: its new id is online, its old one still listed."""
    settings |= {"train.clients-per-round": NODES, "method": "fedpft-b", "rounds": 1}
    grid, first = moved(local_grid, settings, dies=True)
    assert results(settings)[2]["failures"] == 0
    assert 77 in trained(grid) and first not in trained(grid)


def test_a_newcomer_does_not_take_the_name_of_a_node_that_is_there(
    local_grid, settings
):
    settings |= {"train.clients-per-round": NODES, "method": "fedpft-b"}
    run(local_grid, settings)
    expected = results(settings)[3]["adapter-sha256"]
    grid, first = moved(local_grid, settings, dies=False, since=1)
    _, rounds, _, manifest = results(settings)
    assert manifest["adapter-sha256"] == expected
    assert first in trained(grid, 1) and 77 not in trained(grid)
    assert len(rounds) > 3
    for entry in rounds[2:]:
        reason = entry["failures"]["node 77"]
        assert f"node {first}, which is still there, has that name; give" in reason
    hellos = [m for m in grid.seen if m.metadata.message_type == HELLO]
    asked = [m.metadata.dst_node_id for m in hellos]
    assert (asked.count(first), asked.count(77)) == (2, 1)  # not in every round


def test_two_nodes_of_one_name_before_training_end_the_run(local_grid, settings):
    settings |= {"train.clients-per-round": NODES, "method": "fedpft-b", "rounds": 1}
    with pytest.raises(
        FedPFTError, match="still there, has that name; give it another"
    ):
        moved(local_grid, settings, dies=False)


def test_a_node_that_dies_in_the_first_install_does_not_end_the_run(
    local_grid, settings
):
    settings |= {"train.clients-per-round": NODES, "method": "fedpft-b", "rounds": 1}
    died = []

    def die(message, reply):
        if message.metadata.message_type == "query.install" and not died:
            died.append(message.content["config"]["sub-fm"])
            shutil.rmtree(Store().directory(died[0]))
            return Message(Error(5, "node unavailable"), reply_to=message)
        return reply

    run(local_grid, settings, dict.fromkeys(range(NODES), die))
    _, rounds, _, _ = results(settings)
    assert died and not rounds[1]["failures"]
    assert len(rounds[1]["per-client"]) == NODES


def test_a_run_without_any_usable_reply_fails_in_one_line(local_grid, settings):
    fault = broken(lambda m, r: Message(Error(2, "no memory"), reply_to=m))
    said = r"round 1: no client trained.*no memory.*tried 2 times.*of round 0, go on"
    with pytest.raises(FedPFTError, match=said):
        run(local_grid, settings, dict.fromkeys(range(NODES), fault))


def test_a_node_that_cannot_install_later_is_left_out_and_the_run_goes_on(
    local_grid, settings
):
    settings |= {"train.clients-per-round": NODES, "rounds": 3}

    def full_disk(message, reply):
        config = message.content.config_records.get("config", {})
        if message.metadata.message_type == "query.install" and config["base"]:
            shutil.rmtree(Store().directory(config["sub-fm"]))
            return Message(Error(2, "no space left"), reply_to=message)
        return reply

    with pytest.raises(FedPFTError, match=r"round 2: no chosen node.*no space left"):
        run(local_grid, settings, dict.fromkeys(range(NODES), full_disk))


def test_nodes_that_disagree_on_the_number_of_partitions_are_refused(
    local_grid, settings
):
    grid = local_grid(client_app, NODES, settings)
    first, *_ = grid.contexts.values()
    first.node_config["num-partitions"] = NODES + 1
    with pytest.raises(FedPFTError, match="give all the same"):
        serve(grid, Context(7, 0, {}, RecordDict(), settings))


def test_stale_client_code_is_refused(local_grid, settings, monkeypatch):
    monkeypatch.setattr(node, "source_hash", lambda: "f" * 64)
    with pytest.raises(FedPFTError, match="runs other code"):
        run(local_grid, settings)


def test_other_libraries_at_a_node_are_told_and_recorded(
    local_grid, settings, monkeypatch
):
    old = {**versions(), "transformers": "4.0", "fedpft-flower": "0.0"}
    monkeypatch.setattr(node, "versions", lambda: old)
    run(local_grid, settings)
    manifest = results(settings)[3]
    assert set(manifest["node-versions"]) == set(manifest["nodes"])
    for differing in manifest["node-versions"].values():
        # The package itself came with the run.
        assert differing == {"transformers": "4.0"}
    own = manifest["versions"]["transformers"]
    told = f"has transformers 4.0; the server has transformers {own}"
    assert told in log_of(settings)


PATHS = ("data.path", "data.public-path")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "fedmagic"}, "method = 'fedmagic'; choose one of"),
        ({"data.task": "juggling"}, "data.task = 'juggling'"),
        ({"sub-fm.keep-neurons": 99}, "sub-fm.keep-neurons = 99"),
        ({"sub-fm.selection": "magic"}, "sub-fm.selection"),
        ({"lora.targets": "query_key"}, "no module 'query_key'"),
        ({"lora.head": "poolest"}, "no module 'poolest'"),
        ({"train.clients-per-round": 9}, "train.min-nodes = 9"),
        ({"train.min-nodes": 9}, "train.min-nodes = 9, but there are 5 nodes"),
        ({"fm.name": "/no/such/place"}, "fm.name = '/no/such/place'"),
        ({"data.task": "text"}, "takes image inputs"),
        ({"data.max-train-rows": 3}, "empty partition"),
        ({"data.task": "image"}, "needs data.path"),
    ],
)
def test_bad_input_ends_in_one_line_before_any_training(
    local_grid, settings, change, said, tmp_path
):
    if change.get("data.task") == "text":
        rows = [f"film {i},{i % 2}" for i in range(40)]
        (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
        change = change | dict.fromkeys(PATHS, str(tmp_path / "rows.csv"))
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, {**settings, **change})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_are_complete_and_the_adapter_opens_on_the_stock_fm(
    local_grid, settings, vit_directory
):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    from fedpft_flower.evaluation import evaluate

    settings["align.activity"] = "public"
    _, config = run(local_grid, settings)
    place, rounds, summary, manifest = results(settings)
    assert {p.name for p in place.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "manifest.json",
        "curves.png",
        "report.html",
        "hits.json",
        "run.log",
        "adapter",
        "checkpoints",
        ".lock",
    }
    text = (place / "config.toml").read_text()
    from fedpft_flower.config import flatten

    assert Config.from_run_config(flatten(tomllib.loads(text))) == config
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    assert "up-statistics" not in rounds[1]["bytes"]
    assert set(manifest["splits"]) == {"train", "validation", "test", "public"}
    assert 0 < summary["share-withheld"] < 0.5
    task = load_task(config.data, config.seed)
    stock = AutoModelForImageClassification.from_pretrained(
        vit_directory, num_labels=len(task.labels), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(stock, str(place / "adapter"))
    fm = load_fm(str(vit_directory), task.labels, "image", config.seed)
    rows = encode(task.test, fm.processor, "image", config.data)
    assert evaluate(model, rows)["accuracy"] == summary["test-after"]["fm-accuracy"]


def test_further_test_splits_are_reported_apart(local_grid, settings, tmp_path):
    task = load_task(DataConfig(task="digits"), 0)
    splits = {"train": task.train, "near": task.validation, "far": task.test}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    settings["data.max-test-rows"] = 0
    settings |= {
        "rounds": 1,
        "data.task": "image",
        "data.path": str(tmp_path / "data"),
        "data.public-path": str(tmp_path / "data"),
        "data.test-split": "near,far",
    }
    run(local_grid, settings)
    place, _, summary, manifest = results(settings)
    assert summary["more-tests"].keys() == {"far"}
    assert summary["more-tests"]["far"].keys() == summary["test-after"].keys()
    assert summary["more-tests"]["far"] != summary["test-after"]
    assert manifest["splits"]["far"]["rows"] == len(task.test)
    hits = json.loads((place / "hits.json").read_text())
    share = hits["fm (far)"].count("1") / len(task.test)
    assert share == pytest.approx(summary["more-tests"]["far"]["fm-accuracy"])
    assert len(hits["sub-fm (far)"]) == len(task.test)


# ------------------------------------------------------- nodes with rows of their own


@pytest.fixture
def sites(settings, bert_directory, tmp_path):
    """Write a server's rows, a public corpus, and files of sites of different shape."""
    words = {"good": "good fast film", "bad": "very bad film"}

    def csv(name, labels, header="text,label"):
        rows = [f"{words[label]} {'abcdef'[i % 6]},{label}" for i, label in labels]
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n")
        return str(tmp_path / name)

    both = ["good", "bad"]
    (tmp_path / "server").mkdir()
    csv("server/test.csv", [(i, both[i % 2]) for i in range(20)])
    settings |= {
        "method": "fedpft-b",
        "rounds": 2,
        "fm.name": str(bert_directory),
        "data.task": "text",
        "data.path": str(tmp_path / "server"),
        "data.labels": "bad,good",
        "data.public-path": csv("public.csv", [(i, both[i % 2]) for i in range(40)]),
        "data.metric": "matthews",
        "data.max-length": 16,
        "train.clients-per-round": 0,
        "train.fraction": 1.0,
        "train.local-steps": 0,
    }
    return settings, [
        # Two hundred rows; one class only; fewer rows than a batch, other columns.
        {
            "site": "north",
            "data-path": csv("n.csv", [(i, both[i % 2]) for i in range(200)]),
        },
        {"site": "south", "data-path": csv("s.csv", [(i, "good") for i in range(40)])},
        {
            "site": "west",
            "data-path": csv(
                "w.csv", [(0, "bad"), (1, "good"), (2, "bad")], "note,grade"
            ),
            "text-columns": "note",
            "label-column": "grade",
        },
    ]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sites_of_any_shape_train_on_their_own_rows(local_grid, sites, family, request):
    settings, configs = sites
    settings["fm.name"] = str(request.getfixturevalue(f"{family}_directory"))
    run(local_grid, settings, nodes=3, configs=configs)
    _, rounds, summary, manifest = results(settings)
    assert manifest["nodes"] == {"north": 200, "south": 40, "west": 3}
    assert manifest["labels"] == ["bad", "good"]
    assert "train" not in manifest["splits"]
    steps = {name: one["steps"] for name, one in rounds[1]["per-client"].items()}
    assert steps == {"north": 13, "south": 3, "west": 1}
    assert summary["failures"] == 0
    assert rounds[2]["fm-loss"] < rounds[0]["fm-loss"]
    assert set(summary["test-after"]) >= {"fm-macro-f1", "sub-fm-matthews"}


def test_a_resumed_run_goes_on_without_a_site_that_is_gone(
    local_grid, sites, monkeypatch
):
    """As one goes on that loses it between two rounds."""
    settings, configs = sites
    settings |= {"train.clients-per-round": 3, "wait-seconds": 0.1}
    real = ProxyServer.end_round

    def cut(self, current, *rest):
        if current == 2:
            raise KeyboardInterrupt
        return real(self, current, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ProxyServer, "end_round", cut)
        with pytest.raises(KeyboardInterrupt):
            run(local_grid, settings, nodes=3, configs=configs)
    place = Path(settings["out-dir"]) / "7"
    resumed = settings | {"resume": str(place)}
    with pytest.raises(FedPFTError) as caught:
        more = resumed | {"train.min-replies": 3}
        run(local_grid, more, nodes=2, configs=configs)
    assert "3 are needed" in str(caught.value)
    assert "or lower train.min-nodes or train.min-replies" in str(caught.value)
    run(local_grid, resumed, nodes=2, configs=configs)
    _, rounds, _, manifest = results(settings)
    assert rounds[1]["clients"] == ["north", "south", "west"]
    assert rounds[2]["clients"] == ["north", "south"]
    assert "2 of 3 nodes are online" in (place / LOG).read_text()
    assert set(manifest["nodes"]) == {"north", "south", "west"}


def test_a_site_says_in_its_own_log_what_it_did(local_grid, sites, caplog):
    settings, configs = sites
    run(local_grid, settings, nodes=3, configs=configs)
    west = [message for message in caplog.messages if "west" in message]
    assert west == ["run 1: west has 3 rows to train on"]
    assert sum("1: installed the sub-FM, 0." in m for m in caplog.messages) == 1
    for current in (1, 2):
        began = f"run 1, round {current}: training on 3 rows"
        assert caplog.messages.count(began) == 1
        said = rf"run 1, round {current}: trained on 3 rows, 1 steps, loss \d\.\d+, "
        assert sum(bool(re.match(said, m)) for m in caplog.messages) == 1


def test_what_quotes_a_sites_rows_stays_in_its_log(local_grid, sites, capsys, tmp_path):
    settings, configs = sites
    (tmp_path / "n.csv").write_text("text,label\n" + "well,Meier has gout\n" * 9)
    said = "north: 1 labels in train are outside the label set"
    with pytest.raises(FedPFTError, match=said) as refused:
        run(local_grid, settings, nodes=3, configs=configs)
    assert "Meier" in capsys.readouterr().out and "Meier" not in str(refused.value)


def test_a_site_that_says_it_has_most_rows_is_named(local_grid, sites):
    settings, configs = sites
    run(local_grid, settings | {"rounds": 1}, nodes=3, configs=configs)
    told = "north says that it has 200 of 243 rows, which is its weight"
    place, *_ = results(settings)
    assert told in (place / LOG).read_text()


def test_the_same_sites_give_the_same_adapter_whatever_their_node_ids(
    local_grid, sites
):
    settings, configs = sites
    settings["train.clients-per-round"] = 2
    hashes = set()
    for turned in (configs, configs[::-1]):
        run(local_grid, settings, nodes=3, configs=turned)
        hashes.add(results(settings)[3]["adapter-sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"data-path": "/no/such/file.csv"},
            "west: data-path does not exist; give a path",
        ),
        ({"label-column": "mark"}, "no column 'mark'; this data has note, grade"),
        ({"site": "north"}, "are both north; give every node its own"),
        ({"text-columns": "note,grade"}, "name one column twice"),
    ],
)
def test_a_site_that_cannot_take_part_is_named_before_training(
    local_grid, sites, change, said
):
    settings, configs = sites
    configs[2] |= change
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, settings, nodes=3, configs=configs)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_that_the_server_does_not_know_is_refused_by_the_node(
    local_grid, sites
):
    settings, configs = sites
    settings["data.labels"] = ""
    from pathlib import Path

    Path(configs[1]["data-path"]).write_text("text,label\na film,odd\n")
    with pytest.raises(
        FedPFTError, match=r"south: 1 labels in train are outside .*bad, good"
    ):
        run(local_grid, settings, nodes=3, configs=configs)


def test_a_node_without_a_name_is_warned_about(local_grid, sites, monkeypatch):
    settings, configs = sites
    del configs[0]["site"]
    said = []
    monkeypatch.setattr(federation.logger, "warning", lambda *line: said.append(line))
    run(local_grid, settings, nodes=3, configs=configs)
    assert ["sampling is not repeatable" in text for text, _ in said] == [True]
    names = set(results(settings)[3]["nodes"])
    assert len(names) == 3 and {"south", "west"} < names


def test_nodes_may_train_within_their_own_memory(local_grid, settings, tmp_path):
    settings |= {"lora.dropout": 0.0, "rounds": 1, "method": "fedpft-n"}
    adapters = []
    for own in ({}, {"micro-batch-size": 3, "recompute": True}):
        settings |= {"out-dir": str(tmp_path / f"out-{len(adapters)}")}
        configs = [
            {"partition-id": i, "num-partitions": NODES, **own} for i in range(NODES)
        ]
        run(local_grid, settings, configs=configs)
        place = Path(settings["out-dir"]) / "7" / "adapter"
        adapters.append(load_file(place / "adapter_model.safetensors"))
    one, other = adapters
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-3, rtol=1e-2)
    bad = [{"partition-id": 0, "num-partitions": NODES, "micro-batch-size": "few"}]
    with pytest.raises(FedPFTError, match="micro-batch-size = 'few', recompute"):
        run(local_grid, settings, configs=bad)


def test_a_node_without_rows_says_how_to_start_it(local_grid, sites):
    settings, configs = sites
    configs[1] = {"site": "south"}
    with pytest.raises(FedPFTError, match=r"this node has no rows; start it with"):
        run(local_grid, settings, nodes=3, configs=configs)


def test_a_site_that_nobody_named_is_refused(local_grid, sites):
    settings, configs = sites
    configs[1]["site"] = "CHANGE-ME"
    with pytest.raises(FedPFTError, match=r"CHANGE-ME.*give it a name of its own"):
        run(local_grid, settings, nodes=3, configs=configs)


def test_a_node_that_is_online_and_busy_is_told_from_one_that_is_not(
    local_grid, settings
):
    settings |= {"train.min-nodes": NODES, "timeout-seconds": 0.3, "wait-seconds": 0.5}

    def busy(message, reply):
        return None if message.metadata.message_type == "query.hello" else reply

    with pytest.raises(FedPFTError, match=r"1 more are online and do not answer"):
        run(local_grid, settings, {1: busy})


def test_a_node_that_is_gone_when_greeted_is_waited_for(local_grid, settings):
    calls = []

    def flicker(message, reply):
        if message.metadata.message_type == "query.hello":
            calls.append(1)
            if len(calls) == 1:
                return Message(Error(5, "Node Unavailable"), reply_to=message)
        return reply

    run(local_grid, settings, {2: flicker})
    assert len(calls) == 2
    assert len(results(settings)[3]["nodes"]) == NODES


def test_layer_dropping_without_anything_to_align_is_refused(local_grid, settings):
    settings |= {"method": "fedot-b", "sub-fm.layer-budget": 0.5}
    with pytest.raises(FedPFTError, match=r"'fedot-b' has nothing to align.*'fedot'"):
        run(local_grid, settings)


@pytest.mark.parametrize("key", ["align.before", "align.during"])
def test_refitting_whole_layers_is_refused(local_grid, settings, key):
    settings |= {"method": "fedot-b", "sub-fm.end-layers": 1, key: "least-squares"}
    with pytest.raises(FedPFTError, match="'least-squares' refits compressed ones"):
        run(local_grid, settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partition-id": "a"}, "are numbers: invalid literal"),
        ({"text-columns": "note"}, "has text-columns but no data-path"),
        ({"data-path": ""}, "has data-path but no data-path to read"),
        (
            {"label_column": "x"},
            "has label_column, which nobody reads; is it label-col",
        ),
        ({"max-install-mb": "2GB"}, "has max-install-mb = '2GB'; give megabytes"),
        ({"max-install-mb": float("nan")}, "has max-install-mb = nan; give megabytes"),
    ],
)
def test_a_node_config_without_sense_is_refused(local_grid, settings, change, said):
    shares = {"partition-id": 0, "num-partitions": 2}
    configs = [shares | change, {"partition-id": 1, "num-partitions": 2}]
    settings["train.clients-per-round"] = 0
    with pytest.raises(FedPFTError, match=said):
        run(local_grid, settings, nodes=2, configs=configs)


def test_a_node_that_missed_some_versions_gets_a_change(
    local_grid, settings, monkeypatch, tmp_path
):
    def on_its_own_machine(message, context):
        place = tmp_path / f"machine-{context.node_config['partition-id']}"
        monkeypatch.setenv("FEDPFT_CACHE", str(place))
        return client_app(message, context)

    settings |= {"rounds": 8, "train.clients-per-round": 1, "align.every": 1}
    settings |= {"align.during-steps": 1, "train.local-steps": 1}
    run(local_grid, settings, app=on_its_own_machine)
    _, rounds, _, _ = results(settings)
    last: dict[str, int] = {}
    behind = []
    for entry in rounds[1:]:
        (key,) = entry["clients"]
        whole = entry["bytes"].get("down-install", {"sent": 0})["sent"]
        change = entry["bytes"].get("down-delta", {"sent": 0})["sent"]
        assert (whole > 0) == (key not in last)
        assert (change > 0) == (key in last)
        behind.append(entry["round"] - last.get(key, entry["round"]))
        last[key] = entry["round"]
    assert max(behind) > 1


def test_a_strategy_that_diverges_is_named(local_grid, settings, monkeypatch):
    average = FedAvg.aggregate_train

    def overflow(strategy, server_round, replies):
        arrays, metrics = average(strategy, server_round, replies)
        large = {
            name: 1e300 * a.numpy().astype("float64") for name, a in arrays.items()
        }
        return ArrayRecord({n: Array(a) for n, a in large.items()}), metrics

    monkeypatch.setattr(FedAvg, "aggregate_train", overflow)
    with pytest.raises(FedPFTError, match="strategy 'FedAvg' made an adapter that is"):
        run(local_grid, settings)
