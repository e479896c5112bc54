"""Federate a `ProxyServer` through Flower: the Strategy decides no number itself."""

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedpft_flower.adapters import check_adapter
from fedpft_flower.config import FedPFTError
from fedpft_flower.server import Metrics, ProxyServer, average_rates
from fedpft_flower.wire import (
    ARRAYS,
    CONFIG,
    HELLO,
    INSTALL,
    METRICS,
    PACKAGE,
    ChosenNodes,
    CountingGrid,
    difference,
    pack_tensors,
    package_hash,
    package_json,
    package_tensors,
    source_hash,
    split_rates,
    unpack_rates,
    unpack_tensors,
)

logger = logging.getLogger(__name__)

NODE_WAIT_SECONDS = 60.0


@dataclass
class Node:
    """Remember what a node said of itself, and which sub-FM it holds."""

    key: str
    store: str
    examples: int
    held: set[str]


class Federation:
    """Know the nodes and bring the current sub-FM to them."""

    def __init__(self, grid: CountingGrid, timeout: float) -> None:
        self.grid, self._timeout = grid, timeout
        self.nodes: dict[int, Node] = {}
        self._current = ""  # hash of the sub-FM to install
        self._previous: tuple[str, dict[str, Tensor]] = ("", {})
        self._tensors: dict[str, Tensor] = {}
        self._text = ""

    @property
    def sub_fm(self) -> str:
        """Return the hash of the current sub-FM."""
        return self._current

    def meet(self, wanted: int) -> None:
        """Wait for nodes and let every new one introduce itself.

        Args:
            wanted: wait for so many nodes, at least one.

        Raises:
            FedPFTError: too few nodes came, or one refuses, or runs other code.
        """
        deadline = time.monotonic() + NODE_WAIT_SECONDS
        while True:
            online = list(self.grid.get_node_ids())
            self._greet([node for node in online if node not in self.nodes])
            self.nodes = {n: self.nodes[n] for n in online if n in self.nodes}
            if len(self.nodes) >= max(1, wanted):
                return
            if time.monotonic() > deadline:
                raise FedPFTError(
                    f"{len(self.nodes)} nodes are online after "
                    f"{NODE_WAIT_SECONDS:.0f} s, {max(1, wanted)} are needed; start "
                    "more SuperNodes or lower train.clients-per-round"
                )
            time.sleep(1.0)

    def offer(self, server: ProxyServer) -> None:
        """Make the server's sub-FM, as it is now, the one to install."""
        package = server.package()
        tensors, text = package_tensors(package), package_json(package)
        content = package_hash(tensors, text)
        if content != self._current:
            self._previous = (self._current, self._tensors)
            self._current, self._tensors, self._text = content, tensors, text

    def install(self, nodes: Iterable[int]) -> None:
        """Bring the current sub-FM to the nodes that lack it, once to each machine.

        Raises:
            FedPFTError: a node did not install it.
        """
        chosen: dict[str, int] = {}
        sharing: list[int] = []
        for node in nodes:
            if self._current in self.nodes[node].held:
                continue
            store = self.nodes[node].store
            if store in chosen:
                sharing.append(node)
            else:
                chosen[store] = node
        refused = self._install(list(chosen.values()))
        self._install(refused, whole=True)
        for node in sharing:  # their machine holds it now: nothing is sent
            message = self._message(node, self._whole(node))
            self.grid.ledger.count("down", message, sent=False)
            self.nodes[node].held.add(self._current)

    def _install(self, nodes: list[int], whole: bool = False) -> list[int]:
        """Return the nodes that lack the base of a change."""
        messages = [self._message(n, whole or self._whole(n)) for n in nodes]
        refused = []
        answers = self.grid.send_and_receive(messages, timeout=self._timeout)
        waiting = set(nodes)
        for reply in answers:
            node = self.grid.node_of(reply)
            waiting.discard(node)
            if reply.has_error():
                raise FedPFTError(
                    f"{self.name(node)}: {first_line(reply.error.reason)}"
                )
            if reply.content[CONFIG]["installed"]:
                self.nodes[node].held.add(self._current)
            else:
                refused.append(node)
        if waiting or (refused and whole):
            late = self.name(next(iter(waiting or refused)))
            raise FedPFTError(f"{late} did not install the sub-FM; see its log")
        return refused

    def forget(self, node: int) -> None:
        """Note that a node lost its copy of the current sub-FM."""
        store = self.nodes[node].store
        for other in self.nodes.values():
            if other.store == store:
                other.held.clear()

    def name(self, node: int) -> str:
        """Return how to call a node in messages."""
        return self.nodes[node].key if node in self.nodes else f"node {node}"

    def _whole(self, node: int) -> bool:
        return not self._previous[0] or self._previous[0] not in self.nodes[node].held

    def _message(self, node: int, whole: bool) -> Message:
        base, old = ("", {}) if whole else self._previous
        tensors = difference(old, self._tensors) if base else self._tensors
        arrays, casts = pack_tensors(tensors)
        request = {
            "sub-fm": self._current,
            "base": base,
            "bit-cast": casts,
            PACKAGE: "" if base else self._text,
        }
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(request)})
        return Message(content, dst_node_id=node, message_type=INSTALL)

    def _greet(self, nodes: list[int]) -> None:
        messages = [
            Message(
                RecordDict({CONFIG: ConfigRecord()}), dst_node_id=n, message_type=HELLO
            )
            for n in nodes
        ]
        mine = source_hash()
        for reply in self.grid.send_and_receive(messages, timeout=self._timeout):
            node = self.grid.node_of(reply)
            if reply.has_error():
                raise FedPFTError(f"node {node}: {first_line(reply.error.reason)}")
            said, sizes = reply.content[CONFIG], reply.content[METRICS]
            if said["source"] != mine:
                raise FedPFTError(
                    f"{said['key']} runs other code ({said['source'][:12]}) than the "
                    f"server ({mine[:12]}); stop the local SuperLink or upgrade the node"
                )
            self.nodes[node] = Node(
                key=str(said["key"]),
                store=str(said["store"]),
                examples=int(sizes["num-examples"]),
                held=set(json.loads(str(said["held"]))),
            )


