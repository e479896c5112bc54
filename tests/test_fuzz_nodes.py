"""Mutated installs and train requests at a node: one clear line, or sound work."""

import base64
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.plain_loop import PlainLoop
from client_app import app as client_app
from fedpft_flower.config import Config
from fedpft_flower.delta import apply_delta, make_delta
from fedpft_flower.refusals import REFUSED
from fedpft_flower.store import Store, package_hash, package_json, package_tensors
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    INSTALL,
    PACKAGE,
    TRAIN,
    TRAIN_METRICS,
    arrays_of,
    config_of,
    metrics_of,
    pack_tensors,
    split_rates,
    unpack_tensors,
)
from tests.fuzzing import (
    bounded,
    changed_arrays,
    changed_json,
    changed_keys,
    changed_records,
    check_line,
    examples,
    odd_json,
    odd_lists,
    odd_numbers,
    odd_scalars,
    odd_texts,
    small_federation,
)


class Site:
    """Be one node: a store with a sound sub-FM, rows, and messages that work."""

    def __init__(self, place, settings):
        self.place, self.settings = place, settings
        server = PlainLoop(Config.from_run_config(settings), 2).server
        server.prepare()
        package = server.package()
        self.tensors, self.text = package_tensors(package), package_json(package)
        self.sub_fm = package_hash(self.tensors, self.text)
        changed = {
            name: tensor + 1 if name.endswith(".1.output.dense.weight") else tensor
            for name, tensor in self.tensors.items()
        }
        self.changed = package_hash(changed, self.text)
        self.delta = make_delta(self.tensors, changed)
        self.adapter = server.adapter
        self.widths = [len(limit) for limit in package.activity_limits]
        assert not self.send(INSTALL, *self.whole()).has_error()
        self.before = self.train()
        self.files = self.outside()

    def send(self, kind, arrays, config):
        return self.deliver(
            kind, {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord(config)}
        )

    def deliver(self, kind, records):
        """Let the ClientApp, mods included, answer a message of these records."""
        shares = {"partition-id": 0, "num-partitions": 2}
        context = Context(1, 9, shares, RecordDict(), self.settings)
        message = Message(RecordDict(records), dst_node_id=9, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        with bounded():
            return client_app(copy.deepcopy(message), context)

    def whole(self):
        """Return arrays and config of an install of everything."""
        arrays, casts = pack_tensors(self.tensors)
        return dict(arrays), {
            "sub-fm": self.sub_fm,
            "base": "",
            "bit-cast": casts,
            PACKAGE: self.text,
        }

    def change(self):
        """Return arrays and config of an install of a change."""
        arrays, casts = pack_tensors(self.delta)
        return dict(arrays), {
            "sub-fm": self.changed,
            "base": self.sub_fm,
            "bit-cast": casts,
            PACKAGE: "",
        }

    def request(self, sub_fm=None):
        """Return arrays and config of a request to train."""
        return dict(pack_tensors(self.adapter)[0]), {
            "sub-fm": sub_fm or self.sub_fm,
            "lr": 0.01,
            "measure-activity": True,
            "server-round": 1,
            "codec": "fp32",
            "proximal-mu": 0.0,
        }

    def train(self):
        """Train soundly and return the new adapter and the rates."""
        reply = self.send(TRAIN, *self.request())
        assert not reply.has_error(), reply.error.reason
        self.check_trained(reply)
        rates = dict(split_rates(metrics_of(reply))[0])
        return unpack_tensors(arrays_of(reply)), rates

    def outside(self):
        """Return all files that are in no store, with their contents' sizes."""
        store = Store()._root
        return {
            (path, path.stat().st_size)
            for path in self.place.rglob("*")
            if store not in path.parents and "encoded" not in path.parts
        }

    def check_refused(self, reply):
        assert reply.error.code == REFUSED
        check_line(reply.error.reason)

    def check_trained(self, reply):
        """Check that the server could use a reply; that it asks again is sound too."""
        if "missing" in config_of(reply):
            return
        rates, others = split_rates(metrics_of(reply))
        assert set(others) == set(TRAIN_METRICS)
        assert len(rates) in (0, len(self.widths))
        adapter = unpack_tensors(arrays_of(reply))
        assert list(adapter) == list(self.adapter)
        assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())

    def check_store(self):
        """Check that the store holds only what has the hash that it is named by."""
        store = Store()
        hashes = store.hashes()
        assert self.sub_fm in hashes
        assert all(store.get(content) is not None for content in hashes)
        names = {path.name for path in store._root.iterdir()}
        assert names == {"name", *hashes}, "a draft is left"
        for content in hashes:
            files = {p for p in store.directory(content).rglob("*") if p.is_file()}
            others = [p for p in files if p.suffix not in (".json", ".txt")]
            assert [p.name for p in others] == ["weights"], "a file that may run"
            above = {p.name for p in files if p.parent.name != "processor"}
            assert above == {"weights", "package.json"}, "a file outside its folder"
        assert self.outside() == self.files, "a file outside the store"

    def clear(self):
        """Keep the sound sub-FM only."""
        for content in Store().hashes():
            if content != self.sub_fm:
                shutil.rmtree(Store().directory(content))

    def check_works(self):
        """Check that installs and training give what they gave at first."""
        shutil.rmtree(Store().directory(self.sub_fm))
        for message in (self.whole(), self.change()):
            assert config_of(self.send(INSTALL, *message))["installed"]
        self.check_store()
        adapter, rates = self.train()
        for name, tensor in self.before[0].items():
            assert torch.equal(adapter[name], tensor), name
        assert rates == self.before[1]
        self.clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory, bert_directory):
    place = tmp_path_factory.mktemp("site")
    settings = small_federation(place, bert_directory) | {
        "data.public-rows": 8,
        "train.local-steps": 1,
        "train.batch-size": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPFT_CACHE", str(place / "cache"))
        for name in ("run_id", "node_id", "task_id"):
            patch.setattr(TaskIdentity, f"_{name}", 1)
        yield Site(place, settings)


odd_arrays = st.sampled_from(
    [
        Array(np.zeros(2, "f4")),
        Array(np.zeros((1, 1), "f4")),
        Array(np.array([0, 10**6], "i4")),
        Array(np.array([-1], "i4")),
    ]
)
odd_values = st.one_of(odd_scalars, odd_lists)
CODECS = st.sampled_from(["bf16", "fp16", "int8", "fp32", "zip", ""])


class Records(dict):
    """Show what is odd about the records of a message, not all their bytes."""

    def __init__(self, records, sound):
        super().__init__(records)
        self.sound = sound

    def __repr__(self):
        shown = {}
        for name, record in self.items():
            before = self.sound.get(name, {})
            shown[f"{name} lacks"] = sorted(before.keys() - record.keys())
            for key, value in record.items():
                if value == before.get(key):
                    continue
                if isinstance(value, Array):
                    value = f"{value.dtype} {value.shape} {value.data[:200]}"
                elif key == PACKAGE:
                    value = differences(before.get(key), value)
                shown[f"{name}/{key}"] = repr(value)[:300]
        return "\n".join(f"{key}: {value}" for key, value in shown.items())


def differences(text, other):
    """Return what of a package's JSON is another, for the report of a failure."""
    try:
        before, after = json.loads(text), json.loads(other)
        before, after = ({**d, **d["model"], **d["files"]} for d in (before, after))
        return {k: v for k, v in after.items() if before.get(k, k) != v}
    except Exception:
        return other


@st.composite
def drawn(draw, arrays, config, sound):
    """Return the records of a message; of some, one is missing, strange or new."""
    records = {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord(config)}
    if draw(st.integers(0, 9)) == 9:
        records = draw(changed_records(records))
    return Records(records, dict(zip((ARRAYS, CONFIG), sound, strict=True)))


@st.composite
def files(draw, named):
    """Return processor files of which one has another name or content."""
    name = draw(st.sampled_from(sorted(named)))
    body = base64.b64decode(named[name])
    how = draw(st.sampled_from(["name", "content", "bytes", "body"]))
    if how == "name":
        odd = draw(
            st.sampled_from(
                [
                    "../evil.json",
                    "../../../evil.json",
                    "..",
                    ".",
                    "",
                    "a/b.json",
                    "evil.py",
                    "x" * 300 + ".json",
                    "a\0.json",
                    "\ud800.json",
                    "weights",
                    "extra.json",
                ]
            )
        )
        return {**named, odd: named[name]}
    if how == "content":
        body = draw(changed_json(body.decode())).encode(errors="replace")
    elif how == "bytes":
        body = body[: draw(st.integers(0, len(body)))]
    else:
        return {**named, name: draw(odd_json)}
    return {**named, name: base64.b64encode(body).decode()}


@st.composite
def texts(draw, text):
    """Return a package's JSON with another model, plan, head or other files."""
    data = json.loads(text)
    how = draw(st.sampled_from(["model", "plan", "files", "head", "all", "cr"]))
    if how == "all":
        return draw(changed_json(text))
    if how == "cr":
        return json.dumps(data, indent=1).replace("\n", "\r\n")
    if how == "model":
        data["model"] = draw(changed_keys(data["model"], odd_json))
    elif how == "plan":
        data["plan"] = draw(changed_json(data["plan"]))
    elif how == "files":
        data["files"] = draw(files(data["files"]))
    else:
        data["head"] = draw(
            st.one_of(
                odd_json,
                st.lists(st.sampled_from(["classifier", "bert", "", "0"]), max_size=2),
            )
        )
    return json.dumps(data)


def with_file(site, name):
    """Return the records of an install that has one more processor file."""
    arrays, config = site.whole()
    data = json.loads(site.text)
    data["files"][name] = base64.b64encode(b"{}").decode()
    config[PACKAGE] = json.dumps(data)
    config = rehashed(site, arrays, config)
    records = {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord(config)}
    return Records(records, records)


def with_values(site, **values):
    """Return the records of a request to train that says something else."""
    arrays, config = site.request()
    config |= {name.replace("_", "-"): value for name, value in values.items()}
    records = {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord(config)}
    return Records(records, records)


def rehashed(site, arrays, config):
    """Return an install's config that names the hash of what is sent."""
    try:
        tensors = unpack_tensors(ArrayRecord(arrays), config["bit-cast"])
        text = config[PACKAGE]
        if config["base"] == site.sub_fm:
            tensors, text = apply_delta(site.tensors, tensors), site.text
        return {**config, "sub-fm": package_hash(tensors, text)}
    except Exception:  # it cannot be unpacked: any hash will do
        return config


@st.composite
def installs(draw, site):
    """Draw the records of an install that is not quite what a sound server sends."""
    message = draw(st.sampled_from([site.whole, site.whole, site.change]))
    arrays, config = message()
    hows = ["text"] * 5 + ["array"] * 2 + ["arrays", "config", "cast", "codec", "odd"]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        how = draw(st.sampled_from(hows))
        if how == "text" and config.get(PACKAGE) == site.text:
            config[PACKAGE] = draw(texts(site.text))
        elif how == "array" and arrays:
            arrays = draw(changed_arrays(arrays))
        elif how == "arrays":
            arrays = draw(changed_keys(arrays, odd_arrays))
        elif how == "config":
            config = draw(changed_keys(config, odd_values))
        elif how == "cast":
            cast = {next(iter(arrays), ""): draw(odd_json)}
            config["bit-cast"] = draw(st.one_of(st.just(json.dumps(cast)), odd_texts))
        elif how == "codec":
            config["codec"] = draw(st.one_of(CODECS, odd_values))
        else:
            arrays = {**arrays, "__metadata__": draw(odd_arrays)}
    if draw(st.integers(0, 9)):
        config = rehashed(site, arrays, config)
    return draw(drawn(arrays, config, message()))


def test_an_install_is_kept_or_refused(site):
    tally = {"kept": 0, "refused": 0, "trained": 0}

    @examples(360)
    @given(installs(site))
    @example(with_file(site, "../evil.json"))
    @example(with_file(site, "../../../evil.json"))
    @example(with_file(site, str(site.place / "evil.json")))
    @example(with_file(site, "evil.py"))
    def check(records):
        reply = site.deliver(INSTALL, records)
        try:
            site.check_store()
            if reply.has_error():
                tally["refused"] += 1
                site.check_refused(reply)
                return
            installed = config_of(reply)["installed"]
            new = set(Store().hashes()) - {site.sub_fm}
            assert installed or not new
            tally["kept"] += bool(new)
            for content in new:
                reply = site.send(TRAIN, *site.request(content))
                if reply.has_error():
                    site.check_refused(reply)
                else:
                    tally["trained"] += 1
                    assert not set(config_of(reply))
            site.check_store()
        finally:
            site.clear()

    check()
    assert min(tally["refused"], tally["kept"]) >= 40, tally
    assert tally["trained"] >= 5, tally
    site.check_works()


@st.composite
def requests(draw, site):
    """Draw the records of a request to train that is not quite right."""
    arrays, config = site.request()
    hows = ["array", "array", "arrays", "config", "config", "config", "codec", "lr"]
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(hows))
        if how == "array" and arrays:
            arrays = draw(changed_arrays(arrays))
        elif how == "arrays":
            arrays = draw(changed_keys(arrays, odd_arrays))
        elif how == "config":
            config = draw(changed_keys(config, odd_values))
        elif how == "codec":
            config["codec"] = draw(st.one_of(CODECS, odd_values))
        else:
            key = draw(st.sampled_from(["lr", "proximal-mu"]))
            config[key] = draw(odd_numbers)
    return draw(drawn(arrays, config, site.request()))


def test_a_request_to_train_is_done_or_refused(site):
    tally = {"done": 0, "refused": 0}

    @examples(120)
    @given(requests(site))
    @example(with_values(site, lr=float("inf")))
    @example(with_values(site, proximal_mu=float("nan")))
    @example(with_values(site, codec="zip"))
    @example(with_values(site, sub_fm="../" * 3))
    def check(records):
        reply = site.deliver(TRAIN, records)
        tally["refused" if reply.has_error() else "done"] += 1
        if reply.has_error():
            site.check_refused(reply)
        elif config_of(reply).get("missing") is None:
            codec = records[CONFIG].get("codec", "fp32")
            if codec == "fp32":
                site.check_trained(reply)
        site.check_store()

    check()
    assert min(tally.values()) >= 15, tally
    site.check_works()
