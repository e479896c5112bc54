import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpft_flower.config import FedPFTError
from fedpft_flower.delta import apply_delta, make_delta
from fedpft_flower.ledger import Ledger, message_bytes
from fedpft_flower.package import Package
from fedpft_flower.plan import Plan
from fedpft_flower.store import (
    Store,
    package_from,
    package_hash,
    package_json,
    package_tensors,
    tensors_hash,
)
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    pack_rates,
    pack_tensors,
    unpack_rates,
    unpack_tensors,
)

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
]


def equal(left, right):
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wire_round_trip_is_exact(dtype):
    base = torch.randn(3, 4) * 100
    tensors = {
        "b.weight": base.to(dtype),
        "a.scalar": base[0, 0].to(dtype),
        "c.empty": torch.empty(0, 2, dtype=dtype),
        "d.strided": base.to(dtype).t(),
    }
    record, casts = pack_tensors(tensors)
    again = ArrayRecord.inflate(record.deflate(), record.children)  # through bytes
    assert equal(unpack_tensors(again, casts), tensors)


def test_hash_sees_names_dtypes_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3)}
    variants = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
    ]
    hashes = {tensors_hash(v) for v in [base, *variants]}
    assert len(hashes) == 5
    assert tensors_hash(base) == tensors_hash({"a": torch.zeros(3, 2).t()})
    assert tensors_hash(base, b"x") != tensors_hash(base)


def changed(old, **places):
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name, index in places.items():
        new[name][index] += 1
    return new


OLD = {
    "up": torch.randn(8, 4),
    "bias": torch.randn(8),
    "down": torch.randn(4, 8),
    "half": torch.randn(4, 4).bfloat16(),
    "same": torch.randn(5),
}


def test_difference_carries_changed_rows_or_columns_only():
    new = changed(OLD, up=[1, 5], bias=[1, 5], down=(slice(None), [1, 5]), half=(2, 1))
    delta = make_delta(OLD, new)
    assert delta["up"].shape == (2, 4)
    assert delta["down"].shape == (4, 2)
    assert delta["half"].numel() == 4
    assert "same" not in delta
    assert equal(apply_delta(OLD, delta), new)


def test_difference_sees_signed_zeros_and_nan():
    old = {"a": torch.tensor([0.0, 1.0, float("nan")])}
    new = {"a": torch.tensor([-0.0, 1.0, float("nan")])}
    delta = make_delta(old, new)
    assert delta["a@rows"].tolist() == [0]
    assert tensors_hash(apply_delta(old, delta)) == tensors_hash(new)
    assert make_delta(old, old) == {}


def test_a_difference_for_another_model_is_refused():
    with pytest.raises(FedPFTError, match="stranger"):
        apply_delta(OLD, {"stranger": torch.zeros(1), "stranger@rows": torch.zeros(1)})


def package():
    return Package(
        model_config={"model_type": "bert", "hidden_size": 4},
        plan=Plan((4, 4), {0: (0, 1, 2, 3), 1: (1, 3)}),
        head=("classifier",),
        weights={"w": torch.randn(2, 2), "h": torch.randn(3).bfloat16()},
        activity_limits=[torch.rand(4), torch.rand(2)],
        processor_files={"vocab.txt": "käse\n".encode(), "spiece.model": b"\x00\xff"},
    )


def test_package_round_trip():
    sent = package()
    got = package_from(package_json(sent), package_tensors(sent))
    assert (got.model_config, got.plan, got.head) == (
        sent.model_config,
        sent.plan,
        sent.head,
    )
    assert got.processor_files == sent.processor_files
    assert equal(got.weights, {n: t.float() for n, t in sent.weights.items()})
    assert all(map(torch.equal, got.activity_limits, sent.activity_limits))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def parcel():
    sent = package()
    tensors, text = package_tensors(sent), package_json(sent)
    return package_hash(tensors, text), tensors, text


def test_store_keeps_by_hash_and_verifies_at_load(store):
    content, tensors, text = parcel()
    assert store.get(content) is None
    store.put(content, tensors, text)
    store.put(content, tensors, text)  # twice is once
    held = store.get(content)
    assert held is not None and held[1] == text
    assert equal(dict(sorted(held[0].items())), dict(sorted(tensors.items())))
    assert store.hashes() == [content]
    assert (store.directory(content) / "processor" / "spiece.model").read_bytes()
    weights = store.directory(content) / "weights"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    assert store.get(content) is None  # damaged
    store.put(content, tensors, text)
    assert store.get(content) is not None
    weights.write_bytes(body[:50])
    assert store.get(content) is None  # cut


def test_store_refuses_another_content_and_leaves_nothing_behind(store):
    content, tensors, text = parcel()
    with pytest.raises(FedPFTError, match="does not have the hash"):
        store.put("0" * 64, tensors, text)
    assert store.hashes() == []
    assert not list(store.directory(content).parent.glob("*.partial"))


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_behind(store, full_disk):
    content, tensors, text = parcel()
    said = "cannot keep the sub-FM in .* make room there, or set FEDPFT_CACHE"
    with full_disk(), pytest.raises(FedPFTError, match=said):
        store.put(content, tensors, text)
    assert store.hashes() == []
    assert not list(store.directory(content).parent.glob("*.partial"))
    store.put(content, tensors, text)
    assert store.get(content) is not None


