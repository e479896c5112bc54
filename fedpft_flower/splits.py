"""Know splits by their names."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from datasets import Dataset

from fedpft_flower.config import FedPFTError

Splits = Mapping[str, Dataset]
T = TypeVar("T")

# How a table is called that holds a split, or a shard of one.
SPLIT_NAME = re.compile(
    r"(?P<name>(?P<role>train|training|validation|valid|val|dev|test|testing|eval)"
    r"([-_.][a-z]+)*)([-_.]?[0-9]+(-of-[0-9]+)?)?"
)
_SYNONYMS = {
    "training": "train",
    **dict.fromkeys(("valid", "val", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval"), "test"),
}


def by_split(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Return split -> what is called so; nothing where a name is none of a split.

    Several names of one role to evaluate are several splits.
    """
    roles: dict[str, dict[str, list[T]]] = {}
    for called, one in named:
        match = SPLIT_NAME.fullmatch(called.lower())
        if match is None:
            return {}
        role = _SYNONYMS.get(match["role"], match["role"])
        name = role if match["name"] == match["role"] else match["name"]
        roles.setdefault(role, {}).setdefault(name, []).append(one)
    splits: dict[str, list[T]] = {}
    for role, by_name in roles.items():
        if role == "train" or len(by_name) == 1:
            splits[role] = [one for ones in by_name.values() for one in ones]
        else:
            splits |= by_name
    return splits


# Words that tell a role within a longer name, as `datasets` has it.
_ROLES = {role: role for role in ("train", "validation", "test")}
_ROLE_OF = {**_ROLES, **_SYNONYMS, "evaluation": "test"}


def split_in(path: Path) -> str:
    """Return the split that a word in a folder's or file's name tells, or ""."""
    for name in (*path.parts[:-1][::-1], path.name):
        words = re.split(r"[-_. 0-9]+", name.lower())
        told = {_ROLE_OF[word] for word in words if word in _ROLE_OF}
        for role in _ROLES:
            if role in told:
                return role
    return ""


def split_called(source: Splits, name: str, key: str) -> Dataset:
    """Return the split of a name.

    Args:
        source: where it should be.
        name: what a setting names.
        key: the setting.

    Raises:
        FedPFTError: there is none.
    """
    if name not in source:
        raise FedPFTError(f"{key} = {name!r}; this data has {', '.join(source)}")
    return source[name]
