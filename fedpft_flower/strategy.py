"""Federate a `ProxyServer` through Flower: the Strategy decides no number itself."""

import logging
import math
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedpft_flower.adapters import check_adapter
from fedpft_flower.config import FedPFTError
from fedpft_flower.federation import Federation, last_line
from fedpft_flower.server import Metrics, ProxyServer, average_rates
from fedpft_flower.strategies import shortage
from fedpft_flower.wire import (
    ARRAYS,
    METRICS,
    TRAIN_METRICS,
    ChosenNodes,
    arrays_of,
    config_of,
    metrics_of,
    pack_tensors,
    split_rates,
    unpack_rates,
    unpack_tensors,
)

logger = logging.getLogger(__name__)


class FedPFT(Strategy):
    """Train adapters on the sub-FM and plug them into the server's FM.

    Sampling, learning rate and alignment are the `ProxyServer`'s; averaging is the
    inner Flower strategy's.
    """

    def __init__(
        self, server: ProxyServer, federation: Federation, inner: FedAvg
    ) -> None:
        self.server, self.federation, self.inner = server, federation, inner
        self.rounds: dict[int, Metrics] = {}
        self._sent: list[Message] = []
        self._current = 0

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
        self._current = federation.grid.ledger.round = server_round
        federation.meet(server.config.train.clients_per_round)
        by_key = {node.key: number for number, node in federation.nodes.items()}
        chosen = [by_key[key] for key in server.sample(list(by_key), server_round)]
        federation.offer(server)
        before = dict(federation.refused)
        chosen = federation.install(chosen)
        federation.training = True
        left_out = federation.refused.items() - before.items()
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
            "failures": {f"node {node}": reason for node, reason in left_out},
        }
        if not chosen:
            raise FedPFTError(
                f"round {server_round}: no chosen node holds the sub-FM; "
                f"{'; '.join(reason for _, reason in left_out)}"
            )
        view = ChosenNodes(federation.grid, chosen)
        messages = self.inner.configure_train(server_round, arrays, request, view)
        self._sent = list(messages)
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, let the inner strategy average, and end the round.

        Raises:
            FedPFTError: fewer replies can be used than the inner strategy needs.
        """
        federation, record = self.federation, self.rounds[server_round]
        good, bad = self._sorted_out([*replies])
        record["failures"] |= bad
        if not good:
            raise FedPFTError(
                f"round {server_round}: no client trained; {'; '.join(bad.values())}"
            )
        lacking = shortage(self.inner, len(good))
        if lacking:
            reasons = "; ".join([f"{lacking} usable replies", *bad.values()])
            raise FedPFTError(f"round {server_round}: {reasons}")
        good.sort(key=lambda reply: federation.sender(reply))
        rates, weights = [], []
        for reply in good:
            statistics, others = split_rates(metrics_of(reply))
            reply.content[METRICS] = others
            if statistics:
                rates.append(unpack_rates(statistics))
                weights.append(metrics_of(reply)["num-examples"])
        clients = {federation.sender(reply): metrics_of(reply) for reply in good}
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
        lost = [r for r in replies if not r.has_error() and "missing" in config_of(r)]
        if lost:
            nodes = {federation.grid.node_of(reply) for reply in lost}
            for node in nodes:
                federation.forget(node)
            nodes = set(federation.install(nodes))
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
            name = federation.sender(reply)
            reason = self._problem(reply)
            if reason:
                logger.warning("%s is left out: %s", name, reason)
                bad[name] = f"{name}: {reason}"
            else:
                good.append(reply)
        answered = {federation.sender(r) for r in replies}
        for message in self._sent:
            name = federation.name(message.metadata.dst_node_id)
            if name not in answered:
                logger.warning("%s did not reply in time", name)
                bad[name] = f"{name}: no reply in time"
        return good, bad

    def _problem(self, reply: Message) -> str:
        """Return why a reply cannot be used, or nothing."""
        if reply.has_error():
            return last_line(reply.error.reason)
        if "missing" in config_of(reply):
            return "it lost the sub-FM again"
        try:
            self._check(reply)
        except (FedPFTError, KeyError, TypeError, ValueError) as error:
            return f"unusable reply: {error}"
        return ""

    def _check(self, reply: Message) -> None:
        if list(reply.content.array_records) != [ARRAYS]:
            raise FedPFTError("it is not one adapter with metrics")
        statistics, others = split_rates(metrics_of(reply))
        if set(others) != TRAIN_METRICS:
            raise FedPFTError(f"its metrics are {sorted(others)}")
        if not all(math.isfinite(metrics_of(reply)[name]) for name in others):
            raise FedPFTError("a metric is not finite")
        if not metrics_of(reply)["num-examples"] > 0:
            raise FedPFTError("num-examples is not positive")
        self.server.check_rates(unpack_rates(statistics), self._current)
        adapter = unpack_tensors(arrays_of(reply))
        if list(adapter) != list(self.server.adapter):
            raise FedPFTError("the adapter has other names or another order")
        check_adapter(adapter, self.server.adapter)
