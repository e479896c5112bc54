"""Differential privacy: what is released, counted, refused, and what clients tell."""

import copy
import json
import math
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAvg

from benchmarks.plain_loop import PlainLoop
from client_app import app as client_app
from fedpft_flower import commands, run_directory, strategy
from fedpft_flower.checkpoint import Checkpoints
from fedpft_flower.checks import check_run
from fedpft_flower.client import forget_sub_fm
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.privacy import NO_MEAN, Privacy, check_private
from fedpft_flower.refusals import UNTOLD
from fedpft_flower.server import ProxyServer
from fedpft_flower.store import Store
from fedpft_flower.strategies import STRATEGIES, inner_strategy
from tests.test_federation import (
    NODES,
    broken,
    log_of,
    results,
    run,
    with_arrays,
    with_metrics,
)
from tests.test_resume import ROOT, Cut, cut, directory, kill_at
from tests.test_strategies import ARGUMENTS

dp_accounting = pytest.importorskip("dp_accounting")

CLIENTS = 3


@pytest.fixture
def private(settings):
    return settings | {
        "method": "fedpft-n",
        "weighting": "uniform",
        "privacy.mechanism": "server",
        "privacy.noise-multiplier": 1.0,
        "privacy.clipping-norm": 0.05,
        "train.clients-per-round": CLIENTS,
        "train.min-replies": CLIENTS,
        "data.max-validation-rows": 20,
        "data.max-test-rows": 20,
        "timeout-seconds": 1.0,
    }


def everywhere(fault):
    return dict.fromkeys(range(NODES), broken(fault))


def keeper():
    """Return a fault that keeps adapters by round: sent [D], and replies [n, D]."""
    kept = {}

    def keep(message, reply):
        current = message.content["config"]["server-round"]
        sent = vector(message.content["arrays"])
        kept.setdefault(current, (sent, []))[1].append(vector(reply.content["arrays"]))
        return reply

    return keep, kept


def final(settings):
    """Return the adapter [D] of the newest checkpoint."""
    tensors = Checkpoints(directory(settings), 2).load().tensors
    names = [name for name in tensors if name.startswith("adapter/")]
    return np.concatenate([tensors[n].double().numpy().ravel() for n in sorted(names)])


def vector(record):
    """Return the arrays of a record as one [D], in the order of `final`."""
    arrays = [record[name].numpy().ravel() for name in sorted(record)]
    return np.concatenate(arrays).astype("f8")


def clipped(update, norm):
    return update * min(1.0, norm / np.linalg.norm(update))


# ------------------------------------------------------------------ what is released


@pytest.mark.parametrize("mechanism", ["server", "client"])
def test_without_noise_and_clipping_a_run_is_the_uniform_mean(
    local_grid, private, mechanism
):
    private |= {
        "rounds": 1,
        "privacy.mechanism": mechanism,
    }  # Adam enlarges what is small
    plain = {k: v for k, v in private.items() if not k.startswith("privacy.")}
    run(local_grid, plain)
    expected = final(private)
    loose = {"privacy.noise-multiplier": 1e-6, "privacy.clipping-norm": 10.0}
    run(local_grid, private | loose)
    # Seven deviations of the noise that is left.
    np.testing.assert_allclose(final(private), expected, atol=7 * 1e-5 / CLIENTS)
    run(local_grid, plain | {"weighting": "examples"})
    assert np.abs(final(private) - expected).max() > 7e-5


def test_uniform_weights_are_the_mean_of_the_clients(local_grid, private):
    keep, kept = keeper()
    plain = {k: v for k, v in private.items() if not k.startswith("privacy.")}
    run(local_grid, plain | {"rounds": 1}, everywhere(keep))
    _, replies = kept[1]
    np.testing.assert_allclose(final(private), np.mean(replies, axis=0), atol=1e-6)


