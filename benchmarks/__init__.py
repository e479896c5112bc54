"""Measure FedPFT-Flower; run each module by `python -m` at the root of the checkout."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from fedpft_flower.endings import one_line_end

ROOT = Path(__file__).resolve().parent.parent  # of the checkout


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; what its user can mend ends it in one line."""
    with one_line_end():
        main()


def spread(values: Sequence[float], digits: int) -> str:
    """Return median, smallest and largest value, or a dash where there is none."""
    if any(map(math.isnan, values)):
        return "-"
    low, middle, high = (
        f"{value:.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"
