"""Run the ServerApp: from a configuration to a run directory."""

import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid

from fedpft_flower import __version__
from fedpft_flower.adapters import get_adapter
from fedpft_flower.checkpoint import (
    Checkpoint,
    Checkpoints,
    check_partitions,
    check_same,
    identity,
)
from fedpft_flower.checks import check_run
from fedpft_flower.config import MARK, Config, FedPFTError
from fedpft_flower.devices import peak_memory, release
from fedpft_flower.encoding import content_hash
from fedpft_flower.evaluation import is_better
from fedpft_flower.federation import Federation, Node, RoundError
from fedpft_flower.foundation import load_fm_of
from fedpft_flower.images import check_images
from fedpft_flower.methods import method_of
from fedpft_flower.plan import Plan
from fedpft_flower.privacy import Privacy
from fedpft_flower.protection import protection
from fedpft_flower.report import LOG, RunDirectory, aligned_error
from fedpft_flower.sampling import check_clients
from fedpft_flower.server import Metrics, ProxyServer
from fedpft_flower.software import quiet, source_hash, versions
from fedpft_flower.strategies import inner_strategy, memory_of, remember
from fedpft_flower.strategy import FedPFT
from fedpft_flower.tasks import TaskData, load_public, load_task, task_of
from fedpft_flower.wire import CountingGrid, Ledger, pack_tensors, tensors_hash
from fedpft_flower.wording import percent, size

logger = logging.getLogger(__name__)


def serve(grid: Grid, context: Context) -> None:
    """Run a federated fine-tuning and write its results.

    Raises:
        FedPFTError: one clear line about what to mend; the run's status is failed.
    """
    _speak()
    with ExitStack() as until_told:
        try:
            _serve(grid, context, until_told)
        except FedPFTError as error:
            logger.error("error: %s", error)
            raise FedPFTError(str(error)) from None


def _serve(grid: Grid, context: Context, until_told: ExitStack) -> None:
    config = Config.from_run_config(context.run_config)
    if config.server_threads:
        torch.set_num_threads(config.server_threads)
    check_run(config)
    directory = RunDirectory(config, context.run_id)
    until_told.enter_context(closing(directory))
    until_told.enter_context(_kept(directory.path / LOG))
    logger.info("run directory: %s", directory.path)
    _federate(grid, config, directory)


def _federate(grid: Grid, config: Config, directory: RunDirectory) -> None:
    counting = CountingGrid(grid, Ledger())
    checkpoints = Checkpoints(directory.path, config.checkpoint.keep)
    saved = checkpoints.load() if config.resume else None
    plan = Plan.from_json(saved.state["plan"]) if saved is not None else None
    task, public = load_rows(config)
    given = saved.state["installs"] if saved is not None else {}
    federation = Federation(
        counting, config.timeout_seconds, config.wait_seconds, task.labels, given
    )
    federation.invite()  # nodes start and read their rows while the FM loads
    server = load_server(config, task, public, plan)
    splits = {
        # What a hash or a count of clients' rows tells, no noise covers.
        "train": None if config.privacy.on else task.train,
        "validation": task.validation,
        "test": task.test,
        **task.more_tests,
        "public": public,
    }
    hashes = _hashes(splits, server)
    own = identity(config.flat(), {**hashes, "fedpft-flower": __version__})
    if saved is not None:
        check_same(saved.state, own)
    federation.meet(config.train.nodes_awaited)
    if saved is not None:
        check_partitions(saved.state, federation.partitions)
    clients = check_clients(config.train, len(federation.nodes))
    inner = inner_strategy(config.strategy, config.strategy_args, clients)
    _tell_rows(federation, task, config)
    privacy = None
    if config.privacy.on:
        privacy = Privacy(config, inner, len(federation.nodes), checkpoints.note_spent)
        _tell_privacy(privacy, config)
    strategy = FedPFT(server, federation, inner, privacy)
    run = _Run(config, directory, checkpoints, strategy, own)
    if saved is None:
        run.prepare()
    else:
        run.resume(saved)
    run.train()
    _finish(run, task, splits, hashes)


def _finish(
    run: "_Run",
    task: TaskData,
    splits: Mapping[str, Dataset | None],
    hashes: Mapping[str, str],
) -> None:
    """Refine the adapter, test it, and write all that a finished run has."""
    server, federation = run.strategy.server, run.strategy.federation
    run.plug_in_chosen()
    federation.offer(server)  # a run that was over when it was resumed has not yet
    plain, right = server.judge("test")
    hits = {"plain": right["fm"], **right}
    alike = server.likeness()  # before the FM learns to follow the sub-FM
    refinement, after = server.refine(), plain
    if refinement.get("kept"):
        after, right = server.judge("test")
        hits |= right
    first, *_ = rounds = run.directory.rounds
    aligned = [entry.get("alignment", {}) for entry in rounds]
    summary = _summary(run, plain, after) | {
        "refinement": refinement,
        "server-seconds": _seconds_in([*aligned, refinement]),
        "more-tests": {name: server.evaluate(name) for name in task.more_tests},
    }
    summary["protection"] = protection(
        federation.exposure,
        server.parameters["fm"],
        server.metric,
        summary,
        {"before": first["public"], "after": alike} if "public" in first else {},
        hits,
        federation.grid.ledger.kinds("up"),
    )
    run.directory.finish(server, summary, _manifest(run, task, splits, hashes), hits)
    _show(summary, server.metric)
    logger.info("results: %s", run.directory.path)


