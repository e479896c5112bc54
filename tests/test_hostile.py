"""What a hostile or broken server may send: refused in one line, nothing changed."""

import base64
import json
import pickle
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from benchmarks.plain_loop import PlainLoop
from client_app import app as client_app
from fedpft_flower import client
from fedpft_flower.architectures import family_of
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.package import check_processor_file
from fedpft_flower.plan import Plan
from fedpft_flower.processors import load_processor
from fedpft_flower.received import config_fields, config_from
from fedpft_flower.store import Store, package_hash, package_json, package_tensors
from fedpft_flower.wire import ARRAYS, CONFIG, INSTALL, PACKAGE, config_of, pack_tensors
from tests.families import CONFIGS, tiny_model


@pytest.fixture
def package(local_grid, settings):
    """Return a sound package, and the settings it belongs to."""
    loop = PlainLoop(Config.from_run_config(settings), 2)
    loop.server.prepare()
    return loop.server.package(), settings


def send(settings, kind, content, node=None):
    shares = {"partition-id": 0, "num-partitions": 2}
    context = Context(1, 9, shares | (node or {}), RecordDict(), settings)
    message = Message(RecordDict(content), dst_node_id=9, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    return client_app(message, context)


def install(settings, tensors, text, content=None, base="", node=None):
    arrays, casts = pack_tensors(tensors)
    wanted = content or package_hash(tensors, text)
    request = {"sub-fm": wanted, "base": base, "bit-cast": casts, PACKAGE: text}
    records = {ARRAYS: arrays, CONFIG: ConfigRecord(request)}
    return send(settings, INSTALL, records, node), wanted


def train(settings, wanted, adapter):
    request = {
        "sub-fm": wanted,
        "lr": 0.01,
        "measure-activity": False,
        "server-round": 1,
    }
    records = {ARRAYS: pack_tensors(adapter)[0], CONFIG: ConfigRecord(request)}
    return send(settings, "train", records)


def refused(reply, said):
    assert reply.has_error(), "it was taken"
    assert said in reply.error.reason
    assert "\n" not in reply.error.reason


def test_a_sound_package_is_installed_and_trains(package):
    sound, settings = package
    reply, wanted = install(settings, package_tensors(sound), package_json(sound))
    assert config_of(reply)["installed"]
    adapter = client._load_sub_fm(wanted, client.LoraConfig(), 0)
    assert not train(settings, wanted, client.get_adapter(adapter.model)).has_error()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoConfig": "x--y.Z"}}, "not allowed: ['auto_map']"),
        ({"attn_implementation": "hub/kernel"}, "not allowed: ['attn_impl"),
        ({"_attn_implementation": "hub/kernel"}, "not allowed: ['_attn_impl"),
        ({"torch_dtype": "float16"}, "not allowed"),
        ({"_name_or_path": "/home/owner/secret"}, "not allowed"),
        ({"model_type": "xlnet"}, "unsupported model type 'xlnet'"),
        ({"model_type": ["vit"]}, "unsupported model type"),
        ({"num_hidden_layers": 10**7}, "has 10000000 layers"),
        ({"num_hidden_layers": -1}, "has -1 layers"),
        ({"hidden_size": 1e300}, "hidden_size = '1e+300' is refused"),
        ({"hidden_size": "x" * 10**6}, "is refused"),
        ({"hidden_size": [[[[1]]]]}, "is refused"),
        ({"hidden_size": 17}, "weights do not fit the sub-FM"),
        ({"hidden_act": "no_such"}, "cannot be built"),
        ({"image_size": {"a": 1}}, "cannot be built"),
    ],
)
def test_a_hostile_config_is_refused_before_anything_is_built(package, change, said):
    sound, settings = package
    bad = replace(sound, model_config=sound.model_config | change)
    _, wanted = install(settings, package_tensors(bad), package_json(bad))
    refused(train(settings, wanted, {"x": torch.zeros(1)}), said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {**t, "stranger": torch.zeros(3)}, "left over ['stranger']"),
        (lambda t: dict(list(t.items())[1:]), "missing"),
        (lambda t: {k: v[:1] for k, v in t.items()}, "other shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(package, change, said):
    sound, settings = package
    _, wanted = install(settings, change(package_tensors(sound)), package_json(sound))
    refused(train(settings, wanted, {"x": torch.zeros(1)}), said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil.json", "leaves its folder"),
        ("/etc/evil.json", "leaves its folder"),
        ("vocab.pkl", "which hold data only"),
        ("tokenization.py", "which hold data only"),
        ("pytorch_model.bin", "which hold data only"),
    ],
)
def test_processor_files_hold_data_and_stay_in_their_folder(package, name, said):
    sound, settings = package
    bad = replace(sound, processor_files={name: pickle.dumps(1)})
    reply, wanted = install(settings, package_tensors(bad), package_json(bad))
    refused(reply, said)
    assert wanted not in Store().hashes()


def test_what_tokenizers_are_saved_as_is_taken():
    for name in ("vocab.txt", "spiece.model", "chat_template.jinja"):
        check_processor_file(name)


