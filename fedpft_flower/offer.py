"""Hold the sub-FM that nodes are to have, whole and as changes of earlier ones."""

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedpft_flower.delta import make_delta
from fedpft_flower.protection import Exposure
from fedpft_flower.server import ProxyServer
from fedpft_flower.store import package_hash, package_json, package_tensors
from fedpft_flower.wire import ARRAYS, CONFIG, PACKAGE, pack_tensors

EARLIER = 8  # sub-FMs that a change can start from; a node with an older one gets all


class Offer:
    """Be the current sub-FM on the way to the nodes, and count what it gives away."""

    def __init__(self) -> None:
        self.sub_fm = ""  # the hash of the current one
        # What nodes were given, against the FM's own parameters.
        self.exposure = Exposure()
        self._exposed = ""  # hash of the sub-FM that was counted last
        self._version = -1
        self._tensors: dict[str, Tensor] = {}
        self._text = ""
        # Hash -> tensors of earlier sub-FMs, the newest last: a change can start there.
        self._earlier: dict[str, dict[str, Tensor]] = {}
        self._own: Callable[[], Iterable[tuple[str, Tensor]]] = tuple
        self._codec = ""

    @property
    def bytes(self) -> int:
        """Return the size of the whole sub-FM: tensors, plan and processor."""
        return sum(t.nbytes for t in self._tensors.values()) + len(self._text)

    def renew(self, server: ProxyServer) -> None:
        """Become the server's sub-FM, as it is now."""
        if server.version == self._version:
            return
        self._version, self._own = server.version, server.untouched
        package = server.package()
        self._codec = server.config.wire.frozen
        tensors, text = package_tensors(package, self._codec), package_json(package)
        content = package_hash(tensors, text)
        if content != self.sub_fm:
            self._remember()
            self.sub_fm, self._tensors, self._text = content, tensors, text
            self._earlier = {
                name: _shared(old, tensors) for name, old in self._earlier.items()
            }

    def expose(self) -> None:
        """Count the current sub-FM as given, if it is not yet."""
        if self._exposed != self.sub_fm:
            self.exposure.note(self._tensors, self._own(), self._codec)
            self._exposed = self.sub_fm

    def base(self, held: Set[str]) -> str:
        """Return the newest earlier sub-FM among those held, or "" for none."""
        return next((name for name in reversed(self._earlier) if name in held), "")

    def content(self, base: str) -> RecordDict:
        """Return an install: the change from a base, or with "" the whole."""
        tensors = self._tensors
        if base:
            tensors = make_delta(self._earlier[base], tensors)
        arrays, casts = pack_tensors(tensors)
        request = ConfigRecord(
            {
                "sub-fm": self.sub_fm,
                "base": base,
                "bit-cast": casts,
                PACKAGE: "" if base else self._text,
            }
        )
        return RecordDict({ARRAYS: arrays, CONFIG: request})

    def _remember(self) -> None:
        """Keep the sub-FM that another one replaces, and the newest before it."""
        if self.sub_fm:
            self._earlier.pop(self.sub_fm, None)
            self._earlier[self.sub_fm] = self._tensors
        for name in list(self._earlier)[:-EARLIER]:
            del self._earlier[name]


def _shared(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the old tensors; where nothing changed, the new ones take no more room."""
    return {
        name: new[name] if torch.equal(tensor, new[name]) else tensor
        for name, tensor in old.items()
    }
