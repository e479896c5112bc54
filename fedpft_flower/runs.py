"""Read run directories: finished runs, and those under way."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.disk import from_home
from fedpft_flower.metrics import Metrics

LOG = "run.log"  # what the run said, with the time
ROUNDS, SUMMARY = "metrics.jsonl", "summary.json"


def runs_root(out_dir: str) -> Path:
    """Return where run directories are, for this `out-dir`."""
    if out_dir == Config().out_dir:
        out_dir = os.environ.get("FEDPFT_OUT") or out_dir
    return from_home(out_dir)


def is_finished(place: Path) -> bool:
    """Tell whether a run directory is that of a finished run."""
    return (place / SUMMARY).is_file()  # it is written last


def read_rounds(place: Path) -> list[Metrics]:
    """Return the metrics of the rounds that a run directory has, maybe none yet."""
    path = place / ROUNDS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class FinishedRun:
    """Hold what the directory of a finished run says."""

    path: Path
    config: Config
    rounds: list[Metrics]
    summary: Metrics
    manifest: Metrics

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """Read the directory of a finished run.

        Raises:
            FedPFTError: it is none, or its files cannot be read.
        """
        if not is_finished(path):
            raise FedPFTError(
                f"{path} is not the directory of a finished run (no {SUMMARY}); "
                "give the one that a run printed, or let it end first"
            )
        try:
            summary, manifest = (
                json.loads((path / name).read_text(encoding="utf-8"))
                for name in (SUMMARY, "manifest.json")
            )
            rounds = read_rounds(path)
            config = Config.from_run_config(manifest["config"])
            if not rounds:
                raise ValueError(f"{ROUNDS} has no round")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FedPFTError(f"cannot read {path}: {error!r}") from error
        return cls(path, config, rounds, summary, manifest)
