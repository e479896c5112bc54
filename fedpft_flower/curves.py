"""Take curves out of a run's rounds, for its page and for `curves.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpft_flower.charts import Series
from fedpft_flower.metrics import Metrics
from fedpft_flower.plan import Plan

Curves = Mapping[str, Series]  # by label


def series(rounds: Sequence[Metrics], key: str) -> Series:
    """Return the points of one figure, of the rounds that have it."""
    return [(entry["round"], entry[key]) for entry in rounds if key in entry]


def scores(rounds: Sequence[Metrics], metric: str, plan: Plan) -> Curves:
    """Return the validation metric of FM and sub-FM."""
    return {name: series(rounds, f"{key}-{metric}") for name, key in _models(plan)}


def losses(rounds: Sequence[Metrics], plan: Plan) -> Curves:
    """Return the validation loss of FM and sub-FM, and the clients' training loss."""
    return {
        **{
            f"{name}, validation": series(rounds, f"{key}-loss")
            for name, key in _models(plan)
        },
        "clients, training": series(rounds, "train-loss"),
    }


def _models(plan: Plan) -> list[tuple[str, str]]:
    both = [("FM, plugged in", "fm"), ("sub-FM", "sub-fm")]
    return both[:1] if plan.is_whole else both


def gradient_errors(rounds: Sequence[Metrics]) -> dict[str, dict[int, Metrics]]:
    """Return the gradient errors of the sub-FM by label and round."""
    return {
        **{
            f"{when} alignment": {
                entry["round"]: error
                for entry in rounds
                if (error := entry.get("alignment", {}).get(f"gradient-{when}"))
            }
            for when in ("before", "after")
        },
        "while training": {
            entry["round"]: entry["gradient-error"]
            for entry in rounds
            if "gradient-error" in entry
        },
    }


def of_errors(found: Mapping[str, Mapping[int, Metrics]], name: str) -> Curves:
    """Return one figure of gradient errors: "relative" or "cosine"."""
    return {
        label: [(current, error[name]) for current, error in errors.items()]
        for label, errors in found.items()
    }


def aligned_error(entry: Metrics) -> Metrics | None:
    """Return the gradient error behind a round's alignment, else that before it."""
    alignment = entry.get("alignment", {})
    found: Metrics | None = alignment.get(
        "gradient-after", alignment.get("gradient-before")
    )
    return found


# Fixed, since a layout that fits itself draws everything twice.
_MARGINS = {
    "left": 0.08,
    "right": 0.97,
    "top": 0.94,
    "bottom": 0.07,
    "hspace": 0.3,
    "wspace": 0.2,
}


def draw_curves(rounds: Sequence[Metrics], metric: str, plan: Plan, path: Path) -> None:
    """Draw a metric, the loss, bytes and gradient error against rounds."""
    # Here, since nothing is drawn before the end.
    import matplotlib

    matplotlib.use("Agg")  # the ServerApp may run in a thread and has no display
    from matplotlib import pyplot as plt

    data = {
        way: [(x, y / 1e6) for x, y in series(rounds, f"bytes-{way}")]
        for way in ("down", "up")
    }
    errors = of_errors(gradient_errors(rounds), "relative")
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), gridspec_kw=_MARGINS)
    shown: list[tuple[str, str, Curves]] = [
        (f"{metric} on validation", metric, scores(rounds, metric, plan)),
        ("Loss", "cross-entropy", losses(rounds, plan)),
        ("Bytes between server and clients", "MB per round", data),
        ("Gradient error of the sub-FM", "relative L2", errors),
    ]
    for panel, (title, unit, curves) in zip(panels.flat, shown, strict=True):
        for label, points in curves.items():
            if points:
                drawn = zip(*points, strict=True)
                panel.plot(*drawn, marker="o", markersize=3, label=label)
        panel.set(title=title, xlabel="round", ylabel=unit)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
