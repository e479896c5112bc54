"""The benchmarks' functions, on the tiny ViT: what is compared, and what is matched."""

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from benchmarks import (
    alignment,
    bounds,
    head_bias,
    imports,
    markdown_table,
    overhead,
    parser,
    pooling,
    pretrain_vit,
    scaling,
    sharing,
    throughput,
)
from benchmarks.plain_loop import PlainLoop
from fedpft_flower.config import Config, DataConfig, FedPFTError
from fedpft_flower.flops import flops_of
from fedpft_flower.foundation import load_fm
from fedpft_flower.runs import FinishedRun
from fedpft_flower.tasks import load_task
from tests.test_federation import results, run

NODES = 5


@pytest.fixture
def config(settings):
    settings |= {"train.local-steps": 0, "train.local-epochs": 2, "align.every": 2}
    return Config.from_run_config(settings)


def test_a_table_has_a_line_for_titles_a_rule_and_a_line_a_row():
    rows = iter([("one", 1), ["", 2.5]])
    wanted = "| name | number |\n|---|---|\n| one | 1 |\n|  | 2.5 |"
    assert markdown_table(("name", "number"), rows) == wanted


def test_help_keeps_the_lines_of_its_text():
    assert "one\n\n  two\n" in parser("one\n\n  two").format_help()


def side(config, place):
    overhead.run_plain_loop(replace(config, out_dir=str(place)), NODES, threads=1)
    return overhead.read_side(place, began=0.0)


def test_a_side_is_read_as_it_ran_and_other_work_is_refused(config, tmp_path):
    one, other = side(config, tmp_path / "one"), side(config, tmp_path / "other")
    assert [r["round"] for r in one.rounds] == [0, 1, 2, 3]
    assert one.steady == one.rounds[3]["seconds"]
    assert one.aligned == one.rounds[2]["seconds"]
    assert one.prepare == one.rounds[0]["seconds"] < one.start_up
    assert overhead.distance(one.adapter, other.adapter) == 0.0
    assert overhead.verdict(one, other).startswith("same work")
    # Twice as many local epochs are other work, though the result has the same shape.
    train = replace(config.train, local_epochs=4)
    longer = side(replace(config, train=train), tmp_path / "longer")
    with pytest.raises(SystemExit, match="NOT do the same work"):
        overhead.verdict(one, longer)


def test_the_overhead_table_shows_median_and_range_of_paired_repetitions():
    def timed(seconds, start_up):
        rounds = [{"seconds": s} for s in (3.0, 9.0, seconds)]
        return overhead.Side(start_up, rounds, {})

    pairs = [(timed(2.0, 5.0), timed(f, 15.0)) for f in (3.0, 4.0, 5.0)]
    lines = overhead.table(pairs, threads=2).splitlines()
    steady = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert steady[2:] == ["4.0 (3.0 to 5.0)", "2.0 (1.0 to 3.0)", "2.00 (1.50 to 2.50)"]
    assert lines[3].endswith("| - | - | - | - |")  # no round aligned
    assert "| 10.0 (10.0 to 10.0) | 3.00" in lines[4]


def test_a_logs_first_line_tells_when_the_app_began(tmp_path):
    log = tmp_path / "run.log"
    log.write_text(
        "2026-01-02 03:04:05,250 run directory: /x\n2026-01-02 03:04:09,000\n"
    )
    began = datetime(2026, 1, 2, 3, 4, 5).timestamp()  # local time, as logging has it
    assert overhead.first_line(log) == began + 0.25


@pytest.fixture
def taken(monkeypatch):
    """Record rate and steps of every training that a bound does."""
    reports = []

    def train(model, rows, config, lr, seed):
        report = real(model, rows, config, lr, seed)
        reports.append((lr, report.steps))
        return report

    real = bounds.train_adapter
    monkeypatch.setattr(bounds, "train_adapter", train)
    return reports


def federated_steps(config, monkeypatch):
    """Return the steps that the clients take in all rounds of a federation."""
    from benchmarks import plain_loop

    reports = []

    def train(*arguments):
        reports.append(real(*arguments))
        return reports[-1]

    real = plain_loop.train_adapter
    monkeypatch.setattr(plain_loop, "train_adapter", train)
    list(PlainLoop(config, NODES).run())
    return sum(report.steps for report in reports)


