"""Clients that hold their frozen matrices in 8 or 4 bits."""

from importlib.util import find_spec

import pytest
import torch

from fedpft_flower import client
from fedpft_flower.adapters import base_model, get_adapter, load_adapter
from fedpft_flower.architectures import ARCHITECTURES, ffns_of
from fedpft_flower.config import FedPFTError, LoraConfig
from fedpft_flower.package import Package
from fedpft_flower.quantisation import _quantised, check_frozen, quantise
from fedpft_flower.received import config_fields
from fedpft_flower.sub_fm import build_sub_fm, frozen_weights
from tests.families import CONFIGS, tiny_batch, tiny_model
from tests.test_architectures import plans
from tests.test_federation import results, run

pytestmark = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install '.[quantised]'",
)
kinds = pytest.mark.parametrize("kind", ["int8", "nf4"])
families = pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"gpt2"}))
LORA = LoraConfig(r=2, alpha=8)


def package_of(family):
    fm = tiny_model(family)
    plan = plans(fm, keep_fraction=0.5)
    head = ARCHITECTURES[family].head
    weights = frozen_weights(build_sub_fm(fm, plan), head)
    return Package(config_fields(fm.config), plan, head, weights, [], {})


@families
@kinds
def test_such_a_client_trains_the_same_adapter_on_almost_the_same_model(family, kind):
    package = package_of(family)
    plain = client.build_from_package(package, LORA, 0).eval()
    model = client.build_from_package(package, LORA, 0, kind).eval()
    assert get_adapter(model).keys() == get_adapter(plain).keys()
    generator = torch.Generator().manual_seed(0)
    adapter = {  # as they arrive, LoRA does nothing and the head says nothing
        name: torch.randn(tensor.shape, generator=generator)
        * (0.05 if ".lora_" in name else 0.3)
        for name, tensor in get_adapter(plain).items()
    }
    for one in (plain, model):
        load_adapter(one, adapter)
    widths = [ffn.width for ffn in ffns_of(base_model(plain))]
    assert [ffn.width for ffn in ffns_of(base_model(model))] == widths
    batch = {**tiny_batch(family), "labels": torch.tensor([0, 1, 2, 3, 0])}
    with torch.no_grad():
        near, there = model(**batch).logits, plain(**batch).logits
    # Of matrices so small 4 bits leave much less than of real ones.
    most = {"int8": 0.05, "nf4": 0.7}[kind]
    assert 0 < float((near - there).norm() / there.norm()) < most
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimiser, losses = torch.optim.AdamW(trained, 0.01), []
    for _ in range(10):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.28), ("nf4", 0.16)])
def test_the_matrices_take_a_fraction_of_the_memory(kind, share):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=50,
    )
    model = BertForSequenceClassification(config)
    layers = model.bert.encoder

    def size():
        tensors = [*layers.parameters(), *layers.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    before = size()
    quantise(model, kind, torch.device("cpu"))
    assert size() < share * before


@kinds
def test_a_run_with_such_clients(local_grid, settings, kind):
    settings |= {"train.frozen": kind, "method": "fedpft", "train.lr": 0.02}
    run(local_grid, settings)
    _, _, summary, _ = results(settings)
    assert summary["failures"] == 0
    assert summary["test-after"]["fm-loss"] < summary["test-before"]["fm-loss"]
    assert summary["flops-per-client-and-round"] is None  # nobody can count them


def test_outliers_are_multiplied_in_full():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 256)
    inputs = torch.randn(16, 256)
    inputs[:, [3, 90]] *= 60
    model = torch.nn.Module()
    model.linear = _quantised(linear, "int8", torch.device("cpu")).eval()
    expected = linear(inputs)
    error = (model.linear(inputs) - expected).norm() / expected.norm()
    assert float(error) < 0.01


def test_transposed_matrices_are_refused():
    check_frozen(tiny_model("gpt2"), "fp32")
    with pytest.raises(FedPFTError, match="stores its matrices transposed"):
        check_frozen(tiny_model("gpt2"), "nf4")


def test_what_is_missing_is_named_before_training(local_grid, settings, monkeypatch):
    monkeypatch.setattr("fedpft_flower.node.find_spec", lambda name: None)
    with pytest.raises(FedPFTError, match="needs bitsandbytes at every node"):
        run(local_grid, settings | {"train.frozen": "int8"})
