from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fedpft_flower.adapters import attach_adapter, get_adapter
from fedpft_flower.config import FedPFTError, LoraConfig, TrainConfig
from fedpft_flower.encoding import TextRows
from fedpft_flower.evaluation import evaluate
from fedpft_flower.training import round_lr, train_adapter
from tests.families import tiny_model


@pytest.fixture
def rows(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    texts = ["good film", "very bad", "bad bad film", "the good"] * 10
    data = Dataset.from_dict({"text": texts, "label": [0, 1, 1, 0] * 10})
    return TextRows(data, tokenizer, 16)


def model(**lora):
    return attach_adapter(
        tiny_model("bert"), LoraConfig(r=2, alpha=8, **lora), ("classifier",), seed=0
    )


def test_lr_falls_linearly_and_the_last_round_still_learns():
    config = TrainConfig(lr=1.0)
    assert [round_lr(config, r, 4) for r in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    constant = TrainConfig(lr=1.0, lr_decay="none")
    assert round_lr(constant, 4, 4) == 1.0


def test_training_learns_and_is_repeatable(rows):
    config = TrainConfig(local_epochs=8, batch_size=8)
    one, two, other = model(), model(), model()
    assert evaluate(one, rows)["accuracy"] < 0.9
    report = train_adapter(one, rows, config, lr=0.02, seed=1)
    train_adapter(two, rows, config, lr=0.02, seed=1)
    train_adapter(other, rows, config, lr=0.02, seed=2)
    assert (report.steps, report.examples) == (40, 40)
    assert evaluate(one, rows)["accuracy"] == 1.0
    first, again, third = get_adapter(one), get_adapter(two), get_adapter(other)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_steps_take_the_place_of_epochs(rows):
    config = TrainConfig(local_epochs=9, local_steps=3, batch_size=8)
    assert train_adapter(model(), rows, config, 0.01, 0).steps == 3


@pytest.mark.parametrize("on", [True, False])
def test_only_dropout_that_is_asked_for_is_on(rows, on):
    """LoRA's dropout always acts, the frozen model's own only with frozen-dropout."""
    seen = {}
    adapted = model(dropout=0.5)
    for name, module in adapted.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda m, i, o, n=name: seen.__setitem__(n, m.training)
            )
    train_adapter(adapted, rows, TrainConfig(local_steps=1, frozen_dropout=on), 0.01, 0)
    lora = {name: state for name, state in seen.items() if "lora_dropout" in name}
    assert lora and all(lora.values())
    assert set(seen) - set(lora)
    assert all(state == on for name, state in seen.items() if name not in lora)
    assert not adapted.training


def test_evaluation_is_the_mean_over_rows_one_by_one(rows):
    adapted = model()
    found = evaluate(adapted, rows)
    losses, hits = [], []
    for i in range(len(rows)):
        batch = rows.batch([i])
        with torch.no_grad():
            out = adapted(**batch)
        losses.append(float(out.loss))
        hits.append(int(out.logits.argmax()) == int(batch["labels"]))
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused(rows):
    with pytest.raises(FedPFTError, match=r"lower train\.lr"):
        train_adapter(
            model(), rows, TrainConfig(local_steps=30, clip_norm=0.0), 1e30, seed=0
        )


def test_a_starts_as_asked_and_b_at_zero():
    """Gaussian: N(0, 1/r^2); Kaiming: at most 1/sqrt(D) in magnitude."""

    def starts(init, part):
        adapter = get_adapter(model(init=init))
        return torch.cat([t.flatten() for n, t in adapter.items() if part in n])

    assert float(starts("gaussian", "lora_A").std()) == pytest.approx(0.5, rel=0.1)
    assert float(starts("kaiming", "lora_A").abs().max()) <= 16**-0.5
    assert not bool(starts("gaussian", "lora_B").any())


class Said:
    """Rows of a model that says what they tell it to."""

    def __init__(self, truth, said):
        self.truth, self.said = torch.tensor(truth), torch.tensor(said)

    def __len__(self):
        return len(self.truth)

    def lengths(self):
        return [1] * len(self)

    def batch(self, indices):
        rows = list(indices)
        return {"said": self.said[rows], "labels": self.truth[rows]}


class Parrot(torch.nn.Module):
    def forward(self, said):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 5).float())


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([0, 0, 1, 1, 3, 3, 3], [0, 1, 1, 1, 3, 0, 3]),
        ([0, 0, 1, 1], [0, 0, 1, 2]),  # class 2 is said, but no row has it
        ([0, 1] * 50, [0] * 99 + [1]),
    ],
)
def test_metrics_are_those_of_their_definitions(truth, said):
    """Macro F1 over the classes that the rows have; Matthews as R_K (Gorodkin 2004)."""
    found = evaluate(Parrot(), Said(truth, said))
    n, right = len(truth), sum(t == s for t, s in zip(truth, said, strict=True))
    f1 = []
    for c in set(truth):
        hits = sum(t == s == c for t, s in zip(truth, said, strict=True))
        f1.append(2 * hits / (truth.count(c) + said.count(c)))
    assert found["accuracy"] == pytest.approx(right / n)
    assert found["macro-f1"] == pytest.approx(sum(f1) / len(f1))
    t_k, s_k = ([values.count(c) for c in range(5)] for values in (truth, said))
    top = right * n - sum(t * s for t, s in zip(t_k, s_k, strict=True))
    bottom = (n**2 - sum(s * s for s in s_k)) * (n**2 - sum(t * t for t in t_k))
    assert found["matthews"] == pytest.approx(top / bottom**0.5)
