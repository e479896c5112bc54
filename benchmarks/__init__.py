"""Measure FedPFT-Flower; run each module by `python -m` at the root of the checkout."""

import sys
from collections.abc import Callable

from fedpft_flower.config import FedPFTError


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; what its user can mend ends it in one line."""
    try:
        main()
    except FedPFTError as error:
        sys.exit(f"error: {error}")
