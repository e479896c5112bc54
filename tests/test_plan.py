import pytest
import torch

from fedpft_flower.architectures import ffns_of
from fedpft_flower.config import FedPFTError, SubFMConfig
from fedpft_flower.plan import Plan, keep_all, keep_salient, score
from tests.families import tiny_model

SCORES = [torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])]


def test_keeps_the_largest_scores_ascending_and_lower_positions_at_ties():
    plan = keep_salient(SCORES, SubFMConfig(keep_fraction=0.5))
    assert plan.kept == {0: (0, 3), 1: (0, 1)}
    assert plan.compressed == (0, 1)
    assert not plan.is_whole


def test_whole_layers_count_from_both_ends():
    plan = keep_salient(SCORES, SubFMConfig(keep_neurons=1, whole_layers="-1"))
    assert plan.kept == {0: (3,), 1: (0, 1, 2, 3)}
    assert plan.compressed == (0,)


def test_keep_all_is_whole():
    assert keep_all(SCORES, SubFMConfig()).is_whole


def test_at_least_one_neuron_is_kept():
    plan = keep_salient(SCORES, SubFMConfig(keep_fraction=0.001))
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
        keep_salient(SCORES, SubFMConfig(**settings))


def test_json_round_trip():
    plan = Plan((4, 4, 4), {0: (0, 1, 2, 3), 2: (1, 3)})
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


def test_random_saliency_is_seeded_and_differs_from_the_norm():
    ffns = ffns_of(tiny_model("bert"))
    first, again = score(ffns, "random", 1), score(ffns, "random", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], score(ffns, "random", 2)[0])
    assert not torch.equal(first[0], first[1])


def test_unknown_saliency_is_refused():
    with pytest.raises(FedPFTError, match="norm, random"):
        score([], "magic", 0)
