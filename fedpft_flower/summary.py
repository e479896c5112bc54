"""Sum up a finished run: its figures, what it was made of, lines to read."""

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from fedpft_flower.adapters import get_adapter
from fedpft_flower.devices import peak_gpu_memory, peak_memory
from fedpft_flower.metrics import Metrics
from fedpft_flower.rounds import Run, nodes_met
from fedpft_flower.software import source_hash, versions
from fedpft_flower.store import tensors_hash
from fedpft_flower.tasks import TaskData
from fedpft_flower.wording import percent, size

logger = logging.getLogger(__name__)


def summary_of(
    run: Run, plain: Metrics, after: Metrics, refinement: Metrics
) -> Metrics:
    """Return the figures of a run whose rounds are over.

    Args:
        run: its rounds, its bytes, who took part.
        plain: test metrics with the averaged adapter.
        after: test metrics with the adapter that is delivered.
        refinement: what was done in between; empty where nothing was.
    """
    rounds, strategy = run.directory.rounds, run.strategy
    aligned = [entry.get("alignment", {}) for entry in rounds]
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
        "refinement": refinement,
        "server-seconds": _seconds_in([*aligned, refinement]),
        "share-withheld": strategy.server.share_withheld,
        "parameters": strategy.server.parameters,
        "bytes-down": both[0],
        "bytes-up": both[1],
        "bytes-install-per-client": strategy.federation.offer.bytes,
        "bytes-per-client-and-round": (sum(both) - install) / taken,
        "flops-per-client-and-round": _mean_flops(rounds),
        **_peaks(rounds),
        "seconds": sum(entry["seconds"] for entry in rounds),
        "failures": sum(len(entry.get("failures", ())) for entry in rounds),
        "skipped": sum("skipped" in entry for entry in rounds),
        "privacy": strategy.privacy and strategy.privacy.spent(),
    }


def _peaks(rounds: Sequence[Metrics]) -> dict[str, float]:
    """Return the peaks of memory, of all processes of a run that was resumed."""
    now = {
        "peak-memory-server": peak_memory(),
        "peak-gpu-memory-server": peak_gpu_memory(),
    }
    keys = (*now, "peak-memory-client", "peak-gpu-memory-client")
    return {
        key: max([now.get(key, 0), *(entry.get(key, 0) for entry in rounds)])
        for key in keys
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


def manifest_of(
    run: Run,
    task: TaskData,
    splits: Mapping[str, Dataset | None],
    hashes: Mapping[str, str],
) -> Metrics:
    """Return what a run was made of, so that it can be made again.

    Args:
        run: its rounds are over.
        task: its label set, and where its rows are from.
        splits: rows by the name of their split; None where there are none, or where
            nothing of them may be told.
        hashes: of the FM, and of each split, by "FM" and "data (SPLIT)".
    """
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
        "planned-rounds": run.planned_rounds,
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
        "nodes": nodes_met(federation, config),
        # Where a node's libraries are not the server's.
        "node-versions": {
            node.key: node.differing
            for node in federation.nodes.values()
            if node.differing
        },
        "fm-sha256": hashes["FM"],
        "plan": server.plan.to_json(),
        "sub-fm-sha256": federation.offer.sub_fm,
        "adapter-sha256": tensors_hash(server.adapter),
        # Of what lies in adapter/: in the FM, after its refinement.
        "final-adapter-sha256": tensors_hash(get_adapter(server.fm)),
    }


def show(summary: Metrics, metric: str) -> None:
    """Log the figures of a finished run."""
    rows = list(_lines(summary, metric))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        logger.info("  %s  %s", name.ljust(width), value)


def _lines(summary: Metrics, metric: str) -> Iterator[tuple[str, str]]:
    """Yield names and values; what a run does not have is left out."""
    before, after = summary["test-before"], summary["test-after"]
    plain = summary["test-plain"]
    yield f"FM {metric} before (test)", f"{before[f'fm-{metric}']:.3f}"
    yield f"FM {metric} after plug-in (test)", f"{plain[f'fm-{metric}']:.3f}"
    if summary["refinement"].get("kept"):
        yield f"FM {metric} after refinement (test)", f"{after[f'fm-{metric}']:.3f}"
    yield f"sub-FM {metric} after (test)", f"{after[f'sub-fm-{metric}']:.3f}"
    for name, found in summary["more-tests"].items():
        for model, key in (("FM", "fm"), ("sub-FM", "sub-fm")):
            yield f"{model} {metric} after ({name})", f"{found[f'{key}-{metric}']:.3f}"
    yield "FM weights never sent", percent(summary["share-withheld"])
    yield "bytes per client, once (install)", size(summary["bytes-install-per-client"])
    yield "bytes per client and round", size(summary["bytes-per-client-and-round"])
    if flops := summary["flops-per-client-and-round"]:
        yield "GFLOP per client and round", f"{flops / 1e9:.3g}"
    yield "peak memory, server", size(summary["peak-memory-server"])
    if summary["peak-memory-client"]:
        yield "peak memory, client", size(summary["peak-memory-client"])
    for side in ("server", "client"):
        if peak := summary[f"peak-gpu-memory-{side}"]:
            yield f"peak GPU memory, {side}", size(peak)
    yield "client failures", str(summary["failures"])
    if spent := summary["privacy"]:
        told = f"{spent['epsilon']:.3g}, {spent['delta']:g}"
        yield "privacy spent (epsilon, delta)", told
        yield "rounds skipped", str(summary["skipped"])
