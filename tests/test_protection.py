"""The protection sheet, recomputed from the messages that were sent."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from fedpft_flower.codec import encode_weights
from fedpft_flower.delta import apply_delta
from fedpft_flower.passes import outputs_of
from fedpft_flower.plan import Plan
from fedpft_flower.protection import Exposure, _refitted, protection
from fedpft_flower.wire import config_of, unpack_tensors
from tests.test_federation import results, run


def installed(grid):
    """Return every sub-FM that nodes were given, from the captured messages."""
    held, found = {}, []
    for message in grid.seen:
        if message.metadata.message_type != "query.install":
            continue
        told = config_of(message)
        tensors = unpack_tensors(message.content["arrays"], told["bit-cast"])
        if told["base"]:
            tensors = apply_delta(held[told["base"]], tensors)
        held[told["sub-fm"]] = tensors
        found.append(tensors)
    return found


def places(name, plan):
    """Return an FM tensor's name in the sub-FM and the index of what is kept of it."""
    prefix = "vit.layers."
    if not name.startswith(prefix):
        return name, np.s_[:]
    number, _, rest = name.removeprefix(prefix).partition(".")
    if int(number) not in plan.kept:
        return None, None
    kept = list(plan.kept[int(number)])
    name = f"{prefix}{plan.layers.index(int(number))}.{rest}"
    if rest.startswith(("mlp.fc1.", "intermediate.dense.")):
        return name, np.s_[kept]
    if rest in ("mlp.fc2.weight", "output.dense.weight"):
        return name, np.s_[:, kept]
    return name, np.s_[:]


def shares(directory, plan, sub_fms, equal):
    """Return never sent, verbatim and re-fitted shares, value by value in NumPy."""
    total = sent = 0
    verbatim = [0] * len(sub_fms)
    stock = AutoModelForImageClassification.from_pretrained(directory)
    for name, tensor in stock.state_dict().items():
        if name.startswith("classifier."):
            continue
        total += tensor.numel()
        place, index = places(name, plan)
        if place is None:
            continue
        own = tensor.numpy()[index]
        sent += own.size
        for i, tensors in enumerate(sub_fms):
            verbatim[i] += int(equal(own, place, tensors).sum())
    most = max(verbatim)
    return 1 - sent / total, most / total, (sent - most) / total


def exactly(own, name, tensors):
    return own == tensors[name].numpy()


@pytest.mark.parametrize(
    "method",
    ["fedpetuning", "fedpft-n", "fedpft-d", "fedpft", "fedpft-ls", "fedot", "fedot-b"],
)
def test_shares_are_those_of_the_captured_messages(
    local_grid, settings, vit_directory, method
):
    settings |= {"method": method, "plug-in.steps": 2}
    grid, _ = run(local_grid, settings)
    _, rounds, summary, manifest = results(settings)
    sheet, plan = summary["protection"], Plan.from_json(manifest["plan"])
    sub_fms = installed(grid)
    assert len(sub_fms) == (3 if method in ("fedpft", "fedpft-d") else 1)
    never, verbatim, refitted = shares(vit_directory, plan, sub_fms, exactly)
    assert sheet["never-sent"] == pytest.approx(never, abs=1e-9)
    assert sheet["never-sent"] == pytest.approx(summary["share-withheld"], abs=1e-9)
    assert sheet["sent-verbatim"] == pytest.approx(verbatim, abs=1e-9)
    assert sheet["re-fitted"] == pytest.approx(refitted, abs=1e-9)
    notes = {row["name"]: row["note"] for row in sheet["rows"]}
    note = notes["sent re-fitted"]
    if method in ("fedpetuning", "fedpft-n", "fedot"):
        assert refitted == 0 and note == "no other values were put in their place"
    elif method == "fedpft-d":  # pruned and sent first, aligned later
        assert refitted == 0 and "the place of some, which were sent before" in note
    else:
        assert refitted > 0.1 and "put other values in their place" in note
    assert (never == 0) == (method == "fedpetuning")
    up = {}
    for entry in rounds:
        for kind, sizes in entry["bytes"].items():
            if kind.startswith("up-"):
                name = kind.removeprefix("up-")
                up[name] = up.get(name, 0) + sizes["logical"]
    assert sheet["bytes-up"] == up
    assert ("statistics" in up) == (method in ("fedpft", "fedpft-d"))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_verbatim_is_as_exact_as_the_wire(local_grid, settings, vit_directory, codec):
    settings |= {"method": "fedpft-n", "wire.frozen": codec, "rounds": 1}
    run(local_grid, settings)
    sheet = results(settings)[2]["protection"]
    assert sheet["re-fitted"] == 0 and sheet["sent-verbatim"] > 0.5


