"""Count what is sent, by round, direction and kind."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from fedpft_flower.wire import INSTALL, PACKAGE, config_of, split_rates


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
