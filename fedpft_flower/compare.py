"""Run the cells of a comparison through the same app, one after the other."""

import argparse
import json
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedpft_flower.checkpoint import END_KEYS, FREE_KEYS
from fedpft_flower.commands import (
    CHECKOUT,
    DEFAULT_SHARE,
    Share,
    machine_options,
    run_experiment,
    share_of,
)
from fedpft_flower.config import (
    MARK,
    READ_PATHS,
    Config,
    FedPFTError,
    flat_defaults,
    flatten,
)
from fedpft_flower.disk import lock, put
from fedpft_flower.endings import end_like_ctrl_c, one_line_end
from fedpft_flower.methods import method_of
from fedpft_flower.metrics import metric_of
from fedpft_flower.results import Result, best_of, row_of
from fedpft_flower.runs import FinishedRun, is_finished, runs_root
from fedpft_flower.spec import Cell, Spec, unnamed
from fedpft_flower.tables import write_tables
from fedpft_flower.wording import duration

# How often a cell's own progress is shown.
PROGRESS_SECONDS = 30.0
# Of a round, what stays at the run itself: it is long, or says who took part.
_LONG = {"bytes", "clients", "per-client"}


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a comparison (`fedpft-compare`); exit 0 only if every cell has a result.

    A finished cell is not run again, an unfinished one goes on, a failed one is shown
    with its reason and tried again by the next call.
    """
    options = _parser().parse_args(arguments)
    end_like_ctrl_c()
    with one_line_end("interrupted; finished cells stay, the same command goes on"):
        spec = Spec(options.spec)
        out = options.out or runs_root(Config().out_dir) / f"compare-{spec.place.stem}"
        share = share_of(options)
        comparison = Comparison(spec, out.absolute(), options.app, share)
        if not options.tables:
            comparison.run(options.only)
        written = write_tables(spec, comparison.results(), comparison.out)
    print(written.read_text(encoding="utf-8"))
    print(f"results: {comparison.out}")
    sys.exit(0 if comparison.is_complete else 1)


class Comparison:
    """Keep the results of a spec's cells in a directory, and run what is missing.

    `cells/NAME.json` holds a result, `cells/NAME.failed.json` the reason of a failure,
    `runs/NAME-nNODES/` the run directories.
    """

    def __init__(
        self, spec: Spec, out: Path, app: Path = CHECKOUT, share: Share = DEFAULT_SHARE
    ) -> None:
        """Open a directory.

        Raises:
            FedPFTError: it cannot be written, or has results of another spec.
        """
        self.spec, self.out, self._app, self._share = spec, out, app, share
        self._known: dict[Cell, dict[str, Any]] = {}
        try:
            (out / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FedPFTError(
                f"cannot write {out} ({error}); choose another --out"
            ) from error
        for cell in spec.all_cells:
            self._check(cell)
        self._check_read()

    def cells(self) -> list[Cell]:
        """Return the cells whose rate is known, in the order in which they are run."""
        first = self.spec.seeds[0]
        return [
            cell
            for cell in self.spec.all_cells
            if cell.seed == first or cell.lr == self.best_lr(cell)
        ]

    def best_lr(self, cell: Cell) -> float | None:
        """Return the best rate of a cell's grid on validation, with the first seed.

        None as long as one of them is to be run, or where all of them failed.
        """
        tried = self._grid(cell)
        if len(tried) == 1:
            return tried[0].cell.lr
        # One that failed has diverged, say: another rate is better.
        finished = [result for result in tried if result.found is not None]
        if not finished or any(result.state == "unrun" for result in tried):
            return None
        return best_of(finished).cell.lr

    def _grid(self, cell: Cell) -> list[Result]:
        """Return what there is of a cell at every rate, with the first seed."""
        first = replace(cell, seed=self.spec.seeds[0])
        rates = self.spec.lrs(cell.task, cell.partition, cell.method)
        return [self._result(replace(first, lr=lr)) for lr in rates]

    def results(self) -> list[Result]:
        """Return every cell whose rate is known with what is there of it."""
        return [self._result(cell) for cell in self.cells()]

    def _result(self, cell: Cell) -> Result:
        return Result(cell, self._read(cell), self._reason(cell))

    @property
    def is_complete(self) -> bool:
        """Tell whether every cell has a result."""
        return all(result.found is not None for result in self.results())

    def run(self, only: str = "") -> None:
        """Run every cell without a result whose name has this text.

        Raises:
            FedPFTError: no cell has it, or another process runs cells here.
        """
        if not any(only in cell.name for cell in self.spec.all_cells):
            raise FedPFTError(f"--only {only!r} is in no cell's name; see results.csv")
        try:
            (self.out / "runs").mkdir(exist_ok=True)
            alone = lock(self.out / "runs" / ".lock")
        except BlockingIOError as error:
            raise FedPFTError(
                f"{self.out} is in use by another comparison; wait for it or stop it"
            ) from error
        except OSError as error:
            raise FedPFTError(f"cannot write {self.out} ({error})") from error
        with alone:
            self._run_all(only)

    def _run_all(self, only: str) -> None:
        for cell in self.cells():  # what failed earlier may be mended
            if only in cell.name:
                self._place(cell, ".failed.json").unlink(missing_ok=True)
        began, ran = time.monotonic(), 0
        while waiting := self._waiting(only):
            cell, left = waiting[0], ""
            to_go = len(waiting) + self._to_come(only)
            if ran:
                seconds = (time.monotonic() - began) / ran * to_go
                left = f", about {duration(seconds)} left"
            print(f"{cell.name}: {to_go} to go{left}", flush=True)
            print(f"{cell.name}: {self._run(cell)}", flush=True)
            ran += 1

    def _waiting(self, only: str) -> list[Cell]:
        return [
            cell
            for cell in self.cells()
            if only in cell.name and self._read(cell) is None and not self._reason(cell)
        ]

    def _to_come(self, only: str) -> int:
        """Count the cells of later seeds whose rate is yet to be chosen."""
        return len(
            {
                replace(cell, lr=0.0)
                for cell in self.spec.all_cells
                if only in cell.name
                and self.best_lr(cell) is None
                and cell.seed != self.spec.seeds[0]
                and any(result.state == "unrun" for result in self._grid(cell))
            }
        )

    def _run(self, cell: Cell) -> str:
        """Run a cell, keep its result or its failure, and say in short what came."""
        began, config = time.monotonic(), self.spec.config(cell)
        # A stopped run goes on only with as many nodes.
        runs = self.out / "runs" / f"{cell.name}-n{self.spec.nodes}"
        flat = config.flat() | {"out-dir": str(runs), "checkpoint.keep": 1}
        found: Path | _Failed
        try:
            place = _unkept(runs, flat)
        except FedPFTError as error:
            found = _Failed(str(error))
        else:
            if place is not None and is_finished(place):
                found = place
            else:
                found = self._attempt(flat | {"resume": str(place or "")})
        useless = isinstance(found, _Failed) and found.reason.startswith("resume: ")
        if useless and not config.privacy.on:  # releases that were made stay counted
            found = self._attempt(flat)
        if isinstance(found, _Failed):
            self._write(cell, ".failed.json", {"cell": asdict(cell), **asdict(found)})
            return f"failed: {found.reason}"
        result = _collect(found)
        result |= {"cell": asdict(cell), "nodes": self.spec.nodes}
        result |= {"config": self.spec.unfilled(config), "recipe": recipe_of(config)}
        self._write(cell, ".json", result)
        shutil.rmtree(found / "checkpoints", ignore_errors=True)
        self._check_read()  # the data may have changed since the last cell
        metric, test = metric_of(config.data), result["summary"]["test-after"]
        return (
            f"FM {test[f'fm-{metric}']:.3f}, sub-FM {test[f'sub-fm-{metric}']:.3f} "
            f"({metric}), {duration(time.monotonic() - began)}"
        )

    def _attempt(self, flat: Mapping[str, Any]) -> "Path | _Failed":
        """Run an experiment; return its run directory, or why there is none."""
        runs = Path(flat["out-dir"])
        earlier, config = {*runs.glob("*")}, Config.from_run_config(flat)
        try:
            failure = run_experiment(
                config, self.spec.nodes, self._app, _Shown(), self._share
            )
        except (FedPFTError, OSError) as error:
            return _Failed(str(error))
        if failure is not None:
            lines = list(failure.lines)[-30:]
            # A run that broke told nothing: its last words, or how it ended.
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return _Failed(failure.told or last or failure.status, lines)
        (made,) = (
            [Path(config.resume)] if config.resume else {*runs.glob("*")} - earlier
        )
        return made

    def _check(self, cell: Cell) -> None:
        """Refuse results that another spec has made."""
        result = self._read(cell)
        if result is None:
            return
        config = self.spec.config(cell)
        now, recipe = self.spec.unfilled(config), recipe_of(config)
        # What this version added has its default in older results.
        earlier = unnamed({**flat_defaults(), **result["config"]})
        told: dict[str, tuple[Any, Any]] = {
            "nodes": (result["nodes"], self.spec.nodes),
            # What settings leave to the row of a method, which versions may change.
            "recipe": ({**recipe, **_EARLIER, **(result["recipe"] or {})}, recipe),
        }
        told |= {key: (earlier[key], value) for key, value in now.items()}
        for key, (then, value) in told.items():
            if then != value and key not in _FREE:
                raise FedPFTError(
                    f"{self._place(cell, '.json')} was made with {key} = {then!r}, the "
                    f"spec says {value!r}; give another --out, or remove that file"
                )

    def _check_read(self) -> None:
        """Refuse results that settings make alike, and that read other rows or FMs."""
        seen: dict[tuple[Any, ...], tuple[Path, str]] = {}
        for cell in self.spec.all_cells:
            if (result := self._read(cell)) is None:
                continue
            place = self._place(cell, ".json")
            for key, content in _read_by(cell, result).items():
                earlier, other = seen.setdefault(key, (place, content))
                if content != other:
                    raise FedPFTError(
                        f"{earlier} and {place} were made with unlike {key[0]}; give "
                        "another --out, or remove those of the old ones"
                    )

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        place = self._place(cell, ".json")
        if cell not in self._known and place.exists():
            try:
                found = json.loads(place.read_text(encoding="utf-8"))
                self._known[cell] = {key: found[key] for key in _PARTS}
                self._known[cell]["recipe"] = found.get("recipe")
                row_of(Result(cell, found, None))  # what tables take is there
                _read_by(cell, found)
            except (
                *(OSError, ValueError, LookupError, TypeError, AttributeError),
                FedPFTError,
            ) as error:
                self._known.pop(cell, None)
                raise FedPFTError(
                    f"{place} is not a cell's result ({error!r}); remove it"
                ) from error
        return self._known.get(cell)

    def _reason(self, cell: Cell) -> str | None:
        place = self._place(cell, ".failed.json")
        try:
            return str(json.loads(place.read_text())["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            return f"{place} cannot be read"

    def _write(self, cell: Cell, suffix: str, content: Mapping[str, Any]) -> None:
        place = self._place(cell, suffix)
        text = json.dumps(content, indent=1)
        try:
            put(place, lambda draft: draft.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise FedPFTError(
                f"cannot write {place} ({error}); make room, the same command goes on"
            ) from error

    def _place(self, cell: Cell, suffix: str) -> Path:
        return self.out / "cells" / f"{cell.name}{suffix}"


@dataclass(frozen=True)
class _Failed:
    """Say why a cell failed, and how its stream ended."""

    reason: str
    lines: list[str] = field(default_factory=list)


# What recipes did before there was a choice.
_EARLIER = {"sensitivity": 0.0, "refine_on_validation": 0.0}

# What a result has; those of older versions lack the recipe.
_PARTS = ("cell", "nodes", "config", "summary", "manifest", "rounds", "hits")

# Settings that may differ between a run that ended and the spec: where things are put,
# and how long to wait; but not what is read, nor how a run ends.
_FREE_AT_END = FREE_KEYS - {*READ_PATHS} - END_KEYS
# Of these the recipes are compared, which have what older results had.
_FREE = _FREE_AT_END | {"align.sensitivity", "plug-in.validation-share"}


def recipe_of(config: Config) -> dict[str, Any]:
    """Return what a method does, as its row and the settings say it."""
    method = method_of(config)
    told = {part.name: getattr(method, part.name) for part in fields(method)}
    del told["paper"]  # what is cited shapes no result
    return {"plan": told.pop("planner").__name__, **told}


# What decides which of an FM's weights are hashed, and in which numbers.
_FM_KEYS = ("fm.name", "fm.dtype", "lora.head", "data.task")


def _read_by(cell: Cell, result: Mapping[str, Any]) -> dict[tuple[Any, ...], str]:
    """Return the hash of what a cell has read, by what it is and what decides on it.

    Gaps pair the test rows of one task and seed, whatever else methods set.
    """
    manifest, config = result["manifest"], result["config"]
    data = [(key, value) for key, value in config.items() if key.startswith("data.")]
    found: dict[tuple[Any, ...], Any] = {
        ("FM", *(config.get(key) for key in _FM_KEYS)): manifest.get("fm-sha256")
    }
    for name, split in manifest.get("splits", {}).items():
        decides = (cell.task,) if name == "test" else data
        seed = cell.seed if _is_drawn(name, manifest["splits"], config) else None
        found[f"{name} rows", seed, *decides] = split["sha256"]
    return {key: content for key, content in found.items() if content is not None}


def _is_drawn(name: str, splits: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Tell whether the seed may have decided which rows a split has."""
    if name == "public":
        return True
    split, sources = splits[name], [str(each["source"]) for each in splits.values()]
    of_it = f" of {split['source']}, seeded"
    if "seeded" in split["source"] or any(source.endswith(of_it) for source in sources):
        return True
    role = name if name in ("train", "validation") else "test"
    most = config.get(f"data.max-{role}-rows") or 0
    return 0 < most <= int(split["rows"])


