"""Count what crosses the connections between Flower's processes and their SuperLink."""

import socket
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from fedpft_flower.wire import HELLO, INSTALL, TRAIN

# What a SuperNode sends and gets that belongs to no message.
STANDBY, APP = "polls and heartbeats", "run and app code"
_KINDS = {
    "register-node": STANDBY,
    "activate-node": STANDBY,
    "send-node-heartbeat": STANDBY,
    "pull-messages": STANDBY,  # until a message comes
    "get-run": APP,
    "get-fab": APP,
}


@dataclass(frozen=True)
class Count:
    """Hold bytes to and from a SuperLink, and how many requests they were."""

    up: int = 0
    down: int = 0
    requests: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.up + other.up,
            self.down + other.down,
            self.requests + other.requests,
        )


class Tap:
    """Pass the connections to a port on to a SuperLink; count bytes by action.

    An action is the end of a request's path. Bytes are those of TCP's payload: HTTP
    with its headers, without those of TCP and IP.
    """

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self._target, self._lock = target, threading.Lock()
        self._counts: dict[str, Count] = defaultdict(Count)
        self._listener = socket.create_server((host, 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Return the port to connect to instead of the SuperLink's."""
        return int(self._listener.getsockname()[1])

    def counts(self) -> dict[str, Count]:
        """Return what was counted so far."""
        with self._lock:
            return dict(self._counts)

    def kind(self, action: str, response: bytes = b"") -> str:
        """Return what to count a request as, or a piece of its response."""
        return action

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):  # without a SuperLink the connection ends
            far = socket.create_connection(("127.0.0.1", self._target))
            with far:
                _Connection(self, near, far).serve()

    def count(self, kind: str, more: Count) -> None:
        """Add to what was counted of a kind."""
        with self._lock:
            self._counts[kind] += more


class NodeTap(Tap):
    """Count the bytes of one SuperNode by message type, `STANDBY` and `APP`.

    A SuperNode works on one message at a time: what follows its delivery is its own.
    """

    _current = STANDBY

    def kind(self, action: str, response: bytes = b"") -> str:
        """Return the type of the message that the node works on, or what else it is."""
        if action == "pull-messages":
            for name in (HELLO, INSTALL, TRAIN):
                # As protobuf writes a text: its length, then itself.
                if bytes([len(name)]) + name.encode() in response:
                    self._current = name
                    return name
        return _KINDS.get(action, self._current)


class _Connection:
    """Pass one connection on. HTTP/1.1 takes turns: a request, then its response."""

    def __init__(self, tap: Tap, near: socket.socket, far: socket.socket) -> None:
        self._tap, self._near, self._far = tap, near, far
        self._action, self._answered = "", True

    def serve(self) -> None:
        back = threading.Thread(target=self._pass_responses, daemon=True)
        back.start()
        self._pass_requests()
        back.join()

    def _pass_requests(self) -> None:
        with suppress(OSError):  # one end was killed
            while chunk := self._near.recv(1 << 16):
                begins, self._answered = self._answered, False
                if begins:
                    path = chunk.split(b" ", 2)[1].decode()
                    self._action = path.rsplit("/", 1)[-1]
                kind = self._tap.kind(self._action)
                self._tap.count(kind, Count(up=len(chunk), requests=int(begins)))
                self._far.sendall(chunk)
        _end(self._far)

    def _pass_responses(self) -> None:
        with suppress(OSError):
            while chunk := self._far.recv(1 << 16):
                self._answered = True
                kind = self._tap.kind(self._action, chunk)
                self._tap.count(kind, Count(down=len(chunk)))
                self._near.sendall(chunk)
        _end(self._near)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)
