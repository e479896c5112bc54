"""Tell in the log how far long work is."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fedpft_flower.batches import Batch
from fedpft_flower.descent import Progress
from fedpft_flower.least_squares import Fit

logger = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines


class _Pace:
    """Say when a line is due, and how long the work takes."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds since the work began."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Tell whether a line is due, which is then taken to be shown."""
        now = time.monotonic()
        if now - self._shown < SECONDS:
            return False
        self._shown = now
        return True


class LoggedBatches:
    """Hold batches that tell every few seconds how far a pass over them is."""

    def __init__(self, batches: Sequence[Batch], what: str) -> None:
        self._batches, self._what = batches, what

    def __iter__(self) -> Iterator[Batch]:
        pace = _Pace()
        for number, batch in enumerate(self._batches):
            if pace.due():
                share = 100 * number / len(self._batches)
                logger.info("%s: %3.0f %%, %.0f s", self._what, share, pace.seconds)
            yield batch


class StepLog:
    """Tell every few seconds how far a training is."""

    def __init__(self, tell: Callable[..., None], what: str) -> None:
        """Take what tells, as a logger's `info` does, and the training's name."""
        self._tell, self._what, self._pace = tell, what, _Pace()

    def __call__(self, done: int, steps: int) -> None:
        """Take how many steps are done, and of how many."""
        if self._pace.due():
            spent = self._pace.seconds
            self._tell("%s: step %d of %d, %.0f s", self._what, done, steps, spent)


class DescentLog:
    """Log a line every few seconds, and the last one; remember first and last step."""

    def __init__(self, what: str) -> None:
        self._what, self._pace = what, _Pace()
        self._steps: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        """Take the progress of a step, and log it where that is due."""
        self._steps = [*self._steps[:1], progress]
        held_out = progress.held_out
        if self._pace.due() or progress.done:
            logger.info(
                "%s: %3.0f %%, %d steps, %d tokens, loss %.4f%s, %.0f s",
                self._what,
                100 * progress.share,
                progress.steps,
                progress.tokens,
                progress.loss,
                f" (held out {held_out:.4f})" if held_out is not None else "",
                progress.seconds,
            )
        if progress.done and progress.share < 1.0:
            logger.info(
                "%s: ended, the held-out loss no longer falls; its best weights stay",
                self._what,
            )

    def metrics(self) -> dict[str, Any]:
        """Return what was used, and the loss of the first and the last step."""
        first, last = self._steps[0], self._steps[-1]
        return {
            "steps": last.steps,
            "tokens": last.tokens,
            "seconds": last.seconds,
            "loss-first": first.loss,
            "loss-last": last.loss,
        }


class FitLog:
    """Log what least squares did to every layer, and remember it."""

    def __init__(self) -> None:
        self._pace, self._fits = _Pace(), list[Fit]()

    def __call__(self, fit: Fit) -> None:
        """Take the fit of a layer."""
        self._fits.append(fit)
        logger.info(
            "least squares: layer %d, unexplained %.3f -> %.3f (held out %.3f -> "
            "%.3f), %d tokens, %.0f s",
            fit.layer,
            fit.before,
            fit.after,
            fit.held_out_before,
            fit.held_out_after,
            fit.tokens,
            self._pace.seconds,
        )
        if fit.held_out_after > fit.held_out_before:
            logger.warning(
                "least squares: layer %d is worse on the tokens held out; raise "
                "data.public-rows, data.public-tokens, align.calibration-tokens or "
                "align.ridge",
                fit.layer,
            )

    def metrics(self) -> dict[str, Any]:
        """Return the seconds, and every layer's fit."""
        return {
            "seconds": self._pace.seconds,
            "layers": [asdict(fit) for fit in self._fits],
        }
