"""An FM in bfloat16: its sub-FM, and all that trains, are float32."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from fedpft_flower.adapters import base_model, get_adapter, plug_in
from fedpft_flower.alignment import distil, layer_level
from fedpft_flower.architectures import ARCHITECTURES
from fedpft_flower.batches import real_logits
from fedpft_flower.config import AlignConfig, LoraConfig
from fedpft_flower.descent import Schedule
from fedpft_flower.devices import move
from fedpft_flower.foundation import load_fm
from fedpft_flower.least_squares import refit
from fedpft_flower.refinement import refine
from fedpft_flower.sub_fm import build_sub_fm, compressed_ffns
from tests.families import CONFIGS, tiny_batch, tiny_model
from tests.test_architectures import gradient_error, whole, with_adapters
from tests.test_federation import results, run

families = pytest.mark.parametrize("family", sorted(CONFIGS))
# Post-LN, pre-LN with transposed matrices, gated, layer scale, fused gate.
KINDS = ["bert", "gpt2", "llama", "beit", "modernbert"]
kinds = pytest.mark.parametrize("family", KINDS)
LORA = LoraConfig(r=2, alpha=8)
LABELS = ("a", "b", "c", "d")


def halved(family):
    """Build a tiny model in bfloat16, placed as a loaded FM is."""
    fm = tiny_model(family)
    for parameter in fm.parameters():  # buffers stay as they are, as when loaded
        parameter.data = parameter.data.to(torch.bfloat16)
    move(fm, torch.device("cpu"))
    return fm


def adapted(family):
    return with_adapters(halved(family), ARCHITECTURES[family].head)


@families
def test_the_sub_fm_is_float32_with_the_fms_own_values(family):
    fm, batch = halved(family), tiny_batch(family)
    sub = build_sub_fm(fm, whole(fm))
    assert {p.dtype for p in sub.parameters()} == {torch.float32}
    wide = copy.deepcopy(fm).float()
    with torch.no_grad():
        assert torch.equal(sub(**batch).logits, wide(**batch).logits)
    assert {p.dtype for p in fm.parameters()} == {torch.bfloat16}


@families
def test_what_trains_is_float32_and_the_fm_stays_as_it_was(family):
    fm, sub, _ = adapted(family)
    for model in (fm, sub):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
    frozen = {p.dtype for p in fm.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    batch = tiny_batch(family)
    loss = fm(**batch, labels=torch.tensor([0, 1, 2, 3, 0])).loss
    loss.backward()
    gradients = [p.grad for p in fm.parameters() if p.requires_grad]
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    assert real_logits(fm, batch).dtype == torch.float32


@kinds
def test_least_squares_follow_such_an_fm(family):
    fm, sub, plan = adapted(family)
    batches = [tiny_batch(family, seed, rows=8) for seed in range(4)]
    before, fits = gradient_error(fm, sub, batches, 0).relative, []
    refit(fm, sub, plan, batches, AlignConfig(), fits.append)
    assert all(fit.after <= fit.before for fit in fits)
    assert gradient_error(fm, sub, batches, 0).relative < before


@kinds
def test_distillation_follows_such_an_fm(family):
    fm, sub, plan = adapted(family)
    trainable = layer_level(compressed_ffns(base_model(sub), plan))
    endless, seen = iter(lambda: tiny_batch(family, rows=8), None), []
    distil(fm, sub, plan, trainable, endless, Schedule(0.01, 30), 0.01, seen.append)
    assert seen[-1].loss < seen[0].loss


@kinds
def test_such_an_fm_is_refined(family):
    fm, sub, plan = adapted(family)
    before, seen = get_adapter(fm), []
    head = {n: 3 * t for n, t in before.items() if ".lora_" not in n}
    far = {n: t + torch.randn_like(t) for n, t in before.items() if ".lora_" in n}
    plug_in(fm, before | head, plan)
    plug_in(sub, far | head, plan)
    endless = iter(lambda: tiny_batch(family, rows=8), None)
    refine(fm, sub, endless, Schedule(0.01, 30), seen.append)
    assert seen[-1].loss < seen[0].loss
    assert any(not torch.equal(before[n], t) for n, t in get_adapter(fm).items())


@pytest.fixture
def halved_directory(generator_directory, tmp_path):
    """Write the tiny generator in bfloat16, in several files."""
    place = tmp_path / "halved"
    AutoTokenizer.from_pretrained(generator_directory).save_pretrained(place)
    fm = tiny_model("llama", objective="generate").to(torch.bfloat16)
    fm.config.pad_token_id = None
    fm.save_pretrained(place, max_shard_size=2000)
    assert len(list(place.glob("model-*.safetensors"))) > 2
    return place


def test_an_fm_is_loaded_in_the_numbers_of_its_checkpoint(halved_directory):
    def loaded(dtype):
        return load_fm(str(halved_directory), (), "text", 0, (), "generate", dtype)

    assert loaded("checkpoint").model.dtype == torch.bfloat16
    assert loaded("float32").model.dtype == torch.float32


def test_a_float16_checkpoint_becomes_float32(halved_directory, tmp_path):
    fm = load_fm(str(halved_directory), (), "text", 0, (), "generate").model
    place = tmp_path / "float16"
    fm.to(torch.float16).save_pretrained(place)
    AutoTokenizer.from_pretrained(halved_directory).save_pretrained(place)

    def loaded(dtype):
        return load_fm(str(place), (), "text", 0, (), "generate", dtype).model.dtype

    assert loaded("checkpoint") == torch.float32
    assert loaded("bfloat16") == torch.bfloat16


def test_images_reach_an_fm_in_its_own_numbers(vit_directory, tmp_path):
    from transformers import AutoImageProcessor

    AutoImageProcessor.from_pretrained(vit_directory).save_pretrained(tmp_path)
    tiny_model("beit").to(torch.bfloat16).save_pretrained(tmp_path)
    fm = load_fm(str(tmp_path), LABELS, "image", 0).model
    assert fm.dtype == torch.bfloat16
    with torch.no_grad():
        fm(**tiny_batch("beit"))


@pytest.mark.parametrize("method", ["fedpft-ls", "fedpetuning"])
def test_a_run_with_such_an_fm(
    local_grid, settings, halved_directory, tmp_path, method
):
    lines = ["text,label"] + ["good film,1", "bad film,0", "very fast a b,1"] * 20
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    settings |= {
        "method": method,
        "plug-in.steps": 3,
        "fm.name": str(halved_directory),
        "data.task": "text",
        "data.path": str(tmp_path / "rows.csv"),
        "data.public-path": str(tmp_path / "rows.csv"),
        "data.max-length": 8,
        "data.max-train-rows": 0,
        "partition.kind": "iid",
    }
    run(local_grid, settings)
    _, _, summary, _ = results(settings)
    before, after = summary["test-before"], summary["test-after"]
    assert after["fm-loss"] < before["fm-loss"]
    assert after["fm-loss"] == pytest.approx(after["sub-fm-loss"], rel=0.3)
