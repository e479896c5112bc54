"""Measure FedPFT-Flower; run each module by `python -m` at the root of the checkout."""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedpft_flower.endings import one_line_end

ROOT = Path(__file__).resolve().parent.parent  # of the checkout


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; what its user can mend ends it in one line."""
    with one_line_end():
        main()


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of a command line; its --help keeps the lines of this text.

    Args:
        about: what is measured, a benchmark's docstring.
    """
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Return median, smallest and largest value, or a dash where there is none."""
    if any(map(math.isnan, values)):
        return "-"
    low, middle, high = (
        f"{value:.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as Markdown.

    Args:
        titles: of the columns.
        rows: the cells of each, in the order of the columns.
    """
    return "\n".join([header(titles), *map(line, rows)])


def header(titles: Sequence[str]) -> str:
    """Return the first two lines of a table: the titles, and the rule below them."""
    return f"{line(titles)}\n|{'---|' * len(titles)}"


def line(cells: Sequence[object]) -> str:
    """Return the line of one row of a table."""
    return f"| {' | '.join(map(str, cells))} |"
