"""Fewer bits on the wire: exact where they can be, bounded where not, outermost."""

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod

from fedpft_flower.codec import (
    decode_arrays,
    decode_weights,
    encode_arrays,
    encode_weights,
)
from fedpft_flower.delta import apply_delta, make_delta
from fedpft_flower.mods import codec_mod
from fedpft_flower.wire import pack_tensors, unpack_tensors
from tests.test_federation import results, run

CODECS = ("fp32", "bf16", "fp16", "int8")


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "kernel": torch.randn(4, 3, 2, 2, generator=generator),
        "bias": torch.randn(9, generator=generator),
        "zeros": torch.zeros(3, 4),
        "places": torch.arange(6),
    }


@pytest.mark.parametrize("codec", CODECS)
def test_weights_come_back_as_float32_and_near(codec):
    before = weights()
    sent = encode_weights(before, codec)
    after = decode_weights(unpack_tensors(*pack_tensors(sent)))
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        if tensor.dtype != torch.float32:
            assert torch.equal(after[name], tensor)
            continue
        # Half a unit in the last place: 8 bits of significand, 11, or 127 levels a row.
        most = (
            tensor.abs().flatten(1).amax(1) if tensor.ndim > 1 else tensor.abs().max()
        )
        bound = {
            "fp32": 0 * tensor.abs(),
            "bf16": tensor.abs() * 2**-8,
            "fp16": tensor.abs() * 2**-11 + 2**-24,
            "int8": (
                0 * tensor
                if tensor.ndim < 2
                else (most / 254 * 1.001).reshape(-1, *[1] * (tensor.ndim - 1))
            ),
        }[codec]
        assert bool(((after[name] - tensor).abs() <= bound).all()), name


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_sent_once_is_sent_exactly_again(codec):
    once = decode_weights(encode_weights(weights(), codec))
    again = decode_weights(encode_weights(once, codec))
    for name, tensor in once.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-6)
    if codec != "int8":
        assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("codec", CODECS)
def test_changes_of_encoded_weights_are_exact(codec):
    old = weights()
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["matrix"][2] += 1.0
    old, new = encode_weights(old, codec), encode_weights(new, codec)
    delta = make_delta(old, new)
    assert len(delta["matrix"]) == 1  # one row
    rebuilt = apply_delta(old, unpack_tensors(*pack_tensors(delta)))
    assert all(torch.equal(rebuilt[name], new[name]) for name in new)


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_adapters_travel_in_half_the_bytes_and_exactly_if_they_can(codec):
    exact = {"a": torch.tensor([[1.0, -0.5, 0.0, -0.0, 2.0**-10]]), "b": torch.ones(3)}
    record = pack_tensors(exact)[0]
    sent = encode_arrays(record, codec)
    assert sent.count_bytes() < record.count_bytes()
    assert sum(len(a.data) for a in sent.values()) < sum(
        len(a.data) for a in record.values()
    )
    back = unpack_tensors(decode_arrays(sent, codec))
    for name, tensor in exact.items():
        assert torch.equal(back[name], tensor)
        assert torch.equal(back[name].signbit(), tensor.signbit())
    with pytest.raises(ValueError, match="travels as"):
        decode_arrays(record, codec)


def test_the_codec_is_outside_of_clipping(local_grid):  # messages need its run id
    """Flower's mod clips float32 updates, though bfloat16 travels."""
    app, seen = ClientApp(mods=[codec_mod]), []

    @app.train(mods=[fixedclipping_mod])
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        values = unpack_tensors(record)
        seen.append({name: tensor.dtype for name, tensor in values.items()})
        moved = {name: tensor + 3.0 for name, tensor in values.items()}
        records = {"arrays": pack_tensors(moved)[0], "metrics": MetricRecord({"n": 1})}
        return Message(RecordDict(records), reply_to=message)

    start = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0, 8.0]])}
    config = ConfigRecord({"codec": "bf16", "clipping_norm": 1.0})
    arrays = encode_arrays(pack_tensors(start)[0], "bf16")
    message = Message(
        RecordDict({"arrays": arrays, "config": config}),
        dst_node_id=1,
        message_type="train",
    )
    reply = app(message, Context(1, 1, {}, RecordDict(), {}))
    assert seen == [{"a": torch.float32, "b": torch.float32}]
    back = unpack_tensors(decode_arrays(reply.content["arrays"], "bf16"))
    moved = torch.cat([(back[name] - start[name]).flatten() for name in start])
    assert moved.norm() == pytest.approx(1.0, rel=0.05)  # clipped, then rounded


@pytest.mark.parametrize(("frozen", "adapter"), [("bf16", "bf16"), ("int8", "fp16")])
def test_runs_train_and_the_ledger_counts_what_travels(
    local_grid, settings, frozen, adapter
):
    run(local_grid, settings)
    whole = results(settings)[1]
    settings |= {"wire.frozen": frozen, "wire.adapter": adapter}
    run(local_grid, settings)
    place, rounds, summary, _ = results(settings)
    assert summary["failures"] == 0
    assert rounds[-1]["fm-loss"] < rounds[0]["fm-loss"]
    assert rounds[-1]["fm-loss"] == pytest.approx(whole[-1]["fm-loss"], abs=0.02)

    def size(entry, kind):
        return entry["bytes"][kind]["logical"]

    for kind in ("down-adapter", "up-adapter"):
        assert size(rounds[1], kind) < 0.75 * size(whole[1], kind)
    share = {"bf16": 0.8, "int8": 0.75}[frozen]  # the tiny model is half names and JSON
    assert size(rounds[1], "down-install") < share * size(whole[1], "down-install")
    from safetensors.torch import load_file

    exported = load_file(place / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
