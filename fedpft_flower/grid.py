"""Wrap Flower's grid: bytes are counted, replies asked for promptly, nodes chosen."""

import logging
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedpft_flower.codec import decode_arrays, encode_arrays, recode
from fedpft_flower.config import one_line
from fedpft_flower.ledger import Ledger
from fedpft_flower.mods import codec_of
from fedpft_flower.wire import INSTALL

logger = logging.getLogger(__name__)

# What Flower raises where a reply is not what it says, or says that it is more than
# there is room for; connections fail otherwise.
_UNREADABLE = (
    *(AttributeError, LookupError, RecursionError, TypeError, ValueError),
    *(DecodeError, MemoryError, struct.error),
)


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