def test_centralised_takes_the_steps_of_all_clients_at_the_rounds_rates(
    config, taken, monkeypatch
):
    loop = bounds.whole_fm(config, NODES)
    accuracy = bounds.centralised(loop)
    assert 0.0 <= accuracy <= 1.0
    assert sum(steps for _, steps in taken) == federated_steps(config, monkeypatch)
    assert [lr for lr, _ in taken] == [loop.server.lr(r) for r in (1, 2, 3)]


def test_local_takes_the_steps_that_a_client_expects(config, taken):
    loop = bounds.whole_fm(config, NODES)
    accuracies = bounds.local(loop, clients=NODES)
    assert len(accuracies) == NODES
    # 3 rounds, 3 of 5 clients: each expects to be chosen 1.8 times.
    expected = []
    for key in loop.keys:
        steps = bounds.local_steps(loop, key)
        once = 2 * -(-len(loop.rows(key)) // config.train.batch_size)
        assert sum(steps) == round(1.8 * once)
        assert len(steps) == 2 and max(steps) - min(steps) <= 1
        lr = config.train.lr
        expected += [(lr, steps[0]), (lr / 2, steps[1])]
    assert taken == expected
    assert len(bounds.local(loop, clients=2)) == 2


def test_every_bound_starts_from_the_federations_adapter(config):
    loop = bounds.whole_fm(config, NODES)
    found = bounds.local(loop, NODES)
    assert found == bounds.local(loop, NODES)
    assert len(set(found)) > 1  # they learnt from rows of their own


def test_the_bounds_table_shows_mean_and_spreads():
    alone = [[0.1, 0.3], [0.2, 0.4]]
    lines = bounds.table([0, 1], [0.5, 0.7], alone).splitlines()
    assert lines[2] == "| centralised | 0.500 | 0.700 | 0.600 | 0.141 | - |"
    spread = statistics.stdev(alone[0])
    assert lines[3] == f"| local | 0.200 | 0.300 | 0.250 | 0.071 | {spread:.3f} |"


def test_the_imports_table_names_what_is_heavy_of_what_is_loaded():
    answers = [
        imports.Answer(seconds, 1.0, 250.0, frozenset({"json", "torch", "peft"}))
        for seconds in (3.0, 1.0, 2.0)
    ]
    line = imports.table({"hello": answers}).splitlines()[2]
    assert line.startswith("| hello | 2.00 (1.00 to 3.00) | 1.00 (1.00 to 1.00) | 250")
    assert line.endswith("| torch, peft |")


@pytest.fixture
def digits(tmp_path):
    task = load_task(DataConfig(task="digits"), 0)
    DatasetDict({"train": task.train, "test": task.test}).save_to_disk(
        tmp_path / "data"
    )
    return str(tmp_path / "data")


def pretraining(recipe, out):
    training, held_out, names = pretrain_vit.read(recipe)
    return pretrain_vit.Pretraining(recipe, names, out), training, held_out


def test_a_pretrained_vision_transformer_is_an_fm(digits, tmp_path):
    recipe = pretrain_vit.Recipe((digits,), 12, 32, 5e-3, 8, 2, 64, 2, 2)
    run, training, held_out = pretraining(recipe, tmp_path / "out")
    assert (len(training), len(held_out)) == (1000, 297)
    before = run.accuracy(held_out)
    run.run(training, held_out)
    assert run.accuracy(held_out) > before + 0.08
    labels = [f"data/{i}" for i in range(10)]
    fm = load_fm(str(tmp_path / "out"), labels, "image", 0)
    assert torch.equal(fm.model.classifier.weight, run.model.classifier.weight)
    assert fm.processor.size["height"] == 8


def test_pretraining_goes_on_where_it_ended(digits, tmp_path, capsys):
    recipe = pretrain_vit.Recipe((digits,), 2, 100, 3e-3, 8, 2, 16, 1, 2)
    whole, training, held_out = pretraining(recipe, tmp_path / "whole")
    whole.run(training, held_out)
    first, _, _ = pretraining(recipe, tmp_path / "parts")
    first.train_epoch(training)
    first.epoch = 1
    first._save()
    second, _, _ = pretraining(recipe, tmp_path / "parts")
    assert "going on after epoch 1" in capsys.readouterr().out
    second.run(training, held_out)
    for one, other in zip(
        whole.model.parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(FedPFTError, match="checkpoint of another command"):
        pretraining(replace(recipe, seed=1), tmp_path / "parts")


def test_pretraining_keeps_to_the_minutes_it_has(digits, tmp_path, monkeypatch, capsys):
    recipe = pretrain_vit.Recipe((digits,), 9, 50, 3e-3, 8, 2, 16, 1, 2)
    run, training, _ = pretraining(recipe, tmp_path / "out")
    clock = iter([0.0, 6.0] * 3)  # 12 batches of 50 in 6 seconds: 100 images/s

    def epochs(minutes, out=tmp_path / "other"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain_vit.Pretraining, "train_epoch", lambda *_: 0.0)
            patch.setattr(pretrain_vit.time, "monotonic", lambda: next(clock))
            return pretrain_vit.epochs_within(minutes, recipe, training, [], out)

    assert epochs(0.5) == 3
    assert "100 images/s: 3 epochs fit into 0.5 minutes" in capsys.readouterr().out
    assert epochs(10) == 9
    with pytest.raises(FedPFTError, match=r"--minutes 0\.1 is less than an epoch"):
        epochs(0.1)
    run.epoch = 1
    run._save()
    assert epochs(0.5, tmp_path / "out") == 9


def test_the_alignment_table_compares_with_the_first_recipe():
    def one(selection, refit, distil, error):
        return {
            "selection-seconds": selection,
            "least-squares": {"seconds": refit},
            "seconds": distil,
            "gradient-after": {"relative": error, "cosine": 1 - error},
        }

    found = {
        "slow": [one(0.0, 0.0, 40.0, 0.4), one(0.0, 0.0, 60.0, 0.6)],
        "fast": [one(1.0, 3.0, 0.0, 0.5), one(2.0, 4.0, 0.0, 0.5)],
    }
    lines = alignment.table(found).splitlines()
    assert lines[2] == "| slow | 50.0 (40.0 to 60.0) | 1.00 | 0.500 | 0.500 |"
    assert lines[3] == "| fast | 5.0 (4.0 to 6.0) | 0.10 | 0.500 | 0.500 |"


@pytest.fixture
def work(tmp_path):
    scaling.write_fm(tmp_path / "fm", layers=2, hidden=64, length=8)
    return throughput.Work(tmp_path / "fm", rows=4, length=8, batches=2)


def test_the_bare_loops_do_the_same_operations(work):
    pairs = [
        (work.train, work.bare_train),
        (work.train_fm, work.bare_train_fm),
        (work.align, work.bare_align),
        (work.evaluate, work.bare_evaluate),
    ]
    for ours, bare in pairs:
        one, other = (flops_of(lambda r=run: r("fp32")) for run in (ours, bare))
        assert one == pytest.approx(other, rel=0.02)


def test_the_throughput_table_has_a_row_for_every_kind_of_work(work, monkeypatch):
    monkeypatch.setattr(throughput, "peak_rate", lambda device, precision: 1e12)
    monkeypatch.setattr(throughput, "has_bf16", lambda device: True)
    lines = throughput.table(work, repeats=2).splitlines()
    kinds = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines[4:]]
    assert kinds == [
        ("client's training", "fp32"),
        ("the same of the FM", "fp32"),
        ("distillation", "fp32"),
        ("evaluation", "fp32"),
        ("client's training", "bf16"),
        ("the same of the FM", "bf16"),
        ("distillation", "bf16"),
    ]


def test_the_scaling_table_gives_exponents_and_a_picture(tmp_path):
    points = [
        scaling.Point("clients", value, 10.0, 0.1 * value, 10**9, 5 * 10**8)
        for value in (10, 100)
    ] + [scaling.Point("rows", 10, 5.0, 1.0, 10**9, 10**9)]
    lines = scaling.table(points).splitlines()
    assert lines[2] == "| clients | 10 | 10.0 | 1.00 | 1.00 | 0.50 |"
    assert lines[4] == "| clients | exponent, last two | 0.00 | 1.00 | 0.00 | 0.00 |"
    assert len(lines) == 6  # one point has no exponent
    scaling.draw(points, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_random_fm_and_its_rows_can_be_run(tmp_path, local_grid):
    scaling.write_fm(tmp_path / "fm", layers=1)
    scaling.write_rows(tmp_path / "rows", 50)
    settings = scaling.settings_of(tmp_path) | {"rounds": 1}
    run(local_grid, settings)
    assert results(settings)[2]["failures"] == 0


def test_a_fitted_bias_gives_every_class_its_share():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=generator)
    labels = torch.multinomial((logits + torch.tensor([1.0, 0.0, -2.0])).softmax(1), 1)
    bias = head_bias.fitted_bias(logits, labels[:, 0])
    assert float(bias.mean()) == pytest.approx(0, abs=1e-6)
    # Where the loss has no slope, a class is as likely as it is frequent.
    likely = (logits + bias).softmax(1).mean(0)
    shares = labels[:, 0].bincount(minlength=3) / len(labels)
    torch.testing.assert_close(likely, shares, atol=1e-4, rtol=0)


def test_what_a_bias_is_worth_is_a_line_for_every_run(local_grid, settings):
    run(local_grid, settings)
    finished = FinishedRun.read(results(settings)[0])
    cells = head_bias.row(finished)
    assert len(cells) == len(head_bias.TITLES)
    after = finished.summary["test-after"]
    assert cells[0] == finished.path.name
    assert cells[1] == f"{after['fm-accuracy']:.3f}"
    assert cells[3] == f"{after['fm-loss']:.3f}"


def test_every_head_is_trained_and_judged(
    bert_directory, tmp_path, monkeypatch, capsys
):
    words = ["good", "bad", "film", "very", "not"]
    texts = [" ".join(words[: 1 + i % 5][:: (-1) ** i]) for i in range(60)]
    rows = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(60)]})
    rows.to_csv(str(tmp_path / "rows.csv"))
    settings = {"data.task": "text", "data.path": str(tmp_path / "rows.csv")}
    settings["fm.name"] = str(bert_directory)
    monkeypatch.setattr(pooling, "Config", lambda: Config.from_run_config(settings))
    monkeypatch.setattr(sys, "argv", ["pooling", "--steps", "2", "--seeds", "0", "1"])
    pooling.main()
    titles, rule, *lines = capsys.readouterr().out.splitlines()
    assert (titles, rule) == ("| head | seed 0 | seed 1 | mean |", "|---|---|---|---|")
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [name for name, *_ in cells] == [*pooling.HEADS, "mean pooling"]
    for _, *found in cells:
        one, other, mean = map(float, found)
        assert mean == pytest.approx((one + other) / 2, abs=1e-3)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Return what waits until a GPU's driver has told of its 1234 MiB a few times."""
    tells, told = tmp_path / "bin" / "nvidia-smi", tmp_path / "told"
    tells.parent.mkdir()
    script = f"while :; do echo 1234 | tee -a '{told}'; sleep 0.02; done"
    tells.write_text(f"#!/bin/sh\n{script}\n")
    tells.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tells.parent}:{os.environ['PATH']}")

    def wait():
        told.unlink(missing_ok=True)
        while not told.exists() or told.read_text().count("\n") < 4:
            time.sleep(0.01)

    return wait


