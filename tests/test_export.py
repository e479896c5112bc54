"""An export opens with transformers and peft alone, and answers as the run's FM."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedpft_flower import export as exporting
from fedpft_flower.card import Licence
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.encoding import encode
from fedpft_flower.evaluation import evaluate
from fedpft_flower.export import export
from fedpft_flower.export import run as export_run
from fedpft_flower.foundation import load_fm
from fedpft_flower.tasks import load_task
from tests.families import tiny_model
from tests.test_federation import results, run

# Refuses what an environment with only transformers and peft lacks, opens both folders
# of an export and says how far their logits are apart.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fedpft_flower", "flwr", "ray", "datasets"}:
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import torch, transformers
from peft import PeftModel
place, fm, name, shape = sys.argv[1:]
auto = getattr(transformers, name)
config = transformers.AutoConfig.from_pretrained(f"{place}/adapter")
base = auto.from_pretrained(fm, config=config, ignore_mismatched_sizes=True)
apart = PeftModel.from_pretrained(base, f"{place}/adapter").eval()
merged = auto.from_pretrained(f"{place}/merged").eval()
torch.manual_seed(0)
sizes = tuple(map(int, shape.split(",")))
inputs = (
    {"pixel_values": torch.rand(sizes)} if len(sizes) > 2
    else {"input_ids": torch.randint(1, 14, sizes)}
)
with torch.no_grad():
    one, other = apart(**inputs).logits, merged(**inputs).logits
print(float((one - other).abs().max()), float(one.std()))
assert not {"fedpft_flower", "flwr", "datasets"} & set(sys.modules)
"""


