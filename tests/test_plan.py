import pytest
import torch

from fedpft_flower.config import FedPFTError, SubFMConfig
from fedpft_flower.plan import Plan
from fedpft_flower.planners import (
    LayerSize,
    drop_layers,
    keep_all,
    keep_salient,
    parameters_of,
)

SCORES = [torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])]
SIZES = [LayerSize(neuron=10, rest=40)] * 2


def test_keeps_the_largest_scores_ascending_and_lower_positions_at_ties():
    plan = keep_salient(SCORES, SIZES, SubFMConfig(keep_fraction=0.5))
    assert plan.kept == {0: (0, 3), 1: (0, 1)}
    assert plan.compressed == (0, 1)
    assert not plan.is_whole


def test_whole_layers_count_from_both_ends():
    plan = keep_salient(SCORES, SIZES, SubFMConfig(keep_neurons=1, whole_layers="-1"))
    assert plan.kept == {0: (3,), 1: (0, 1, 2, 3)}
    assert plan.compressed == (0,)


def test_keep_all_is_whole():
    assert keep_all(SCORES, SIZES, SubFMConfig()).is_whole


def test_at_least_one_neuron_is_kept():
    plan = keep_salient(SCORES, SIZES, SubFMConfig(keep_fraction=0.001))
    assert [len(neurons) for neurons in plan.kept.values()] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_neurons": 5}, "keep-neurons = 5.*4 neurons"),
        ({"whole_layers": "2"}, "layer 2 does not exist"),
        ({"whole_layers": "-3"}, "layer -3 does not exist"),
    ],
)
def test_what_the_fm_does_not_have_is_refused(settings, said):
    with pytest.raises(FedPFTError, match=said):
        keep_salient(SCORES, SIZES, SubFMConfig(**settings))


@pytest.mark.parametrize(
    ("count", "settings", "kept"),
    [
        # A layer has 40 + 4 * 10 parameters; a quarter of the neurons leaves 50 of 80.
        (6, {"keep_fraction": 0.25}, (0, 2, 5)),
        (6, {"keep_fraction": 1.0}, (0, 1, 2, 3, 4, 5)),
        (6, {"layer_budget": 0.7}, (0, 2, 3, 5)),
        (6, {"layer_budget": 0.34}, (0, 5)),
        (12, {"layer_budget": 0.5}, (0, 2, 4, 7, 9, 11)),
        (12, {"layer_budget": 0.5, "end_layers": 2}, (0, 1, 4, 7, 10, 11)),
        (2, {"layer_budget": 1.0, "end_layers": 3}, (0, 1)),
    ],
)
def test_layers_are_dropped_evenly_within_the_budget(count, settings, kept):
    scores, sizes = [SCORES[0]] * count, SIZES[:1] * count
    config = SubFMConfig(**settings)
    plan = drop_layers(scores, sizes, config)
    assert plan.layers == kept
    ends = config.end_layers
    assert plan.adapters == tuple(sorted({*kept[:ends], *kept[-ends:]}))
    assert not plan.compressed
    same_budget = keep_salient(scores, sizes, config)
    if not config.layer_budget:
        assert parameters_of(plan, sizes) <= parameters_of(same_budget, sizes)


def test_end_layers_above_the_budget_are_refused():
    with pytest.raises(FedPFTError, match=r"end-layers = 2 keeps 4 whole.*budget"):
        drop_layers(
            [SCORES[0]] * 6, SIZES[:1] * 6, SubFMConfig(layer_budget=0.5, end_layers=2)
        )


def test_adapters_in_dropped_layers_are_refused():
    with pytest.raises(FedPFTError, match="drops"):
        Plan((4, 4), {0: (0, 1, 2, 3)}, (1,))


def test_json_round_trip():
    for adapters in (None, (0,), (0, 2)):
        plan = Plan((4, 4, 4), {0: (0, 1, 2, 3), 2: (1, 3)}, adapters)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert again.layers == (0, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"widths": [4]}',
        '{"widths": [4], "kept": {"1": [0]}}',
        '{"widths": [4], "kept": {"0": [2, 1]}}',
        '{"widths": [4], "kept": {"0": [4]}}',
        '{"widths": [4], "kept": {"0": []}}',
        '{"widths": [4], "kept": {"0": [-1]}}',
    ],
)
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(FedPFTError):
        Plan.from_json(text)