@pytest.mark.parametrize("mechanism", ["server", "client"])
def test_noise_has_the_size_that_the_formula_gives(local_grid, private, mechanism):
    keep, kept = keeper()
    private |= {"privacy.mechanism": mechanism, "rounds": 1}
    run(local_grid, private, everywhere(keep))
    sent, replies = kept[1]
    norm, multiplier = private["privacy.clipping-norm"], 1.0
    moved = [np.linalg.norm(reply - sent) for reply in replies]
    if mechanism == "client":  # they arrive clipped, over all tensors together
        assert max(moved) == pytest.approx(norm, rel=1e-4)
    else:
        assert min(moved) > norm
    mean = np.mean([clipped(reply - sent, norm) for reply in replies], axis=0)
    noise = final(private) - sent - mean
    deviation = multiplier * norm / CLIENTS
    # Six standard errors of a normal sample's deviation, and of its mean.
    size = len(noise)
    assert abs(noise.std() / deviation - 1) < 6 / math.sqrt(2 * size)
    assert abs(noise.mean()) < 6 * deviation / math.sqrt(size)
    inside = (np.abs(noise) < deviation).mean()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 6 * 0.47 / math.sqrt(size)


def test_noise_follows_no_seed(local_grid, private, monkeypatch):
    made = []
    train = strategy.FedPFT.configure_train

    def seeded(self, *arguments):
        np.random.seed(0)  # as a library in this process may do
        return train(self, *arguments)

    monkeypatch.setattr(strategy.FedPFT, "configure_train", seeded)
    for _ in range(2):
        run(local_grid, private | {"rounds": 1})
        made.append(final(private))
    assert (made[0] != made[1]).mean() > 0.9


# -------------------------------------------------------------------- what is counted


