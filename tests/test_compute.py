"""In which numbers steps are computed, and who decides."""

import json
from types import SimpleNamespace

import pytest
import torch

from fedpft_flower import compute
from fedpft_flower.adapters import base_model
from fedpft_flower.compute import (
    CHOICES,
    Compute,
    asked_for,
    best_here,
    fastest,
    rough_shapes,
)
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.disk import cache_dir
from tests.families import CONFIGS, tiny_batch
from tests.test_architectures import adapted
from tests.test_federation import NODES, results, run

EAGER = CHOICES[-1]


def gradient(model, batch, how):
    """Return the flat gradient of the adapter, all else off."""
    model.zero_grad(set_to_none=True)
    model.eval()
    with how.steps([base_model(model)]), how.step(torch.device("cpu")):
        logits = model(**batch).logits
        (logits.float().square().mean()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", CONFIGS)
def test_every_way_gives_nearly_the_same_gradient(family):
    fm, _, _ = adapted(family)
    batch = tiny_batch(family)
    attention = base_model(fm).config._attn_implementation
    expected = gradient(fm, batch, Compute())
    for how in CHOICES[1:]:
        found = gradient(fm, batch, how)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)  # it was computed in other numbers
        # Qwen 3 norms queries and keys, here of eight numbers each.
        most = 0.25 if family == "qwen3" else 0.15
        assert float((found - expected).norm() / expected.norm()) < most
        assert base_model(fm).config._attn_implementation == attention
    assert torch.equal(gradient(fm, batch, Compute()), expected)


@pytest.fixture
def both(monkeypatch, tmp_path):
    """Let this machine have bfloat16, and an empty cache."""
    monkeypatch.setattr(compute, "has_bf16", lambda device: True)
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    return [base_model(adapted("bert")[0])]


@pytest.fixture
def clock(monkeypatch):
    """Return the time in a list, which goes on only where a test says so."""
    now = [0.0]
    stopped = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(compute, "time", stopped)
    return now


def timed(clock, **seconds):
    """Return a step that takes so long in float32, bfloat16, with eager attention."""

    def step():
        bf16 = torch.is_autocast_enabled("cpu")
        eager = step.models[0].config._attn_implementation == "eager"
        clock[0] += seconds["eager" if eager else "bf16" if bf16 else "fp32"]

    return step


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32": 0.02, "bf16": 0.001, "eager": 0.02}, Compute(bf16=True)),
        ({"fp32": 0.02, "bf16": 0.02, "eager": 0.001}, EAGER),
        ({"fp32": 0.001, "bf16": 0.02, "eager": 0.02}, Compute()),
        ({"fp32": 0.1, "bf16": 0.098, "eager": 0.2}, Compute()),  # hardly faster
    ],
)
def test_the_fastest_way_is_taken_where_it_is_much_faster(
    both, clock, seconds, expected
):
    step = timed(clock, **seconds)
    step.models = both
    assert fastest(both, step, torch.device("cpu")) == expected


def test_what_was_fastest_is_kept_and_a_damaged_note_is_not_believed(both, clock):
    asked = []

    def step():
        asked.append(1)
        clock[0] += 0.001 if torch.is_autocast_enabled("cpu") else 0.02

    first = best_here(both, step, "x")
    assert first.bf16 and asked
    (note,) = (cache_dir() / "compute").iterdir()
    asked.clear()
    assert best_here(both, step, "x") == first and not asked
    for text in ("{", json.dumps({"bf16": "yes"}), "[]"):
        note.write_text(text)
        assert best_here(both, step, "x").bf16 and asked
        asked.clear()
    (note,) = (cache_dir() / "compute").iterdir()  # no draft is left


def test_another_model_or_batch_is_tried_again(both):
    best_here(both, lambda: None, "x")
    best_here([base_model(adapted("bert")[1])], lambda: None, "x")
    best_here(both, lambda: None, "y")
    assert len(list((cache_dir() / "compute").iterdir())) == 3


def test_batches_that_are_nearly_as_long_share_a_trial():
    batches = [{"ids": torch.zeros(16, n), "labels": torch.zeros(16)} for n in (33, 64)]
    assert rough_shapes(batches[0]) == rough_shapes(batches[1]) == [[16, 64], [16]]
    assert rough_shapes({"ids": torch.zeros(1, 65)}) == [[1, 128]]


def test_without_bfloat16_nothing_is_tried(both, monkeypatch):
    monkeypatch.setattr(compute, "has_bf16", lambda device: False)

    def never():
        raise AssertionError("tried")

    assert best_here(both, never, "x") == Compute()
    assert asked_for("fp32") == Compute()
    assert asked_for("bf16") == Compute(bf16=True)
    assert asked_for("auto") is None


def test_a_full_disk_is_told(both, full_disk):
    with full_disk(0), pytest.raises(FedPFTError, match="set FEDPFT_CACHE"):
        best_here(both, lambda: None, "x")


def test_a_run_in_bfloat16_says_so_and_ends_near_one_in_float32(
    local_grid, settings, tmp_path, monkeypatch
):
    settings |= {"rounds": 2, "plug-in.steps": 3}
    settings |= {"train.lr": 0.005, "train.local-steps": 8}
    monkeypatch.setattr(compute, "has_bf16", lambda device: True)
    losses = []
    for number, precision in enumerate(("fp32", "bf16", "auto")):
        settings |= {
            "out-dir": str(tmp_path / f"out-{number}"),
            "train.precision": precision,
            "server-precision": precision,
        }
        run(local_grid, settings)
        _, rounds, summary, _ = results(settings)
        for entry in rounds[1:]:
            told = {one["bf16"] for one in entry["per-client"].values()}
            expected = {"fp32": {0.0}, "bf16": {1.0}, "auto": {0.0, 1.0}}
            assert told and told <= expected[precision]
        start = summary["test-before"]["fm-loss"]
        losses.append(summary["test-after"]["fm-loss"])
    assert losses[0] != losses[1]
    learnt = start - losses[0]
    assert learnt > 0
    assert all(abs(loss - losses[0]) < 0.1 * learnt for loss in losses[1:])
    assert list((cache_dir() / "compute").iterdir())  # what was tried is kept


def test_a_node_may_have_a_precision_of_its_own(local_grid, settings):
    settings |= {"rounds": 1}
    configs = [{"partition-id": i, "num-partitions": NODES} for i in range(NODES)]
    for config in configs[: NODES // 2]:
        config["precision"] = "bf16"
    run(local_grid, settings | {"train.fraction": 1.0}, configs=configs)
    _, rounds, _, _ = results(settings)
    told = {key: one["bf16"] for key, one in rounds[1]["per-client"].items()}
    assert 0.0 in told.values() and 1.0 in told.values()
    configs[0]["precision"] = "double"
    with pytest.raises(FedPFTError, match="precision = 'double'; choose one of fp32"):
        run(local_grid, settings, configs=configs)


def test_an_unknown_precision_is_refused():
    for key in ("train.precision", "server-precision"):
        with pytest.raises(FedPFTError, match=f"{key} = 'fp8'; choose one of fp32"):
            Config.from_run_config({key: "fp8"})
