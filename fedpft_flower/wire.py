"""Translate between domain objects and Flower records, and count what is sent.

Names of records and kinds of messages stand here; the keys of a request or a reply
stand with who writes and who reads it. Nothing is ever unpickled: arrays travel as raw
bytes with dtype and shape, structure as JSON text.
"""

import base64
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpft_flower.codec import (
    decode_arrays,
    decode_weights,
    encode_arrays,
    encode_weights,
    recode,
)
from fedpft_flower.config import Config, FedPFTError, OwnRowsError, one_line
from fedpft_flower.disk import cache_dir, last_used
from fedpft_flower.mods import codec_of
from fedpft_flower.package import Package, check_processor_file
from fedpft_flower.plan import Plan
from fedpft_flower.refusals import UNTOLD, refusal

logger = logging.getLogger(__name__)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
HELLO, INSTALL, TRAIN = "query.hello", "query.install", "train"
# What Flower raises where a reply is not what it says, or says that it is more than
# there is room for; connections fail otherwise.
_UNREADABLE = (
    *(AttributeError, LookupError, RecursionError, TypeError, ValueError),
    *(DecodeError, MemoryError, struct.error),
)
_EXPIRED = {3, 4}  # Flower's error codes for a message and a reply that lived too long
PACKAGE = "package"  # key of a package's JSON in an install
# What a node says of its training, and the most that is believed (`train_metrics`).
TRAIN_METRICS: dict[str, float] = {
    "num-examples": 1e12,
    "train_loss": 1e6,
    "steps": 1e12,
    "seconds": 1e9,
    "step-seconds": 1e9,
    "flops": 1e24,
    "bf16": 1.0,
    "peak-memory": 1e15,
}
RATES = "inactive-rates."  # prefix of activity statistics among the metrics

Handler = Callable[[Message, Context], Message]

# Tensors that Flower's records cannot hold travel as integers of the same size.
_BIT_CAST = {torch.bfloat16: torch.int16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BIT_CAST}


def arrays_of(message: Message) -> ArrayRecord:
    """Return the array record of a message."""
    return cast(ArrayRecord, message.content[ARRAYS])


def config_of(message: Message) -> dict[str, Any]:
    """Return the values of a message's config record; empty without one."""
    return dict(message.content.config_records.get(CONFIG, {}))


def metrics_of(message: Message) -> dict[str, Any]:
    """Return the values of a message's metric record; empty without one."""
    return dict(message.content.metric_records.get(METRICS, {}))


def train_metrics(config: Config) -> dict[str, float]:
    """Return which metrics a reply to a train message holds, and the most of each.

    With uniform weights every client has one example. With quantised matrices no
    operations are told: PyTorch cannot count those products. With differential privacy
    nothing else leaves a client beside its adapter: losses, steps and seconds have no
    noise.
    """
    known = dict(TRAIN_METRICS)
    if config.weighting == "uniform":
        known["num-examples"] = 1
    if config.train.frozen != "fp32":
        del known["flops"]
    if config.privacy.on:
        known = {"num-examples": known["num-examples"]}
    return known


def last_line(reason: str | None) -> str:
    """Return the last line of an error's reason, which may be a whole traceback."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "unknown error"


def reply(message: Message, records: dict[str, Any]) -> Message:
    """Reply to a message with these records."""
    return Message(RecordDict(records), reply_to=message)


def one_line_errors(handler: Handler) -> Handler:
    """Reply with one clear line where the user can mend what went wrong."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        told = ""  # where it is not the whole reason
        try:
            return handler(message, context)
        except FedPFTError as error:
            reason = str(error)
            if isinstance(error, OwnRowsError) and "data-path" in context.node_config:
                told = error.told
        except Exception as error:  # a hostile message may raise anything
            logger.exception("a message could not be handled")
            kind, name = message.metadata.message_type, type(error).__name__
            cannot = f"a {kind} message cannot be handled ({name}"
            reason = f"{cannot}: {last_line(str(error))}); see this node's log"
            if "data-path" in context.node_config:  # it may quote a row
                told = f"{cannot}); see this node's log"
        logger.error("%s", one_line(reason))
        if context.run_config.get("privacy.mechanism", "none") != "none":
            told = UNTOLD
        site, told = context.node_config.get("site"), told or reason
        return refusal(message, f"{site}: {told}" if site else told)

    return handle


