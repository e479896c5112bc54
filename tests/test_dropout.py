import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedpft_flower.adapters import attach_adapter
from fedpft_flower.config import LoraConfig
from fedpft_flower.dropout import Dropout
from tests.families import tiny_model


def dropped(p, count=1_000_003, seed=0):
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(count))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.95])
def test_entries_are_dropped_with_their_probability_and_others_scaled(p):
    found = dropped(p)
    gone = found == 0
    deviation = (p * (1 - p) / len(found)) ** 0.5
    assert float(gone.double().mean()) == pytest.approx(p, abs=4 * deviation + 2**-17)
    assert found[~gone].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)


def test_entries_of_one_draw_know_nothing_of_each_other():
    gone = (dropped(0.3, 1_000_000) == 0).double().view(-1, 4)
    together = torch.corrcoef(gone.T) - torch.eye(4)
    assert together.abs().max() < 5 / len(gone) ** 0.5
    for places in gone.mean(0).tolist():
        assert places == pytest.approx(0.3, abs=5 * (0.21 / len(gone)) ** 0.5)


def test_it_is_off_in_evaluation():
    values = torch.randn(3, 5)
    assert torch.equal(Dropout(0.5).eval()(values), values)


def test_equal_seeds_drop_the_same_however_many_threads_there_are():
    threads = torch.get_num_threads()
    one = dropped(0.2, seed=3)
    torch.set_num_threads(threads + 1)
    other = dropped(0.2, seed=3)
    torch.set_num_threads(threads)
    assert torch.equal(one, other)
    assert not torch.equal(one, dropped(0.2, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_entries_were_kept(dtype):
    values = torch.randn(7, 9, 11, dtype=dtype).transpose(0, 2).requires_grad_()
    found = Dropout(0.4)(values)
    found.sum().backward()
    assert found.shape == values.shape and found.dtype == dtype
    assert torch.equal(found, values.detach() * values.grad)
    scales = values.grad.unique().tolist()
    assert scales == pytest.approx(
        [0, 1 / 0.6], rel=1e-4 if dtype.itemsize > 2 else 4e-3
    )


def test_elsewhere_it_is_that_of_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p, *_: asked.append(p) or x
    )
    Dropout(0.4)(torch.ones(3, device="meta"))
    Dropout(0.4)(torch.ones(3))
    assert asked == [0.4]


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_it_is_the_dropout_of_every_lora_layer(family):
    head = ("classifier",) if family in ("bert", "vit") else ("score",)
    adapted = attach_adapter(tiny_model(family), LoraConfig(dropout=0.3), head, seed=0)
    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    found = [one for layer in layers for one in layer.lora_dropout.values()]
    assert found and {(type(one), one.p) for one in found} == {(Dropout, 0.3)}
    none = attach_adapter(tiny_model(family), LoraConfig(dropout=0.0), head, seed=0)
    assert not [m for m in none.modules() if isinstance(m, Dropout)]
