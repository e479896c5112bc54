"""Write the page of a finished run anew (`fedpft-report`)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedpft_flower.config import FedPFTError
from fedpft_flower.disk import put
from fedpft_flower.endings import one_line_end
from fedpft_flower.page import render_page
from fedpft_flower.runs import FinishedRun


def run(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a finished run anew (`fedpft-report`)."""
    parser = argparse.ArgumentParser(
        prog="fedpft-report", description="Write report.html of a finished run anew."
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    place = parser.parse_args(arguments).run.expanduser().absolute()
    with one_line_end():
        print(f"report: {write_page(FinishedRun.read(place))}")


def write_page(run: FinishedRun) -> Path:
    """Write `report.html` of a finished run from its other files, and return its path.

    Raises:
        FedPFTError: the files lack something, or the disk refuses.
    """
    place = run.path / "report.html"
    try:
        page = render_page(run.config.flat(), run.rounds, run.summary, run.manifest)
        put(place, lambda path: path.write_text(page, encoding="utf-8"))
    except (LookupError, TypeError, AttributeError) as error:
        raise FedPFTError(
            f"the files of {run.path} lack what a page shows ({error!r}); was the run "
            "made by this version?"
        ) from error
    except OSError as error:
        raise FedPFTError(f"cannot write {place} ({error}); make room") from error
    return place
