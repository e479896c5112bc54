"""Say in numbers what a run gave away of the FM, and of the clients.

Every figure comes from what was sent or evaluated in the run itself. None of them is a
guarantee: the sheet says what a reader of the messages has, not what can be made of it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedpft_flower.codec import SCALE, decode_weights, encode_weights
from fedpft_flower.delta import bits
from fedpft_flower.metrics import is_better, metric_row
from fedpft_flower.wording import percent

Figures = dict[str, Any]

# What rounding to the nearest level may move a value; a little more, in float32.
_HALF_A_LEVEL = 0.5 + 1e-4


class Exposure:
    """Count the FM's parameters among the sub-FMs that nodes were given.

    A value counts as verbatim where what was sent is the FM's own as exactly as the
    wire's codec carries it: bit for bit what the codec makes of it or, of int8, within
    half a level of the row that was sent. What was sent instead of it is re-fitted. Of
    several sub-FMs the one that shows most counts: alignment changes values, it does
    not bring the FM's own back (where a codec rounds, a few may come back by chance).
    How far values are re-fitted is told of the last one.
    """

    def __init__(self) -> None:
        self.sent = self.verbatim = 0
        # Relative L2 distance of the re-fitted values from the FM's own.
        self.distance = 0.0

    def note(
        self,
        sent: Mapping[str, Tensor],
        own: Iterable[tuple[str, Tensor]],
        codec: str,
    ) -> None:
        """Count one sub-FM.

        Args:
            sent: the tensors that nodes hold, encoded.
            own: the FM's parameters, cut as the plan says, under the same names.
            codec: how `sent` is encoded.
        """
        given = verbatim = 0
        moved = size = 0.0
        for name, values in own:
            tensor = values.cpu()
            given += tensor.numel()
            parts = {name, name + SCALE} & sent.keys()
            held = {part: sent[part].cpu() for part in parts}
            if name + SCALE in held:
                levels = held[name + SCALE].reshape([-1] + [1] * (tensor.ndim - 1))
                far = (decode_weights(held)[name] - tensor).abs()
                same = far <= levels * _HALF_A_LEVEL
            else:
                own_sent = encode_weights({name: tensor}, codec)[name]
                same = bits(own_sent) == bits(held[name])
            verbatim += int(same.sum())
            if not bool(same.all()):
                change = (decode_weights(held)[name] - tensor).double()[~same]
                moved += float(change.square().sum())
                size += float(tensor.double()[~same].square().sum())
        self.sent, self.verbatim = max(self.sent, given), max(self.verbatim, verbatim)
        self.distance = (moved / size) ** 0.5 if size else 0.0

    def state(self) -> dict[str, float]:
        """Return the figures, as JSON can hold them."""
        return {
            "sent": self.sent,
            "verbatim": self.verbatim,
            "distance": self.distance,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self.sent, self.verbatim = int(state["sent"]), int(state["verbatim"])
        self.distance = state["distance"]


def protection(
    exposure: Exposure,
    metric: str,
    summary: Mapping[str, Any],
    likeness: Mapping[str, Mapping[str, Any]],
    hits: Mapping[str, str],
    up: Mapping[str, int],
) -> Figures:
    """Return the figures of the protection sheet, and its rows for people.

    Args:
        exposure: what was sent.
        metric: what the run is judged by.
        summary: of the run: how many values models have, test metrics, and what privacy
            was spent.
        likeness: FM and sub-FM on public data, "before" and "after" training; empty
            without a public corpus.
        hits: which test rows FM and sub-FM get right, a digit a row.
        up: bytes that clients sent, by kind.
    """
    before, after = summary["test-before"], summary["test-after"]
    parameters = summary["parameters"]["fm"]
    figures: Figures = {
        "parameters": parameters,
        "head": summary["parameters"]["head"],
        "never-sent": 1 - exposure.sent / parameters,
        "sent-verbatim": exposure.verbatim / parameters,
        "re-fitted": (exposure.sent - exposure.verbatim) / parameters,
        "re-fitted-distance": exposure.distance,
        "capability-gap-before": _gap(before, metric),
        "theft-gap": _gap(after, metric),
        "theft-gap-interval": _paired_interval(hits["fm"], hits["sub-fm"])
        if metric_row(metric).by_row
        else None,
        "public": {when: dict(found) for when, found in likeness.items()},
        "bytes-up": dict(up),
        "privacy": dict(summary.get("privacy") or {}),
    }
    return figures | {"rows": list(_rows(figures, metric, before, after))}


def _rows(
    figures: Figures, metric: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterable[dict[str, str]]:
    """Yield the rows of the sheet: name, value, what it means."""
    yield from _share_rows(figures)
    yield from _gap_rows(figures, metric, before, after)
    yield from _client_rows(figures)


def _share_rows(figures: Figures) -> Iterable[dict[str, str]]:
    """Yield how much of the FM was sent."""
    total = figures["parameters"]
    for key, name, note in (
        (
            "never-sent",
            "FM parameters never sent",
            "no message of the run held them; the head "
            f"({figures['head'] / 1e6:.2f} M) is not counted here: it trains, and "
            "clients get all of it, initial values included",
        ),
        (
            "sent-verbatim",
            "sent verbatim",
            "clients that trained have these values, as exact as the wire carries "
            "them; of several sub-FMs that were sent, those of the one with most",
        ),
        (
            "re-fitted",
            "sent re-fitted",
            _refitted(figures),
        ),
    ):
        share = figures[key]
        yield _row(name, f"{percent(share)} ({share * total / 1e6:.2f} M)", note)


def _refitted(figures: Figures) -> str:
    if not (figures["re-fitted"] or figures["re-fitted-distance"]):
        return "no other values were put in their place"
    told = "alignment put other values in their place"
    if not figures["re-fitted"]:
        told = "alignment put other values in the place of some, which were sent before"
    distance = f"{figures['re-fitted-distance']:.3g}"
    return f"{told}, at a relative distance of {distance} (L2) from the FM's own"


def _gap_rows(
    figures: Figures, metric: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterable[dict[str, str]]:
    """Yield what the FM can do that the sub-FM cannot."""
    yield _row(
        f"capability gap before training ({metric}, test)",
        _minus(before, metric, figures["capability-gap-before"]),
        "by how much the FM is better, with the head as it starts: a new head guesses",
    )
    interval = figures["theft-gap-interval"]
    around = (
        "" if interval is None else f", 95 % {interval[0]:+.3f} to {interval[1]:+.3f}"
    )
    yield _row(
        f"theft gap ({metric}, test)",
        _minus(after, metric, figures["theft-gap"]) + around,
        "by how much the FM as it is delivered (its adapter refined, where that was "
        "kept) is better than the sub-FM with the averaged adapter, both as the server "
        "has them at the end; a client can keep the sub-FM, and the adapter, of the "
        "last round that it trained in",
    )
    for when, found in figures["public"].items():
        yield _row(
            f"public data, {when} training",
            _likeness(found),
            "sub-FM against FM, both with the averaged adapter: last states, answers",
        )


def _client_rows(figures: Figures) -> Iterable[dict[str, str]]:
    """Yield what clients gave away."""
    sent = figures["bytes-up"]
    listed = ", ".join(f"{kind} {size / 1e6:.3f} MB" for kind, size in sent.items())
    spent = figures["privacy"]
    uncounted = "; not counted is what came in a round that was cut short and resumed"
    yield _row(
        "clients sent, all rounds",
        listed or "nothing",
        "adapters hold what was learnt from the rows; control is names, versions of "
        "libraries, which sub-FMs are held, and that they trained" + uncounted
        if spent
        else "adapters hold what was learnt from the rows; statistics are how often "
        "neurons were inactive; control is names, versions of libraries, which sub-FMs "
        "are held, counts, losses, seconds and memory; not counted are the reasons of "
        "failures, which may name columns" + uncounted,
    )
    yield _row(
        "differential privacy",
        f"epsilon {spent['epsilon']:.3g}, delta {spent['delta']:.3g}"
        if "epsilon" in spent
        else "none",
        "of a client's updates, against who sees what the server gives out; the server "
        "itself sees them without noise; other runs on the same rows add to it"
        if "epsilon" in spent
        else "nothing bounds what adapters tell of single rows",
    )


def _row(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _gap(scores: Mapping[str, Any], metric: str) -> float:
    """Return by how much the FM is better than the sub-FM; below 0 it is worse."""
    fm, sub_fm = float(scores[f"fm-{metric}"]), float(scores[f"sub-fm-{metric}"])
    return fm - sub_fm if is_better(metric, 1, 0) else sub_fm - fm


def _minus(scores: Mapping[str, Any], metric: str, gap: float) -> str:
    fm, sub_fm = scores[f"fm-{metric}"], scores[f"sub-fm-{metric}"]
    return f"{gap:+.3f} (FM {fm:.3f}, sub-FM {sub_fm:.3f})"


def _likeness(found: Mapping[str, Any]) -> str:
    text = (
        f"state error {found['state_error']:.3f}, agreement "
        f"{percent(found['agreement'])}"
    )
    if found.get("fm_loss") is not None:
        text += (
            f", next-token loss {found['fm_loss']:.3f} and {found['sub_fm_loss']:.3f}"
        )
    return text


def _paired_interval(ones: str, others: str) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference of two shares of the same rows.

    The normal approximation with the variance of the paired differences; None for fewer
    than two rows.
    """
    differences: Sequence[int] = [
        int(one) - int(other) for one, other in zip(ones, others, strict=True)
    ]
    count = len(differences)
    if count < 2:
        return None
    mean = statistics.mean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half