def test_store_refuses_a_file_name_that_leaves_its_folder(store):
    _, tensors, text = parcel()
    data = json.loads(text)
    data["files"]["../../evil"] = ""
    text = json.dumps(data)
    with pytest.raises(FedPFTError, match="leaves its folder"):
        store.put(package_hash(tensors, text), tensors, text)
    assert store.hashes() == []


def test_store_keeps_the_newest_copies_only(store, monkeypatch):
    text = parcel()[2]
    contents = []
    monkeypatch.setattr(Store, "UNUSED_SECONDS", 0.0)
    for i in range(Store.KEEP + 2):
        tensors = {"w": torch.full((2,), float(i))}
        contents.append(package_hash(tensors, text))
        store.put(contents[-1], tensors, text)
    assert len(store.hashes()) == Store.KEEP
    assert contents[-1] in store.hashes()


def test_store_removes_what_a_killed_process_left(store):
    tensors, text = {"w": torch.ones(2)}, parcel()[2]
    drafts = [store.directory(f"{name}.partial") for name in ("old", "new")]
    for draft in drafts:
        draft.mkdir()
    long_ago = time.time() - 2 * Store.UNUSED_SECONDS
    os.utime(drafts[0], (long_ago, long_ago))
    store.put(package_hash(tensors, text), tensors, text)
    assert [draft.exists() for draft in drafts] == [False, True]


def test_store_keeps_what_another_process_is_still_writing(store):
    tensors, text = {"w": torch.ones(2)}, parcel()[2]
    draft = store.directory("slow.partial")
    draft.mkdir()
    (draft / "weights").touch()
    long_ago = time.time() - 2 * Store.UNUSED_SECONDS
    os.utime(draft, (long_ago, long_ago))
    store.put(package_hash(tensors, text), tensors, text)
    assert draft.exists()
    os.utime(draft / "weights", (long_ago, long_ago))
    store.put(package_hash(tensors, text), tensors, text)
    assert not draft.exists()


def test_a_copy_whose_processor_is_damaged_is_none(store):
    content, tensors, text = parcel()
    store.put(content, tensors, text)
    assert store.get(content) is not None
    files = json.loads(text)["files"]
    assert files
    for name in files:
        place = store.directory(content) / "processor" / name
        whole = place.read_bytes()
        place.write_bytes(whole[: len(whole) // 2])
        assert store.get(content) is None
        place.write_bytes(whole)
        assert store.get(content) is not None
        place.unlink()
        assert store.get(content) is None
        store.put(content, tensors, text)  # as the server sends it again
        assert store.get(content) is not None


def test_a_store_has_one_name_whoever_makes_it_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "new"))
    names, together = [], threading.Barrier(8)

    def make():
        together.wait()
        names.append(Store().name)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 8 and len(set(names)) == 1 and len(names[0]) == 32
    assert Store().name == names[0]


def message(kind, content):
    return Message(RecordDict(content), dst_node_id=5, message_type=kind)


def test_bytes_are_counted_by_kind(local_grid):
    rates = [torch.rand(3), torch.rand(2)]
    arrays = ArrayRecord([np.zeros(10, dtype=np.float32)])
    metrics = MetricRecord({"loss": 0.5, **pack_rates(rates)})
    found = message_bytes(message("train", {ARRAYS: arrays, METRICS: metrics}))
    assert set(found) == {"adapter", "statistics", "control"}
    assert found["adapter"] == arrays.count_bytes() >= 40
    assert found["statistics"] >= 5 * 8
    for base, kind in (("", "install"), ("x", "delta")):
        config = ConfigRecord({"base": base, "package": "p" * 100, "sub-fm": "s"})
        found = message_bytes(
            message("query.install", {ARRAYS: arrays, CONFIG: config})
        )
        assert found[kind] == arrays.count_bytes() + 100
    reply = message("query.install", {CONFIG: ConfigRecord({"installed": True})})
    assert set(message_bytes(reply)) == {"control"}


def test_ledger_counts_what_was_not_sent_logically_only(local_grid):
    ledger = Ledger()
    arrays = ArrayRecord([np.zeros(10, dtype=np.float32)])
    ledger.round = 2
    for sent in (True, False):
        ledger.count("down", message("train", {ARRAYS: arrays}), sent=sent)
    size = arrays.count_bytes()
    assert ledger.table(2) == {"down-adapter": {"logical": 2 * size, "sent": size}}
    assert ledger.total("down") == ledger.total("down", 2) == 2 * size
    assert ledger.total("up") == ledger.total("down", 1) == 0


def test_rates_round_trip():
    rates = [torch.rand(3) for _ in range(12)]
    again = unpack_rates(MetricRecord(pack_rates(rates)))
    assert all(map(torch.equal, rates, again))
