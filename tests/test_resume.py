"""A run that was cut anywhere goes on and ends as if it had not been."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fedpft_flower import checkpoint, disk, run_directory, strategy
from fedpft_flower.checkpoint import FREE_KEYS, Checkpoint, Checkpoints
from fedpft_flower.config import FedPFTError, flatten
from fedpft_flower.runs import LOG
from fedpft_flower.server import ProxyServer
from tests.test_federation import NODES, results, run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def short(settings):
    return settings | {
        "data.max-test-rows": 20,
        "train.local-steps": 2,
        "align.steps": 3,
        "align.during-steps": 2,
        "strategy": "FedAdam",
        "strategy-args": '{"eta": 0.01}',
    }


class Cut(BaseException):
    """Stand for a power cut: nobody catches it."""


def directory(settings):
    return Path(settings["out-dir"]) / "7"


def outcome(settings):
    """Return all that must be the same: adapter, sub-FM, metrics without times."""
    _, rounds, summary, manifest = results(settings)
    kept = ("round", "fm-accuracy", "fm-loss", "sub-fm-loss", "train-loss", "lr")
    return [
        manifest["adapter-sha256"],
        manifest["sub-fm-sha256"],
        [[entry.get(key) for key in kept] for entry in rounds],
        summary["test-before"],
        summary["test-after"],
        summary["best-round"],
    ]


UNCUT = {}


def uncut(local_grid, settings):
    """Return the outcome of the uninterrupted run, which is made once."""
    key = json.dumps(settings | {"out-dir": ""}, sort_keys=True)
    if key not in UNCUT:
        run(local_grid, settings | {"out-dir": settings["out-dir"] + "-uncut"})
        UNCUT[key] = outcome(settings | {"out-dir": settings["out-dir"] + "-uncut"})
    return UNCUT[key]


def cut(monkeypatch, owner, name, call, after):
    """Cut the power at this call of a function, before or after it worked."""
    real, calls = getattr(owner, name), []

    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == call and not after:
            raise Cut
        value = real(*arguments, **named)
        if len(calls) == call:
            raise Cut
        return value

    monkeypatch.setattr(owner, name, counted)


CUTS = [
    (ProxyServer, "end_round", 1, False),
    (ProxyServer, "end_round", 2, True),  # realigned, nothing written yet
    (ProxyServer, "_distil", 3, False),  # in the alignment of round 2
    (ProxyServer, "evaluate", 3, False),  # round 1's validation
    (strategy.FedPFT, "configure_train", 3, True),
    (
        run_directory.RunDirectory,
        "add_round",
        3,
        True,
    ),  # metrics are ahead of the checkpoint
    (disk, "flush", 11, False),  # while a checkpoint is written
    (disk, "flush", 14, False),  # renamed, older ones not removed yet
    (Checkpoints, "save", 3, True),
    (run_directory.RunDirectory, "finish", 1, False),  # all rounds are over
]


@pytest.mark.parametrize(("owner", "name", "call", "after"), CUTS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    local_grid, short, monkeypatch, tmp_path, owner, name, call, after
):
    expected = uncut(local_grid, short)
    short["out-dir"] = str(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut(patch, owner, name, call, after)
        with pytest.raises(Cut):
            run(local_grid, short)
    assert not (directory(short) / "summary.json").exists()
    run(local_grid, {**short, "resume": str(directory(short))})
    assert outcome(short) == expected
    assert not list(directory(short).rglob("*.partial*"))


CHILD = """
import json, os, signal, sys
from tests import conftest
from flwr.supercore.task_identity import TaskIdentity
from fedpft_flower import checkpoint, run_directory
from tests.test_federation import run

for name in ("run_id", "node_id", "task_id"):
    setattr(TaskIdentity, f"_{name}", 1)
run_directory.draw_curves = lambda *a: a[-1].touch()
flushes, real = [], os.fsync
def fsync(handle):
    flushes.append(1)
    if len(flushes) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
