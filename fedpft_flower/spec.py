"""Read the spec of a comparison: methods x tasks x partitions x kept fractions x seeds.

A spec is one TOML file:

    nodes = 20
    seeds = [0, 1, 2]
    methods = ["fedpetuning", "fedpft", "long"]  # rows of methods, or tables below
    kept = [0.25, 0.125]                         # sub-fm.keep-fraction (optional)
    lrs = [5e-4, 1e-3]                           # train.lr (optional)
    reference = "fedpetuning"                    # what gaps are taken from (optional)
    pairs = [["long", "fedpft"]]                 # differences to show (optional)

    [settings]            # of every cell (optional)
    rounds = 10

    [task.sst2]           # at least one
    base = "../sst2.toml" # a configuration to start from (optional)
    data.path = "{SST2}"  # the environment variable SST2

    [partition.skewed]    # optional
    partition.kind = "dirichlet"

    [method.long]         # optional
    method = "fedpft"
    align.steps = 1000

Later tables win: base, settings, task, partition, method; kept and lrs exclude the same
settings in tables of methods. Of several rates each method takes, for every task,
partition and kept fraction, the one that is best on validation with the first seed. A
method that keeps the whole FM runs once for all kept fractions.
"""

import hashlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpft_flower.commands import resolve
from fedpft_flower.config import READ_PATHS, Config, FedPFTError, flatten
from fedpft_flower.disk import shell_path
from fedpft_flower.methods import METHODS, method_of, name_of
from fedpft_flower.planners import keep_all
from fedpft_flower.wording import last_part, shown_settings

_VARIABLE = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_KEYS = {
    "nodes": int,
    "seeds": list,
    "methods": list,
    "kept": list,
    "lrs": list,
    "reference": str,
    "pairs": list,
    "settings": dict,
    "task": dict,
    "partition": dict,
    "method": dict,
}


@dataclass(frozen=True)
class Cell:
    """Name one run of a comparison."""

    task: str
    partition: str  # "" where the spec has no partitions
    method: str
    # sub-fm.keep-fraction, or sub-fm.keep-neurons where that decides; 1 where the whole
    # FM is kept.
    kept: float
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        parts = [self.task, self.partition, self.method]
        numbers = [f"k{self.kept:g}", f"lr{self.lr:g}", f"s{self.seed}"]
        return "-".join([*filter(None, parts), *numbers])