def independent(multiplier, releases, delta):
    """Return epsilon of so many Gaussian releases, by dp_accounting alone."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(multiplier), releases)
    return float(accountant.get_epsilon(delta))


def by_hand(multiplier, releases, delta):
    """Return the classic bound, over orders a: n a / 2 z^2 + log(1 / d) / (a - 1).

    Mironov 2017, arXiv 1702.07476, propositions 1, 3 and 7.
    """
    orders = np.linspace(1.01, 200, 200_000)
    spent = releases * orders / (2 * multiplier**2)
    return float((spent + math.log(1 / delta) / (orders - 1)).min())


def test_epsilon_is_that_of_an_independent_accountant(local_grid, private):
    run(local_grid, private)
    _, rounds, summary, _ = results(private)
    for releases, entry in enumerate(rounds):
        told = entry["privacy"]
        assert (told["releases"], told["delta"]) == (releases, 1e-5)
        expected = independent(1.0, releases, 1e-5) if releases else 0.0
        assert told["epsilon"] == pytest.approx(expected, rel=1e-9)
        if releases:
            bound = by_hand(1.0, releases, 1e-5)
            assert 0.7 * bound < told["epsilon"] < bound
    assert summary["privacy"] == rounds[-1]["privacy"]
    saved = Checkpoints(directory(private), 2)
    assert saved.load().state["privacy"] == saved.spent()


def test_the_run_ends_before_the_round_that_would_exceed_the_budget(
    local_grid, private
):
    private |= {"privacy.max-epsilon": independent(1.0, 2, 1e-5) + 0.1, "rounds": 9}
    run(local_grid, private)
    _, rounds, summary, _ = results(private)
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert summary["privacy"]["epsilon"] <= private["privacy.max-epsilon"]
    assert Checkpoints(directory(private), 2).load().round == 2


def test_a_budget_for_no_round_and_no_noise_to_speak_of_are_refused(
    local_grid, private
):
    for change, said in (
        ({"privacy.max-epsilon": 0.1}, "allows no round, one alone spends more"),
        ({"privacy.noise-multiplier": 1e-200}, "is next to no noise"),
        ({"privacy.delta": 0.099, "train.clients-per-round": 20}, "20 nodes"),
    ):
        config = Config.from_run_config(private | change)
        with pytest.raises(FedPFTError, match=said):
            Privacy(config, inner_strategy("FedAvg", "", CLIENTS), 20, lambda s: None)


def test_without_its_package_the_remedy_is_named(private, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    config = Config.from_run_config(private)
    with pytest.raises(FedPFTError, match=r"pip install 'fedpft-flower\[dp\]'"):
        Privacy(config, inner_strategy("FedAvg", "", CLIENTS), 5, lambda state: None)


# ------------------------------------------------------------------- skipped rounds


BAD = {
    "error": lambda message, reply: Message(Error(2, "boom"), reply_to=message),
    "late": lambda message, reply: None,
    "not finite": with_arrays(lambda a: {k: v * np.nan for k, v in a.items()}),
    "a loss": with_metrics(lambda m: m.update({"train_loss": 0.5})),
    "many rows": with_metrics(lambda m: m.update({"num-examples": 9})),
    "activity": with_metrics(lambda m: m.update({"inactive-rates.0": [0.5]})),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_round_without_all_replies_is_skipped(local_grid, private, bad):
    private |= {"train.clients-per-round": NODES, "train.min-replies": NODES}

    def second(message, reply):
        if message.content["config"]["server-round"] != 2:
            return reply
        return BAD[bad](message, reply)

    grid, _ = run(local_grid, private, {1: broken(second)})
    trains = [m for m in grid.seen if m.metadata.message_type == "train"]
    assert len(trains) == 3 * NODES  # nobody is asked twice, nobody stands in
    by_round = {m.content["config"]["server-round"]: m for m in trains}
    before, after = (vector(by_round[r].content["arrays"]) for r in (2, 3))
    assert np.array_equal(before, after)
    _, rounds, summary, _ = results(private)
    assert rounds[2]["skipped"] == f"{NODES - 1} usable replies of {NODES}"
    assert list(rounds[2]["failures"]) == ["partition-000001"]
    assert ["skipped" in entry for entry in rounds] == [False, False, True, False]
    assert [entry["privacy"]["releases"] for entry in rounds] == [0, 1, 1, 2]
    assert summary["skipped"] == 1


def test_a_round_whose_sample_cannot_be_installed_asks_nobody_and_still_aligns(
    local_grid, private
):
    installs = []

    def second(message, reply):
        if message.metadata.message_type == "query.install":
            installs.append(message)
            if len(installs) == 2:
                return Message(Error(5, "node offline"), reply_to=message)
        return reply

    private |= {"method": "fedpft", "align.activity": "public"}
    grid, _ = run(local_grid, private, dict.fromkeys(range(NODES), second))
    asked = [m for m in grid.seen if m.metadata.message_type == "train"]
    rounds_asked = [m.content["config"]["server-round"] for m in asked]
    assert rounds_asked == [1] * CLIENTS + [3] * CLIENTS
    _, rounds, _, _ = results(private)
    assert rounds[2]["skipped"] == f"0 usable replies of {CLIENTS}"
    assert "alignment" in rounds[2]
    assert [entry["privacy"]["releases"] for entry in rounds] == [0, 1, 1, 2]


def unmoved(message, reply):
    reply.content["arrays"] = copy.deepcopy(message.content["arrays"])
    return reply


def far(message, reply):
    sent = message.content["arrays"]
    moved = {k: Array(a.numpy() + np.float32(0.01)) for k, a in sent.items()}
    reply.content["arrays"] = ArrayRecord(moved)
    return reply


@pytest.mark.parametrize(
    ("mechanism", "fault", "said"),
    [
        ("server", unmoved, "is the one that was sent"),
        ("client", unmoved, "is the one that was sent"),
        ("client", far, "the node does not clip"),
        ("server", far, ""),  # the server clips it
    ],
)
def test_replies_that_clipping_cannot_take(local_grid, private, mechanism, fault, said):
    private |= {"privacy.mechanism": mechanism, "rounds": 1}
    run(local_grid, private, everywhere(fault))
    _, rounds, _, _ = results(private)
    assert ("skipped" in rounds[1]) == bool(said)
    assert all(said in reason for reason in rounds[1]["failures"].values())
    if not said:
        assert rounds[1]["privacy"]["releases"] == 1


def test_that_training_moved_nothing_stays_at_the_node(local_grid, private):
    private |= {"privacy.mechanism": "client", "rounds": 1, "train.lr": 1e-30}
    run(local_grid, private)
    _, rounds, _, _ = results(private)
    assert len(rounds[1]["failures"]) == CLIENTS
    assert all(UNTOLD in reason for reason in rounds[1]["failures"].values())
    assert "training did not move the adapter; raise train.lr" in log_of(private)


@pytest.mark.parametrize("mechanism", ["server", "client"])
def test_a_node_that_lost_its_copy_gets_it_again(local_grid, private, mechanism):
    lost = []

    def lose(message, reply):
        if not lost:
            lost.append(message.content["config"]["sub-fm"])
            Store().directory(lost[0]).rename(Store().directory("away"))
            forget_sub_fm()
        return reply

    private["privacy.mechanism"] = mechanism
    run(local_grid, private, everywhere(lose))
    _, rounds, summary, _ = results(private)
    assert lost
    assert (summary["skipped"], summary["failures"]) == (0, 0)
    assert rounds[-1]["privacy"]["releases"] == 3


def test_the_norm_in_a_message_cannot_be_another_than_the_runs(local_grid, private):
    private["privacy.mechanism"] = "client"
    for change in (1e9, "x", None):

        def raised(message, context, change=change):
            config = message.content.config_records.get("config", {})
            if "clipping_norm" in config:
                del config["clipping_norm"]
                if change is not None:
                    config["clipping_norm"] = change
            return client_app(message, context)

        run(local_grid, private | {"rounds": 1}, app=raised)
        _, rounds, _, _ = results(private)
        reasons = rounds[1]["failures"].values()
        assert len(reasons) == CLIENTS
        assert all("is not the run's 0.05" in reason for reason in reasons)


# ------------------------------------------------------------------ what clients tell


@pytest.mark.parametrize("mechanism", ["server", "client"])
def test_clients_tell_nothing_but_their_adapter(local_grid, private, mechanism):
    private |= {"method": "fedpft", "align.activity": "public"}
    private["privacy.mechanism"] = mechanism
    said = {}

    def listen(message, reply):
        said.setdefault(message.metadata.message_type, []).append(reply.content)
        return reply

    run(local_grid, private, dict.fromkeys(range(NODES), listen))
    assert len(said["train"]) == 3 * CLIENTS
    for content in said["train"]:
        assert set(content) == {"arrays", "metrics"}
        assert dict(content["metrics"]) == {"num-examples": 1}
    for content in said["query.hello"]:
        counts = {"num-examples": 1, "num-partitions": NODES}
        assert dict(content["metrics"]) == counts
        known = {"key", "named", "store", "held", "source", "libraries"}
        assert set(content["config"]) == known
    place, rounds, summary, manifest = results(private)
    for name in ("metrics.jsonl", "summary.json"):
        written = (place / name).read_text()
        assert not re.search("train.loss|inactive", written)
    assert set(manifest["nodes"].values()) == {None}
    assert set(manifest["splits"]) == {"validation", "test", "public"}
    saved = Checkpoints(place, 2).load().state["identity"]
    assert "data (test)" in saved and "data (train)" not in saved
    for entry in rounds[1:]:
        for one in entry["per-client"].values():
            told = set(one)
            assert told == {"outcome", "num-examples", "bytes-up", "bytes-down"}
    assert summary["privacy"]["releases"] == 3


def test_a_reason_that_may_quote_rows_stays_at_the_node(
    local_grid, private, monkeypatch
):
    from fedpft_flower import client

    def fail(*arguments):
        raise FedPFTError("row 'my secret' cannot be read")

    monkeypatch.setattr(client, "train_adapter", fail)
    run(local_grid, private | {"rounds": 1})
    place, rounds, _, _ = results(private)
    assert "only its own log says why" in str(rounds[1]["failures"])
    assert all("secret" not in p.read_text() for p in place.glob("*.json*"))


def test_a_node_measures_no_activity_with_differential_privacy(
    local_grid, private, monkeypatch
):
    monkeypatch.setattr(ProxyServer, "wants_activity", lambda self, current: True)
    run(local_grid, private | {"rounds": 1})
    _, rounds, _, _ = results(private)
    assert len(rounds[1]["failures"]) == CLIENTS


def test_a_node_measures_no_activity_that_was_not_to_leave(
    local_grid, settings, monkeypatch
):
    monkeypatch.setattr(ProxyServer, "wants_activity", lambda self, current: True)
    settings |= {"align.activity": "public", "rounds": 1}
    with pytest.raises(FedPFTError, match="were not to leave"):
        run(local_grid, settings)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weighting": "examples"}, "weighting = 'examples' lets a client count"),
        ({"privacy.noise-multiplier": 0.0}, "noise-multiplier = 0 adds no noise"),
        ({"privacy.clipping-norm": 0.0}, "clipping-norm = 0 leaves nothing"),
        ({"train.clients-per-round": 0}, "train.clients-per-round = 0 leaves"),
        ({"train.min-replies": 2}, "train.min-replies = 2, but noise is calibrated"),
        ({"method": "fedpft"}, "set align.activity = 'public'"),
        ({"align.during": "distill"}, "set align.activity = 'public'"),
        (
            {"privacy.mechanism": "client", "wire.adapter": "bf16"},
            "rounds adapters behind the client's clipping",
        ),
        ({"privacy.delta": 0.0}, "privacy.delta = 0.0 is outside (0, 0.1]"),
        ({"privacy.mechanism": "adaptive"}, "choose one of none, server, client"),
        ({"privacy.mechanism": "none"}, "guarantees nothing with privacy.mechanism"),
        *(
            ({"strategy": name, "strategy-args": ARGUMENTS[name]}, NO_MEAN[name])
            for name in NO_MEAN
        ),
    ],
)
def test_a_setting_with_a_false_guarantee_is_refused_before_anything_is_loaded(
    local_grid, private, tmp_path, change, said
):
    private |= change | {"data.task": "no such task"}
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, private)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(private["out-dir"]).exists()
    conf = tmp_path / "x.toml"
    conf.write_text("")
    pairs = [f"{key}={json.dumps(value)}" for key, value in private.items()]
    with pytest.raises(FedPFTError, match=re.escape(said)):
        check_run(commands.read_config(conf, pairs))  # as fedpft-run does


def test_exactly_the_strategies_that_average_uniformly_keep_the_guarantee():
    """By Flower's own rule: the mean, and nothing behind it."""
    mean = FedAvg.aggregate_train
    plain = {n for n, kind in STRATEGIES.items() if kind.aggregate_train is mean}
    assert plain == STRATEGIES.keys() - NO_MEAN.keys() == {"FedAvg", "FedProx"}