run(conftest.LocalGrid, json.loads(sys.argv[1]))
"""


def kill_at(flush, settings):
    """Run in a process that is killed at this flush to the disk."""
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(settings), str(flush)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize("flush", [16, 21])
def test_kill_9_loses_nothing(local_grid, short, tmp_path, flush):
    expected = uncut(local_grid, short)
    short["out-dir"] = str(tmp_path / "killed")
    kill_at(flush, short)
    run(local_grid, {**short, "resume": str(directory(short))})
    assert outcome(short) == expected


FINISHED = []  # the directory of a run of two rounds, which is made once


@pytest.fixture
def finished(local_grid, short, tmp_path_factory):
    """Return the settings that continue a run of two rounds."""
    short |= {"rounds": 2, "method": "fedpft-b"}
    if not FINISHED:
        made = {**short, "out-dir": str(tmp_path_factory.mktemp("finished"))}
        run(local_grid, made)
        FINISHED.append(directory(made))
    shutil.copytree(FINISHED[0], directory(short))
    return {**short, "resume": str(directory(short))}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.lr": 0.5}, "resume: train.lr = 0.5, the checkpoint has 0.001"),
        ({"rounds": 9}, "resume: rounds = 9, the checkpoint is of round 2 of 2; a run"),
        ({"rounds": 1}, "resume: rounds = 1, the checkpoint is of round 2 of 2; a run"),
        ({"seed": 1}, "resume: data (public) is"),
        ({"data.max-train-rows": 190}, "resume: data (train) is"),
        ({"sub-fm.keep-fraction": 0.4}, "resume: sub-fm.keep-fraction = 0.4, the"),
        ({"resume": "/no/such/run"}, "is not a run directory"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    local_grid, finished, change, said
):
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, finished | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_divided_among_other_nodes_are_refused(local_grid, finished):
    with pytest.raises(FedPFTError, match=r"7 nodes share .* it was 5.*--nodes 5"):
        run(local_grid, finished, nodes=NODES + 2)


def test_another_fm_is_refused(local_grid, finished, tmp_path):
    from transformers.models.vit import ViTImageProcessor

    from tests.families import tiny_model

    tiny_model("vit", seed=1, layers=4).save_pretrained(tmp_path / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "vit")
    with pytest.raises(FedPFTError, match="resume: FM is"):
        run(local_grid, finished | {"fm.name": str(tmp_path / "vit")})


def test_files_of_another_format_are_refused(local_grid, finished):
    state = directory(finished) / "checkpoints" / "round-000002" / "state.json"
    text = state.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 99')
    state.write_text(text)
    with pytest.raises(
        FedPFTError, match=f"has format 99, this version reads {checkpoint.FORMAT}"
    ):
        run(local_grid, finished)


def test_settings_that_only_say_where_and_how_long_may_change(local_grid, finished):
    cheaper = {"train.recompute": True, "train.micro-batch-size": 2}
    run(local_grid, finished | {"timeout-seconds": 9.0, "checkpoint.keep": 5} | cheaper)


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default(
    local_grid, finished
):
    file = directory(finished) / "checkpoints" / "round-000002" / "state.json"
    state = json.loads(file.read_text())
    del state["identity"]["config"]["train.clip-norm"]
    file.write_text(json.dumps(state))
    run(local_grid, finished)
    with pytest.raises(FedPFTError, match=r"clip-norm = 0\.5, the checkpoint has 1\.0"):
        run(local_grid, finished | {"train.clip-norm": 0.5})


def test_a_damaged_checkpoint_gives_way_to_the_one_before(local_grid, finished):
    expected = outcome(finished)
    place = directory(finished) / "checkpoints"
    tensors = place / "round-000002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    run(local_grid, finished)
    assert outcome(finished) == expected
    for path in place.rglob("state.json"):
        path.write_text("{")
    with pytest.raises(FedPFTError, match=r"no checkpoint.*damaged: round-000002"):
        run(local_grid, finished)


def test_two_runs_do_not_share_a_directory(finished, local_grid):
    from fedpft_flower.config import Config

    held = run_directory.RunDirectory(Config.from_run_config(finished), 7)
    with pytest.raises(FedPFTError, match="is in use by another run"):
        run(local_grid, finished)
    del held


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_run_may_end_early_with_a_result(local_grid, short, monkeypatch, rounds):
    short |= {"rounds": 5, "method": "fedpft-n", "eval-every": 5}
    with monkeypatch.context() as patch:
        cut(patch, ProxyServer, "end_round", 3, False)
        with pytest.raises(Cut):
            run(local_grid, short)
    ended = short | {"rounds": rounds, "resume": str(directory(short))}
    run(local_grid, ended)
    place, entries, summary, manifest = results(short)
    assert len(entries) == rounds + 1 and summary["rounds"] == rounds
    assert [entry["last"] for entry in entries] == [False] * rounds + [True]
    assert "fm-accuracy" in entries[-1]
    assert manifest["planned-rounds"] == 5
    assert f">{rounds} of 5<" in (place / "report.html").read_text()
    # What was written at first is what the run now has, to resume it once more.
    config = flatten(tomllib.loads((place / "config.toml").read_text()))
    assert config["rounds"] == rounds and not config["resume"]
    run(local_grid, config | {"resume": str(place)})
    assert results(short)[3]["planned-rounds"] == 5


def test_a_run_that_is_over_may_deliver_another_rounds_adapter(
    local_grid, short, monkeypatch
):
    scores = iter([0.1, 0.9, 0.3])
    real = ProxyServer.evaluate

    def evaluate(self, split):
        told = real(self, split)
        return {**told, "fm-accuracy": next(scores)} if split == "validation" else told

    monkeypatch.setattr(ProxyServer, "evaluate", evaluate)
    short |= {"rounds": 9, "early-stop": 1, "method": "fedpft-n"}
    run(local_grid, short)
    place, rounds, _, last = results(short)
    assert len(rounds) == 3
    said = "than round 1's; delivered is round 2's adapter (select = 'last')"
    assert said in (place / LOG).read_text()
    run(local_grid, short | {"select": "best", "resume": str(place)})
    _, rounds, summary, best = results(short)
    assert len(rounds) == 3 and summary["select"] == "best"
    assert last["final-adapter-sha256"] != best["final-adapter-sha256"]


# --------------------------------------------------------------------- the files alone


STATE = {"format": checkpoint.FORMAT}


def kept(place):
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for current in range(6):
        tensors = {"x": torch.full((2,), float(current))}
        store.save(Checkpoint(current, tensors, STATE), best=1)
    assert kept(tmp_path) == ["round-000001", "round-000004", "round-000005"]
    assert store.load().round == 5
    assert store.load(1).tensors["x"].tolist() == [1.0, 1.0]


def test_a_copy_of_a_checkpoint_is_none(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    store.save(Checkpoint(0, {"x": torch.zeros(1)}, STATE), best=0)
    copied = tmp_path / "checkpoints" / "round-000000.bak"
    copied.mkdir()
    store.save(Checkpoint(1, {"x": torch.zeros(1)}, STATE), best=1)
    assert store.load().round == 1
    assert kept(tmp_path) == ["round-000000.bak", "round-000001"]


def test_a_run_directory_that_was_removed_is_told(tmp_path):
    from fedpft_flower.config import Config

    place = run_directory.RunDirectory(Config(out_dir=str(tmp_path)), 7)
    place._rounds = [{}, {}]
    shutil.rmtree(place.path)
    with pytest.raises(FedPFTError, match=r"/7 is gone .*; start anew"):
        place.add_round({"round": 2})


def test_a_full_disk_at_the_end_says_how_to_go_on(
    local_grid, short, full_disk, monkeypatch
):
    real, expected = run_directory.export_adapter, short["out-dir"]

    def export(fm, path):
        with full_disk():
            real(fm, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "export_adapter", export)
        said = f"cannot write .* make room or resume with resume={expected}/7"
        with pytest.raises(FedPFTError, match=said):
            run(local_grid, short)
    run(local_grid, {**short, "resume": str(directory(short))})
    assert (directory(short) / "summary.json").exists()


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, keep=2)
    store.save(Checkpoint(0, {"x": torch.ones(3)}, STATE), best=0)

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    for owner, name in ((checkpoint, "save_file"), (disk, "flush")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(FedPFTError, match=r"No space left.*make room"):
                store.save(Checkpoint(1, {"x": torch.ones(3)}, STATE), best=1)
        assert kept(tmp_path) == ["round-000000"]
    assert store.load().round == 0


# --------------------------------------------------------- best round, early stop


def test_the_best_round_is_chosen_and_the_run_stops_early(
    local_grid, short, monkeypatch
):
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2, 0.1])
    real = ProxyServer.evaluate

    def evaluate(self, split):
        told = real(self, split)
        return {**told, "fm-accuracy": next(scores)} if split == "validation" else told

    adapters = []
    monkeypatch.setattr(ProxyServer, "evaluate", evaluate)
    ended = ProxyServer.end_round
    monkeypatch.setattr(
        ProxyServer,
        "end_round",
        lambda self, current, adapter, rates: (
            adapters.append(adapter) or ended(self, current, adapter, rates)
        ),
    )
    short |= {"rounds": 9, "early-stop": 2, "select": "best", "method": "fedpft-n"}
    run(local_grid, short)
    from safetensors.torch import load_file

    place, rounds, summary, _ = results(short)
    assert [entry["round"] for entry in rounds] == [0, 1, 2, 3, 4]
    assert (summary["rounds"], summary["best-round"]) == (4, 2)
    exported = load_file(place / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(exported[name], tensor, atol=0, rtol=0)


def test_every_strategy_can_remember(local_grid, short):
    """What a strategy holds after a round is found again in a fresh one."""
    from flwr.app import Array, ArrayRecord

    from fedpft_flower.strategies import STRATEGIES, inner_strategy, memory_of, remember
    from tests.test_strategies import ARGUMENTS

    for name in STRATEGIES:
        first = inner_strategy(name, ARGUMENTS[name], NODES + 2)
        fresh = inner_strategy(name, ARGUMENTS[name], NODES + 2)
        names = [k for k in vars(fresh) if vars(fresh)[k] is None]
        record = ArrayRecord({"a": Array(torch.ones(2, 3).numpy())})
        for attribute in names:
            form = {
                "momentum_vector": [torch.ones(2).numpy()],
                "current_arrays": record,
            }
            plain = {"a": torch.ones(2).double().numpy()}
            setattr(first, attribute, form.get(attribute, plain))
        tensors, form = memory_of(first)
        assert set(form) == set(names)  # nothing that is None at first is forgotten
        remember(fresh, tensors, json.loads(json.dumps(form)))
        again, form_again = memory_of(fresh)
        assert form == form_again and tensors.keys() == again.keys()
        assert all(torch.equal(tensors[k], again[k]) for k in tensors)


def test_the_documents_list_the_settings_that_may_differ_at_a_resume():
    shown = (ROOT / "docs/running.md").read_text()
    listed = shown.partition("These settings may differ when a run")[2]
    setting = r"`([a-z-]+(?:\.[a-z-]+)?(?:\.\*)?)`"
    named = set(re.findall(setting, listed.partition("act after")[0]))
    assert "plug-in.*" in named
    whole = named - {"plug-in.*"}
    # What is resumed is not said by the run itself.
    assert whole == {key for key in FREE_KEYS if not key.startswith("plug-in.")} - {
        "resume"
    }
