"""Where models lie, as far as that can be tried without a GPU."""

import weakref

import pytest
import torch

from fedpft_flower import client, devices
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import FedPFTError, SubFMConfig
from fedpft_flower.planners import keep_salient, size_of
from fedpft_flower.quantisation import quantise
from fedpft_flower.sub_fm import build_sub_fm
from tests.families import tiny_model
from tests.test_federation import run


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (RuntimeError("CUDA error: no kernel image is available\nmore"), "cpu"),
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda"),
        (None, "cuda"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_and_none(monkeypatch, caplog, error, where):
    def zeros(*sizes, device):
        assert device == "cuda"
        if error is not None:
            raise error
        return torch.ones(*sizes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert devices.device_here.__wrapped__().type == where
    assert ("(CUDA error: no kernel image is available)" in caplog.text) == (
        where == "cpu"
    )


@pytest.mark.parametrize("where", ["build_from_package", "train_adapter"])
def test_a_client_whose_memory_ends_says_what_helps_and_lets_it_go(
    local_grid, settings, monkeypatch, where
):
    held, free = [], []

    class Large:
        pass

    def too_large(*given):
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    # What is given back is what nothing holds any more.
    monkeypatch.setattr(
        client, "release", lambda: free.append([one() is None for one in held])
    )
    monkeypatch.setattr(client, where, too_large)
    client.forget_sub_fm()
    free.clear()
    with pytest.raises(FedPFTError, match="memory ended in training"):
        run(local_grid, settings | {"train.max-retries": 0})
    assert held and all(free[-1])


@pytest.mark.parametrize(("neurons", "fits"), [(8, True), (7, False)])
def test_int8_on_a_gpu_needs_multiples_of_four(monkeypatch, neurons, fits):
    fm = tiny_model("bert")
    layers = zip(layers_of(fm), ffns_of(fm), strict=True)
    sizes = [size_of(layer, ffn) for layer, ffn in layers]
    scores = [torch.arange(float(ffn.width)) for ffn in ffns_of(fm)]
    plan = keep_salient(scores, sizes, SubFMConfig(keep_neurons=neurons))
    model, made = build_sub_fm(fm, plan), []
    monkeypatch.setattr(
        "fedpft_flower.quantisation._quantised",
        lambda linear, *how: made.append(linear) or linear,
    )
    if fits:
        quantise(model, "int8", torch.device("cuda"))
        assert made
    else:
        with pytest.raises(FedPFTError, match="a matrix has 7 outputs"):
            quantise(model, "int8", torch.device("cuda"))
        quantise(model, "int8", torch.device("cpu"))
