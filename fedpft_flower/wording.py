"""Say sizes, times, shares, places and nodes as people read them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from fedpft_flower.config import READ_PATHS, WRITTEN_PATHS, Scalar
from fedpft_flower.disk import existing_path


def size(count: float) -> str:
    """Return a number of bytes as kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Return seconds as seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def last_part(name: str) -> str:
    """Return the last part of a path; a hub name stays as it is."""
    is_path = name.startswith(("/", "~", ".")) or bool(name and existing_path(name))
    return PurePath(name).name if is_path else name


def shown_settings(config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings to show others: of paths of this machine, the last part only."""
    return {
        key: last_part(str(value)) if key in (*READ_PATHS, *WRITTEN_PATHS) else value
        for key, value in config.items()
    }


def count_nodes(nodes: Mapping[str, int | None]) -> str:
    """Return how many nodes there were, and rows where nodes told them."""
    told = [rows for rows in nodes.values() if rows is not None]
    rows = f"{sum(told)} training rows" if told else "rows that they did not tell"
    return f"{len(nodes)} with {rows}"


def which_adapter(summary: Mapping[str, Any]) -> str:
    """Return after which round a finished run's adapter was the delivered one."""
    best = f" ({summary['best-round']})" if summary["select"] == "best" else ""
    return f"the {summary['select']} round{best}"


def data_name(config: Mapping[str, Scalar]) -> str:
    """Return what a run's data is called: its path's last part, or its task."""
    path, subset = last_part(str(config["data.path"])), config["data.subset"]
    return f"{path} ({subset})" if subset else path or str(config["data.task"])
