"""End a command as its users expect: by one line, and by its exit status."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedpft_flower.config import FedPFTError


@contextmanager
def one_line_end(interrupted: str = "interrupted") -> Iterator[None]:
    """End the process by one line on what the user can mend, and on Ctrl-C.

    Args:
        interrupted: what to say on Ctrl-C: what is left, what to do.

    Raises:
        SystemExit: 2 after a `FedPFTError`, 130 after Ctrl-C.
    """
    try:
        yield
    except FedPFTError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
