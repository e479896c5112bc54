"""How a run stands, told from its directory alone."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from flwr.app import Error, Message

from fedpft_flower import status
from fedpft_flower.disk import lock
from fedpft_flower.status import Status, render
from tests.test_federation import results, run


@pytest.fixture
def finished(local_grid, settings):
    def fail(message, reply):
        if message.metadata.message_type != "train":
            return reply
        return Message(Error(2, "no \x1b[31mroom"), reply_to=message)

    settings |= {"rounds": 2, "train.clients-per-round": 5, "method": "fedpft-n"}
    run(local_grid, settings, {1: fail})
    return results(settings)[0]


def shown(place, capsys):
    status.run([str(place)])
    return capsys.readouterr().out


def test_a_finished_run_is_shown_with_its_nodes_errors_and_log(finished, capsys):
    text = shown(finished, capsys)
    lines = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line[:30])
    assert lines["state"].strip() == "finished"
    assert lines["round"].strip() == "2 of 2"
    assert "time left" not in text
    rounds = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert f"{rounds[-1]['fm-accuracy']:.3f} (round 2)" in text
    assert "partition-000000  2  2  ok" in text
    assert "partition-000001  2  0  " in text
    assert "\x1b" not in text
    errors = text.split("last errors:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(":")[:2] for line in errors] == [
        ["  round 1", " partition-000001"],
        ["  round 2", " partition-000001"],
    ]
    assert text.rstrip().endswith(f"results: {finished}")


def test_a_run_that_goes_on_tells_the_time_left(finished, capsys):
    (finished / "summary.json").unlink()
    metrics = finished / "metrics.jsonl"
    rounds = [json.loads(line) for line in metrics.open()][:2]
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in rounds))
    told = Status.read(finished)
    assert told.seconds_left == rounds[1]["seconds"]
    text = shown(finished, capsys)
    assert f"go on with resume={finished}" in text and "1 of 2" in text
    held = lock(finished / ".lock")
    try:
        assert Status.read(finished).locked is True
        assert "running; last written" in shown(finished, capsys)
    finally:
        held.close()
    early = [rounds[0], {**rounds[1], "last": True}]
    for ended in ([*rounds, {"round": 2, "seconds": 1.0, "last": True}], early):
        metrics.write_text("".join(json.dumps(e) + "\n" for e in ended))
        told = Status.read(finished)
        assert told.seconds_left is None
        assert replace(told, locked=True).state.startswith("ending: ")
    metrics.unlink()
    assert "preparing" in render(Status.read(finished))
    shutil.rmtree(finished / "checkpoints")
    assert "start anew" in shown(finished, capsys)


def test_without_a_directory_the_newest_run_is_shown(finished, capsys, monkeypatch):
    monkeypatch.setenv("FEDPFT_OUT", str(finished.parent))
    status.run([])
    assert str(finished) in capsys.readouterr().out
    # An older run that goes on is newer than one that began after it.
    later = shutil.copytree(finished, finished.parent / "later")
    for path in later.iterdir():
        os.utime(path, (1, 1))
    status.run([])
    assert str(finished) in capsys.readouterr().out
    shutil.rmtree(later)


@pytest.mark.parametrize("what", ["nothing", "empty", "broken", "no runs", "file"])
def test_what_is_no_run_is_refused_in_one_line(what, tmp_path, capsys, monkeypatch):
    place = tmp_path / "run"
    if what == "file":
        place.touch()
    elif what != "nothing":
        place.mkdir()
    if what == "broken":
        (place / "config.toml").write_text("rounds = ")
    monkeypatch.setenv("FEDPFT_OUT", str(place))
    with pytest.raises(SystemExit) as ended:
        status.run([] if what in ("no runs", "file") else [str(place)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([x for x in lines if x.startswith("error: ")]) == 1


def test_nothing_is_written(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in copy.rglob("*")}
    shown(copy, capsys)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in copy.rglob("*")}
    assert before == after
