"""Generation: rows, losses and metrics of decoders, and every method over them."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.plain_loop import PlainLoop
from fedpft_flower import client
from fedpft_flower.adapters import attach_adapter, base_model, export_adapter
from fedpft_flower.alignment import distil, layer_level
from fedpft_flower.architectures import ARCHITECTURES, ffns_of
from fedpft_flower.config import Config, DataConfig, FedPFTError, LoraConfig
from fedpft_flower.data_check import check
from fedpft_flower.descent import Schedule
from fedpft_flower.encoding import (
    NO_TARGET,
    GenerationRows,
    encode_public,
    shuffled_batches,
)
from fedpft_flower.evaluation import evaluate
from fedpft_flower.foundation import load_fm
from fedpft_flower.refinement import logit_loss
from fedpft_flower.sub_fm import build_sub_fm, compressed_ffns, frozen_weights
from tests.conftest import write_llama
from tests.families import CONFIGS, tiny_batch, tiny_model
from tests.test_architectures import gradient_error, plans, whole, with_adapters
from tests.test_federation import NODES, results, run

DECODERS = sorted(name for name in CONFIGS if ARCHITECTURES[name].decoder)
decoders = pytest.mark.parametrize("family", DECODERS)
LORA = LoraConfig(r=2, alpha=8)
WORDS = ["good", "bad", "film", "very", "fast", *"abcdef"]


def tokenizer_of(place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def decoder(family):
    return tiny_model(family, objective="generate")


def labelled(family, seed=0):
    batch = tiny_batch(family, seed)
    hidden = batch["attention_mask"] == 0
    return {**batch, "labels": batch["input_ids"].masked_fill(hidden, NO_TARGET)}


def adapted(family):
    return with_adapters(decoder(family), (), objective="generate")


# ------------------------------------------------------------------------------ rows


def test_the_response_and_its_end_are_learnt_and_nothing_else(generator_directory):
    tokenizer = tokenizer_of(generator_directory)
    data = {"prompt": ["a b", "c"], "response": ["good film", "bad"]}
    config = DataConfig(prompt_template="very {prompt} fast")
    rows = GenerationRows(Dataset.from_dict(data), tokenizer, config)
    batch = rows.batch([0, 1])
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"]]
    assert words == [
        ["very", "a", "b", "fast", "good", "film", "</s>"],
        ["very", "c", "fast", "bad", "</s>", "</s>", "</s>"],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    learnt = batch["labels"] != NO_TARGET
    assert learnt.tolist() == [
        [False] * 4 + [True] * 3,
        [False] * 3 + [True] * 2 + [False] * 2,
    ]
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert rows.lengths() == [7, 5]


def test_what_is_too_long_loses_the_prompts_beginning_first(generator_directory):
    tokenizer = tokenizer_of(generator_directory)

    def words(prompt, response, longest):
        data = Dataset.from_dict({"prompt": [prompt], "response": [response]})
        config = DataConfig(max_length=longest, prompt_template="{prompt}")
        batch = GenerationRows(data, tokenizer, config).batch([0])
        learnt = int((batch["labels"] != NO_TARGET).sum())
        return tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), learnt

    assert words("a b c d", "good", 5) == (["b", "c", "d", "good", "</s>"], 2)
    assert words("a b c d", "good bad film", 3) == (["d", "good", "bad"], 2)
    assert words("", "good", 5) == (["</s>", "good", "</s>"], 2)
    # A start token stays where it is.
    assert words("<s> a b c d", "good", 4) == (["<s>", "d", "good", "</s>"], 2)


def test_every_block_begins_with_the_start_token_where_texts_do(tmp_path):
    place = write_llama(tmp_path, "generate")
    tokenizer = tokenizer_of(place)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    data = Dataset.from_dict({"text": ["a b c d e", "good"]})
    rows = GenerationRows(data, tokenizer, DataConfig(max_length=4))
    blocks = [
        " ".join(tokenizer.convert_ids_to_tokens(rows.batch([i])["input_ids"][0]))
        for i in range(len(rows))
    ]
    assert blocks == ["<s> a b c", "<s> d e </s>", "<s> good </s>"]


def test_long_texts_become_blocks_that_lose_nothing(generator_directory):
    tokenizer = tokenizer_of(generator_directory)
    texts = ["a b c d e f a b c", "good", "", "bad film"]
    data = Dataset.from_dict({"text": texts})
    rows = GenerationRows(data, tokenizer, DataConfig(max_length=4))
    blocks = [
        " ".join(tokenizer.convert_ids_to_tokens(rows.batch([i])["input_ids"][0]))
        for i in range(len(rows))
    ]
    assert blocks == ["a b c d", "e f a b", "c </s>", "good </s>", "bad film </s>"]
    batch = rows.batch([0, 2])
    learnt = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert set(batch["labels"][~learnt].tolist()) == {NO_TARGET}
    with pytest.raises(FedPFTError, match="has two tokens"):
        GenerationRows(Dataset.from_dict({"text": [""]}), tokenizer, DataConfig())


def test_public_texts_become_blocks_where_the_tasks_do(bert_directory):
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    data = Dataset.from_dict({"text": ["good bad film very fast", "red"]})

    def lengths(**settings):
        config = DataConfig(max_length=4, **settings)
        return encode_public(data, tokenizer, "text", config).lengths()

    assert lengths() == [4, 3]
    assert lengths(public_long="blocks") == [4, 4, 3, 3]
    config = DataConfig(max_length=4)
    rows = encode_public(data, tokenizer, "text", config, "generate")
    assert rows.lengths() == [4, 4, 3, 3]
    words = [w for i in range(3) for w in rows.batch([i])["input_ids"][0].tolist()]
    assert tokenizer.decode(words, skip_special_tokens=True) == data["text"][0]
    config = DataConfig(max_length=4, public_long="cut")
    rows = encode_public(data, tokenizer, "text", config, "generate")
    assert rows.lengths() == [4, 3]


def test_a_chat_template_puts_the_prompt(generator_directory):
    tokenizer = tokenizer_of(generator_directory)
    data = Dataset.from_dict({"prompt": ["a b"], "response": ["good"]})
    config = DataConfig(prompt_template="chat")
    with pytest.raises(FedPFTError, match="chat_template is not set"):
        GenerationRows(data, tokenizer, config)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(FedPFTError, match="no user here"):
        GenerationRows(data, tokenizer, config)
    tokenizer.chat_template = (
        "<s> {% for m in messages %}very {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}fast{% endif %}"
    )
    batch = GenerationRows(data, tokenizer, config).batch([0])
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["<s>", "very", "a", "b", "fast", "good", "</s>"]


# --------------------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def taught(generator_directory):
    """Return a small decoder that knows some of its responses, and the rows."""
    tokenizer = tokenizer_of(generator_directory)
    prompts = [f"{one} {two}" for one in "abcdef" for two in "abcdef"]
    responses = [f"{WORDS[i % 5]} {WORDS[i % 3]}"[: 4 + i % 9] for i in range(36)]
    data = Dataset.from_dict({"prompt": prompts, "response": responses})
    rows = GenerationRows(data, tokenizer, DataConfig())
    model = AutoModelForCausalLM.from_pretrained(generator_directory)
    optimiser = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(12):
        for batch in shuffled_batches(rows, 12, seed=0):
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    return model.eval(), rows, tokenizer


def test_metrics_are_those_of_the_rows_one_by_one(taught):
    model, rows, _ = taught
    nll, hits, tokens = 0.0, 0, 0
    for i in range(len(rows)):
        batch = rows.batch([i])  # without padding
        with torch.no_grad():
            scores = model(batch["input_ids"]).logits[0].log_softmax(-1)
        for place in range(1, scores.shape[0]):
            target = int(batch["labels"][0, place])
            if target != NO_TARGET:
                nll -= float(scores[place - 1, target])
                hits += int(scores[place - 1].argmax()) == target
                tokens += 1
    found = evaluate(model, rows, "generate")
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.718281828 ** (nll / tokens), rel=1e-4)
    assert found["token-accuracy"] == hits / tokens


def test_exact_match_is_what_greedy_decoding_writes(taught):
    model, rows, tokenizer = taught
    exact = 0
    for i in range(len(rows)):
        batch = rows.batch([i])
        learnt = batch["labels"][0] != NO_TARGET
        prompt, response = batch["input_ids"][:, ~learnt], batch["input_ids"][0, learnt]
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(response),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, prompt.shape[1] :]
        exact += written.tolist() == response.tolist()
    assert 0 < exact < len(rows)
    assert evaluate(model, rows, "generate")["exact-match"] == exact / len(rows)


# -------------------------------------------------------------------------- decoders


@decoders
def test_full_plan_is_bit_identical(family):
    fm, batch = decoder(family), tiny_batch(family)
    sub = build_sub_fm(fm, whole(fm), "generate")
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, sub(**batch).logits)


@decoders
@pytest.mark.parametrize("tied", [True, False])
def test_a_client_rebuilds_it_and_a_tied_matrix_travels_once(family, tied):
    from fedpft_flower.package import Package
    from fedpft_flower.received import config_fields

    fm = decoder(family)
    fm.config.tie_word_embeddings = tied
    fm = type(fm)(fm.config).eval()
    plan = plans(fm, keep_fraction=0.5)
    sub = build_sub_fm(fm, plan, "generate")
    weights = frozen_weights(sub, ())
    places = [tensor.data_ptr() for tensor in weights.values()]
    assert len(set(places)) == len(places)
    shape = (fm.config.vocab_size, fm.get_input_embeddings().weight.shape[1])
    assert sum(tuple(w.shape) == shape for w in weights.values()) == (1 if tied else 2)
    fields = config_fields(fm.config)
    package = Package(fields, plan, (), weights, [], {}, "generate")
    model = client.build_from_package(package, LORA, seed=0).eval()
    batch = tiny_batch(family)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, sub(**batch).logits)


@decoders
def test_a_thinned_decoder_trains(family):
    fm = decoder(family)
    sub = build_sub_fm(fm, plans(fm, keep_fraction=0.5), "generate")
    frozen = frozen_weights(sub, ())
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    model = attach_adapter(sub, LORA, (), 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(trained, 0.01), []
    for _ in range(15):
        loss = model(**labelled(family)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.items())


@decoders
def test_alignment_lowers_the_gradient_error(family):
    fm, sub, plan = adapted(family)
    batches = [tiny_batch(family, seed, rows=8) for seed in range(3)]
    before = gradient_error(fm, sub, batches, seed=0).relative
    trainable = layer_level(compressed_ffns(base_model(sub), plan))
    endless = iter(lambda: tiny_batch(family, rows=8), None)
    seen = []
    distil(fm, sub, plan, trainable, endless, Schedule(0.01, 30), 0.01, seen.append)
    assert seen[-1].loss < seen[0].loss
    assert gradient_error(fm, sub, batches, seed=0).relative < before
    assert gradient_error(fm, fm, batches, seed=0).relative == 0.0


@decoders
def test_the_gradient_error_sees_no_padding(family):
    fm, sub, _ = adapted(family)
    batch = tiny_batch(family, rows=1)
    longer = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
    }
    one = gradient_error(fm, sub, [batch], seed=0)
    other = gradient_error(fm, sub, [longer], seed=0)
    assert one.relative == pytest.approx(other.relative, rel=1e-4)


@decoders
def test_exported_adapter_opens_on_the_stock_decoder(family, tmp_path):
    fm, _, _ = adapted(family)
    export_adapter(fm, tmp_path)
    stock = PeftModel.from_pretrained(decoder(family), str(tmp_path)).eval()
    batch = tiny_batch(family)
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, fm(**batch).logits)


def test_logit_loss_is_the_mean_over_tokens():
    teacher, student = torch.randn(2, 6, 5)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert float(logit_loss(teacher, student)) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("method", ["fedpft", "fedpft-ls", "fedot", "fedpetuning"])
def test_responses_are_learnt_by_every_method(local_grid, generation, method):
    generation |= {"method": method, "plug-in.steps": 5, "rounds": 4}
    run(local_grid, generation)
    place, rounds, summary, manifest = results(generation)
    before, after = summary["test-before"], summary["test-after"]
    assert after["fm-perplexity"] < before["fm-perplexity"] / 1.3
    assert after["sub-fm-perplexity"] < before["sub-fm-perplexity"] / 1.3
    assert {"fm-token-accuracy", "fm-exact-match", "fm-loss"} <= after.keys()
    best = min(rounds, key=lambda entry: entry["fm-perplexity"])
    assert summary["best-round"] == best["round"]
    assert manifest["labels"] == []
    stock = AutoModelForCausalLM.from_pretrained(generation["fm.name"])
    model = PeftModel.from_pretrained(stock, str(place / "adapter")).eval()
    config = Config.from_run_config(generation)
    task = PlainLoop(config, NODES).task
    rows = GenerationRows(task.test, tokenizer_of(generation["fm.name"]), config.data)
    found = evaluate(model, rows, "generate")["perplexity"]
    assert found == pytest.approx(after["fm-perplexity"], rel=1e-6)


def test_whole_texts_are_learnt_too(local_grid, generation):
    generation |= {"data.text-columns": "say", "method": "fedpft-n"}
    run(local_grid, generation)
    _, _, summary, _ = results(generation)
    before, after = summary["test-before"], summary["test-after"]
    assert after["fm-perplexity"] < before["fm-perplexity"]


def test_sites_bring_responses_of_their_own(local_grid, generation):
    place = generation["data.path"]
    configs = [{"data-path": place, "site": f"site {i}"} for i in range(2)]
    generation |= {"train.clients-per-round": 2, "method": "fedpft-n"}
    run(local_grid, generation, nodes=2, configs=configs)
    _, _, _, manifest = results(generation)
    assert set(manifest["nodes"]) == {"site 0", "site 1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fm.name": "minilm"}, "no decoder and cannot generate"),
        ({"partition.kind": "dirichlet"}, "shares rows by their label"),
        ({"data.metric": "accuracy"}, "no metric of data.task"),
        ({"data.prompt-template": "ask"}, "where the prompt is"),
        ({"data.prompt-template": "chat"}, "chat_template is not set"),
        ({"data.text-columns": "ask,say,who"}, "of prompts and of responses"),
        ({"data.text-columns": "ask,tell"}, "no column 'tell'"),
        ({"lora.head": "nothing"}, "no module 'nothing'"),
    ],
)
def test_bad_settings_end_in_one_line(local_grid, generation, change, message):
    with pytest.raises(FedPFTError, match=message):
        run(local_grid, generation | change)


def test_a_tied_output_cannot_train_alone(tmp_path, generator_directory):
    tokenizer_of(generator_directory).save_pretrained(tmp_path)
    decoder("gpt2").save_pretrained(tmp_path)
    load_fm(str(tmp_path), (), "text", 0, objective="generate")
    for head in ("lm_head", "wte"):
        with pytest.raises(FedPFTError, match="cannot train alone"):
            load_fm(str(tmp_path), (), "text", 0, (head,), "generate")


def test_two_matrices_in_a_file_are_two_whatever_its_config_says(
    tmp_path, generator_directory
):
    tokenizer_of(generator_directory).save_pretrained(tmp_path)
    decoder("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    fm = load_fm(str(tmp_path), (), "text", 0, objective="generate").model
    sub = build_sub_fm(fm, whole(fm), "generate")
    batch = tiny_batch("llama")
    with torch.no_grad():
        assert torch.equal(fm(**batch).logits, sub(**batch).logits)


def test_what_predicts_tokens_must_be_there(tmp_path, generator_directory):
    tokenizer_of(generator_directory).save_pretrained(tmp_path)
    decoder("llama").model.save_pretrained(tmp_path)
    with pytest.raises(FedPFTError, match="lacks 'lm_head"):
        load_fm(str(tmp_path), (), "text", 0, objective="generate")


def test_a_site_is_told_what_would_be_learnt(generation):
    config = Config.from_run_config(generation)
    found = check(config.data, 16, 0)
    assert not found.errors
    assert any("prompt: median 2" in line for line in found.lines)
    assert any("response: median 2" in line for line in found.lines)
    assert "columns  ask, say (not used: who)" in found.lines


def test_neurons_are_cut_in_every_ffn():
    fm = decoder("gpt2")
    sub = build_sub_fm(fm, plans(fm, keep_neurons=7), "generate")
    assert [ffn.width for ffn in ffns_of(sub)] == [7] * len(ffns_of(fm))
