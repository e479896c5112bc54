"""Show how a run stands, from its directory alone (`fedpft-status`)."""

import argparse
import os
import statistics
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpft_flower.config import Config, FedPFTError, flatten, one_line
from fedpft_flower.disk import last_used
from fedpft_flower.endings import one_line_end
from fedpft_flower.methods import name_of
from fedpft_flower.metrics import Metrics, metric_of
from fedpft_flower.runs import LOG, is_finished, read_rounds, runs_root
from fedpft_flower.wording import duration, last_part, size

_LINES = 5  # of the log, and of the errors, that are shown
_EVERY = 5.0  # seconds, with --watch


@dataclass(frozen=True)
class Status:
    """Hold what the directory of a run says of it."""

    path: Path
    config: Config
    rounds: list[Metrics]
    log: list[str]
    finished: bool
    # Whether a process has the directory locked; None where that cannot be told.
    locked: bool | None
    # Seconds since anything was written.
    age: float

    @classmethod
    def read(cls, path: Path) -> "Status":
        """Read a run directory, of a run that may be writing it.

        Raises:
            FedPFTError: it is none.
        """
        try:
            flat = flatten(tomllib.loads((path / "config.toml").read_text()))
            config = Config.from_run_config(flat)
            rounds = read_rounds(path)
            written = max(map(last_used, path.iterdir()))
        except (OSError, ValueError) as error:
            raise FedPFTError(
                f"{path} is not a run directory ({error}); give the one that the run "
                "printed"
            ) from error
        return cls(
            path,
            config,
            rounds,
            _lines(path / LOG),
            is_finished(path),
            _is_locked(path / ".lock"),
            time.time() - written,
        )

    @property
    def state(self) -> str:
        """Return "finished", "running", "stopped", or what else can be told."""
        if self.finished:
            return "finished"
        if self.locked is None:
            return f"not finished; last written {duration(self.age)} ago"
        if self.locked:
            doing = "ending: refinement, test, results" if self.is_over else "running"
            return f"{doing}; last written {duration(self.age)} ago"
        begun = any(self.path.glob("checkpoints/round-*"))
        advice = f"go on with resume={self.path}" if begun else "start anew"
        return f"stopped {duration(self.age)} ago; {advice}"

    @property
    def is_over(self) -> bool:
        """Tell whether no round is to come: all are done, or it stopped early."""
        return bool(self.rounds) and self.rounds[-1].get("last", False)

    @property
    def seconds_left(self) -> float | None:
        """Return the median seconds of a round times the rounds to come."""
        seconds: list[float] = [
            entry["seconds"] for entry in self.rounds if entry["round"]
        ]
        if self.finished or self.is_over or not seconds:
            return None
        return statistics.median(seconds) * (self.config.rounds - len(seconds))

    def nodes(self) -> dict[str, tuple[int, int, str]]:
        """Return for every node: its last round, rounds it took, how the last went."""
        found: dict[str, tuple[int, int, str]] = {}
        for entry in self.rounds:
            for name, one in entry.get("per-client", {}).items():
                took = found.get(name, (0, 0, ""))[1] + (one["outcome"] == "ok")
                found[name] = entry["round"], took, one["outcome"]
        return found

    def errors(self) -> list[str]:
        """Return the failures of all rounds, the newest last."""
        return [
            f"round {entry['round']}: {name}: {reason}"
            for entry in self.rounds
            for name, reason in entry.get("failures", {}).items()
        ]


def render(status: Status) -> str:
    """Return how a run stands, for a terminal."""
    config, rounds = status.config, status.rounds
    metric = metric_of(config.data)
    last = rounds[-1]["round"] if rounds else None
    rows = [
        ("run", str(status.path)),
        ("state", status.state),
        ("method", f"{name_of(config)}, FM {last_part(config.fm.name)}"),
        ("round", "preparing" if last is None else f"{last} of {config.rounds}"),
    ]
    if status.seconds_left is not None:
        rows.append(("time left", f"about {duration(status.seconds_left)}"))
    for name, key in (("FM", "fm"), ("sub-FM", "sub-fm")):
        scored = [entry for entry in rounds if f"{key}-{metric}" in entry]
        if scored:
            value = f"{scored[-1][f'{key}-{metric}']:.3f} (round {scored[-1]['round']})"
            rows.append((f"{name} {metric}, validation", value))
    for way in ("down", "up"):
        sent = sum(entry.get(f"bytes-{way}", 0) for entry in rounds)
        rows.append((f"sent {way}", size(sent)))
    if rounds and "privacy" in rounds[-1]:
        rows.append(("epsilon", f"{rounds[-1]['privacy']['epsilon']:.3g}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines += _section("nodes (last round, rounds taken, outcome)", _nodes(status))
    lines += _section("last errors", status.errors()[-_LINES:])
    lines += _section("log", status.log[-_LINES:])
    return "\n".join(lines)


def _nodes(status: Status) -> list[str]:
    found = status.nodes()
    width = max(map(len, found), default=0)
    return [
        one_line(f"{name.ljust(width)}  {last}  {took}  {outcome}")
        for name, (last, took, outcome) in sorted(found.items())
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _lines(place: Path) -> list[str]:
    return place.read_text(encoding="utf-8").splitlines() if place.exists() else []


def _is_locked(place: Path) -> bool | None:
    """Tell whether a file is locked, from the system's list: nobody is disturbed.

    Some file systems are listed under another device than their files say, so a lock
    on an equal number there may be one on this file, or not.
    """
    listed = Path("/proc/locks")
    if not place.exists() or not listed.exists():
        return None
    told = place.stat()
    device = f"{os.major(told.st_dev):02x}:{os.minor(told.st_dev):02x}"
    locks = [line.split()[5:6] for line in listed.read_text().splitlines()]
    if [f"{device}:{told.st_ino}"] in locks:
        return True
    unsure = any(lock and lock[0].endswith(f":{told.st_ino}") for lock in locks)
    return None if unsure else False


def _newest(root: Path) -> Path:
    """Return the run that was written last: it may be an older one, resumed."""
    try:
        found = [path for path in root.iterdir() if (path / "config.toml").is_file()]
    except OSError as error:
        raise FedPFTError(f"{root}: {error.strerror}; give a run directory") from error
    if not found:
        raise FedPFTError(f"{root} has no run directory; give one")
    return max(found, key=lambda path: max(map(last_used, path.iterdir())))


def run(arguments: Sequence[str] | None = None) -> None:
    """Show how a run stands (`fedpft-status`)."""
    parser = argparse.ArgumentParser(
        prog="fedpft-status",
        description="Show how a running or finished run stands, from its directory.",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", help="its directory (default: the newest one)"
    )
    parser.add_argument(
        "--watch", action="store_true", help=f"every {_EVERY:g} s until it ends"
    )
    options = parser.parse_args(arguments)
    with one_line_end():
        place = options.run or _newest(runs_root(Config().out_dir))
        status = Status.read(place.expanduser().absolute())
        print(render(status), flush=True)
        while options.watch and not status.finished and status.locked is not False:
            time.sleep(_EVERY)
            status = Status.read(status.path)
            print(f"\n{render(status)}", flush=True)
