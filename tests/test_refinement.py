"""The refinement of the plugged-in adapter."""

from dataclasses import asdict
from itertools import cycle, islice

import numpy as np
import pytest
import torch

from benchmarks.plain_loop import PlainLoop
from fedpft_flower.adapters import get_adapter
from fedpft_flower.config import Config, FedPFTError, derive_seed
from fedpft_flower.descent import Schedule
from fedpft_flower.encoding import shuffled_batches
from fedpft_flower.evaluation import evaluate
from fedpft_flower.public import load_public
from fedpft_flower.refinement import logit_loss, refine
from fedpft_flower.server import GRADIENT_BATCHES
from tests.families import tiny_batch
from tests.test_architectures import adapted, gradient_error

PIXELS = "pixel_values"


def test_logit_loss_against_numpy():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 6, 4))
    p, q = (
        np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (teacher, student)
    )
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    found = logit_loss(torch.tensor(teacher), torch.tensor(student))
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_the_fm_follows_the_sub_fm_by_its_lora_alone(family):
    fm, sub, _ = adapted(family)
    with torch.no_grad():  # tiny models differ too little by their neurons alone
        for name, parameter in sub.named_parameters():
            if ".lora_B" in name:
                parameter.mul_(10.0)
    before = {
        name: {k: v.clone() for k, v in model.state_dict().items()}
        for name, model in (("fm", fm), ("sub", sub))
    }
    batches = [
        {**tiny_batch(family, seed), "labels": torch.zeros(5)} for seed in (1, 2)
    ]
    seen = []
    refine(fm, sub, cycle(batches), Schedule(0.01, 60), seen.append)
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert (seen[-1].share, seen[-1].steps) == (1.0, 60)
    for name, model in (("fm", fm), ("sub", sub)):
        changed = {
            key
            for key, value in model.state_dict().items()
            if not torch.equal(value, before[name][key])
        }
        assert all(".lora_" in key for key in changed)
        assert bool(changed) == (name == "fm")


def test_a_rate_that_is_too_large_is_named():
    fm, sub, _ = adapted("bert")
    with pytest.raises(FedPFTError, match=r"refinement is nan.*lower plug-in.lr"):
        refine(fm, sub, cycle([tiny_batch("bert")]), Schedule(1e30, 50), print)


@pytest.fixture
def trained(local_grid, settings):
    settings |= {"plug-in.steps": 5, "plug-in.lr": 0.01, "rounds": 1}
    loop = PlainLoop(Config.from_run_config(settings), 5)
    list(loop.run())
    return loop.server


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_server_keeps_what_lowers_the_loss_on_validation(trained, monkeypatch):
    plain, sub = get_adapter(trained.fm), get_adapter(trained.sub_fm)
    losses = iter([0.5, 0.4, 0.5])

    def evaluation(model, rows, objective):
        return {"accuracy": 0.5, "loss": next(losses)}, []

    monkeypatch.setattr("fedpft_flower.server.judge", evaluation)
    trained.restore(trained.state())  # it has been judged before
    report = trained.refine()
    assert report["kept"]
    assert report["steps"] == 5
    assert not same(get_adapter(trained.fm), plain)
    report = trained.refine()  # now validation gets worse
    assert not report["kept"]
    assert same(get_adapter(trained.fm), plain)
    assert same(get_adapter(trained.sub_fm), sub)
    assert same(trained.adapter, sub)


def test_a_refinement_that_fails_loses_nothing(trained, monkeypatch, caplog):
    plain = get_adapter(trained.fm)

    def fail(fm, *rest):
        for name, parameter in fm.named_parameters():
            if ".lora_B" in name:
                parameter.data.fill_(torch.nan)
        raise FedPFTError("the loss of the refinement is nan; lower plug-in.lr")

    monkeypatch.setattr("fedpft_flower.server.refine", fail)
    report = trained.refine()
    assert report["kept"] is False and "lower plug-in.lr" in report["error"]
    assert "lower plug-in.lr" in caplog.text
    assert same(get_adapter(trained.fm), plain)


@pytest.mark.parametrize("how", ["distill", "least-squares"])
def test_what_was_judged_before_is_judged_again_once_a_model_changes(
    local_grid, settings, how
):
    settings |= {"align.before": how, "align.during": how}
    settings |= {"plug-in.steps": 5, "plug-in.lr": 0.01}
    loop = PlainLoop(Config.from_run_config(settings), 5)
    rows = loop.server.encode(loop.task.validation)
    public = loop.server.encode_public(load_public(loop.config.data, 0))
    order = derive_seed(0, "gradient")

    def check():
        found = loop.server.evaluate("validation")
        for name, model in (("fm", loop.server.fm), ("sub-fm", loop.server.sub_fm)):
            for metric, value in evaluate(model, rows).items():
                assert found[f"{name}-{metric}"] == value
        batches = list(islice(shuffled_batches(public, 8, order), GRADIENT_BATCHES))
        error = gradient_error(loop.server.fm, loop.server.sub_fm, batches, 0)
        assert loop.server.gradient_error() == asdict(error)

    check()
    loop.server.prepare()  # no adapter is plugged in here, which would forget all
    check()
    for _ in loop.run():  # aligns after every round
        check()
    loop.server.refine()
    check()


def test_labels_change_nothing():
    ends = []
    for labels in ({}, {"labels": torch.zeros(5)}, {"labels": torch.ones(5)}):
        fm, sub, _ = adapted("bert")
        batch = {**tiny_batch("bert"), **labels}
        refine(fm, sub, cycle([batch]), Schedule(0.01, 3), lambda _: None)
        ends.append(get_adapter(fm))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "pppppppp"), (0.25, "pppvpppv"), (0.5, "pvpvpvpv"), (1.0, "vvvvvvvv")],
)
def test_a_share_of_the_batches_is_validation_rows(
    local_grid, settings, monkeypatch, share, expected
):
    taken = []

    def noting(fm, sub_fm, batches, schedule, report):
        taken.extend(islice(batches, 8))
        raise FedPFTError("enough")

    monkeypatch.setattr("fedpft_flower.server.refine", noting)
    settings |= {"plug-in.steps": 5, "plug-in.validation-share": share, "rounds": 1}
    loop = PlainLoop(Config.from_run_config(settings), 5)
    loop.server.refine()
    rows = loop.server.encode(loop.task.validation)
    own = {image.numpy().tobytes() for image in rows.batch(range(len(rows)))[PIXELS]}
    kinds = [all(i.numpy().tobytes() in own for i in batch[PIXELS]) for batch in taken]
    assert "".join("pv"[kind] for kind in kinds) == expected


def test_texts_that_say_what_is_right_are_left_out(generation):
    """A generator's validation rows are prompts with their responses."""
    settings = generation | {"method": "fedpft-ls", "plug-in.validation-share": 1.0}
    loop = PlainLoop(Config.from_run_config(settings), 2)
    public = loop.server.encode_public(load_public(loop.config.data, 0))
    text = public.batch([0])["input_ids"][0]  # all of them are this one
    for batch in islice(loop.server._refinement_batches(), 4):
        assert all(torch.equal(row, text) for row in batch["input_ids"])


@pytest.mark.parametrize(
    "change", [{"method": "fedpetuning"}, {"plug-in.steps": 0}, {"plug-in.steps": -1}]
)
def test_nothing_to_refine(local_grid, settings, change):
    settings |= {"plug-in.steps": 5, "rounds": 1, **change}
    loop = PlainLoop(Config.from_run_config(settings), 5)
    before = get_adapter(loop.server.fm)
    assert loop.server.refine() == {}
    assert same(get_adapter(loop.server.fm), before)
