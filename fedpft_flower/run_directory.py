"""Write the run directory: metrics, curves, page, summary, adapter, manifest."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from peft import PeftModel
from safetensors import SafetensorError

from fedpft_flower.adapters import export_adapter
from fedpft_flower.config import Config, FedPFTError, nest
from fedpft_flower.curves import draw_curves
from fedpft_flower.disk import OUT_OF_REACH, from_home, lock, put, reachable_path
from fedpft_flower.metrics import Metrics
from fedpft_flower.page import render_page
from fedpft_flower.plan import Plan
from fedpft_flower.runs import ROUNDS, SUMMARY, runs_root


class RunDirectory:
    """Hold the results of one run; every file appears whole or not at all."""

    def __init__(self, config: Config, run_id: int) -> None:
        """Create the directory and write the effective configuration.

        With `resume`, the directory is that of the run to continue.

        Raises:
            FedPFTError: the directory cannot be written, or another run writes there.
        """
        self.path = runs_root(config.out_dir) / str(run_id)
        if config.resume:
            self.path = from_home(config.resume)
            if not _is_there(self.path / "config.toml"):
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
            self.note(config)

    def close(self) -> None:
        """Let another run continue in this directory."""
        self._lock.close()

    def note(self, config: Config) -> None:
        """Write the effective configuration, to run with or to resume."""
        here = replace(config, out_dir=str(self.path.parent), resume="")
        self._write("config.toml", tomli_w.dumps(nest(here.flat())))

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
        if self._rounds and isinstance(error, FileNotFoundError):
            return FedPFTError(f"{self.path} is gone ({error}); start anew")
        # From round 1 on there is a checkpoint.
        resumable = len(self._rounds) > 1
        other = f"resume with resume={self.path}" if resumable else "choose an out-dir"
        return FedPFTError(f"cannot write {self.path} ({error}); make room or {other}")


def _pretty(value: Metrics) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _is_there(path: Path) -> bool:
    try:
        return reachable_path(str(path)) is not None
    except PermissionError as error:
        raise FedPFTError(f"resume: {path.parent} {OUT_OF_REACH}") from error