def reason_of(reply: Message, name: str) -> str:
    """Return in one line why a reply is an error.

    Args:
        reply: an error.
        name: of its node, which may say it itself.
    """
    if reply.error.code in _EXPIRED:
        return "no reply in time (timeout-seconds), or the node is gone"
    return last_line(reply.error.reason).removeprefix(f"{name}: ")


# ------------------------------------------------------------------ tensors, packages


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[ArrayRecord, str]:
    """Pack tensors of any dtype, exactly.

    Returns:
        The arrays, and JSON that names the dtype of each bit-cast tensor.
    """
    arrays, casts = {}, {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype in _BIT_CAST:
            casts[name] = str(value.dtype).removeprefix("torch.")
            value = value.view(_BIT_CAST[value.dtype])
        arrays[name] = Array(value.numpy())
    return ArrayRecord(arrays), json.dumps(casts)


def unpack_tensors(record: ArrayRecord, casts: str = "{}") -> dict[str, Tensor]:
    """Unpack what `pack_tensors` packed; the tensors own their memory."""
    tensors = {}
    named = json.loads(casts)
    for name, array in record.items():
        tensor = torch.from_numpy(np.array(array.numpy()))
        tensors[name] = tensor.view(_DTYPES[named[name]]) if name in named else tensor
    return tensors


def tensors_hash(tensors: Mapping[str, Tensor], *more: bytes) -> str:
    """Return the SHA-256 of tensors (names, dtypes, shapes, bytes) and more content."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    for content in more:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


_LIMITS = "activity-limits."


def package_tensors(package: Package, codec: str = "fp32") -> dict[str, Tensor]:
    """Return all tensors of a package under distinct names, weights encoded."""
    limits = {f"{_LIMITS}{i}": limit for i, limit in enumerate(package.activity_limits)}
    return {**encode_weights(package.weights, codec), **limits}


def package_json(package: Package) -> str:
    """Return all of a package but its tensors, as JSON."""
    files = {
        name: base64.b64encode(body).decode()
        for name, body in package.processor_files.items()
    }
    return json.dumps(
        {
            "model": package.model_config,
            "plan": package.plan.to_json(),
            "head": package.head,
            "objective": package.objective,
            "files": files,
        },
        sort_keys=True,
    )


def package_from(text: str, tensors: Mapping[str, Tensor]) -> Package:
    """Rebuild a package from its JSON and its tensors; weights become float32."""
    data = json.loads(text)
    limits = sorted(
        (name for name in tensors if name.startswith(_LIMITS)),
        key=lambda name: int(name.removeprefix(_LIMITS)),
    )
    return Package(
        model_config=data["model"],
        plan=Plan.from_json(data["plan"]),
        head=tuple(data["head"]),
        weights=decode_weights(
            {n: t for n, t in tensors.items() if not n.startswith(_LIMITS)}
        ),
        activity_limits=[tensors[name] for name in limits],
        processor_files={n: base64.b64decode(b) for n, b in data["files"].items()},
        objective=data["objective"],
    )


def package_hash(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the content hash that names a sub-FM everywhere."""
    return tensors_hash(tensors, text.encode())


# ------------------------------------------------------------------------- the store

_HASH = re.compile("[0-9a-f]{64}")


class Store:
    """Keep installed sub-FMs on a node's disk, each under its content hash.

    Virtual clients of one machine share it. A copy is written to a temporary name and
    renamed, and verified by hash whenever it is loaded.
    """

    # Copies beyond the newest so many are removed, if no run used them for so long.
    KEEP, UNUSED_SECONDS = 4, 600.0

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or cache_dir() / "sub-fms"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self.name = self._own_name()
        except OSError as error:
            raise FedPFTError(
                f"cannot keep sub-FMs in {self._root} ({error}); set FEDPFT_CACHE to a "
                "directory that can be written"
            ) from error

    def _own_name(self) -> str:
        """Return the name that tells this store from every other one."""
        path = self._root / "name"
        if not path.exists():
            # A hard link appears whole and only once, also with many processes.
            draft = self._root / f"{uuid.uuid4().hex}.partial"
            draft.write_text(uuid.uuid4().hex)
            try:
                path.hardlink_to(draft)
            except FileExistsError:
                pass  # another process was first
            finally:
                draft.unlink()
        return path.read_text()

    def hashes(self) -> list[str]:
        """Return the hashes of all copies."""
        return sorted(p.name for p in self._root.iterdir() if len(p.name) == 64)

    def directory(self, content: str) -> Path:
        """Return where a copy is, or would be."""
        return self._root / content

    def put(self, content: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Add a copy.

        Raises:
            FedPFTError: the content does not have this hash, or the disk refuses.
        """
        if package_hash(tensors, text) != content:
            raise FedPFTError(f"received sub-FM does not have the hash {content[:12]}")
        draft = Path(tempfile.mkdtemp(dir=self._root, suffix=".partial"))
        try:
            save_file(
                {n: t.contiguous() for n, t in tensors.items()}, draft / "weights"
            )
            (draft / "package.json").write_text(text, encoding="utf-8")
            (draft / "processor").mkdir()
            for name, body in json.loads(text)["files"].items():
                check_processor_file(name)
                (draft / "processor" / name).write_bytes(base64.b64decode(body))
            if _read(draft, content) is None:
                raise FedPFTError(
                    f"received sub-FM {content[:12]} does not come back from the disk "
                    "as it was sent; mend the server, or this node's disk"
                )
            self._move(draft, content)
        except (OSError, SafetensorError) as error:  # the latter says "disk full"
            raise FedPFTError(
                f"cannot keep the sub-FM in {self._root}: {error}; make room there, or "
                "set FEDPFT_CACHE"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._prune()

    def get(self, content: str) -> tuple[dict[str, Tensor], str] | None:
        """Return tensors and JSON of a copy, or None if it is missing or damaged."""
        if not _HASH.fullmatch(content):  # it could lead out of the store
            return None
        held = _read(self.directory(content), content)
        if held is not None:
            with suppress(OSError):  # another process removed it
                os.utime(self.directory(content))
        return held

    def _move(self, draft: Path, content: str) -> None:
        place = self.directory(content)
        if self.get(content) is None and place.exists():
            shutil.rmtree(place)  # damaged
        try:
            draft.rename(place)
        except OSError:
            if self.get(content) is None:  # not merely another process that was first
                raise

    def _prune(self) -> None:
        copies = [self.directory(content) for content in self.hashes()]
        drafts = self._root.glob("*.partial")  # of processes that were killed, maybe
        for old in [*sorted(copies, key=last_used)[: -self.KEEP], *drafts]:
            with suppress(FileNotFoundError):  # another process has renamed it
                # What is being written is as old as its newest file.
                used = max(map(last_used, [old, *old.glob("*")]))
                if time.time() - used >= self.UNUSED_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)


def _read(directory: Path, content: str) -> tuple[dict[str, Tensor], str] | None:
    """Return tensors and JSON of a copy that has this hash, or None."""
    try:
        text = (directory / "package.json").read_text(encoding="utf-8")
        tensors = load_file(directory / "weights")
        if package_hash(tensors, text) != content:
            return None
        for name, body in json.loads(text)["files"].items():
            if (directory / "processor" / name).read_bytes() != base64.b64decode(body):
                return None
    except (OSError, ValueError, SafetensorError):  # gone, no UTF-8, cut
        return None
    return tensors, text


# --------------------------------------------------------------- changes of a package

_INDEX = {0: "@rows", 1: "@columns"}


def make_delta(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what `apply_delta` needs to turn `old` into `new`, bit for bit.

    Only changed rows or columns (whichever are fewer) are carried, with their places.
    Both must have the same names and shapes.
    """
    delta: dict[str, Tensor] = {}
    for name, tensor in new.items():
        changed = bits(old[name]) != bits(tensor)
        if not bool(changed.any()):
            continue
        axes = [0] if changed.ndim < 2 else [0, 1]
        places = {
            axis: changed.transpose(0, axis).flatten(1).any(1).nonzero().flatten()
            if changed.ndim > 1
            else changed.nonzero().flatten()
            for axis in axes
        }
        axis = min(axes, key=lambda a: len(places[a]) / tensor.shape[a])
        delta[name] = tensor.index_select(axis, places[axis])
        delta[name + _INDEX[axis]] = places[axis].to(torch.int32)
    return delta


def apply_delta(
    old: Mapping[str, Tensor], delta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a `make_delta`.

    Raises:
        FedPFTError: the difference names a tensor that `old` does not have.
    """
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name, values in delta.items():
        if name.endswith(tuple(_INDEX.values())):
            continue
        axis = 0 if name + _INDEX[0] in delta else 1
        places = delta.get(name + _INDEX[axis])
        if name not in new or places is None:
            raise FedPFTError(f"change of the sub-FM names an unknown tensor {name!r}")
        new[name].index_copy_(axis, places.long(), values)
    return new


def bits(tensor: Tensor) -> Tensor:
    """View floats as integers: -0.0 differs from 0.0, NaN equals itself."""
    if not tensor.is_floating_point():
        return tensor
    same_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(same_size[tensor.element_size()])


# ------------------------------------------------------------------------ the ledger


class Ledger:
    """Count bytes of record payloads by round, direction and kind.

    Kinds: install (a whole sub-FM), delta (its changed rows), adapter, statistics
    (activity), control (everything else). `sent` leaves out what a machine already
    held.
    """

    def __init__(self) -> None:
        self.round = 0
        self.logical: dict[tuple[int, str, str], int] = defaultdict(int)
        self.sent: dict[tuple[int, str, str], int] = defaultdict(int)

    def count(
        self, direction: str, message: Message, logical: bool = True, sent: bool = True
    ) -> int:
        """Count one message; `direction` is "down" (to clients) or "up".

        Returns:
            Its bytes, all kinds together.
        """
        return self.add(direction, message_bytes(message), logical, sent)

    def add(
        self,
        direction: str,
        sizes: Mapping[str, int],
        logical: bool = True,
        sent: bool = True,
    ) -> int:
        """Count what a message has, kind -> bytes; return the sum."""
        for kind, size in sizes.items():
            self.logical[self.round, direction, kind] += size if logical else 0
            self.sent[self.round, direction, kind] += size if sent else 0
        return sum(sizes.values())

    def state(self) -> list[list[Any]]:
        """Return all counts, as JSON can hold them."""
        return [[*key, self.logical[key], self.sent[key]] for key in self.logical]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Become what `state` returned."""
        for current, way, kind, logical, sent in state:
            self.logical[current, way, kind] = logical
            self.sent[current, way, kind] = sent

    def total(self, direction: str, current: int | None = None) -> int:
        """Return all bytes of a direction, in one round or in the whole run."""
        return sum(
            size
            for (of, way, _), size in self.logical.items()
            if way == direction and current in (None, of)
        )

    def kinds(self, direction: str) -> dict[str, int]:
        """Return the bytes of a direction in the whole run, by kind."""
        sizes: dict[str, int] = defaultdict(int)
        for (_, way, kind), size in sorted(self.logical.items()):
            if way == direction:
                sizes[kind] += size
        return dict(sizes)

    def table(self, current: int) -> dict[str, dict[str, int]]:
        """Return the bytes of a round as direction-kind -> logical, sent."""
        rows = sorted(key for key in self.logical if key[0] == current)
        return {
            f"{way}-{kind}": {
                "logical": self.logical[of, way, kind],
                "sent": self.sent[of, way, kind],
            }
            for of, way, kind in rows
        }


def message_bytes(message: Message) -> dict[str, int]:
    """Return the payload bytes of a message by kind: raw arrays, serialized records."""
    if message.has_error():
        return {}
    sizes: dict[str, int] = defaultdict(int)
    content = message.content
    arrays = "adapter"
    if message.metadata.message_type == INSTALL:
        arrays = "delta" if config_of(message).get("base") else "install"
    for record in content.array_records.values():
        sizes[arrays] += record.count_bytes()
    for config in content.config_records.values():
        whole = len(config.deflate())
        # The package's JSON holds the processor: it is part of the install.
        package = len(str(config.get(PACKAGE, "")))
        sizes[arrays] += package
        sizes["control"] += whole - package
    for metrics in content.metric_records.values():
        statistics, others = split_rates(metrics)
        sizes["statistics"] += len(statistics.deflate()) if statistics else 0
        sizes["control"] += len(others.deflate())
    return {kind: size for kind, size in sizes.items() if size}


def split_rates(metrics: Mapping[str, Any]) -> tuple[MetricRecord, MetricRecord]:
    """Part activity statistics from the other metrics."""
    rates = {k: v for k, v in metrics.items() if k.startswith(RATES)}
    return MetricRecord(rates), MetricRecord(
        {k: v for k, v in metrics.items() if k not in rates}
    )


def pack_rates(rates: Sequence[Tensor]) -> dict[str, list[float]]:
    """Return inactive rates as metrics, one list a layer."""
    return {f"{RATES}{i}": rate.double().tolist() for i, rate in enumerate(rates)}


def unpack_rates(metrics: Mapping[str, Any]) -> list[Tensor]:
    """Return the inactive rates among metrics, layer by layer."""
    names = sorted(metrics, key=lambda name: int(name.removeprefix(RATES)))
    return [torch.tensor(metrics[name], dtype=torch.float32) for name in names]


# ----------------------------------------------------------------------- grid wrappers


class CountingGrid(Grid):
    """Count the bytes of every exchange, poll promptly, and know who replied."""

    POLL_SECONDS, LEAST_SECONDS = 0.2, 0.02  # between two questions for replies

    def __init__(self, grid: Grid, ledger: Ledger) -> None:
        self._grid, self.ledger = grid, ledger
        self._recipient: dict[str, int] = {}
        self._codec: dict[str, str] = {}  # message id -> how its adapter travels
        # (round, node, direction) -> bytes that really went there.
        self.node_bytes: dict[tuple[int, int, str], int] = defaultdict(int)

    def node_of(self, reply: Message) -> int:
        """Return the node that a reply is about.

        Errors such as "node offline" name the SuperLink as their source, so the node is
        looked up by the message that was replied to.
        """
        asked = reply.metadata.reply_to_message_id
        return self._recipient.get(asked, reply.metadata.src_node_id)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse: deprecated in Flower."""
        raise NotImplementedError("use Message(...)")

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are online now."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Count and pass on."""
        batch = [self._encoded(message) for message in messages]
        self._grid.push_messages(batch)
        for message in batch:
            number = message.metadata.message_id
            self._recipient[number] = message.metadata.dst_node_id
            self._codec[number] = codec_of(message)
            # Installs go to machines, but count for each node: `Federation` does that.
            own = message.metadata.message_type != INSTALL
            size = self.ledger.count("down", message, logical=own)
            self.node_bytes[self.ledger.round, self._recipient[number], "down"] += size
        # Flower returns "" or nothing for one to a node that has just gone; asked for
        # by its own id, its error says whose it was.
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on and count.

        Flower reads all replies of a pull together, and has given them up by then: one
        that cannot be read takes the others along, and each is then told as lost.
        """
        try:
            replies = list(self._grid.pull_messages(message_ids))
        except _UNREADABLE as error:
            why = one_line(f"{error!r}")
            logger.warning("a reply cannot be read (%s); it and others are lost", why)
            return []
        for reply in replies:
            size = self.ledger.count("up", reply)
            self.node_bytes[self.ledger.round, self.node_of(reply), "up"] += size
            self._decode(reply)
        return replies

    def _encoded(self, message: Message) -> Message:
        codec = codec_of(message)
        if codec == "fp32":
            return message
        content = recode(message.content, codec, encode_arrays)
        told = message.metadata
        return Message(
            content,
            dst_node_id=told.dst_node_id,
            message_type=told.message_type,
            ttl=told.ttl,
            group_id=told.group_id,
        )

    def _decode(self, reply: Message) -> None:
        codec = self._codec.get(reply.metadata.reply_to_message_id, "fp32")
        if not reply.has_error():
            try:
                reply.content = recode(reply.content, codec, decode_arrays)
            except Exception as error:  # a hostile reply may raise anything
                why = one_line(str(error))
                logger.info("an adapter that is not %s: %s", codec, why)

    def send(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Send messages that live until a timeout in seconds, and return their ids.

        Who is late need not begin any more.
        """
        messages = list(messages)
        for message in messages:
            if timeout is not None:
                message.metadata.ttl = min(message.metadata.ttl, timeout)
        return list(self.push_messages(messages))

    def receive(
        self, asked: Iterable[str], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies to messages, by their ids, that come before a timeout."""
        waiting = set(asked)
        replies: list[Message] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting:
            began = time.monotonic()
            for reply in self.pull_messages(list(waiting)):
                answered = reply.metadata.reply_to_message_id
                if answered not in waiting:
                    logger.warning("a second reply, or one to nothing, is left out")
                    continue
                waiting.discard(answered)
                replies.append(reply)
            if not waiting or (deadline and time.monotonic() > deadline):
                break
            # A cheap question is asked often, an expensive one seldom.
            took = time.monotonic() - began
            time.sleep(min(self.POLL_SECONDS, max(self.LEAST_SECONDS, 10 * took)))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies that come before the timeout."""
        return self.receive(self.send(messages, timeout=timeout), timeout=timeout)


class ChosenNodes(CountingGrid):
    """Show an inner strategy exactly the nodes of this round."""

    def __init__(self, grid: CountingGrid, nodes: Sequence[int]) -> None:
        super().__init__(grid, Ledger())
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Return the chosen nodes."""
        return list(self._nodes)
