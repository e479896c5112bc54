"""Write the run directory: metrics, curves, page, summary, adapter, manifest."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from peft import PeftModel
from safetensors import SafetensorError

from fedpft_flower.adapters import export_adapter
from fedpft_flower.config import Config, FedPFTError, nest
from fedpft_flower.curves import draw_curves
from fedpft_flower.disk import existing_path, lock, put
from fedpft_flower.endings import one_line_end
from fedpft_flower.metrics import Metrics
from fedpft_flower.page import render_page
from fedpft_flower.plan import Plan

LOG = "run.log"  # what the run said, with the time
ROUNDS, SUMMARY = "metrics.jsonl", "summary.json"


def runs_root(out_dir: str) -> Path:
    """Return where run directories are, for this `out-dir`."""
    if out_dir == Config().out_dir:
        out_dir = os.environ.get("FEDPFT_OUT") or out_dir
    # The working directory is that of a SuperLink started who knows where.
    return Path.home() / os.path.expanduser(out_dir)  # noqa: PTH111


def is_finished(place: Path) -> bool:
    """Tell whether a run directory is that of a finished run."""
    return (place / SUMMARY).is_file()  # it is written last


def read_rounds(place: Path) -> list[Metrics]:
    """Return the metrics of the rounds that a run directory has, maybe none yet."""
    path = place / ROUNDS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class RunDirectory:
    """Hold the results of one run; every file appears whole or not at all."""

    def __init__(self, config: Config, run_id: int) -> None:
        """Create the directory and write the effective configuration.

        With `resume`, the directory is that of the run to continue.

        Raises:
            FedPFTError: the directory cannot be written, or another run writes there.
        """
        root = runs_root(config.out_dir)
        config = replace(config, out_dir=str(root))
        self.path = root / str(run_id)
        if config.resume:
            self.path = Path.home() / os.path.expanduser(config.resume)  # noqa: PTH111
            if existing_path(str(self.path / "config.toml")) is None:
                raise FedPFTError(
                    f"resume = {config.resume!r} is not a run directory; give the one "
                    "that the run printed"
                )
        self._rounds: list[Metrics] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / ".lock")
        except BlockingIOError as error:
            raise FedPFTError(
                f"{self.path} is in use by another run; wait for it or stop it"
            ) from error
        except OSError as error:
            raise self._refused(error) from error
        if not config.resume:
            self._write("config.toml", tomli_w.dumps(nest(config.flat())))

    def close(self) -> None:
        """Let another run continue in this directory."""
        self._lock.close()

    @property
    def rounds(self) -> list[Metrics]:
        """Return the metrics of all rounds so far; round 0 is before training."""
        return list(self._rounds)

    def add_round(self, metrics: Metrics) -> None:
        """Add one object to `metrics.jsonl`."""
        self._rounds.append(metrics)
        lines = [json.dumps(entry, sort_keys=True) for entry in self._rounds]
        self._write(ROUNDS, "\n".join(lines) + "\n")

    def go_back(self, current: int) -> None:
        """Keep the metrics of the rounds up to this one, as a resumed run begins.

        Raises:
            FedPFTError: the metrics of these rounds are not all there.
        """
        place = self.path / ROUNDS
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
            self._rounds = [json.loads(line) for line in lines[: current + 1]]
        except (OSError, ValueError) as error:
            raise FedPFTError(f"resume: cannot read {place}: {error}") from error
        if [entry["round"] for entry in self._rounds] != list(range(current + 1)):
            raise FedPFTError(
                f"resume: {place} lacks rounds before {current}; start anew"
            )

    def finish(
        self,
        fm: PeftModel,
        metric: str,
        summary: Metrics,
        manifest: Metrics,
        hits: Mapping[str, str],
    ) -> None:
        """Write everything that a finished run has, maybe over an earlier end of it."""
        try:
            (self.path / SUMMARY).unlink(missing_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._write("manifest.json", _pretty(manifest))
        self._write("hits.json", _pretty(dict(hits)))
        rounds = self._rounds
        plan = Plan.from_json(manifest["plan"])
        self._put("curves.png", lambda path: draw_curves(rounds, metric, plan, path))
        self._put("adapter", lambda path: export_adapter(fm, path))
        self._write(
            "report.html", render_page(manifest["config"], rounds, summary, manifest)
        )
        self._write(SUMMARY, _pretty(summary))  # last: the run is complete

    def _write(self, name: str, text: str) -> None:
        self._put(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        try:
            put(self.path / name, write)
        except (OSError, SafetensorError) as error:  # the latter of the adapter
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> FedPFTError:
        # From round 1 on there is a checkpoint.
        resumable = len(self._rounds) > 1
        other = f"resume with resume={self.path}" if resumable else "choose an out-dir"
        return FedPFTError(f"cannot write {self.path} ({error}); make room or {other}")


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


def run(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a finished run anew (`fedpft-report`)."""
    parser = argparse.ArgumentParser(
        prog="fedpft-report", description="Write report.html of a finished run anew."
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    place = parser.parse_args(arguments).run.expanduser().absolute()
    with one_line_end():
        print(f"report: {write_page(FinishedRun.read(place))}")


def write_page(run: FinishedRun) -> Path:
    """Write `report.html` of a finished run from its other files, and return its path.

    Raises:
        FedPFTError: the files lack something, or the disk refuses.
    """
    place = run.path / "report.html"
    try:
        page = render_page(run.config.flat(), run.rounds, run.summary, run.manifest)
        put(place, lambda path: path.write_text(page, encoding="utf-8"))
    except (LookupError, TypeError, AttributeError) as error:
        raise FedPFTError(
            f"the files of {run.path} lack what a page shows ({error!r}); was the run "
            "made by this version?"
        ) from error
    except OSError as error:
        raise FedPFTError(f"cannot write {place} ({error}); make room") from error
    return place


def _pretty(value: Metrics) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