class Spec:
    """Hold a spec, and make the configuration of each of its cells."""

    def __init__(self, place: Path) -> None:
        """Read a spec.

        Raises:
            FedPFTError: it cannot be read, an environment variable that it names is
                not set, or one of its cells makes no configuration.
        """
        self.place = place
        # Environment variables that the spec names, and what they stand for.
        self._variables: dict[str, str] = {}
        table = self._read(place)
        self._check(table)
        self.nodes: int = table["nodes"]
        self.seeds: list[int] = table["seeds"]
        self.methods: list[str] = table["methods"]
        self.tasks: list[str] = list(table["task"])
        self.partitions: list[str] = list(table.get("partition", {})) or [""]
        self.pairs: list[tuple[str, str]] = [(a, b) for a, b in table.get("pairs", [])]
        usual = "fedpetuning" if "fedpetuning" in self.methods else self.methods[0]
        self.reference: str = table.get("reference", usual)
        self._table = table
        self._bases = {task: self._base(task) for task in self.tasks}
        for cell in self.all_cells:
            self.config(cell)  # says what is wrong before anything runs
        names = [cell.name.casefold() for cell in self.all_cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise FedPFTError(
                f"{place}: several cells are called {twice[0]!r}; give tasks, "
                "partitions, methods and rates other names and values"
            )

    # ------------------------------------------------------------------------ cells

    @cached_property
    def all_cells(self) -> list[Cell]:
        """Return all cells, the whole grid of rates for every seed."""
        return [
            Cell(task, partition, method, kept, lr, seed)
            for seed in self.seeds
            for task in self.tasks
            for partition in self.partitions
            for method in self.methods
            for kept in self.kept(task, partition, method)
            for lr in self.lrs(task, partition, method)
        ]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return every task with every partition, as tables and plots have them."""
        return [(task, part) for task in self.tasks for part in self.partitions]

    def groups(self) -> Iterator[tuple[str, str, str, float]]:
        """Yield task, partition, method and kept fraction, as they stand in tables."""
        seen = dict.fromkeys(
            (c.task, c.partition, c.method, c.kept) for c in self.all_cells
        )
        yield from seen

    def kept(self, task: str, partition: str, method: str) -> list[float]:
        """Return the kept fractions of a method.

        Raises:
            FedPFTError: the settings name a number of neurons too.
        """
        config = self._config(task, partition, method)
        if METHODS[config.method].planner is keep_all:
            return [1.0]
        if config.sub_fm.keep_neurons:
            if "kept" in self._table:
                raise FedPFTError(
                    f"{self.place}: kept and sub-fm.keep-neurons exclude each other"
                )
            return [float(config.sub_fm.keep_neurons)]
        return list(map(float, self._table.get("kept", [config.sub_fm.keep_fraction])))

    def lrs(self, task: str, partition: str, method: str) -> list[float]:
        """Return the grid of rates of a method."""
        usual = self._config(task, partition, method).train.lr
        return list(map(float, self._table.get("lrs", [usual])))

    def config(self, cell: Cell) -> Config:
        """Return the configuration of a cell.

        Raises:
            FedPFTError: there can be none.
        """
        settings: dict[str, Any] = {"seed": cell.seed, "train.lr": cell.lr}
        if "kept" in self._table and cell.kept != 1.0:
            settings["sub-fm.keep-fraction"] = cell.kept
        return self._config(cell.task, cell.partition, cell.method, settings)

    def unfilled(self, config: Config) -> dict[str, Any]:
        """Return settings to hand on: of places the variable that names them.

        Of one that none names it is the last part, and what tells it from others.
        """
        flat = config.flat() | {"out-dir": Config().out_dir}
        longest_first = sorted(self._variables.items(), key=lambda v: -len(v[1]))
        for key in READ_PATHS:
            for name, value in longest_first:
                if str(flat[key]) == value or str(flat[key]).startswith(f"{value}/"):
                    flat[key] = f"{{{name}}}{str(flat[key]).removeprefix(value)}"
        return unnamed(flat)

    def name_of(self, task: str, partition: str, method: str) -> str:
        """Return what is run under the name of a method of this spec."""
        own = flatten(self._table.get("method", {}).get(method, {}))
        own.pop("method", None)
        return name_of(self._config(task, partition, method), shown_settings(own))

    # ------------------------------------------------------------------------ parts

    def _config(
        self,
        task: str,
        partition: str,
        method: str,
        more: Mapping[str, Any] | None = None,
    ) -> Config:
        settings = self._settings(task, partition, method) | dict(more or {})
        try:
            config = resolve(settings)
            method_of(config)
        except FedPFTError as error:
            what = " ".join(filter(None, (task, partition, method)))
            raise FedPFTError(f"{self.place}, {what}: {error}") from error
        return config

    def _settings(self, task: str, partition: str, method: str) -> dict[str, Any]:
        own = {"method": method} if method in METHODS else {}
        own |= flatten(self._table.get("method", {}).get(method, {}))
        settings = dict(self._bases[task])
        for part in (
            self._table.get("settings", {}),
            {k: v for k, v in self._table["task"][task].items() if k != "base"},
            self._table.get("partition", {}).get(partition, {}),
            own,
        ):
            settings |= flatten(part)
        return settings

    def _base(self, task: str) -> dict[str, Any]:
        base = self._table["task"][task].get("base")
        return flatten(self._read(self.place.parent / base)) if base else {}

    def _read(self, place: Path) -> dict[str, Any]:
        try:
            text = place.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # the latter of its name, or bytes
            raise FedPFTError(f"cannot read {place}: {error}; give a spec") from error
        for name in dict.fromkeys(_VARIABLE.findall(_uncommented(text))):
            value = os.environ.get(name)
            if not value:
                raise FedPFTError(
                    f"{place} names {{{name}}}; set the environment variable {name}"
                )
            value = self._variables[name] = shell_path(value)
            text = text.replace(f"{{{name}}}", value)
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise FedPFTError(f"cannot read {place}: {error}; give a spec") from error

    def _check(self, table: Mapping[str, Any]) -> None:
        for problem in _problems(table):
            raise FedPFTError(f"{self.place}: {problem}")


def unnamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose places are the last part and a hash of the whole."""
    told = dict(flat)
    for key in READ_PATHS:
        whole = str(flat[key])
        if (last := last_part(whole)) != whole:
            told[key] = f"{last}~{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return told


def _uncommented(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.lstrip()[:1] != "#")


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a spec; behind the first the others may be untrue."""
    yield from _key_problems(table)
    yield from _list_problems(table)
    yield from _method_problems(table)
    yield from _table_problems(table)
    yield from _mention_problems(table)


def _key_problems(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if key not in _KEYS:
            yield f"unknown key {key!r}; a spec has {', '.join(_KEYS)}"
        if type(value) is not _KEYS[key]:
            yield f"{key} is no {_KEYS[key].__name__}"
    for key in ("nodes", "seeds", "methods", "task"):
        if not table.get(key):
            yield f"{key} is missing"
    if table["nodes"] < 1:
        yield f"nodes = {table['nodes']}; give at least 1"


def _list_problems(table: Mapping[str, Any]) -> Iterator[str]:
    for kept in table.get("kept", []):
        if type(kept) in (int, float) and not 0 < kept < 1:
            yield f"kept = {kept}; give fractions between 0 and 1"
    for key, kinds in (
        ("seeds", (int,)),
        ("methods", (str,)),
        ("kept", (int, float)),
        ("lrs", (int, float)),
    ):
        values = table.get(key, [0])
        if not values or any(type(value) not in kinds for value in values):
            yield f"{key} = {values}; give a list of {kinds[-1].__name__}s"
        if len(set(values)) < len(values):
            yield f"{key} = {values} names one twice"


def _method_problems(table: Mapping[str, Any]) -> Iterator[str]:
    own = table.get("method", {})
    for method in table["methods"]:
        if method not in own and method not in METHODS:
            yield (
                f"method {method!r} is neither a table [method.{method}] nor one of "
                f"{', '.join(METHODS)}"
            )
    for method in own:
        if method not in table["methods"]:
            yield f"[method.{method}] is none of methods; add it there, or remove it"


def _table_problems(table: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("task", "partition", "method"):
        for name, settings in table.get(kind, {}).items():
            if not _NAME.fullmatch(name):
                yield f"{kind} {name!r}: names are letters, digits and . _ + -"
            if not isinstance(settings, Mapping):
                yield f"{kind}.{name} is no table"
            elif kind == "task" and not isinstance(settings.get("base", ""), str):
                yield f"task.{name}: base = {settings['base']!r} is no file's name"
    for key, setting in (("kept", "sub-fm.keep-fraction"), ("lrs", "train.lr")):
        for method, settings in table.get("method", {}).items():
            if key in table and setting in flatten(settings):
                yield f"{key} and {setting} of method {method!r} exclude each other"


def _mention_problems(table: Mapping[str, Any]) -> Iterator[str]:
    for pair in table.get("pairs", []):
        if not isinstance(pair, list) or len(pair) != 2:
            yield f'pairs: {pair} is no pair; write ["one", "other"]'
    mentioned = [name for pair in table.get("pairs", []) for name in pair]
    if "reference" in table:
        mentioned.append(table["reference"])
    for name in mentioned:
        if name not in table["methods"]:
            yield f"{name!r} is compared with, but is none of methods"
