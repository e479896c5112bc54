"""Federate a `ProxyServer` through Flower: the Strategy decides no number itself."""

import logging
from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import Tensor

from fedpft_flower.activity import average_rates
from fedpft_flower.adapters import Adapter
from fedpft_flower.config import FedPFTError, one_line
from fedpft_flower.federation import Federation, RoundError
from fedpft_flower.grid import ChosenNodes
from fedpft_flower.metrics import Metrics
from fedpft_flower.privacy import Privacy
from fedpft_flower.refusals import is_silence, reason_of
from fedpft_flower.sampling import sample, stand_ins
from fedpft_flower.server import ProxyServer
from fedpft_flower.strategies import shortage
from fedpft_flower.tasks import task_of
from fedpft_flower.wire import (
    ARRAYS,
    METRICS,
    arrays_of,
    config_of,
    metrics_of,
    pack_tensors,
    split_rates,
    train_metrics,
    unpack_rates,
    unpack_tensors,
)

logger = logging.getLogger(__name__)


class FedPFT(Strategy):
    """Train adapters on the sub-FM and plug them into the server's FM.

    Learning rate and alignment are the `ProxyServer`'s; averaging is the
    inner Flower strategy's, where there is `privacy` with clipping and noise.
    """

    def __init__(
        self,
        server: ProxyServer,
        federation: Federation,
        inner: FedAvg,
        privacy: Privacy | None = None,
    ) -> None:
        self.server, self.federation, self.inner = server, federation, inner
        self.privacy = privacy
        self.rounds: dict[int, Metrics] = {}
        # The last round that is over (0: evaluated before training); a resumed run
        # begins behind it.
        self.done = -1
        # Set to end after the round that is over now.
        self.stopped = False
        self._sent: list[Message] = []
        self._silent: set[int] = set()  # nodes that did not answer the last messages
        # Of the round: whom it asked, which replies are good, how often it was tried.
        self._asked: list[str] = []
        self._good: dict[str, Message] = {}
        self._numbers: dict[str, int] = {}  # nodes that this round asked, by name
        self._attempt = 0

    def summary(self) -> None:
        """Log the method and the plan."""
        plan = self.server.plan
        logger.info(
            "method %s: %s, adapters in %d; %.1f %% of the FM's weights stay at the "
            "server",
            self.server.config.method,
            plan.told,
            len(plan.layers if plan.adapters is None else plan.adapters),
            100 * self.server.share_withheld,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds behind `done`, until the last one, `stopped`, or no privacy.

        Takes the place of Flower's loop, which can neither resume, try a round again,
        nor stop early; the arguments are the same, and so are the hooks of training.
        Those of federated evaluation are not called: only the server evaluates.

        Raises:
            RoundError: a round failed as often as `train.max-retries` allows.
        """
        result, arrays = Result(), initial_arrays
        self.summary()
        if self.done < 0:
            if evaluate_fn is not None:
                _note(result.evaluate_metrics_serverapp, 0, evaluate_fn(0, arrays))
            self.done = 0
        while self.done < num_rounds and not self.stopped:
            current = self.done + 1
            if self.privacy is not None and self.privacy.is_over:
                logger.info(
                    "privacy.max-epsilon: %g are spent, round %d would exceed it; the "
                    "run ends after round %d",
                    self.privacy.spent()["epsilon"],
                    current,
                    self.done,
                )
                break
            request = train_config or ConfigRecord()
            arrays, metrics = self._round(current, arrays, request, grid, timeout)
            result.arrays, self.done = arrays, current
            _note(result.train_metrics_clientapp, current, metrics)
            if evaluate_fn is not None:
                told = evaluate_fn(current, arrays)
                _note(result.evaluate_metrics_serverapp, current, told)
        return result

    def _round(
        self,
        current: int,
        arrays: ArrayRecord,
        request: ConfigRecord,
        grid: Grid,
        timeout: float,
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Train and aggregate, again if too few usable replies came."""
        self._asked, self._good, self._numbers = [], {}, {}
        self.rounds[current] = {
            "round": current,
            "lr": self.server.lr(current),
            "failures": {},
        }
        tries = self.server.config.train.max_retries + 1
        for attempt in range(tries):
            self._attempt = attempt
            try:
                messages = self.configure_train(current, arrays, request, grid)
                replies = grid.send_and_receive(messages, timeout=timeout)
                ended = self.aggregate_train(current, replies)
                self._sent, self._good = [], {}  # as large as all clients' adapters
                return ended
            except RoundError as error:
                problem = error
                logger.warning("try %d of %d failed: %s", attempt + 1, tries, error)
        raise RoundError(f"{problem} (tried {tries} times: train.max-retries)")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose nodes, install the sub-FM where it is missing, ask them to train.

        Raises:
            RoundError: no chosen node holds the sub-FM.
        """
        server, federation = self.server, self.federation
        record = self.rounds[server_round]
        federation.grid.ledger.round = server_round
        train = server.config.train
        for node in self._silent:
            if len(federation.nodes) > train.min_replies:  # the others are enough
                federation.miss(node)
        self._silent = set()
        begun = federation.training or self.done > 0
        federation.meet(train.min_replies if begun else train.nodes_awaited)
        chosen = self._choose(server_round)
        federation.offer.renew(server)
        chosen = federation.install(chosen)
        federation.training = True
        left_out = dict(federation.refused.values())
        record["failures"] |= left_out
        self._numbers |= {federation.name(node): node for node in chosen}
        record["clients"] = sorted({*self._good, *map(federation.name, chosen)})
        request = ConfigRecord(
            {
                "lr": server.lr(server_round),
                "measure-activity": server.wants_activity(server_round),
                "sub-fm": federation.offer.sub_fm,
                "codec": server.config.wire.adapter,
            }
        )
        if self.privacy is not None and len(chosen) != self.privacy.clients:
            self._sent = []  # the round is skipped: nobody need train for it
            return []
        if not chosen:
            raise RoundError(
                f"round {server_round}: no chosen node holds the sub-FM; "
                f"{'; '.join(_named(left_out))}"
            )
        view = ChosenNodes(federation.grid, chosen)
        averaging = self.privacy or self.inner
        messages = averaging.configure_train(server_round, arrays, request, view)
        self._sent = list(messages)
        return self._sent

    def _choose(self, current: int) -> list[int]:
        """Return the nodes to ask: at a new try those that failed, or stand-ins."""
        config = self.server.config
        nodes = {n.key: number for number, n in self.federation.nodes.items()}
        if not self._asked:
            self._asked = sample(config, list(nodes), current)
        lacking = [key for key in self._asked if key not in self._good]
        there = [key for key in lacking if key in nodes]
        others = sorted(nodes.keys() - {*self._asked})
        gone = len(lacking) - len(there)
        new = stand_ins(config, others, gone, current, self._attempt)
        self._asked += new
        return [nodes[key] for key in sorted([*there, *new])]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Check the replies, let the inner strategy average, and end the round.

        Raises:
            RoundError: fewer replies can be used than there must be.
            FedPFTError: the aggregated adapter is of no use.
        """
        record = self.rounds[server_round]
        good, bad = self._sorted_out(server_round, [*replies])
        self._good |= {self.federation.sender(reply): reply for reply in good}
        record["failures"] = {
            name: reason
            for name, reason in {**record["failures"], **bad}.items()
            if name not in self._good
        }
        if self.privacy is None:
            self._check_enough(server_round, bad)
        # In the order of the keys: the order of arrival must not matter.
        kept = [self._good[name] for name in sorted(self._good)]
        rates, weights = [], []
        for reply in kept:
            statistics, others = split_rates(metrics_of(reply))
            reply.content[METRICS] = others
            if statistics:
                rates.append(unpack_rates(statistics))
                weights.append(metrics_of(reply)["num-examples"])
        self._describe(server_round)
        if self.privacy is not None and len(kept) != self.privacy.clients:
            return self._skip(server_round, len(kept))
        averaging = self.privacy or self.inner
        arrays, metrics = averaging.aggregate_train(server_round, kept)
        if arrays is None or metrics is None:
            raise FedPFTError(f"round {server_round}: the strategy aggregated nothing")
        adapter = {
            name: tensor.to(self.server.adapter[name].dtype)
            for name, tensor in unpack_tensors(arrays).items()
        }
        self._check_aggregated(server_round, adapter)
        if "train_loss" in metrics:
            record["train-loss"] = metrics["train_loss"]
        averaged = average_rates(rates, weights) if rates else None
        return self._end_round(server_round, adapter, averaged), metrics

    def _end_round(
        self, current: int, adapter: Adapter, rates: list[Tensor] | None
    ) -> ArrayRecord:
        record = self.rounds[current]
        alignment = self.server.end_round(current, adapter, rates)
        if alignment:
            record["alignment"] = alignment
        return pack_tensors(self.server.adapter)[0]

    def _skip(self, current: int, count: int) -> tuple[ArrayRecord, MetricRecord]:
        """End a round whose replies are not all there, with the adapter as it was.

        The noise is that of all clients, and asking others would let a client's failure
        choose who is averaged. Nothing made of the replies leaves this method, so that
        no privacy is spent; what shows is which client failed.
        """
        assert self.privacy is not None
        reason = f"{count} usable replies of {self.privacy.clients}"
        self.rounds[current]["skipped"] = reason
        logger.warning("round %d is skipped: %s", current, reason)
        return self._end_round(current, self.server.adapter, None), MetricRecord()

    def _check_aggregated(self, current: int, adapter: Adapter) -> None:
        # All replies were finite, so it is the strategy that diverges.
        if not all(bool(tensor.isfinite().all()) for tensor in adapter.values()):
            name = self.server.config.strategy
            raise FedPFTError(
                f"round {current}: strategy {name!r} made an adapter that is not finite"
                "; lower its step size in strategy-args, or train.lr"
            )

    def _check_enough(self, current: int, bad: Mapping[str, str]) -> None:
        wanted, count = self.server.config.train.min_replies, len(self._good)
        if not count:
            problem = "no client trained"
        elif count < wanted:
            problem = f"train.min-replies = {wanted}, and n = {count} usable replies"
        elif lacking := shortage(self.inner, count):
            problem = f"{lacking} usable replies"
        else:
            return
        raise RoundError(f"round {current}: {'; '.join([problem, *_named(bad)])}")

    def _describe(self, current: int) -> None:
        """Note what every client of a round did, and what it cost."""
        record, federation = self.rounds[current], self.federation
        table: dict[str, Metrics] = {
            name: {"outcome": reason} for name, reason in record["failures"].items()
        }
        for name, reply in self._good.items():
            table[name] = {"outcome": "ok", **metrics_of(reply)}
        for name in table.keys() & self._numbers.keys():
            for way in ("down", "up"):
                size = federation.grid.node_bytes[current, self._numbers[name], way]
                table[name][f"bytes-{way}"] = size
        record["per-client"] = table
        for key in ("peak-memory", "peak-gpu-memory"):
            if peaks := [one[key] for one in table.values() if key in one]:
                record[f"{key}-client"] = max(peaks)

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
        self, server_round: int, replies: list[Message]
    ) -> tuple[list[Message], dict[str, str]]:
        """Return usable replies, and the reason for each node without one."""
        federation = self.federation
        asked = [message.metadata.dst_node_id for message in self._sent]
        names = {node: federation.name(node) for node in asked}
        for apart in (False, True):
            replies = self._with_sub_fm(replies, apart)
        good, bad = [], {}
        for reply in replies:
            name = federation.sender(reply)
            reason = one_line(self._problem(server_round, reply))
            if reason:
                logger.warning("%s is left out: %s", name, reason)
                bad[name] = reason
            else:
                self._bound_weight(name, reply)
                good.append(reply)
        told = [reply for reply in replies if not is_silence(reply)]
        self._silent = names.keys() - {federation.grid.node_of(reply) for reply in told}
        answered = {federation.grid.node_of(reply) for reply in replies}
        for node, name in names.items():
            if node not in answered:
                _, reason = federation.refused.get(node, (name, "no reply in time"))
                logger.warning("%s is left out: %s", name, reason)
                bad[name] = reason
        return good, bad

    def _with_sub_fm(self, replies: list[Message], apart: bool) -> list[Message]:
        """Let nodes that have lost the sub-FM train with it; return all replies."""
        federation = self.federation
        lost = [r for r in replies if not r.has_error() and "missing" in config_of(r)]
        if not lost:
            return replies
        nodes = {federation.grid.node_of(reply) for reply in lost}
        for node in nodes:
            federation.forget(node)
        nodes = set(federation.install(nodes, apart))
        again = [
            Message(m.content, dst_node_id=node, message_type=m.metadata.message_type)
            for m in self._sent
            if (node := m.metadata.dst_node_id) in nodes
        ]
        timeout = self.server.config.timeout_seconds
        found = federation.grid.send_and_receive(again, timeout=timeout)
        return [*(r for r in replies if r not in lost), *found]

    def _problem(self, server_round: int, reply: Message) -> str:
        """Return why a reply cannot be used, or nothing."""
        if reply.has_error():
            return reason_of(reply, self.federation.sender(reply))
        if "missing" in config_of(reply):
            return "it lost the sub-FM again"
        try:
            self._check(server_round, reply)
        except FedPFTError as error:
            return f"unusable reply: {error}"
        except Exception as error:  # a hostile reply may raise anything
            return f"unusable reply: {error!r}"
        return ""

    def _check(self, server_round: int, reply: Message) -> None:
        content = reply.content
        found = [*content.array_records, *content.metric_records]
        if found != [ARRAYS, METRICS] or content.config_records:
            raise FedPFTError("it is not one adapter with metrics")
        statistics, others = split_rates(metrics_of(reply))
        known, told = train_metrics(self.server.config), metrics_of(reply)
        if set(others) != set(known):
            raise FedPFTError(f"its metrics are {sorted(others)}")
        for name, most in known.items():
            if not 0 <= told[name] <= most:  # also true for NaN
                raise FedPFTError(f"{name} = {told[name]} is outside [0, {most:g}]")
        if type(told["num-examples"]) is not int or not told["num-examples"]:
            raise FedPFTError("num-examples is not positive and whole")
        self.server.check_rates(unpack_rates(statistics), server_round)
        adapter = unpack_tensors(arrays_of(reply))
        if list(adapter) != list(self.server.adapter):
            raise FedPFTError("the adapter has other names or another order")
        moved = self.server.check_update(adapter)
        if self.privacy is not None:
            self.privacy.check_moved(moved, self.server.adapter)

    def _bound_weight(self, name: str, reply: Message) -> None:
        """Let a reply weigh no more than the rows that its node came with.

        Where text is generated blocks are counted, and a text makes as many as it is
        long: there what a node says is its weight.
        """
        node = self.federation.nodes.get(self.federation.grid.node_of(reply))
        task, said = self.server.config.data.task, metrics_of(reply)["num-examples"]
        if node is None or task_of(task).objective == "generate":
            return
        if said > node.examples:
            logger.warning(
                "%s says that it learnt from %d rows and came with %d, which count",
                name,
                said,
                node.examples,
            )
            reply.content.metric_records[METRICS]["num-examples"] = node.examples


def _named(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in reasons.items()]


def _note(
    history: dict[int, MetricRecord], current: int, metrics: MetricRecord | None
) -> None:
    if metrics is not None:
        history[current] = metrics