def test_a_gpus_memory_is_watched_while_a_run_lasts(driver):
    with sharing.watched() as used:
        driver()
    assert len(used) > 1 and set(used) == {1234}
    with pytest.raises(SystemExit), sharing.watched():  # it ends, too
        sys.exit("the run failed")


def test_a_row_tells_rounds_and_memory_of_clients_that_share(
    driver, tmp_path, monkeypatch
):
    entries = [
        {"round": 0, "seconds": 9.0, "alignment": {}},
        {"round": 1, "seconds": 8.0},
        {"round": 2, "seconds": 1.0, "peak-gpu-memory-client": 2.5e9},
        {"round": 3, "seconds": 3.0, "alignment": {}},
        {"round": 4, "seconds": 2.0, "peak-gpu-memory-server": 1.5e9},
    ]
    asked = []

    def run_app(spec, pairs, nodes, *options):
        asked.append((spec, nodes, *options))
        place = Path(pairs[1].removeprefix("out-dir=")) / "1"
        place.mkdir(parents=True)
        lines = map(json.dumps, entries)
        (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        driver()

    monkeypatch.setattr(sharing, "run_app", run_app)
    options = SimpleNamespace(conf=Path("x.toml"), nodes=7, rounds=4, set=["a=b"])
    row = sharing.measure(options, 4, tmp_path)
    steady, aligned = "1.50 (1.00 to 2.00)", "3.00 (3.00 to 3.00)"
    assert row == [4, steady, aligned, "1.29", "1.50", "2.50"]
    assert sharing.measure(options, 0, tmp_path)[0] == "on the CPU"
    assert asked[1] == (Path("x.toml"), 7, "--clients-per-gpu=0")
