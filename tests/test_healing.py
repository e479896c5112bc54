"""Healing: an attacker starts from what was sent, and nothing else."""

import csv
import sys

import pytest
import torch
from datasets import Dataset
from PIL import Image

from benchmarks import healing
from fedpft_flower.adapters import base_model
from fedpft_flower.config import Config, DataConfig, FedPFTError
from fedpft_flower.foundation import load_fm
from fedpft_flower.server import ProxyServer
from fedpft_flower.tasks import TaskData

WORDS = ["good", "bad", "film", "very", "not", "red", "blue", "fast"]


@pytest.fixture
def server(bert_directory):
    def build(**changes):
        settings = {"method": "fedpft-n", "data.max-length": 16} | changes
        settings["fm.name"] = str(bert_directory)
        config = Config.from_run_config(settings)
        texts = [" ".join(WORDS[(i + j) % 8] for j in range(6)) for i in range(40)]
        rows = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(40)]})
        fm = load_fm(config.fm.name, ("a", "b"), "text", 0)
        return ProxyServer(config, fm, TaskData(rows, rows, rows, ("a", "b")), None)

    return build


def test_what_is_grown_back_has_the_fms_shape_and_starts_as_the_sub_fm(server):
    owner = server()
    package = owner.package()
    grown = healing.regrow(package, seed=0)
    fm = base_model(owner.fm)
    assert grown.config.intermediate_size == fm.config.intermediate_size
    batch = {"input_ids": torch.randint(5, 20, (3, 7))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        own, sent = (
            healing.hidden(model, batch) for model in (grown, base_model(owner.sub_fm))
        )
        whole = healing.hidden(fm, batch)
    torch.testing.assert_close(own, sent)
    assert not torch.allclose(own, whole, atol=1e-3)
    assert healing.distance(fm, fm, [batch]) == 0.0
    assert healing.distance(grown, fm, [batch]) > 0


def test_training_lowers_the_loss_and_changes_what_was_not_sent(server):
    owner = server()
    package = owner.package()
    grown = healing.regrow(package, seed=0)
    tokenizer = healing.tokenizer_of(package)
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    texts = Dataset.from_dict({"text": [" ".join(WORDS)] * 40})
    data = DataConfig(max_length=16)
    rows = healing.encode_public(texts, tokenizer, "text", data, "classify")
    steps = healing.pretrain(grown, rows, tokenizer, 0.01, seed=0)
    losses = [next(steps)[1] for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    name = next(n for n in before if n.endswith("layer.0.output.dense.weight"))
    assert not torch.equal(dict(grown.named_parameters())[name], before[name])


def test_dropped_layers_are_refused(server):
    package = server(method="fedot", **{"sub-fm.layer-budget": 0.8}).package()
    with pytest.raises(FedPFTError, match="not dropped layers"):
        healing.regrow(package, seed=0)


def test_an_attack_is_measured_and_shown(bert_directory, tmp_path, monkeypatch):
    texts = [" ".join(WORDS[(i + j) % 8] for j in range(6)) for i in range(60)]
    labels = [WORDS.index(text.split()[0]) % 2 for text in texts]
    rows = Dataset.from_dict({"text": texts, "label": labels})
    rows.to_csv(str(tmp_path / "rows.csv"))
    rows.select_columns(["text"]).to_csv(str(tmp_path / "public.csv"))
    arguments = [
        f"fm.name={bert_directory}",
        f"data.path={tmp_path / 'rows.csv'}",
        f"data.public-path={tmp_path / 'public.csv'}",
        *("data.task=text", "method=fedpft-b", "align.steps=3", "data.max-length=16"),
    ]
    told = ["--seeds", "0", "1", "--tokens", "900", "--points", "3", "--out"]
    monkeypatch.setattr(
        sys, "argv", ["healing", *arguments, *told, str(tmp_path / "out")]
    )
    healing.main()
    with (tmp_path / "out" / "healing.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["seed"] for line in lines] == ["0"] * 4 + ["1"] * 4
    for seed in (0, 1):
        spent = [int(one["tokens"]) for one in lines if one["seed"] == str(seed)]
        assert spent[0] == 0 and spent == sorted(spent) and spent[-1] >= 900
        far = [float(one["distance"]) for one in lines if one["seed"] == str(seed)]
        back = [float(o["distance_recovered"]) for o in lines if o["seed"] == str(seed)]
        assert back == pytest.approx([1 - one / far[0] for one in far])
        assert all(0 <= float(o["probe"]) <= 1 for o in lines)
    shown = healing.table([point_of(line) for line in lines]).splitlines()
    assert len(shown) == 2 + 4 and shown[2].startswith("| 0 | ")
    with Image.open(tmp_path / "out" / "healing.png") as picture:
        assert picture.size == (840, 540)


def point_of(line):
    kinds = [int, int, *[float] * 5]
    values = zip(kinds, line.values(), strict=True)
    return healing.Point(*(kind(value) for kind, value in values))