def load_rows(config: Config) -> tuple[TaskData, Dataset | None]:
    """Load the task's rows, and public rows where there are any.

    Raises:
        FedPFTError: they cannot be read, or do not fit the configuration.
    """
    logger.info("loading task %s", config.data.task)
    task = load_task(config.data, config.seed)
    needs_public = method_of(config).needs_public
    has_public = bool(config.data.public_path or task_of(config.data.task).public)
    needed = needs_public or has_public
    public = load_public(config.data, config.seed) if needed else None
    for split, rows in (
        ("validation", task.validation),
        ("test", task.test),
        *task.more_tests.items(),
        ("public", public),
    ):
        if rows is not None:
            check_images(rows, split)
    return task, public


def load_server(
    config: Config, task: TaskData, public: Dataset | None, plan: Plan | None = None
) -> ProxyServer:
    """Load the FM and make the server of it.

    Args:
        config: the run's.
        task: what the FM is to learn.
        public: the public corpus.
        plan: that of a run that goes on.

    Raises:
        FedPFTError: the FM cannot be loaded, or does not fit.
    """
    logger.info("loading FM %s", config.fm.name)
    fm = load_fm_of(config, task.labels)
    return ProxyServer(config, fm, task, public, plan)


def _tell_privacy(privacy: Privacy, config: Config) -> None:
    logger.info(
        "privacy: %d releases spend epsilon = %.3g at delta = %g",
        config.rounds,
        privacy.planned_epsilon,
        config.privacy.delta,
    )


def _tell_rows(federation: Federation, task: TaskData, config: Config) -> None:
    nodes = federation.nodes.values()
    if config.privacy.on:
        logger.info("%d nodes, their rows are not told", len(nodes))
        return
    rows = sum(node.examples for node in nodes)
    logger.info("%d nodes, %d training rows", len(nodes), rows)
    believed = [node for node in nodes if not node.partitions]
    if config.weighting == "examples" and len(believed) > 2:
        _tell_weight(max(believed, key=lambda node: node.examples), rows)
    everybody = all(node.partitions == len(nodes) for node in nodes)
    if task.train is not None and everybody and rows < len(task.train):
        logger.warning(
            "%d of %d training rows are in no partition",
            len(task.train) - rows,
            len(task.train),
        )


def _tell_weight(largest: Node, rows: int) -> None:
    if 2 * largest.examples > rows:
        logger.warning(
            "%s says that it has %d of %d rows, which is its weight in the average; "
            "if that may be wrong, set weighting = 'uniform'",
            largest.key,
            largest.examples,
            rows,
        )


def _hashes(
    splits: Mapping[str, Dataset | None], server: ProxyServer
) -> dict[str, str]:
    """Return the hashes of what a run starts from."""
    data = {
        name: content_hash(rows) for name, rows in splits.items() if rows is not None
    }
    return {
        **{f"data ({name})": content for name, content in data.items()},
        "FM": tensors_hash(server.fm_weights),
    }


class _Run:
    """Close every round: evaluate, write metrics and a checkpoint, say one line."""

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
        strategy.federation.exposure.restore(state["exposure"])
        strategy.done = saved.round
        self.directory.go_back(saved.round)
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
        if self.strategy.stopped:
            logger.info(
                "early stop: %d evaluations without a better one than round %d's",
                self._misses,
                self.best_round,
            )
        return MetricRecord(scores) if scores else None

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
            "ledger": strategy.federation.grid.ledger.state(),
            "exposure": strategy.federation.exposure.state(),
            "strategy": form,
            "privacy": strategy.privacy and strategy.privacy.state(),
            "before": self.before,
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


def _summary(run: _Run, plain: Metrics, after: Metrics) -> Metrics:
    rounds, strategy = run.directory.rounds, run.strategy
    ledger = strategy.federation.grid.ledger
    taken = max(1, sum(len(entry.get("clients", ())) for entry in rounds))
    both = [ledger.total(way) for way in ("down", "up")]
    install = ledger.kinds("down").get("install", 0)
    return {
        "method": run.config.method,
        "rounds": strategy.done,
        "best-round": run.best_round,
        "select": run.config.select,
        "test-before": run.before,
        "test-plain": plain,  # the averaged adapter, before its refinement
        "test-after": after,
        "share-withheld": strategy.server.share_withheld,
        "parameters": strategy.server.parameters,
        "bytes-down": both[0],
        "bytes-up": both[1],
        "bytes-install-per-client": strategy.federation.install_bytes,
        "bytes-per-client-and-round": (sum(both) - install) / taken,
        "flops-per-client-and-round": _mean_flops(rounds),
        # Of all processes of the run, if it was resumed.
        "peak-memory-server": max(
            [peak_memory(), *(entry.get("peak-memory-server", 0) for entry in rounds)]
        ),
        "peak-memory-client": max(
            (entry.get("peak-memory-client", 0) for entry in rounds), default=0
        ),
        "seconds": sum(entry["seconds"] for entry in rounds),
        "failures": sum(len(entry.get("failures", ())) for entry in rounds),
        "skipped": sum("skipped" in entry for entry in rounds),
        "privacy": strategy.privacy and strategy.privacy.spent(),
    }