def opens_alone(place, fm, auto, shape):
    """Check that both folders open in a process without us, and agree."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(place), str(fm), auto, shape],
        cwd=place.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    apart, spread = map(float, done.stdout.split())
    assert apart < 1e-4 * max(1.0, spread)


def check_folder(place, fm):
    """Check what holds of every export: files, and no path of this machine."""
    assert {path.name for path in place.iterdir()} >= {"README.md", "adapter", "merged"}
    for folder, weights in (("adapter", "adapter_model"), ("merged", "model")):
        names = {path.name for path in (place / folder).iterdir()}
        assert {f"{weights}.safetensors", "config.json"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    for path in place.rglob("*"):
        if path.suffix in {".json", ".md", ".jinja", ".txt"}:
            assert str(fm) not in path.read_text(), path
    stored = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == fm.name
    assert not list(place.parent.glob(".*.partial"))


@pytest.mark.parametrize("method", ["fedpft", "fedot", "fedpetuning"])
def test_both_folders_answer_as_the_runs_fm(local_grid, settings, method):
    settings |= {"method": method, "rounds": 2}
    run(local_grid, settings)
    place, _, summary, manifest = results(settings)
    out = place / "export"
    told = []
    export(place, out, tell=told.append)
    assert told == [
        "loading FM " + Config.from_run_config(settings).fm.name.rpartition("/")[2],
        "writing the adapter",
        "merging, and writing the FM in float32",
    ]
    config = Config.from_run_config(settings)
    task = load_task(config.data, config.seed)
    fm = load_fm(config.fm.name, task.labels, "image", config.seed)
    rows = encode(task.test, fm.processor, "image", config.data)
    merged = AutoModelForImageClassification.from_pretrained(out / "merged")
    assert list(merged.config.id2label.values()) == manifest["labels"]
    apart = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(
            config.fm.name,
            config=AutoConfig.from_pretrained(out / "adapter"),
            ignore_mismatched_sizes=True,
        ),
        out / "adapter",
    )
    for model in (merged, apart):
        found = evaluate(model, rows)
        assert found["accuracy"] == summary["test-after"]["fm-accuracy"]
        assert found["loss"] == pytest.approx(
            summary["test-after"]["fm-loss"], rel=1e-4
        )


def test_an_image_export_opens_without_us(local_grid, settings, vit_directory):
    run(local_grid, settings | {"rounds": 1})
    place, _, summary, manifest = results(settings)
    export(place, place / "export")
    check_folder(place / "export", vit_directory)
    name = "AutoModelForImageClassification"
    opens_alone(place / "export", vit_directory, name, "2,3,8,8")
    card = (place / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    for text in (
        "license: other",
        "is not known here: check it",
        "pipeline_tag: image-classification",
        f"value: {summary['test-after']['fm-accuracy']}",
        manifest["splits"]["test"]["sha256"],
        "FM parameters never sent",
        f'{name}.from_pretrained("merged")',
    ):
        assert text in card
    assert str(place) not in card


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_generator_opens_without_us(
    local_grid, generation, generator_directory, tmp_path, family
):
    fm, side = tmp_path / "fm", "left" if family == "llama" else "right"
    tokenizer = AutoTokenizer.from_pretrained(generator_directory, padding_side=side)
    tokenizer.save_pretrained(fm)
    tiny_model(family, objective="generate").save_pretrained(fm)
    generation |= {"method": "fedpft-n", "rounds": 1, "fm.name": str(fm)}
    run(local_grid, generation)
    place, _, summary, _ = results(generation)
    out = tmp_path / "given"
    export(place, out)
    check_folder(out, fm)
    opens_alone(out, fm, "AutoModelForCausalLM", "2,7")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert bool(merged.all_tied_weights_keys) == (family == "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer.padding_side == side
    config = Config.from_run_config(generation)
    rows = encode(
        load_task(config.data, 0).test, tokenizer, "text", config.data, "generate"
    )
    found = evaluate(merged, rows, "generate")["perplexity"]
    assert found == pytest.approx(summary["test-after"]["fm-perplexity"], rel=1e-4)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "perplexity" in card
    assert repr(config.data.prompt_template) in card


@pytest.fixture
def texts(settings, bert_directory, tmp_path):
    """Return the configuration of a small federation on texts, in bfloat16."""
    fm = tmp_path / "half"
    AutoTokenizer.from_pretrained(bert_directory).save_pretrained(fm)
    tiny_model("bert").bfloat16().save_pretrained(fm)
    (fm / "README.md").write_text("---\nlicense: mit\n---\n# An FM\n")
    (fm / "LICENSE").write_text("all of it")
    lines = [f"{'good' if i % 2 else 'bad'} film {i % 7},{i % 2}" for i in range(80)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return settings | {
        "method": "fedpft-n",
        "rounds": 1,
        "fm.name": str(fm),
        "data.task": "text",
        "data.path": str(tmp_path / "rows.csv"),
        "data.max-length": 16,
    }


def test_a_bfloat16_fm_stays_one_and_its_licence_goes_along(
    local_grid, texts, tmp_path
):
    run(local_grid, texts)
    place, _, summary, _ = results(texts)
    out = tmp_path / "given"
    export(place, out)
    check_folder(out, tmp_path / "half")
    assert (out / "LICENSE").read_text() == "all of it"
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "`LICENSE`" in card
    assert "rounded to bfloat16" in card and "data `rows.csv`" in card
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    config = Config.from_run_config(texts)
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    rows = encode(load_task(config.data, 0).test, tokenizer, "text", config.data)
    found = evaluate(merged, rows)["loss"]
    assert found == pytest.approx(summary["test-after"]["fm-loss"], abs=0.02)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", Licence("mit")),
        (
            "license: other\nlicense_name: gemma\nlicense_link: https://a.b/c",
            Licence("other", "gemma", "https://a.b/c"),
        ),
        ("license: mit\nmodel-index: 3", Licence("mit")),
        ("license: other", None),
        ("tags: [x]", None),
    ],
)
def test_the_licence_is_what_the_fms_card_says(tmp_path, front, licence):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# An FM\n")
    assert exporting._licence(str(tmp_path)) == licence


def test_files_with_the_licence_are_found_however_they_are_spelt(tmp_path, monkeypatch):
    names = ["LICENSE", "Licence.md", "USE_POLICY.md", "notice.txt"]
    for name in (*names, "config.json"):
        (tmp_path / name).touch()
    (tmp_path / "licenses").mkdir()
    found = exporting._licence_files(str(tmp_path))
    assert [path.name for path in found] == names
    # Of an FM on a hub they are fetched, where there is one.
    wanted = []

    def fetch(source, allow_patterns):
        wanted.append((source, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(exporting, "snapshot_download", fetch)
    assert exporting._licence_files("owner/fm") == found
    ((source, patterns),) = wanted
    assert source == "owner/fm"
    assert all(any(fnmatchcase(name, p) for p in patterns) for name in names)


def test_protection_and_hostile_names_in_the_card(local_grid, texts, tmp_path):
    texts |= {"train.warmup-ratio": 0.5}
    run(local_grid, texts)
    place, _, summary, _ = results(texts)
    sheet = {"rows": [{"name": "held | back", "value": "<b>1", "note": "a\nb"}]}
    summary |= {"protection": sheet, "privacy": {"epsilon": 2.5, "delta": 1e-5}}
    (place / "summary.json").write_text(json.dumps(summary))
    export(place, tmp_path / "given")
    card = (tmp_path / "given" / "README.md").read_text()
    assert "| held \\| back | &lt;b>1 | a b |" in card
    assert "epsilon 2.5" in card and "No differential privacy" not in card
    assert "Choices were made on validation; test was only reported." in card
    assert ", warm-up 50.0 % of the rounds, decay linear |" in card
    refinement = {"kept": True, "validation-share": 0.5}
    summary |= {"select": "best", "best-round": 1, "refinement": refinement}
    (place / "summary.json").write_text(json.dumps(summary))
    export(place, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| adapter of | the best round (1) |" in card
    assert "validation, whose inputs are 50.0 % of what it was refined on;" in card


def test_what_cannot_be_exported_ends_in_one_line_and_leaves_nothing(
    local_grid, texts, bert_directory, tmp_path, full_disk, capsys
):
    run(local_grid, texts)
    place, *_ = results(texts)
    out = tmp_path / "given"

    def refused(match, *arguments, most=None):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FedPFTError, match=match):
            if most is None:
                export(place, out, *arguments)
            else:
                with full_disk(most):
                    export(place, out, *arguments)
        assert sorted(tmp_path.rglob("*")) == before

    refused("give the run's FM by --fm", str(bert_directory))
    refused("is not a directory", "/nowhere/at/all")
    for most in (0, 3000, 20_000):
        refused("cannot write .*given", most=most)
    with pytest.raises(SystemExit) as caught:
        export_run([str(tmp_path), "--out", str(out)])
    assert caught.value.code == 2
    assert "is not the directory of a finished run" in capsys.readouterr().err
    weights = place / "adapter" / "adapter_model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[: len(held) // 2])
    refused("cannot read .*adapter_model")
    adapter = load(held)
    save_file({name: tensor + 1.0 for name, tensor in adapter.items()}, weights)
    refused("is not the adapter that the run ended with")
    weights.unlink()
    refused("cannot read .*adapter_model")
    weights.write_bytes(held)
    noted = (place / "manifest.json").read_text()
    unsigned = {k: v for k, v in json.loads(noted).items() if "adapter" not in k}
    (place / "manifest.json").write_text(json.dumps(unsigned))
    refused("is not the adapter that the run ended with")
    (place / "manifest.json").write_text(noted)
    told = json.loads((place / "summary.json").read_text())
    del told["refinement"]
    (place / "summary.json").write_text(json.dumps(told))
    refused("lack what an export shows")
    out.mkdir()
    refused("is there already")


def test_a_moved_fm_is_named_on_the_command_line(local_grid, texts, tmp_path, capsys):
    run(local_grid, texts)
    place, *_ = results(texts)
    (tmp_path / "half").rename(tmp_path / "moved")
    export_run([str(place), "--fm", str(tmp_path / "moved")])
    assert capsys.readouterr().out.splitlines()[-1] == f"exported: {place / 'export'}"
    check_folder(place / "export", tmp_path / "moved")