def test_code_named_by_a_processor_is_not_loaded(package, tmp_path):
    """Not even where it lies beside the file that names it."""
    sound, settings = package
    said = json.loads(sound.processor_files["preprocessor_config.json"])
    evil = {**said, "auto_map": {"AutoImageProcessor": "evil.Processor"}}
    del evil["image_processor_type"]
    folder, ran = tmp_path / "processor", tmp_path / "ran"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(evil))
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "class Processor:\n    from_pretrained = classmethod(lambda *a, **k: a[0]())\n"
    )
    row = family_of(sound.model_config["model_type"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_processor(folder, row)
    assert not ran.exists()
    files = {"preprocessor_config.json": json.dumps(evil).encode()}
    bad = replace(sound, processor_files={**sound.processor_files, **files})
    _, wanted = install(settings, package_tensors(bad), package_json(bad))
    refused(train(settings, wanted, {"x": torch.zeros(1)}), "trust_remote_code")


def test_an_install_of_another_hash_or_size_is_refused(package):
    sound, settings = package
    tensors, text = package_tensors(sound), package_json(sound)
    for content in ("0" * 64, "../x", ""):
        reply, _ = install(settings, tensors, text, content or "none")
        refused(reply, "does not have the hash")
    reply, _ = install(settings, tensors, text, node={"max-install-mb": 0.01})
    refused(reply, "this node takes max-install-mb = 0.01; raise it")
    assert Store().hashes() == []


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        (
            {
                "stranger": torch.zeros(1),
                "stranger@rows": torch.zeros(1, dtype=torch.int32),
            },
            "names an unknown tensor 'stranger'",
        ),
        (
            {
                "NAME": torch.zeros(1, 1),
                "NAME@rows": torch.tensor([10**6], dtype=torch.int32),
            },
            "cannot be handled (",
        ),
        ({"NAME": torch.zeros(2, 2)}, "names an unknown tensor"),
        (
            {"NAME": torch.zeros(1, 1), "NAME@rows": torch.tensor(["0"[0] == "0"])},
            "cannot be handled (",
        ),
    ],
)
def test_a_hostile_change_is_refused_and_the_base_stays(package, delta, said):
    sound, settings = package
    tensors, text = package_tensors(sound), package_json(sound)
    _, base = install(settings, tensors, text)
    name = next(n for n in tensors if tensors[n].ndim == 2)
    named = {key.replace("NAME", name): value for key, value in delta.items()}
    reply, _ = install(settings, named, "", "1" * 64, base=base)
    refused(reply, said)  # as what it is, not for the hash of what results
    assert Store().hashes() == [base]
    assert Store().get(base) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"files": 3}',
        json.dumps({"files": {"a.json": "%%%"}, "model": {}, "plan": "{}", "head": []}),
        json.dumps({"files": {"a.json": base64.b64encode(b"x").decode()}}),
    ],
)
def test_a_package_that_is_none_is_refused(package, text):
    _, settings = package
    reply, wanted = install(settings, {"x": torch.zeros(2)}, text)
    if not reply.has_error():  # a store keeps what has the right hash
        reply = train(settings, wanted, {"x": torch.zeros(2)})
    assert reply.has_error() and "\n" not in reply.error.reason


def test_a_plan_as_large_as_no_model_is_refused():
    layers = {"widths": [9_000_000] * 1000, "kept": dict.fromkeys(range(1000), "all")}
    for text in ('{"widths": [1000000000], "kept": {"0": "all"}}', json.dumps(layers)):
        with pytest.raises(FedPFTError, match="larger than any model"):
            Plan.from_json(text)


@pytest.mark.parametrize(
    "text", ['{"widths": [Infinity]}', '{"widths": [-3], "kept": {}}', "[" * 100_000]
)
def test_a_plan_that_is_none_is_refused(text):
    with pytest.raises(FedPFTError, match="not a plan"):
        Plan.from_json(text)


def test_no_base_is_looked_for_outside_the_store(package):
    sound, settings = package
    tensors, text = package_tensors(sound), package_json(sound)
    _, base = install(settings, tensors, text)
    outside = Store()._root.parent / "elsewhere"
    Store().directory(base).rename(outside)
    before = outside.stat().st_mtime_ns
    reply, _ = install(settings, {}, "", "1" * 64, base="../elsewhere")
    assert config_of(reply)["installed"] is False
    assert outside.stat().st_mtime_ns == before


def test_a_copy_that_does_not_come_back_as_sent_is_not_kept(package):
    sound, settings = package
    tensors, text = package_tensors(sound), package_json(sound)
    odd = {**tensors, "__metadata__": torch.zeros(2)}
    lines = json.dumps(json.loads(text), indent=1).replace("\n", "\r\n")
    for received in ((odd, text), (tensors, lines)):
        refused(install(settings, *received)[0], "does not come back from the disk")
    assert Store().hashes() == []


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_fields_sent_are_allowed_and_name_no_path(family):
    config = tiny_model(family).config
    config._name_or_path = "/home/owner/secret"
    fields = config_fields(config)
    assert "secret" not in json.dumps(fields)
    again = config_from(fields)
    assert config_fields(again) == fields
