"""Know the nodes of a federation and bring the current sub-FM to them."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

from flwr.app import ConfigRecord, Message, RecordDict

from fedpft_flower.config import FedPFTError
from fedpft_flower.grid import CountingGrid
from fedpft_flower.ledger import message_bytes
from fedpft_flower.offer import Offer
from fedpft_flower.refusals import REFUSED, reason_of
from fedpft_flower.software import differences, source_hash, versions
from fedpft_flower.wire import CONFIG, HELLO, INSTALL, config_of, metrics_of

logger = logging.getLogger(__name__)

LONGEST_KEY = 200  # characters of a node's name
MOST_HELD = 1000  # sub-FMs that a node may say that it holds


# A node reads its rows before it answers; but for longer than this, or than
# `wait-seconds` where that is longer, nobody waits.
GREETING_SECONDS = 300.0
# And so many in the middle of training, where those who are known are enough.
GRACE_SECONDS = 10.0


class RoundError(FedPFTError):
    """Report that a round had too few nodes or replies; it may be tried again."""


@dataclass
class Node:
    """Remember what a node said of itself, and which sub-FM it was given."""

    key: str
    # Whether the key is the same in every run.
    named: bool
    # Which machine's disk it uses; virtual clients of one machine share it.
    store: str
    # Of how many partitions it has one; 0 when its rows are its own.
    partitions: int
    examples: int
    # Library -> version, where it is another than the server's.
    differing: dict[str, str]
    installed: str = ""


# What a node says of itself in reply to a greeting, and of which type.
_SAID = {
    "key": str,
    "named": bool,
    "store": str,
    "held": str,
    "libraries": str,
    "num-partitions": int,
    "num-examples": int,
}


def _introduction(
    reply: Message, mine: str, ours: Mapping[str, str]
) -> tuple[Node, set[str]]:
    """Return a node as its reply to a greeting has it, and the sub-FMs it holds.

    Args:
        reply: the reply, which may be hostile.
        mine: the hash of the server's sources.
        ours: versions of the server's libraries.

    Raises:
        FedPFTError: it runs other code, or says what cannot be.
    """
    said = {**config_of(reply), **metrics_of(reply)}
    if (source := said.get("source")) != mine:
        raise FedPFTError(
            f"it runs other code ({str(source)[:12]}) than the server ({mine[:12]}); "
            "upgrade it, remove its copies of the app (apps/ in its FLWR_HOME), or "
            "stop the local SuperLink"
        )
    for name, kind in _SAID.items():
        if type(value := said.get(name)) is not kind:
            wanted = kind.__name__
            raise FedPFTError(f"it says {name} = {value!r}, which is no {wanted}")
    key, examples = said["key"], said["num-examples"]
    if not (0 < len(key) <= LONGEST_KEY and key.isprintable()):
        raise FedPFTError(f"its name is {key!r}; give it a short site")
    if examples < 1 or said["num-partitions"] < 0:
        raise FedPFTError(f"it says that it has {examples} rows; give it some")
    try:
        held = {str(content) for content in json.loads(said["held"])}
    except (RecursionError, TypeError, ValueError) as error:
        raise FedPFTError(f"it says that it holds {said['held'][:40]!r}") from error
    longest = max(map(len, [said["store"], *held]))
    if longest > LONGEST_KEY or len(held) > MOST_HELD:
        raise FedPFTError(
            f"it says that it holds {len(held)} sub-FMs, and names of {longest} "
            f"characters; {MOST_HELD} and {LONGEST_KEY} are believed"
        )
    node = Node(
        key,
        said["named"],
        said["store"],
        said["num-partitions"],
        examples,
        differences(_libraries(said["libraries"]), ours),
    )
    return node, held


def _told(differing: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Say which versions a node has where the server has others."""
    pairs = [f"{name} {theirs}" for name, theirs in differing.items()]
    own = [f"{name} {ours[name]}" for name in differing]
    return f"{', '.join(pairs)}; the server has {', '.join(own)}"


def _libraries(text: str) -> dict[str, str]:
    """Return library -> version as a node says it.

    Raises:
        FedPFTError: it is no JSON object of short strings.
    """
    try:
        said = json.loads(text)
    except (RecursionError, ValueError):
        said = None
    if not isinstance(said, dict) or not all(
        isinstance(value, str) and len(value) <= LONGEST_KEY and value.isprintable()
        for value in said.values()
    ):
        raise FedPFTError(f"it says that its libraries are {text[:40]!r}")
    return said