def test_a_plain_loop_adds_no_noise_and_says_so(private):
    with pytest.raises(
        FedPFTError, match=r"privacy\.mechanism = 'server': the plain loop"
    ):
        PlainLoop(Config.from_run_config(private), NODES)


def test_sound_settings_pass(private):
    check_private(Config())
    check_private(Config.from_run_config(private))
    bits = {"wire.adapter": "bf16", "strategy": "FedProx"}
    check_private(Config.from_run_config(private | bits))


@pytest.mark.parametrize("changes", [{"wire.adapter": "bf16"}, {"strategy": "FedProx"}])
def test_what_is_allowed_runs(local_grid, private, changes):
    changes |= {"strategy-args": ARGUMENTS[changes.get("strategy", "FedAvg")]}
    run(local_grid, private | changes)
    _, _, summary, _ = results(private)
    assert summary["privacy"]["releases"] == 3


def test_the_demo_passes():
    path = ROOT / "conf" / "demo-dp.toml"
    config = commands.read_config(path, [])
    check_private(config)
    assert config.privacy.on
    assert "privacy" in tomllib.loads(path.read_text())


def test_a_clipping_norm_that_rounding_swallows_is_refused():
    """The demo's adapter has 24 x 384 values of variance 1, which leaves some room."""
    config = commands.read_config(ROOT / "conf" / "demo-dp.toml", [])
    privacy = Privacy(config, FedAvg(), 40, lambda state: None)
    privacy.check_clipping({"lora": torch.ones(24, 384), "head": torch.zeros(3)})
    said = r"clipping-norm = 0\.2 for 40 clients is lost in the rounding of an adapter"
    with pytest.raises(FedPFTError, match=said):
        privacy.check_clipping({"lora": torch.full((24, 384), 10.0)})