def _collect(directory: Path) -> dict[str, Any]:
    """Return the result of a finished run, without what is long or names places."""
    run = FinishedRun.read(directory)
    return {
        "summary": run.summary,
        "manifest": _without(run.manifest, {"config"}),
        "rounds": [_without(entry, _LONG) for entry in run.rounds],
        "hits": json.loads((directory / "hits.json").read_text()),
    }


def _without(found: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in keys}


def _unkept(runs: Path, flat: Mapping[str, Any]) -> Path | None:
    """Return the newest directory of a run of this configuration without a result.

    It was stopped, or ended and was not kept as a result, which removes checkpoints.

    Raises:
        FedPFTError: a directory with checkpoints cannot be read, so that it may be this
            run's.
    """
    for directory in sorted(
        runs.glob("*/checkpoints"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        place = directory.parent
        if not any(directory.glob("round-*")):
            continue
        ended = is_finished(place)
        try:
            told = (
                json.loads((place / "manifest.json").read_text())["config"]
                if ended
                else flatten(tomllib.loads((place / "config.toml").read_text()))
            )
        except (OSError, ValueError, LookupError) as error:
            raise FedPFTError(
                f"cannot read how {place} was run ({error!r}); mend it, or remove it "
                "if nothing in it is wanted"
            ) from error
        settings, free = flat_defaults() | told, _FREE_AT_END if ended else FREE_KEYS
        if all(settings.get(k) == v for k, v in flat.items() if k not in free):
            return place
    return None


class _Shown:
    """Show a cell's rounds now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        own, now = line.removeprefix(MARK), time.monotonic()
        if line.startswith(f"{MARK}round ") and now - self._last > PROGRESS_SECONDS:
            print(f"  {own}", flush=True)
            self._last = now


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpft-compare",
        description="Run a comparison of methods from a spec, e.g. "
        "conf/compare/quick.toml, and write its tables and plots.",
    )
    parser.add_argument("spec", type=Path, help="the comparison, a TOML file")
    parser.add_argument(
        "--out",
        type=Path,
        help="where results are kept (default: compare-SPEC among the runs)",
    )
    parser.add_argument("--only", default="", help="cells whose name has this text")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing, write tables and plots"
    )
    machine_options(parser)
    return parser