class Federation:
    """Know the nodes and bring the current sub-FM to them."""

    def __init__(
        self,
        grid: CountingGrid,
        timeout: float,
        wait: float,
        labels: Sequence[str],
        given: Mapping[str, str] | None = None,
    ) -> None:
        self.grid, self._labels = grid, labels
        self._timeout, self._wait = timeout, wait
        self.nodes: dict[int, Node] = {}
        # Rows of every node with a name that was ever met; None: not told.
        self.met: dict[str, int | None] = {}
        # Before training a node that cannot take part ends the run; later, such a node
        # is left out instead.
        self.training = False
        # Whether a wait for all was in vain: the next one goes on without.
        self._waited = False
        # Node -> id of a greeting whose reply was not taken yet.
        self._greeted: dict[int, str] = {}
        # Nodes left out this time: what they are called, and why.
        self.refused: dict[int, tuple[str, str]] = {}
        # Old ids of nodes that came back under new ones; Flower lists them for a while.
        self._replaced: set[int] = set()
        # Nodes that give the name of another: whose, and what they are told. They are
        # not greeted again before that one is gone.
        self._doubles: dict[int, tuple[int, str]] = {}
        self._held: dict[str, set[str]] = {}  # store -> hashes of its sub-FMs
        # What nodes were given before they went away, or before the run was resumed.
        self._given: dict[str, str] = dict(given or {})
        self.offer = Offer()
        # Sub-FM, base -> bytes of an install from there, by kind; "" for a whole one.
        self._sizes: dict[tuple[str, str], dict[str, int]] = {}

    @property
    def partitions(self) -> int:
        """Return into how many partitions the nodes divide the run's rows, or 0."""
        return max((node.partitions for node in self.nodes.values()), default=0)

    def invite(self) -> None:
        """Greet the nodes that are online, and let `meet` take their replies."""
        # These live for as long as Flower lets them: loading an FM may take long.
        self._greeted = self._send_hello(sorted(self.grid.get_node_ids()), None)

    def meet(self, wanted: int, least: int | None = None) -> None:
        """Wait for nodes and let every new one introduce itself.

        Args:
            wanted: wait for so many nodes, at least one; before training, for as many
                as the nodes say that there are partitions.
            least: how many are enough when the wait is over; by default as many.

        Raises:
            FedPFTError: too few nodes came; before training, also when one refuses,
                runs other code, or names a partition that does not fit.
        """
        # Whatever it was may be mended: each may try again, but for doubles.
        online = set(self.grid.get_node_ids())
        self._replaced &= online  # one that was gone and is back is no old self
        self._doubles = {
            n: (old, why)
            for n, (old, why) in self._doubles.items()
            if n in online and old in self.nodes
        }
        self.refused = {n: (self.name(n), why) for n, (_, why) in self._doubles.items()}
        began = time.monotonic()
        # Those who were invited were there before those who come now.
        invited = online & self._greeted.keys()
        self._greeted = {n: asked for n, asked in self._greeted.items() if n in online}
        self._greet(sorted(invited), set(self.nodes), self._waits(wanted, 0.0))
        earlier = set(self.nodes)
        while True:
            online = set(self.grid.get_node_ids())
            self._forget_offline(online)
            known = self.nodes.keys() | self.refused.keys() | self._replaced
            new = sorted(online - known - invited)
            self._greet(new, earlier, self._waits(wanted, GRACE_SECONDS))
            invited = set()  # who did not answer is greeted again, if need be
            enough = max(1, wanted if least is None else least)
            expected = max(enough, wanted)
            if not self.training:
                self._check(wanted)
                if not self._waited:
                    expected = max(expected, self.partitions)
            if len(self.nodes) >= expected:
                return
            waited = time.monotonic() - began
            if waited > self._wait:
                break
            time.sleep(1.0)
        if len(self.nodes) < enough:
            silent = len(online - self.nodes.keys() - self.refused.keys())
            busy = f" ({silent} more are online and do not answer: busy with another "
            busy = f"{busy}run or one that was cut short, or reading rows for longer)"
            raise RoundError(
                f"{len(self.nodes)} nodes are here after {waited:.0f} s (wait-seconds ="
                f" {self._wait:g}){busy if silent else ''}, {enough} are needed; wait, "
                "start more SuperNodes, raise wait-seconds, or lower "
                f"{'' if self.training or least else 'train.clients-per-round, '}"
                "train.min-nodes or train.min-replies"
            )
        self._waited = True
        logger.warning("%d of %d nodes are online", len(self.nodes), expected)

    def install(self, nodes: Iterable[int], apart: bool = False) -> list[int]:
        """Bring the current sub-FM to the nodes that lack it, once to each machine.

        Args:
            nodes: who needs it.
            apart: send it to each of them, since what they say of their machines has
                proved wrong: copies of one machine give their stores one name.

        Returns:
            The nodes that hold it now.

        Raises:
            FedPFTError: before training, when a node that is there did not install it.
        """
        asked = list(nodes)
        if asked:  # whether or not they answer
            self.offer.expose()
        offer, current = self.offer, self.offer.sub_fm
        lacking = [n for n in asked if self.nodes[n].installed != current]
        machines: dict[str | int, int] = {}
        for node in lacking:
            store = self.nodes[node].store
            if current not in self._held[store]:
                machines.setdefault(node if apart else store, node)
        content = cache(offer.content)  # built at most once whole, once from each base
        lost = self._send(
            {
                n: content(offer.base(self._held[self.nodes[n].store]))
                for n in machines.values()
            }
        )
        for node in self._send({n: content("") for n in lost}):
            self._leave_out(node, "did not keep the sub-FM; see its log")
        for node in lacking:
            if node not in self.nodes:
                continue
            if current not in self._held[self.nodes[node].store]:
                self._leave_out(node, "its machine did not keep the sub-FM", False)
                continue
            # What a node of its own would have received, whether sent or not.
            base = offer.base({self.nodes[node].installed})
            if (current, base) not in self._sizes:
                whole = self._message(node, content(base))
                self._sizes[current, base] = message_bytes(whole)
            self.grid.ledger.add("down", self._sizes[current, base], sent=False)
            self.nodes[node].installed = current
        return [node for node in asked if node in self.nodes]

    def installs(self) -> dict[str, str]:
        """Return which sub-FM every node was given last, by sampling key."""
        return {**self._given, **{n.key: n.installed for n in self.nodes.values()}}

    def forget(self, node: int) -> None:
        """Note that a node has lost its copy of the current sub-FM.

        Of its machine's store nothing is believed any more.
        """
        self.nodes[node].installed = ""
        self._held[self.nodes[node].store].clear()

    def miss(self, node: int) -> None:
        """Take a node for gone until it answers a greeting, if it is known.

        Flower keeps it online as long as its SuperNode lives, even if nothing there
        takes messages any more: each round would wait for it again.
        """
        if gone := self.nodes.pop(node, None):
            self._given[gone.key] = gone.installed

    def name(self, node: int) -> str:
        """Return how to call a node in messages."""
        return self.nodes[node].key if node in self.nodes else f"node {node}"

    def sender(self, reply: Message) -> str:
        """Return how to call the node that a reply is about."""
        return self.name(self.grid.node_of(reply))

    def _message(self, node: int, content: RecordDict) -> Message:
        return Message(content, dst_node_id=node, message_type=INSTALL)

    def _send(self, contents: Mapping[int, RecordDict]) -> list[int]:
        """Send installs and return the nodes that lack the base of a change."""
        messages = [self._message(node, content) for node, content in contents.items()]
        lost, waiting = [], set(contents)
        for reply in self.grid.send_and_receive(messages, timeout=self._timeout):
            node = self.grid.node_of(reply)
            waiting.discard(node)
            if reply.has_error():
                refused = reply.error.code == REFUSED
                self._leave_out(node, reason_of(reply, self.name(node)), refused)
            elif config_of(reply).get("installed") is True:
                self._held[self.nodes[node].store].add(self.offer.sub_fm)
            else:
                lost.append(node)
        for node in waiting:
            self._leave_out(
                node, f"no answer to an install in timeout-seconds = {self._timeout:g}"
            )
        return lost

    def _leave_out(self, node: int, reason: str, refused: bool = True) -> None:
        """Go on without a node; before training only if it is gone, not if it refused.

        Raises:
            FedPFTError: it refused before training.
        """
        name = self.name(node)
        if refused and not self.training:
            raise FedPFTError(f"{name}: {reason}")
        logger.warning("left out: %s: %s", name, reason)
        self.refused[node] = name, reason
        self.miss(node)

    def _check(self, wanted: int) -> None:
        keys: dict[str, int] = {}
        sharing = [node for node in self.nodes.values() if node.partitions]
        for number, node in self.nodes.items():
            if node.key in keys:
                raise FedPFTError(
                    f"nodes {keys[node.key]} and {number} are both {node.key}; give "
                    "every node its own partition-id or site"
                )
            keys[node.key] = number
        for node in sharing:
            if node.partitions != sharing[0].partitions:
                raise FedPFTError(
                    f"{node.key} says num-partitions = {node.partitions}, another node "
                    f"{sharing[0].partitions}; give all the same"
                )
            if wanted > node.partitions and len(sharing) == len(self.nodes):
                raise FedPFTError(
                    "train.clients-per-round or train.min-nodes = "
                    f"{wanted}, but there are {node.partitions} nodes; lower it or add "
                    "nodes"
                )

    def _greet(self, nodes: list[int], earlier: Set[int], waits: float) -> None:
        mine, ours = source_hash(), versions()
        for reply in self._hello(nodes, waits):
            node = self.grid.node_of(reply)
            if reply.has_error() and reply.error.code != REFUSED:
                # It went offline, or its process died: it may come back.
                name = self.name(node)
                logger.info("no greeting of %s: %s", name, reason_of(reply, name))
                continue
            if reply.has_error():
                self._leave_out(node, reason_of(reply, self.name(node)))
                continue
            try:
                known, held = _introduction(reply, mine, ours)
            except FedPFTError as error:
                self._leave_out(node, str(error))
                continue
            if not self._has_room(known.key, node, earlier):
                continue
            counts = {known.partitions, self.partitions} - {0}
            if self.training and len(counts) > 1:
                why = f"num-partitions = {known.partitions}, others {self.partitions}"
                self._leave_out(node, f"it says {why}; give all the same")
                continue
            known.installed = self._given.get(known.key, "")
            self.nodes[node] = known
            if known.named:
                self.met[known.key] = known.examples
            self._held.setdefault(known.store, set()).update(held)
            if known.differing:
                logger.warning("%s has %s", known.key, _told(known.differing, ours))
            if not known.named:
                logger.warning(
                    "%s has neither site nor partition-id in its node-config: sampling "
                    "is not repeatable",
                    known.key,
                )

    @property
    def _patience(self) -> float:
        """Return the seconds that a greeting waits for its reply.

        A node that is online and never answers must not hold up the others for long;
        of one that is gone Flower says so within about a minute.
        """
        return min(self._timeout, max(self._wait, GREETING_SECONDS))

    def _waits(self, wanted: int, most: float) -> float:
        """Return how long to wait for a greeting: at most so long if all goes on."""
        goes_on = self.training and len(self.nodes) >= max(1, wanted)
        return min(most, self._patience) if goes_on else self._patience

    def _hello(self, nodes: Sequence[int], waits: float) -> list[Message]:
        """Greet nodes that were not yet, and return what comes back in so many seconds.

        Replies that come later are taken next time.
        """
        asked = {n: self._greeted.pop(n) for n in nodes if n in self._greeted}
        asked |= self._send_hello([n for n in nodes if n not in asked], self._patience)
        replies = self.grid.receive(asked.values(), timeout=waits)
        taken = {reply.metadata.reply_to_message_id for reply in replies}
        late = {n: number for n, number in asked.items() if number not in taken}
        if self.training:
            self._greeted |= late
        return replies

    def _send_hello(
        self, nodes: Sequence[int], timeout: float | None
    ) -> dict[int, str]:
        """Greet nodes and return the ids of the messages, by node."""
        labels = ConfigRecord({"labels": json.dumps(list(self._labels))})
        messages = [
            Message(RecordDict({CONFIG: labels}), dst_node_id=n, message_type=HELLO)
            for n in nodes
        ]
        asked = self.grid.send(messages, timeout=timeout)
        return dict(zip(nodes, asked, strict=True))

    def _forget_offline(self, online: set[int]) -> None:
        """Drop who is gone, but remember what it was given."""
        self._given = self.installs()
        self.nodes = {n: node for n, node in self.nodes.items() if n in online}

    def _has_room(self, key: str, newcomer: int, earlier: Set[int]) -> bool:
        """Tell whether a newcomer may have its name, maybe in its old self's place.

        Two that introduce themselves together before training are no node and its old
        self: there is a mistake in a node's config, which `_check` reports.

        Args:
            key: the name.
            newcomer: the node that gives it.
            earlier: the nodes that were known before this greeting.
        """
        for old in [n for n, node in self.nodes.items() if node.key == key]:
            if not self.training and old not in earlier:
                continue
            if self._answers(old):
                why = (
                    f"its site or partition-id makes it {key}, and node {old}, which "
                    "is still there, has that name; give it another one"
                )
                self._doubles[newcomer] = old, why
                self._leave_out(newcomer, why)
                return False
            logger.warning("%s came back as node %d", key, newcomer)
            self._replaced.add(old)
            self._given[key] = self.nodes.pop(old).installed
        return True

    def _answers(self, node: int) -> bool:
        """Tell whether a node still answers a greeting, if only to refuse it."""
        return any(
            not reply.has_error() or reply.error.code == REFUSED
            for reply in self._hello([node], self._patience)
        )