def _mean_flops(rounds: Sequence[Metrics]) -> float | None:
    """Return the mean over all trainings; None where no node tells."""
    clients = [one for entry in rounds for one in entry.get("per-client", {}).values()]
    told = [one["flops"] for one in clients if "flops" in one]
    return sum(told) / len(told) if told else None


def _seconds_in(parts: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that the server spent on selection, alignment, refinement."""
    seconds = 0.0
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Mapping):
                seconds += _seconds_in([value])
            elif name in ("seconds", "selection-seconds"):
                seconds += value
    return seconds


def _manifest(
    run: _Run,
    task: TaskData,
    splits: Mapping[str, Dataset | None],
    hashes: Mapping[str, str],
) -> Metrics:
    config, strategy = run.config, run.strategy
    server, federation = strategy.server, strategy.federation
    return {
        "versions": dict(versions()),
        "source": source_hash(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "config": config.flat(),
        "seed": config.seed,
        "labels": list(task.labels),
        "splits": {
            name: {
                "rows": len(rows),
                "source": task.notes.get(name, ""),
                "sha256": hashes[f"data ({name})"],
            }
            for name, rows in splits.items()
            if rows is not None
        },
        "nodes": {
            node.key: None if config.privacy.on else node.examples
            for node in federation.nodes.values()
        },
        # Where a node's libraries are not the server's.
        "node-versions": {
            node.key: node.differing
            for node in federation.nodes.values()
            if node.differing
        },
        "fm-sha256": hashes["FM"],
        "plan": server.plan.to_json(),
        "sub-fm-sha256": federation.sub_fm,
        "adapter-sha256": tensors_hash(server.adapter),
        # Of what lies in adapter/: in the FM, after its refinement.
        "final-adapter-sha256": tensors_hash(get_adapter(server.fm)),
    }


def _show(summary: Metrics, metric: str) -> None:
    before, after = summary["test-before"], summary["test-after"]
    plain = summary["test-plain"]
    rows = [
        (f"FM {metric} before (test)", f"{before[f'fm-{metric}']:.3f}"),
        (f"FM {metric} after plug-in (test)", f"{plain[f'fm-{metric}']:.3f}"),
        *(
            [(f"FM {metric} after refinement (test)", f"{after[f'fm-{metric}']:.3f}")]
            if summary["refinement"].get("kept")
            else []
        ),
        (f"sub-FM {metric} after (test)", f"{after[f'sub-fm-{metric}']:.3f}"),
        *(
            (f"{model} {metric} after ({name})", f"{found[f'{key}-{metric}']:.3f}")
            for name, found in summary["more-tests"].items()
            for model, key in (("FM", "fm"), ("sub-FM", "sub-fm"))
        ),
        ("FM weights never sent", percent(summary["share-withheld"])),
        (
            "bytes per client, once (install)",
            size(summary["bytes-install-per-client"]),
        ),
        ("bytes per client and round", size(summary["bytes-per-client-and-round"])),
        *(
            [("GFLOP per client and round", f"{flops / 1e9:.3g}")]
            if (flops := summary["flops-per-client-and-round"])
            else []
        ),
        ("peak memory, server", size(summary["peak-memory-server"])),
        *(
            [("peak memory, client", size(summary["peak-memory-client"]))]
            if summary["peak-memory-client"]
            else []
        ),
        ("client failures", str(summary["failures"])),
    ]
    if spent := summary["privacy"]:
        told = f"{spent['epsilon']:.3g}, {spent['delta']:g}"
        rows.append(("privacy spent (epsilon, delta)", told))
        rows.append(("rounds skipped", str(summary["skipped"])))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        logger.info("  %s  %s", name.ljust(width), value)


def _speak() -> None:
    """Send this package's log to standard output, where `--stream` shows it."""
    package = logging.getLogger(__package__)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
        package.addHandler(handler)
        package.propagate = False
    package.setLevel(logging.INFO)
    quiet()


class _Kept(logging.FileHandler):
    """Write lines to a file; a full disk is told by those who write results."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Let a line go."""


@contextmanager
def _kept(place: Path) -> Iterator[None]:
    """Keep the lines of this package in a file too, with the time."""
    handler = _Kept(place, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger(__package__)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
