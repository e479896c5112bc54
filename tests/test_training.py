from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fedpft_flower import progress
from fedpft_flower.adapters import attach_adapter, base_model, get_adapter
from fedpft_flower.architectures import ARCHITECTURES, ffns_of, layers_of
from fedpft_flower.config import FedPFTError, LoraConfig, TrainConfig
from fedpft_flower.encoding import NO_TARGET, TextRows
from fedpft_flower.evaluation import evaluate
from fedpft_flower.flops import FlopMeter
from fedpft_flower.training import add_gradients, recomputed, round_lr, train_adapter
from tests.families import tiny_batch, tiny_model


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


def test_lr_rises_over_the_rounds_that_warm_up():
    config = TrainConfig(lr=1.0, warmup_ratio=0.4)
    rates = [round_lr(config, r, 5) for r in (1, 2, 3, 4, 5)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    constant = TrainConfig(lr=1.0, warmup_ratio=0.4, lr_decay="none")
    assert [round_lr(constant, r, 5) for r in (3, 4, 5)] == [1, 1, 1]
    assert round_lr(config, 1, 1) == 1.0  # a single round has nothing to lead to
    most = TrainConfig(lr=1.0, warmup_ratio=0.9)
    assert [round_lr(most, r, 4) for r in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_training_learns_and_is_repeatable(rows):
    config = TrainConfig(local_epochs=8, batch_size=8)
    one, two, other = model(), model(), model()
    assert evaluate(one, rows)["accuracy"] < 0.9
    report = train_adapter(one, rows, config, lr=0.02, seed=1)
    train_adapter(two, rows, config, lr=0.02, seed=1)
    train_adapter(other, rows, config, lr=0.02, seed=2)
    assert (report.steps, report.examples) == (40, 40)
    assert 0 < report.step_seconds <= report.seconds
    assert evaluate(one, rows)["accuracy"] == 1.0
    first, again, third = get_adapter(one), get_adapter(two), get_adapter(other)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_counting_changes_nothing_and_a_training_tells(rows):
    told, adapters = [], []
    for meter in (None, FlopMeter()):
        adapted = model()
        config = TrainConfig(local_steps=3, batch_size=8)
        report = train_adapter(adapted, rows, config, 0.01, seed=0, meter=meter)
        train_adapter(adapted, rows, config, 0.01, seed=0, meter=meter)
        told.append(report.flops)
        adapters.append([p.detach() for p in adapted.parameters() if p.requires_grad])
    assert told[0] == told[1] > 0
    for one, other in zip(*adapters, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("lasting", "steps"),
    [({"local_epochs": 9, "local_steps": 3}, 3), ({"local_epochs": 2}, 2 * 5)],
)
def test_a_training_tells_how_far_it_is(rows, lasting, steps):
    config = TrainConfig(batch_size=9, **lasting)  # of the 40 rows 4 are left
    seen = []

    def watch(*told):
        seen.append(told)

    report = train_adapter(model(), rows, config, 0.01, 0, watch=watch)
    assert report.steps == steps
    assert seen == [(done, steps) for done in range(1, steps + 1)]


def test_a_line_every_few_seconds_tells_of_a_training(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = progress.StepLog(lambda text, *values: said.append(text % values), "round 1")
    for step in range(1, 8):
        now[0] += 4.0
        log(step, 7)
    assert said == ["round 1: step 3 of 7, 12 s", "round 1: step 6 of 7, 24 s"]


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(rows, size):
    whole, parts = model(dropout=0.0), model(dropout=0.0)
    batch = rows.batch(range(8))
    losses = [float(add_gradients(m, batch, n)) for m, n in ((whole, 0), (parts, size))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(float(whole(**batch).loss.detach()), rel=1e-6)
    same_gradients(whole, parts)
    adapters = []
    for size_of_parts in (0, size):
        adapted = model(dropout=0.0)
        config = TrainConfig(local_steps=4, micro_batch_size=size_of_parts)
        train_adapter(adapted, rows, config, 0.01, 0)
        adapters.append(get_adapter(adapted))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], atol=1e-4, rtol=1e-3)


def test_parts_of_texts_to_generate_count_by_their_tokens():
    whole, parts = (adapted_family("llama", "generate") for _ in range(2))
    batch = tiny_batch("llama")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, NO_TARGET)
    labels[0, :5] = NO_TARGET  # a prompt
    labels[1, 1:] = NO_TARGET  # nothing is learnt from this row
    batch |= {"labels": labels}
    losses = [float(add_gradients(m, batch, n)) for m, n in ((whole, 0), (parts, 1))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    same_gradients(whole, parts)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_recomputing_changes_no_gradient(family):
    """Dropout falls alike, and every layer runs twice."""
    batch = tiny_batch(family) | {"labels": torch.tensor([0, 1, 2, 3, 0])}
    found, runs = [], []
    for recompute in (False, True):
        adapted = adapted_family(family, "classify", dropout=0.5).train()
        layer = layers_of(base_model(adapted))[1]
        part = ffns_of(base_model(adapted))[1].up[0][0]
        count = []
        part.register_forward_hook(lambda *_, c=count: c.append(1))
        torch.manual_seed(0)
        with recomputed(adapted) if recompute else nullcontext():
            add_gradients(adapted, batch, 0)
        assert "forward" not in vars(layer)
        runs.append(len(count))
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert runs == [1, 2]
    for one, two in zip(*found, strict=True):  # without its cache GPT-2 rounds anew
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def adapted_family(family, objective, **lora):
    fm = tiny_model(family, objective=objective)
    row = ARCHITECTURES[family]
    head = row.head if objective == "classify" else ()
    return attach_adapter(
        fm, LoraConfig(r=2, alpha=8, **{"dropout": 0.0, **lora}), head, 0
    )


def same_gradients(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    seen = 0
    for (name, mine), (_, theirs) in pairs:
        if mine.requires_grad:
            torch.testing.assert_close(
                mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name
            )
            seen += bool(mine.grad.any())
    assert seen > 2


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
