"""Gradient steps within a budget, against a quadratic whose minimum is known."""

from itertools import cycle

import pytest
import torch

from benchmarks.plain_loop import PlainLoop
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.descent import CHECKS, Loss, Progress, Schedule, descend

GOAL = torch.tensor([1.0, -2.0, 3.0])


def descended(schedule, batches, held_out=(), mask=None):
    """Return the parameter and every report; a batch holds the goal of its rows."""
    parameter = torch.zeros(3, requires_grad=True)
    seen: list[Progress] = []

    def loss_of(batch):
        return (parameter - batch["goal"]).square().sum(), 7

    last = descend(
        [],
        [(parameter, mask)],
        cycle(batches),
        Loss(loss_of, "the loss", "lower lr"),
        schedule,
        seen.append,
        held_out,
    )
    assert last == seen[-1]
    assert [one.done for one in seen] == [False] * (len(seen) - 1) + [True]
    return parameter.detach(), seen


def test_it_reaches_the_minimum_and_ends_at_the_budget():
    parameter, seen = descended(Schedule(0.1, steps=300), [{"goal": GOAL}])
    torch.testing.assert_close(parameter, GOAL, atol=1e-2, rtol=0)
    assert [one.steps for one in seen] == list(range(1, 301))
    assert seen[-1].tokens == 7 * 300
    assert seen[-1].held_out is None
    _, seen = descended(Schedule(0.1, steps=300, tokens=70), [{"goal": GOAL}])
    assert seen[-1].steps == 10


def test_an_entry_outside_its_mask_stays():
    mask = torch.tensor([True, False, True])
    parameter, _ = descended(Schedule(0.1, steps=300), [{"goal": GOAL}], mask=mask)
    assert parameter[1] == 0.0
    torch.testing.assert_close(parameter[mask], GOAL[mask], atol=1e-2, rtol=0)


def test_the_best_parameters_on_held_out_batches_stay():
    """The goal of the held-out batch lies on the way: beyond it that loss rises."""
    half = [{"goal": GOAL / 2}]
    schedule = Schedule(0.02, steps=500, patience=3)
    parameter, seen = descended(schedule, [{"goal": GOAL}], half)
    assert seen[-1].share < 1.0
    losses = list(dict.fromkeys(one.held_out for one in seen))
    # The first one is that of the first steps, before anything was measured again.
    assert losses[-4] == min(losses)
    assert losses[-3:] == sorted(losses[-3:])
    found = float((parameter - GOAL / 2).square().sum())
    assert found == pytest.approx(min(losses), rel=1e-6)


def test_without_overfit_the_whole_budget_is_used():
    schedule = Schedule(0.05, steps=100, patience=1)
    parameter, seen = descended(schedule, [{"goal": GOAL}], [{"goal": GOAL}])
    assert seen[-1].share == 1.0
    assert len({one.held_out for one in seen}) == CHECKS + 1
    free, _ = descended(Schedule(0.05, steps=100), [{"goal": GOAL}])
    assert torch.equal(parameter, free)


def test_a_loss_that_is_not_finite_ends_it_before_the_step():
    with pytest.raises(FedPFTError, match="the loss is inf at step 1; lower lr"):
        descended(Schedule(0.1, steps=3), [{"goal": torch.full((3,), torch.inf)}])


@pytest.mark.parametrize("rows", [12, 4])
def test_a_small_public_corpus_does_not_overfit(local_grid, settings, rows):
    settings |= {
        "method": "fedpft-b",
        "data.public-rows": rows,
        "align.patience": 1,
        "align.steps": 400,
        "align.lr": 0.05,
        "align.batch-size": 4,
    }
    if rows < 5:
        with pytest.raises(FedPFTError, match="of 4 public rows none can be held out"):
            PlainLoop(Config.from_run_config(settings), 5).server.prepare()
        return
    told = PlainLoop(Config.from_run_config(settings), 5).server.prepare()
    assert told["ended-early"]
    assert told["steps"] < 400
