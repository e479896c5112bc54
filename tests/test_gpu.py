"""Runs where there is a GPU: pytest -m gpu."""

import pytest
import torch

from deploy.processes import Deployment
from fedpft_flower import client
from fedpft_flower.adapters import base_model
from fedpft_flower.client import forget_sub_fm
from tests.deployment import SITES, prepare, rounds_of, run_directory, start_site
from tests.test_federation import results, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.mark.parametrize("method", ["fedpft", "fedpft-ls", "fedot", "fedpetuning"])
def test_a_run_on_the_gpu_gives_what_one_on_the_cpu_does(
    local_grid, settings, tmp_path, monkeypatch, method
):
    found = {}
    for where in ("cpu", "cuda"):
        monkeypatch.setattr(
            "fedpft_flower.foundation.device_here", lambda w=where: torch.device(w)
        )
        monkeypatch.setattr(
            "fedpft_flower.client.device_here", lambda w=where: torch.device(w)
        )
        forget_sub_fm()
        out = {"out-dir": str(tmp_path / where), "method": method, "plug-in.steps": 3}
        run(local_grid, settings | out)
        _, _, found[where], _ = results(settings | out)
        for side in ("server", "client"):
            assert where == "cpu" or found[where][f"peak-gpu-memory-{side}"]
        (held,) = client._HELD.values()
        assert {p.device.type for p in held.model.parameters()} == {where}
    for name, value in found["cpu"]["test-after"].items():
        if name.endswith("loss"):
            assert found["cuda"]["test-after"][name] == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_clients_train_on_the_gpu(local_grid, settings, kind):
    pytest.importorskip("bitsandbytes", reason="extra `quantised` not installed")
    settings |= {"train.frozen": kind, "train.lr": 0.02}
    run(local_grid, settings)
    _, _, summary, _ = results(settings)
    assert summary["failures"] == 0
    assert summary["test-after"]["fm-loss"] < summary["test-before"]["fm-loss"]


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_steps_in_other_numbers_on_the_gpu(local_grid, settings, precision):
    settings |= {"train.precision": precision, "server-precision": precision}
    run(local_grid, settings | {"train.lr": 0.02})
    _, rounds, summary, _ = results(settings)
    assert summary["test-after"]["fm-loss"] < summary["test-before"]["fm-loss"]
    told = {one["bf16"] for one in rounds[1]["per-client"].values()}
    assert told <= ({1.0} if precision == "bf16" else {0.0, 1.0})


def test_models_lie_on_the_gpu(settings):
    from benchmarks.plain_loop import PlainLoop
    from fedpft_flower.config import Config

    server = PlainLoop(Config.from_run_config(settings), 5).server
    for model in (server.fm, server.sub_fm):
        assert {p.device.type for p in base_model(model).parameters()} == {"cuda"}
    assert {t.device.type for t in server.adapter.values()} == {"cpu"}


def test_a_node_with_a_gpu_takes_part_beside_one_without(tmp_path, vit_directory):
    settings = prepare(tmp_path, vit_directory) | {"timeout-seconds": 300.0}
    with Deployment(tmp_path) as deployment:
        deployment.superlink()
        start_site(deployment, "north")
        start_site(deployment, "south", within=("env", "CUDA_VISIBLE_DEVICES="))
        deployment.submit("run", settings)
        assert deployment.status("run", 500) == "finished:completed"
    for entry in rounds_of(run_directory(tmp_path))[1:]:
        outcomes = {site: one["outcome"] for site, one in entry["per-client"].items()}
        assert outcomes == dict.fromkeys(SITES, "ok")
