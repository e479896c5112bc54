"""Run the ServerApp: from a configuration to a run directory."""

import logging
import platform
import sys
import time

import datasets
import torch
import transformers
from datasets import Dataset
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid

from fedpft_flower.client import peak_memory
from fedpft_flower.config import MARK, Config, FedPFTError, names_in
from fedpft_flower.encoding import content_hash
from fedpft_flower.federation import Federation
from fedpft_flower.foundation import load_fm
from fedpft_flower.methods import method_of
from fedpft_flower.report import RunDirectory, versions
from fedpft_flower.server import Metrics, ProxyServer
from fedpft_flower.strategies import inner_strategy, strategy_of
from fedpft_flower.strategy import FedPFT
from fedpft_flower.tasks import TaskData, load_public, load_task, task_of
from fedpft_flower.wire import CountingGrid, Ledger, pack_tensors, tensors_hash

logger = logging.getLogger(__name__)


def serve(grid: Grid, context: Context) -> None:
    """Run a federated fine-tuning and write its results.

    Raises:
        FedPFTError: one clear line about what to mend; the run's status is failed.
    """
    _speak()
    try:
        _serve(grid, context)
    except FedPFTError as error:
        logger.error("error: %s", error)
        raise FedPFTError(str(error)) from None


def _serve(grid: Grid, context: Context) -> None:
    config = Config.from_run_config(context.run_config)
    if config.server_threads:
        torch.set_num_threads(config.server_threads)
    method_of(config.method)
    strategy_of(config.strategy, config.strategy_args)
    directory = RunDirectory(config, context.run_id)
    logger.info("run directory: %s", directory.path)
    counting = CountingGrid(grid, Ledger())
    task, public, server = load(config)
    federation = Federation(counting, config.timeout_seconds, task.labels)
    federation.meet(config.train.clients_per_round, config.train.min_nodes)
    chosen = server.sample([node.key for node in federation.nodes.values()], 1)
    inner = inner_strategy(config.strategy, config.strategy_args, len(chosen))
    logger.info(
        "%d nodes, %d training rows",
        len(federation.nodes),
        sum(node.examples for node in federation.nodes.values()),
    )
    strategy = FedPFT(server, federation, inner)
    began = time.monotonic()
    alignment = server.prepare()
    before = server.evaluate("test")
    run = _Run(config, directory, strategy, alignment, began)
    strategy.start(
        counting,
        pack_tensors(server.adapter)[0],
        num_rounds=config.rounds,
        timeout=config.timeout_seconds,
        evaluate_fn=run.end_round,
    )
    after = server.evaluate("test")
    summary = _summary(run, before, after, counting.ledger)
    splits = {
        "train": task.train,
        "validation": task.validation,
        "test": task.test,
        "public": public,
    }
    manifest = _manifest(config, task, splits, server, federation)
    directory.finish(server, summary, manifest)
    _show(summary, config.data.metric)
    logger.info("results: %s", directory.path)


def load(config: Config) -> tuple[TaskData, Dataset | None, ProxyServer]:
    """Load the task, the public corpus where there is one, and the server with its FM.

    Raises:
        FedPFTError: the configuration, the data or the FM do not fit each other.
    """
    logger.info("loading task %s", config.data.task)
    task = load_task(config.data, config.seed)
    row, method = task_of(config.data.task), method_of(config.method)
    aligns = method.align_before or method.align_during
    has_public = bool(config.data.public_path or row.public)
    public = load_public(config.data, config.seed) if aligns or has_public else None
    logger.info("loading FM %s", config.fm.name)
    head = names_in(config.lora.head)
    fm = load_fm(config.fm.name, task.labels, row.modality, config.seed, head)
    return task, public, ProxyServer(config, fm, task, public)