# ---------------------------------------------------------------------------- resume


CUTS = [
    (Privacy, "aggregate_train", 2, False, 3),
    (Privacy, "aggregate_train", 2, True, 4),  # counted, not used yet
    (ProxyServer, "end_round", 2, False, 4),
    (ProxyServer, "end_round", 2, True, 4),
    (run_directory.RunDirectory, "add_round", 3, True, 4),  # used, no checkpoint yet
    (Checkpoints, "save", 3, True, 3),
    (strategy.FedPFT, "configure_train", 2, True, 3),
]


@pytest.mark.parametrize(("owner", "name", "call", "after", "releases"), CUTS)
def test_a_resumed_run_counts_every_release(
    local_grid, private, monkeypatch, owner, name, call, after, releases
):
    with monkeypatch.context() as patch:
        cut(patch, owner, name, call, after)
        with pytest.raises(Cut):
            run(local_grid, private)
    run(local_grid, {**private, "resume": str(directory(private))})
    _, rounds, summary, _ = results(private)
    assert summary["privacy"]["releases"] == releases >= 3
    assert summary["privacy"]["epsilon"] == pytest.approx(
        independent(1.0, releases, 1e-5)
    )
    counts = [entry["privacy"]["releases"] for entry in rounds]
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("flush", "releases"),
    [
        (11, 3),  # round 1 has noise and is neither counted nor used
        (12, 4),  # counted
        (17, 4),  # used; its checkpoint is not there yet
        (18, 3),  # the checkpoint is there
    ],
)
def test_kill_9_never_counts_too_few(local_grid, private, flush, releases):
    kill_at(flush, private)
    run(local_grid, {**private, "resume": str(directory(private))})
    assert results(private)[2]["privacy"]["releases"] == releases


def test_a_lost_or_damaged_count_is_refused(local_grid, private):
    run(local_grid, private)
    private["resume"] = str(directory(private))
    count = directory(private) / "checkpoints" / "privacy.json"
    text = count.read_text()
    for damaged in (text[:-5], "[]", text.replace('"rdp"', '"other"')):
        count.write_text(damaged)
        with pytest.raises(FedPFTError, match=r"privacy .* start anew"):
            run(local_grid, private)
    count.unlink()
    with pytest.raises(FedPFTError, match="cannot read how much privacy was spent"):
        run(local_grid, private)
    count.write_text(text)
    run(local_grid, private)


def test_a_full_disk_uses_no_release(local_grid, private, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    used = []
    monkeypatch.setattr(
        ProxyServer, "end_round", lambda *arguments: used.append(arguments)
    )
    real = Privacy.aggregate_train

    def aggregate(self, *arguments):
        monkeypatch.setattr(Path, "replace", full)
        return real(self, *arguments)

    monkeypatch.setattr(Privacy, "aggregate_train", aggregate)
    with pytest.raises(FedPFTError, match=r"No space left.*resume with resume="):
        run(local_grid, private)
    assert not used
