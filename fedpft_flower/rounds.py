"""Train round after round: evaluate, write metrics and a checkpoint, say one line."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from fedpft_flower.checkpoint import Checkpoint, Checkpoints
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.curves import aligned_error
from fedpft_flower.devices import peak_gpu_memory, peak_memory, release
from fedpft_flower.federation import Federation, RoundError
from fedpft_flower.metrics import Metrics, is_better
from fedpft_flower.run_directory import RunDirectory
from fedpft_flower.strategies import memory_of, remember
from fedpft_flower.strategy import FedPFT
from fedpft_flower.wire import pack_tensors
from fedpft_flower.wording import size

logger = logging.getLogger(__name__)

# Of the loss of guessing: above this share of it nothing is learnt.
GUESSING = 0.98


class Run:
    """Prepare or resume a run, train its rounds, and close each of them."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        strategy: FedPFT,
        own: Mapping[str, Any],
    ) -> None:
        self.config, self.directory, self.strategy = config, directory, strategy
        self._checkpoints, self._own = checkpoints, own
        self.before: Metrics = {}  # test metrics before training
        self._metric = strategy.server.metric
        self.planned_rounds = config.rounds  # when the run was begun
        self._best_score: float | None = None
        self.best_round, self._misses = 0, 0
        self._alignment: Metrics = {}
        self._likeness: Metrics = {}
        self._began = time.monotonic()

    def prepare(self) -> None:
        """Align before the first round, and evaluate what training will start from."""
        server, privacy = self.strategy.server, self.strategy.privacy
        if privacy is not None:
            privacy.begin()
        self._alignment = server.prepare()
        self.before = server.evaluate("test")
        self._likeness = server.likeness()

    def resume(self, saved: Checkpoint) -> None:
        """Become the run that a checkpoint was made of."""
        state, strategy = saved.state, self.strategy
        strategy.server.restore(saved.tensors)
        remember(strategy.inner, saved.tensors, state["strategy"])
        if strategy.privacy is not None:
            # The latter is ahead where a release was made and no checkpoint since.
            strategy.privacy.begin(state["privacy"], self._checkpoints.spent())
        strategy.federation.grid.ledger.restore(state["ledger"])
        strategy.federation.offer.exposure.restore(state["exposure"])
        strategy.federation.met = {**state["met"], **strategy.federation.met}
        strategy.done = saved.round
        # One that an earlier version made was begun with as many as it has.
        begun = state["identity"]["config"]["rounds"]
        self.planned_rounds = state.get("planned-rounds", begun)
        self.directory.go_back(saved.round)
        self.directory.note(self.config)
        self.before = state["before"]
        best = state["best"]
        self.best_round, self._best_score = best["round"], best["score"]
        self._misses = best["misses"]
        self._stop_early()
        logger.info("resumed after round %d", saved.round)

    def train(self) -> None:
        """Train all rounds that are left.

        Raises:
            FedPFTError: a round has too few nodes or replies; the run can be resumed.
        """
        strategy = self.strategy
        if strategy.done >= self.config.rounds or strategy.stopped:
            self._end_here(strategy.done)
        try:
            strategy.start(
                strategy.federation.grid,
                pack_tensors(strategy.server.adapter)[0],
                num_rounds=self.config.rounds,
                timeout=self.config.timeout_seconds,
                evaluate_fn=self.end_round,
            )
        except RoundError as error:
            raise FedPFTError(
                f"{error}; the last checkpoint is of round {strategy.done}, go on with "
                f"resume={self.directory.path}"
            ) from error

    def _end_here(self, current: int) -> None:
        """Make a round the last one that was not to be it when it was closed."""
        entry = self.directory.rounds[-1]
        if entry.get("last"):
            return
        if f"fm-{self._metric}" not in entry:
            scores = self.strategy.server.evaluate("validation")
            self._note_score(current, scores[f"fm-{self._metric}"])
            entry |= scores
        self.directory.go_back(current - 1)
        self.directory.add_round(entry | {"last": True})
        logger.info("the run ends after round %d", current)

    def plug_in_chosen(self) -> None:
        """Go back to the best round, where the run is to end with its adapter."""
        if self.config.select == "best":
            best = self._checkpoints.load(self.best_round)
            self.strategy.server.restore(best.tensors)

    def end_round(self, current: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate after a round (0: before training) and report it."""
        ledger = self.strategy.federation.grid.ledger
        entry: Metrics = {"round": 0, "alignment": self._alignment}
        if self._likeness:
            entry["public"] = self._likeness
        entry = self.strategy.rounds[current] if current else entry
        privacy = self.strategy.privacy
        last = current == self.config.rounds or (privacy and privacy.is_over)
        due = current % self.config.eval_every == 0 or last
        scores = self.strategy.server.evaluate("validation") if due else {}
        entry |= scores
        entry |= self._gradient(current, entry)
        entry["peak-memory-server"] = peak_memory()
        entry["peak-gpu-memory-server"] = peak_gpu_memory()
        entry["bytes"] = ledger.table(current)
        entry["bytes-down"] = ledger.total("down", current)
        entry["bytes-up"] = ledger.total("up", current)
        now = time.monotonic()
        entry["seconds"], self._began = now - self._began, now
        if self.strategy.privacy is not None:
            entry["privacy"] = self.strategy.privacy.spent()
        if scores:
            self._note_score(current, scores[f"fm-{self._metric}"])
        entry["last"] = bool(last or self.strategy.stopped)
        self.directory.add_round(entry)
        self._save(current)
        release()  # virtual clients may share this GPU
        logger.info("%s", self._line(current, entry))
        self._tell_guessing(current, entry.get("train-loss"))
        if self.strategy.stopped:
            last = self.config.select == "last" and current != self.best_round
            logger.info(
                "early stop: %d evaluations without a better one than round %d's%s",
                self._misses,
                self.best_round,
                f"; delivered is round {current}'s adapter (select = 'last')" * last,
            )
        return MetricRecord(scores) if scores else None

    def _tell_guessing(self, current: int, loss: float | None) -> None:
        """Warn once where clients have learnt nothing so far, as far as losses say.

        To guess among C classes as frequent as each other costs ln C, else less.
        """
        classes = self.strategy.server.classes
        if (
            loss is None
            or classes is None
            or current != max(5, self.config.rounds // 4)
        ):
            return
        if loss > GUESSING * math.log(classes):
            logger.warning(
                "the training loss is %.3f after %d rounds, and guessing among %d "
                "classes has %.3f; if it does not fall, try another train.lr, a lower "
                "one first",
                loss,
                current,
                classes,
                math.log(classes),
            )

    def _gradient(self, current: int, entry: Metrics) -> Metrics:
        """Measure the gradient error where it is due and no alignment just has."""
        every = self.config.gradient_every
        if not every or current % every:
            return {}
        found = aligned_error(entry) or self.strategy.server.gradient_error()
        return {"gradient-error": found} if found else {}

    def _note_score(self, current: int, score: float) -> None:
        best = self._best_score
        if best is None or is_better(self._metric, score, best):
            self.best_round, self._best_score, self._misses = current, score, 0
        else:
            self._misses += 1
        self._stop_early()

    def _stop_early(self) -> None:
        patience = self.config.early_stop
        self.strategy.stopped = bool(patience) and self._misses >= patience

    def _save(self, current: int) -> None:
        strategy = self.strategy
        memory, form = memory_of(strategy.inner)
        state = {
            **self._own,
            "plan": strategy.server.plan.to_json(),
            "partitions": strategy.federation.partitions,
            "installs": strategy.federation.installs(),
            "met": _told(strategy.federation.met, self.config),
            "ledger": strategy.federation.grid.ledger.state(),
            "exposure": strategy.federation.offer.exposure.state(),
            "strategy": form,
            "privacy": strategy.privacy and strategy.privacy.state(),
            "before": self.before,
            "planned-rounds": self.planned_rounds,
            "best": {
                "round": self.best_round,
                "score": self._best_score,
                "misses": self._misses,
            },
        }
        tensors = {**strategy.server.state(), **memory}
        checkpoint = Checkpoint(current, tensors, state)
        self._checkpoints.save(checkpoint, self.best_round)

    def _line(self, current: int, entry: Metrics) -> str:
        parts = [f"round {current}/{self.config.rounds}"]
        for name, model in (("FM", "fm"), ("sub-FM", "sub-fm")):
            if (key := f"{model}-{self._metric}") in entry:
                parts.append(f"{name} {entry[key]:.3f}")
        loss = entry.get("train-loss", entry.get("fm-loss"))
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if "skipped" in entry:
            parts.append(f"skipped ({entry['skipped']})")
        if "privacy" in entry:
            parts.append(f"epsilon {entry['privacy']['epsilon']:.3g}")
        parts.append(f"down {size(entry['bytes-down'])}")
        parts.append(f"up {size(entry['bytes-up'])}")
        parts.append(f"{entry['seconds']:.1f} s")
        return "  ".join(parts)


def nodes_met(federation: Federation, config: Config) -> dict[str, int | None]:
    """Return the rows of every node that was met; None where none are told.

    A node without a name is another one whenever it comes back: of such nodes only
    those that are here now are told.
    """
    here = {node.key: node.examples for node in federation.nodes.values()}
    return _told({**federation.met, **here}, config)


def _told(rows: Mapping[str, int | None], config: Config) -> dict[str, int | None]:
    """Return nodes' rows as they may be written: none with differential privacy."""
    return {key: None if config.privacy.on else rows[key] for key in sorted(rows)}