class _Run:
    """Close every round: evaluate, write metrics, say one line."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        strategy: FedPFT,
        alignment: Metrics,
        began: float,
    ) -> None:
        self.config, self.directory, self.strategy = config, directory, strategy
        self._alignment, self._began = alignment, began

    def end_round(self, current: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate after a round (0: before training) and report it."""
        ledger = self.strategy.federation.grid.ledger
        entry: Metrics = {"round": 0, "alignment": self._alignment}
        entry = self.strategy.rounds[current] if current else entry
        due = current % self.config.eval_every == 0 or current == self.config.rounds
        accuracies = self.strategy.server.evaluate("validation") if due else {}
        entry |= accuracies
        entry["peak-memory-server"] = peak_memory()
        entry["bytes"] = ledger.table(current)
        entry["bytes-down"] = ledger.total("down", current)
        entry["bytes-up"] = ledger.total("up", current)
        now = time.monotonic()
        entry["seconds"], self._began = now - self._began, now
        self.directory.add_round(entry)
        logger.info("%s", self._line(current, entry))
        return MetricRecord(accuracies) if accuracies else None

    def _line(self, current: int, entry: Metrics) -> str:
        parts = [f"round {current}/{self.config.rounds}"]
        for name, model in (("FM", "fm"), ("sub-FM", "sub-fm")):
            if (key := f"{model}-{self.config.data.metric}") in entry:
                parts.append(f"{name} {entry[key]:.3f}")
        loss = entry.get("train-loss", entry.get("fm-loss"))
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        parts.append(f"down {_size(entry['bytes-down'])}")
        parts.append(f"up {_size(entry['bytes-up'])}")
        parts.append(f"{entry['seconds']:.1f} s")
        return "  ".join(parts)


def _summary(run: _Run, before: Metrics, after: Metrics, ledger: Ledger) -> Metrics:
    rounds, strategy = run.directory.rounds, run.strategy
    taken = max(1, sum(len(entry.get("clients", ())) for entry in rounds))
    both = [ledger.total(way) for way in ("down", "up")]
    install = ledger.of_kind("install")
    return {
        "method": run.config.method,
        "test-before": before,
        "test-after": after,
        "share-withheld": strategy.server.share_withheld,
        "bytes-down": both[0],
        "bytes-up": both[1],
        "bytes-install-per-client": strategy.federation.install_bytes,
        "bytes-per-client-and-round": (sum(both) - install) / taken,
        "peak-memory-server": peak_memory(),
        "peak-memory-client": max(
            (entry.get("peak-memory-client", 0) for entry in rounds), default=0
        ),
        "seconds": sum(entry["seconds"] for entry in rounds),
        "failures": sum(len(entry.get("failures", ())) for entry in rounds),
    }


def _manifest(
    config: Config,
    task: TaskData,
    splits: dict[str, Dataset | None],
    server: ProxyServer,
    federation: Federation,
) -> Metrics:
    return {
        "versions": versions(),
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
                "sha256": content_hash(rows),
            }
            for name, rows in splits.items()
            if rows is not None
        },
        "nodes": {node.key: node.examples for node in federation.nodes.values()},
        "fm-sha256": tensors_hash(server.fm_weights),
        "plan": server.plan.to_json(),
        "sub-fm-sha256": federation.sub_fm,
        "adapter-sha256": tensors_hash(server.adapter),
    }


def _show(summary: Metrics, metric: str) -> None:
    before, after = summary["test-before"], summary["test-after"]
    rows = [
        (f"FM {metric} before (test)", f"{before[f'fm-{metric}']:.3f}"),
        (f"FM {metric} after plug-in (test)", f"{after[f'fm-{metric}']:.3f}"),
        (f"sub-FM {metric} after (test)", f"{after[f'sub-fm-{metric}']:.3f}"),
        ("FM weights never sent", f"{100 * summary['share-withheld']:.1f} %"),
        (
            "bytes per client, once (install)",
            _size(summary["bytes-install-per-client"]),
        ),
        ("bytes per client and round", _size(summary["bytes-per-client-and-round"])),
        ("peak memory, server", _size(summary["peak-memory-server"])),
        ("peak memory, client", _size(summary["peak-memory-client"])),
        ("client failures", str(summary["failures"])),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        logger.info("  %s  %s", name.ljust(width), value)


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


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


def quiet() -> None:
    """Turn off the reports and progress bars of the libraries that load."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