def test_gaps_are_those_of_the_test_rows(local_grid, settings):
    settings |= {"method": "fedpft-b", "rounds": 1}
    run(local_grid, settings)
    place, rounds, summary, _ = results(settings)
    sheet, hits = summary["protection"], json.loads((place / "hits.json").read_text())
    right = {model: np.array(list(hits[model]), dtype=float) for model in hits}
    gap = right["fm"].mean() - right["sub-fm"].mean()
    assert sheet["theft-gap"] == pytest.approx(gap)
    after = summary["test-after"]
    assert gap == pytest.approx(after["fm-accuracy"] - after["sub-fm-accuracy"])
    low, high = sheet["theft-gap-interval"]
    assert low <= gap <= high
    differences = right["fm"] - right["sub-fm"]
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    assert high - low == pytest.approx(2 * 1.96 * error)
    assert sheet["public"]["before"] == rounds[0]["public"]
    assert all(set(row) == {"name", "value", "note"} for row in sheet["rows"])
    shown = {row["name"]: row["value"] for row in sheet["rows"]}
    assert shown["FM parameters never sent"].startswith(
        f"{100 * sheet['never-sent']:.1f} %"
    )
    assert shown["differential privacy"] == "none"


def test_likeness_is_that_of_a_slow_reference(local_grid, settings):
    from benchmarks.plain_loop import PlainLoop
    from fedpft_flower.adapters import base_model
    from fedpft_flower.architectures import layers_of
    from fedpft_flower.config import Config, derive_seed
    from fedpft_flower.encoding import shuffled_batches

    config = Config.from_run_config(settings | {"method": "fedpft-n"})
    server = PlainLoop(config, 3).server
    found = server.likeness()
    seed = derive_seed(config.seed, "likeness")
    states, answers = {"fm": [], "sub": []}, {"fm": [], "sub": []}
    for batch in list(shuffled_batches(server._public, 32, seed))[:8]:
        for name, model in (("fm", server.fm), ("sub", server.sub_fm)):
            model.eval()
            with torch.no_grad(), outputs_of([layers_of(base_model(model))[-1]]) as out:
                answers[name].append(model(**batch).logits.argmax(-1).numpy())
            states[name].append(out[0].numpy().astype(np.float64).reshape(-1, 16))
    fm, sub = (np.concatenate(states[name]) for name in ("fm", "sub"))
    error = np.linalg.norm(sub - fm) / np.linalg.norm(fm)
    assert found["state_error"] == pytest.approx(error, rel=1e-6)
    same = np.concatenate(answers["fm"]) == np.concatenate(answers["sub"])
    assert found["agreement"] == same.mean()
    assert found["fm_loss"] is None
    whole = Config.from_run_config(settings | {"method": "fedpetuning"})
    alike = PlainLoop(whole, 3).server.likeness()
    assert (alike["state_error"], alike["agreement"]) == (0.0, 1.0)


def test_of_several_sub_fms_the_one_that_shows_most_counts():
    own = [("w", torch.arange(6.0).reshape(2, 3)), ("b", torch.zeros(2))]
    first = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    second = {"w": torch.full((2, 3), 9.0), "b": torch.zeros(2)}
    exposure = Exposure()
    exposure.note(second, own, "fp32")
    assert (exposure.sent, exposure.verbatim) == (8, 2)
    exposure.note(first, own, "fp32")
    assert exposure.distance == 0.0  # the FM's own values there are all zero
    assert "other values in their place" in _refitted(
        {"re-fitted": 0.25, "re-fitted-distance": exposure.distance}
    )
    exposure.note(second, own, "fp32")
    assert (exposure.sent, exposure.verbatim) == (8, 6)
    moved, size = np.array([9.0, 8, 7, 6, 5, 4]), np.arange(6.0)
    far = np.linalg.norm(moved) / np.linalg.norm(size)
    assert exposure.distance == pytest.approx(far)
    again = Exposure()
    again.restore(exposure.state())
    assert again.state() == exposure.state()


def test_of_int8_what_lies_within_half_a_level_is_verbatim():
    """A row's largest value sets its scale: one that moves changes no level."""
    own = torch.tensor([[0.1, -0.5, 1.0], [1.0, 2.0, 3.0]])
    sent = encode_weights({"w": own * torch.tensor([[1.0 + 1e-6], [2.0]])}, "int8")
    exposure = Exposure()
    exposure.note(sent, [("w", own)], "int8")
    assert (exposure.sent, exposure.verbatim) == (6, 3)
    assert exposure.distance == pytest.approx(1.0, rel=0.01)


def test_the_sheet_tells_a_loss_of_privacy_where_there_is_one():
    exposure = Exposure()
    exposure.sent, exposure.verbatim = 60, 40
    scores = {"fm-accuracy": 0.5, "sub-fm-accuracy": 0.25}
    summary = {"test-before": scores, "test-after": scores}
    summary["parameters"] = {"fm": 100, "head": 10}
    summary["privacy"] = {"epsilon": 3.21, "delta": 1e-5}
    sheet = protection(
        exposure, "accuracy", summary, {}, {"fm": "10", "sub-fm": "11"}, {}
    )
    assert sheet["never-sent"] == pytest.approx(0.4)
    values = [row["value"] for row in sheet["rows"]]
    assert "epsilon 3.21, delta 1e-05" in values and "nothing" in values
