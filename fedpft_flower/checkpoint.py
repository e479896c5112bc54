"""Keep the state of a run on disk after every round, so that it can be resumed.

A checkpoint is a directory `checkpoints/round-000003` with `tensors.safetensors` and
`state.json`. It is written under a temporary name, flushed and renamed: it is there
whole, or not at all.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpft_flower.config import (
    READ_PATHS,
    WRITTEN_PATHS,
    FedPFTError,
    Scalar,
    flat_defaults,
)
from fedpft_flower.disk import file_hash, put

_NAME = re.compile(r"round-([0-9]{6,})")
_SPENT = "privacy.json"  # beside the checkpoints; ahead of them after a kill

FORMAT = 5  # of the files; rises when older ones can no longer be read

# What comes after all that checkpoints are made of: when a run ends before its last
# round, which round's adapter it delivers, and how that is refined.
END_KEYS = {
    "early-stop",
    "select",
    *(key for key in flat_defaults() if key.startswith("plug-in.")),
}
# Settings that may differ between a run and its continuation: they say where things
# are, how long and for whom to wait, what a step may cost, and how the run ends. What
# stands in places is compared by content.
FREE_KEYS = {
    *READ_PATHS,
    *WRITTEN_PATHS,
    *END_KEYS,
    "server-threads",
    "timeout-seconds",
    "wait-seconds",
    "checkpoint.keep",
    "train.min-nodes",
    "train.min-replies",
    "train.max-retries",
    "train.micro-batch-size",
    "train.recompute",
}


@dataclass(frozen=True)
class Checkpoint:
    """Hold a run as it was after a round."""

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """Write and read the checkpoints of one run directory."""

    def __init__(self, run_directory: Path, keep: int) -> None:
        self._root, self._keep = run_directory / "checkpoints", keep

    def save(self, checkpoint: Checkpoint, best: int) -> None:
        """Add a checkpoint; keep it, the newest ones and that of the best round.

        Raises:
            FedPFTError: the disk refuses; earlier checkpoints are as they were.
        """

        def write(draft: Path) -> None:
            draft.mkdir()
            tensors = draft / "tensors.safetensors"
            save_file(
                {n: t.contiguous() for n, t in checkpoint.tensors.items()}, tensors
            )
            state = {
                "round": checkpoint.round,
                "tensors-sha256": file_hash(tensors),
                **checkpoint.state,
            }
            (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")

        try:
            self._root.mkdir(parents=True, exist_ok=True)
            put(self._place(checkpoint.round), write)
        except (OSError, SafetensorError) as error:  # the latter says "disk full" too
            raise FedPFTError(
                f"cannot write a checkpoint in {self._root} ({error}); make room and "
                f"resume with resume={self._root.parent}"
            ) from error
        for old in self._rounds()[: -self._keep]:
            if old != best:
                shutil.rmtree(self._place(old), ignore_errors=True)

    def load(self, wanted: int | None = None) -> Checkpoint:
        """Read the checkpoint of a round, or the newest sound one.

        Raises:
            FedPFTError: there is none that is whole.
        """
        problems = []
        rounds = reversed(self._rounds()) if wanted is None else [wanted]
        for current in rounds:
            place = self._place(current)
            try:
                state = json.loads((place / "state.json").read_text(encoding="utf-8"))
                tensors = place / "tensors.safetensors"
                if file_hash(tensors) != state["tensors-sha256"]:
                    raise ValueError("its tensors have another hash")
                _check_format(state)
                return Checkpoint(current, load_file(tensors), state)
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"{place.name} ({error})")
        found = f"; damaged: {', '.join(problems)}" if problems else ""
        if wanted is not None:
            raise FedPFTError(
                f"{self._root} lacks the checkpoint that is needed{found}"
            )
        raise FedPFTError(
            f"resume: {self._root} has no checkpoint to resume from{found}; name the "
            "run directory of a run that ended its round 0"
        )

    def note_spent(self, spent: Mapping[str, Any]) -> None:
        """Put on disk how much privacy is spent, between two checkpoints.

        Raises:
            FedPFTError: the disk refuses; what stood there before still does.
        """
        text = json.dumps(spent)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            put(self._root / _SPENT, lambda draft: draft.write_text(text))
        except OSError as error:
            raise FedPFTError(
                f"cannot write in {self._root} ({error}); make room and resume with "
                f"resume={self._root.parent}"
            ) from error

    def spent(self) -> dict[str, Any]:
        """Return what `note_spent` wrote last.

        Raises:
            FedPFTError: it is not there, or not whole.
        """
        try:
            text = (self._root / _SPENT).read_text(encoding="utf-8")
            return dict(json.loads(text))
        except (OSError, TypeError, ValueError) as error:
            raise FedPFTError(
                f"resume: cannot read how much privacy was spent ({error}); start anew"
            ) from error

    def _place(self, current: int) -> Path:
        return self._root / f"round-{current:06d}"

    def _rounds(self) -> list[int]:
        named = (_NAME.fullmatch(path.name) for path in self._root.glob("round-*"))
        return sorted(int(match[1]) for match in named if match)


def _check_format(state: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise FedPFTError(
            f"resume: the checkpoint has format {state.get('format')}, this version "
            f"reads {FORMAT}; resume with the version that wrote it"
        )


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run that was another one, and name the difference.

    Rounds may be fewer, so that a run can be ended early.

    Args:
        saved: the state of a checkpoint: its `round`, and the `identity` of the run,
            `config` and hashes by name.
        now: the identity of this run.

    Raises:
        FedPFTError: they differ.
    """
    before, after = saved["identity"], now["identity"]
    for name in sorted(before.keys() | after.keys()):
        if name != "config" and before.get(name) != after.get(name):
            raise FedPFTError(
                f"resume: {name} is {_short(after.get(name))}, the checkpoint has "
                f"{_short(before.get(name))}; give what that run had"
            )
    # A setting that was not there when the checkpoint was made had its default.
    settings = flat_defaults() | before["config"]
    for key, new in sorted(after["config"].items()):
        old = settings[key]
        if key == "rounds":
            _check_rounds(saved["round"], old, new)
        elif key not in FREE_KEYS and old != new:
            raise FedPFTError(
                f"resume: {key} = {new!r}, the checkpoint has {old!r}; run with the "
                "config.toml of that run directory"
            )


def _check_rounds(done: int, before: int, now: int) -> None:
    if not done <= now <= before:
        raise FedPFTError(
            f"resume: rounds = {now}, the checkpoint is of round {done} of {before}; "
            "a run may end early, by any number from the one to the other"
        )


def check_partitions(saved: Mapping[str, Any], now: int) -> None:
    """Refuse to continue a run whose rows were divided among more or fewer nodes.

    Args:
        saved: the state of a checkpoint.
        now: into how many partitions the nodes divide the rows; 0 if none does.

    Raises:
        FedPFTError: the numbers differ.
    """
    before = saved["partitions"]
    if before and now and before != now:
        raise FedPFTError(
            f"resume: {now} nodes share the rows, in that run it was {before}; start "
            f"as many (fedpft-run: --nodes {before})"
        )


def identity(config: Mapping[str, Scalar], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return what must be the same for a run to be continued."""
    return {"format": FORMAT, "identity": {"config": dict(config), **hashes}}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else repr(value)
