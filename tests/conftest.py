"""Shared fixtures: an own cache per session, tiny FMs on disk, an in-process grid."""

import copy
import itertools
import json
import logging
import os
import re
import resource
import sys
from contextlib import contextmanager

# Hide GPUs, whose sums have another order, but from tests that need one (-m gpu),
# before a library below looks for them. Workers have it from what starts them.
if "PYTEST_XDIST_WORKER" not in os.environ and not re.search(
    r"-m ?=?gpu\b", " ".join(sys.argv)
):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import huggingface_hub
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedpft_flower import run_directory
from tests.families import CONFIGS, tiny_model

torch.set_num_threads(1)  # the same sums in the same order everywhere


def pytest_configure(config):
    """Hide hubs, but from tests that need one.

    The libraries have read the environment when this file imported them.
    """
    if config.option.markexpr != "network":
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the user's cache and run directories out of the tests.

    All processes that run tests share it, so that the embedded task is extracted once.
    """
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    place.mkdir(exist_ok=True)
    os.environ["FEDPFT_CACHE"] = str(place)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    os.environ.pop("FEDPFT_OUT", None)
    return place


@pytest.fixture(autouse=True)
def own_log():
    """Let no run of a test decide where the log of the next one goes."""
    package = logging.getLogger("fedpft_flower")
    package.handlers, package.propagate = [], True
    yield
    package.handlers, package.propagate = [], True


@pytest.fixture(scope="session")
def vit_directory(tmp_path_factory):
    """Write a tiny random ViT with its image processor, as a user's own FM."""
    from transformers import AutoConfig, AutoImageProcessor  # noqa: F401
    from transformers.models.vit import ViTImageProcessor

    place = tmp_path_factory.mktemp("vit")
    tiny_model("vit", layers=4).save_pretrained(place)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory):
    """Write a tiny random BERT with a word-level tokenizer, as a user's own FM."""
    from transformers import BertTokenizerFast

    place = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["good", "bad", "film", "very", "not", "the", "red", "blue", "fast"]
    words += list("abcdefghijklmnopqrstuvwxyz")
    words = list(dict.fromkeys(words))
    assert len(words) <= CONFIGS["bert"]["vocab_size"]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
    tiny_model("bert").save_pretrained(place)
    return place


@pytest.fixture
def full_disk():
    """Return a context in which no file can grow beyond some bytes."""

    @contextmanager
    def limited(most=100):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def settings(vit_directory, tmp_path, monkeypatch):
    """Return the flat configuration of a small federation on digits."""
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))  # an empty store
    # Drawing takes as long as a round of so small a run.
    monkeypatch.setattr(run_directory, "draw_curves", lambda *a: a[-1].touch())
    return {
        "method": "fedpft",
        "rounds": 3,
        "out-dir": str(tmp_path / "runs"),
        "fm.name": str(vit_directory),
        "data.task": "digits",
        "data.max-train-rows": 200,
        "data.max-validation-rows": 40,
        "data.max-test-rows": 40,
        "partition.alpha": 5.0,
        "train.clients-per-round": 3,
        "train.local-steps": 3,
        "sub-fm.keep-fraction": 0.5,
        "align.steps": 6,
        "align.every": 1,
        "align.during-steps": 4,
        "data.public-rows": 40,
    }


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory):
    """Write a tiny random Llama, a classifier, as a user's own FM."""
    return write_llama(tmp_path_factory.mktemp("llama"), "classify")


@pytest.fixture(scope="session")
def generator_directory(tmp_path_factory):
    """Write a tiny random Llama, a language model, as a user's own FM."""
    return write_llama(tmp_path_factory.mktemp("generator"), "generate")


@pytest.fixture
def generation(settings, generator_directory, tmp_path):
    """Return the configuration of a small federation that learns responses."""
    data = tmp_path / "data"
    data.mkdir()
    words = ["good", "bad", "film", "very", "fast", *"abcdef"]
    pairs = [(one, two) for one in words for two in words]
    for split, start in (("train", 0), ("validation", 1), ("test", 2)):
        rows = pairs[start::2] if split == "train" else pairs[start::7]
        lines = [{"ask": f"{a} {b}", "say": f"{b} {a}", "who": a} for a, b in rows]
        text = "\n".join(json.dumps(line) for line in lines)
        (data / f"{split}.jsonl").write_text(text)
    (tmp_path / "public.csv").write_text("text\n" + "\n".join(["a b good c"] * 40))
    return settings | {
        "fm.name": str(generator_directory),
        "data.task": "generation",
        "data.path": str(data),
        "data.text-columns": "ask,say",
        "data.public-path": str(tmp_path / "public.csv"),
        "data.public-rows": 0,
        "data.max-length": 16,
        "partition.kind": "iid",
        "train.lr": 0.02,
        "train.local-steps": 5,
        "lora.alpha": 8,
    }


def write_llama(place, objective):
    """Write a tiny random Llama whose tokenizer knows no padding, as they come."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "good", "bad", "film", "very", "fast", *"abcdef"]
    model = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(place)
    fm = tiny_model("llama", objective=objective)
    fm.config.pad_token_id = None
    fm.save_pretrained(place)
    return place


class LocalGrid(Grid):
    """Run a ClientApp in this process for every message; nodes have random ids.

    `faults` maps a node's place to a function (message, reply) -> reply or None (lost).
    """

    def __init__(self, app, count, run_config, order=1):
        self._app, self._numbers, self._replies = app, itertools.count(), {}
        self.faults, self._order, self.seen = {}, order, []
        ids = torch.randperm(1000)[:count].tolist()
        self.contexts = {
            1000 + number: Context(
                run_id=1,
                node_id=1000 + number,
                state=RecordDict(),
                run_config=run_config,
                node_config={"partition-id": i, "num-partitions": count},
            )
            for i, number in enumerate(ids)
        }

    run = property(lambda self: None)

    def set_run(self, run):
        pass

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            ids.append(number)
            self.seen.append(message)
            context = self.contexts[message.metadata.dst_node_id]
            try:
                reply = self._app(copy.deepcopy(message), context)
            except Exception as error:  # what Flower turns into error code 2
                reply = Message(Error(2, repr(error)), reply_to=message)
            fault = self.faults.get(context.node_config.get("partition-id"))
            reply = fault(message, reply) if fault else reply
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = number
                self._replies[number] = reply
        return ids

    def pull_messages(self, message_ids):
        ready = [i for i in message_ids if i in self._replies]
        return [self._replies.pop(i) for i in sorted(ready, key=int)[:: self._order]]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture
def local_grid(monkeypatch):
    """Return the class, usable outside a Flower runtime."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    return LocalGrid