class FedPFT(Strategy):
    """Train adapters on the sub-FM and plug them into the server's FM.

    Sampling, learning rate and alignment are the `ProxyServer`'s; averaging is the inner
    Flower strategy's.
    """

    def __init__(
        self, server: ProxyServer, federation: Federation, inner: Strategy | None = None
    ) -> None:
        self.server, self.federation = server, federation
        # Nodes are chosen here: the inner strategy must take all it is shown.
        self.inner = inner or FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_evaluate_nodes=0,
            min_available_nodes=1,
        )
        self.rounds: dict[int, Metrics] = {}
        self._sent: list[Message] = []

    def summary(self) -> None:
        """Log the method and the plan."""
        plan = self.server.plan
        logger.info(
            "method %s: %d of %d layers compressed, %.1f %% of the FM's weights stay "
            "at the server",
            self.server.config.method,
            len(plan.compressed),
            len(plan.layers),
            100 * self.server.share_withheld,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose nodes, install the sub-FM where it is missing, ask them to train."""
        server, federation = self.server, self.federation
        federation.grid.ledger.round = server_round
        federation.meet(server.config.train.clients_per_round)
        by_key = {node.key: number for number, node in federation.nodes.items()}
        chosen = [by_key[key] for key in server.sample(list(by_key), server_round)]
        federation.offer(server)
        federation.install(chosen)
        request = ConfigRecord(
            {
                "lr": server.lr(server_round),
                "measure-activity": server.wants_activity(server_round),
                "sub-fm": federation.sub_fm,
            }
        )
        self.rounds[server_round] = {
            "round": server_round,
            "lr": server.lr(server_round),
            "clients": [federation.name(node) for node in chosen],
        }
        view = ChosenNodes(federation.grid, chosen)
        messages = self.inner.configure_train(server_round, arrays, request, view)
        self._sent = list(messages)
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, let the inner strategy average, and end the round.

        Raises:
            FedPFTError: no reply can be used.
        """
        federation, record = self.federation, self.rounds[server_round]
        good, bad = self._sorted_out([*replies])
        record["failures"] = bad
        if not good:
            raise FedPFTError(
                f"round {server_round}: no client trained; {'; '.join(bad.values())}"
            )
        good.sort(key=lambda reply: federation.name(federation.node_of(reply)))
        rates, weights = [], []
        for reply in good:
            statistics, others = split_rates(reply.content[METRICS])
            reply.content[METRICS] = others
            if statistics:
                rates.append(unpack_rates(statistics))
                weights.append(int(str(others["num-examples"])))
        clients = {
            federation.name(federation.node_of(reply)): dict(reply.content[METRICS])
            for reply in good
        }
        record["per-client"] = clients
        record["peak-memory-client"] = max(c["peak-memory"] for c in clients.values())
        arrays, metrics = self.inner.aggregate_train(server_round, good)
        if arrays is None or metrics is None:
            raise FedPFTError(f"round {server_round}: the strategy aggregated nothing")
        adapter = {
            name: tensor.to(self.server.adapter[name].dtype)
            for name, tensor in unpack_tensors(arrays).items()
        }
        record["train-loss"] = metrics["train_loss"]
        averaged = average_rates(rates, weights) if rates else None
        alignment = self.server.end_round(server_round, adapter, averaged)
        if alignment:
            record["alignment"] = alignment
        return pack_tensors(self.server.adapter)[0], metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates, since only it has the FM."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate nothing."""
        return None

    def _sorted_out(
        self, replies: list[Message]
    ) -> tuple[list[Message], dict[str, str]]:
        """Return usable replies, and the reason for each node without one."""
        federation = self.federation
        lost = [r for r in replies if not r.has_error() and "missing" in _config(r)]
        if lost:
            nodes = {federation.node_of(reply) for reply in lost}
            for node in nodes:
                federation.forget(node)
            federation.install(nodes)
            again = [
                Message(
                    m.content, dst_node_id=node, message_type=m.metadata.message_type
                )
                for m in self._sent
                if (node := m.metadata.dst_node_id) in nodes
            ]
            replies = [r for r in replies if r not in lost]
            timeout = self.server.config.timeout_seconds
            replies += federation.grid.send_and_receive(again, timeout=timeout)
        good, bad = [], {}
        for reply in replies:
            name = federation.name(federation.node_of(reply))
            reason = self._problem(reply)
            if reason:
                logger.warning("%s is left out: %s", name, reason)
                bad[name] = f"{name}: {reason}"
            else:
                good.append(reply)
        answered = {federation.name(federation.node_of(r)) for r in replies}
        for message in self._sent:
            name = federation.name(message.metadata.dst_node_id)
            if name not in answered:
                logger.warning("%s did not reply in time", name)
                bad[name] = f"{name}: no reply in time"
        return good, bad

    def _problem(self, reply: Message) -> str:
        """Return why a reply cannot be used, or nothing."""
        if reply.has_error():
            return first_line(reply.error.reason)
        content = reply.content
        if list(content.array_records) != [ARRAYS] or METRICS not in content:
            return "the reply is not one adapter with metrics"
        metrics: Any = content[METRICS]
        if not isinstance(metrics.get("num-examples"), int):
            return "the reply has no num-examples"
        adapter = unpack_tensors(content[ARRAYS])
        if list(adapter) != list(self.server.adapter):
            return "the adapter has other names or another order"
        try:
            check_adapter(adapter, self.server.adapter)
        except FedPFTError as error:
            return str(error)
        return ""


def first_line(reason: str | None) -> str:
    """Return what matters of an error's reason, which may be a whole traceback."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return lines[-1] if lines else "unknown error"


def _config(reply: Message) -> ConfigRecord:
    record = reply.content.config_records.get(CONFIG, ConfigRecord())
    assert isinstance(record, ConfigRecord)
    return record
