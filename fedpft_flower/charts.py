"""Draw charts as SVG that stands inside a page and takes its colours from there.

Series have the classes `s0`, `s1`, ...; the page gives them colours for light and dark
(`STYLE`). Every mark says its value when it is pointed at.
"""

import math
from collections.abc import Mapping, Sequence

from fedpft_flower.markup import Markup, element

Series = Sequence[tuple[float, float]]  # (round, value)

SERIES = 8  # colours
_WIDTH, _HEIGHT = 460.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 12.0, 38.0
LOG_RATIO = 50.0  # from this ratio of largest and smallest value on the axis is log
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_SHADES = 4  # of the strip of a layer
_BINS = 256

STYLE = """
svg.chart { width: 100%; height: auto; display: block; }
svg.chart text { fill: var(--quiet); font-size: 12px; }
svg.chart .grid { stroke: var(--line); stroke-width: 1; }
svg.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg.strip { width: 100%; height: 1.1em; display: block; background: var(--line); }
"""


def number(value: float) -> str:
    """Return a value in at most three digits, or as many as a whole one needs."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 100_000 or 0 < size < 0.001:
        return f"{value:.3g}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def lines(title: str, unit: str, series: Mapping[str, Series]) -> Markup:
    """Draw series against rounds, with a legend, without values that are not finite.

    Args:
        title: what is drawn; also what a screen reader says.
        unit: of the vertical axis.
        series: (round, value) by name; those without values are left out.

    Returns:
        A figure; nothing where there is nothing to draw.
    """
    shown = {
        name: points for name, given in series.items() if (points := _finite(given))
    }
    if not shown:
        return Markup()
    values = [y for points in shown.values() for _, y in points]
    rounds = [x for points in shown.values() for x, _ in points]
    axes = _Axes(min(rounds), max(rounds), values)
    drawn = list[Markup]()
    for place, (name, points) in enumerate(shown.items()):
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        dash = _DASHES[place % len(_DASHES)] or None
        style = f"stroke: {_colour(place)}"
        drawn.append(
            element("polyline", points=places, style=style, stroke_dasharray=dash)
        )
        drawn += [
            element(
                "circle",
                element("title", f"{name}, round {x:g}: {number(y)}"),
                cx=f"{axes.x(x):.1f}",
                cy=f"{axes.y(y):.1f}",
                r=3,
                style=f"fill: {_colour(place)}",
            )
            for x, y in points
        ]
    told = "; ".join(
        f"{name}: {number(points[0][1])} in round {points[0][0]:g}, "
        f"{number(points[-1][1])} in round {points[-1][0]:g}"
        for name, points in shown.items()
    )
    keys = [(name, _key(place)) for place, name in enumerate(shown)]
    return _figure(title, unit + axes.note, told, axes.drawn() + drawn, keys)


def bars(title: str, unit: str, stacks: Mapping[float, Mapping[str, float]]) -> Markup:
    """Draw one bar a round, its parts one above the other.

    Args:
        title: what is drawn; also what a screen reader says.
        unit: of the vertical axis.
        stacks: sizes of the parts, by round and name; none is negative.

    Returns:
        A figure; nothing where there is nothing to draw.
    """
    sizes = {
        current: {n: v for n, v in parts.items() if math.isfinite(v) and v > 0}
        for current, parts in stacks.items()
    }
    names = sorted({name for parts in sizes.values() for name in parts})
    if not names:
        return Markup()
    totals = {current: sum(parts.values()) for current, parts in sizes.items()}
    axes = _Axes(min(sizes) - 0.5, max(sizes) + 0.5, [0.0, *totals.values()], bars=True)
    width = 0.7 * (axes.x(1) - axes.x(0))
    drawn = list[Markup]()
    for current, parts in sizes.items():
        below = 0.0
        for name in names:
            if not (size := parts.get(name, 0.0)):
                continue
            top, bottom = axes.y(below + size), axes.y(below)
            below += size
            drawn.append(
                element(
                    "rect",
                    element("title", f"{name}, round {current:g}: {number(size)}"),
                    x=f"{axes.x(current) - width / 2:.1f}",
                    y=f"{top:.1f}",
                    width=f"{width:.1f}",
                    height=f"{max(0.5, bottom - top):.1f}",
                    style=f"fill: {_colour(names.index(name))}",
                )
            )
    told = ", ".join(f"round {c:g}: {number(total)}" for c, total in totals.items())
    keys = [(name, _key(place, bar=True)) for place, name in enumerate(names)]
    return _figure(title, unit, told, axes.drawn() + drawn, keys)


def strip(label: str, kept: Sequence[int], width: int) -> Markup:
    """Draw which neurons of a layer are kept: the fuller a place, the more of them.

    Args:
        label: what a screen reader says.
        kept: the kept neurons, ascending.
        width: N.
    """
    bins = min(width, _BINS)
    counts, sizes = [0] * bins, [0] * bins
    for neuron in range(width):
        sizes[neuron * bins // width] += 1
    for neuron in kept:
        counts[neuron * bins // width] += 1
    shades = [
        math.ceil(_SHADES * count / size)
        for count, size in zip(counts, sizes, strict=True)
    ]
    paths = [
        element(
            "path",
            d="".join(
                f"M{start} 0h{end - start}v1h-{end - start}z"
                for start, end in _runs(shades, shade)
            ),
            style=f"fill: {_colour(0)}; fill-opacity: {shade / _SHADES:g}",
        )
        for shade in sorted(set(shades) - {0})
    ]
    return element(
        "svg",
        *paths,
        class_="strip",
        viewbox=f"0 0 {bins} 1",
        preserveaspectratio="none",
        role="img",
        aria_label=label,
        shape_rendering="crispEdges",
    )


def _runs(shades: Sequence[int], wanted: int) -> list[tuple[int, int]]:
    """Return beginnings and ends of the runs of one shade."""
    found = list[tuple[int, int]]()
    for place, shade in enumerate(shades):
        if shade != wanted:
            continue
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


class _Axes:
    """Map rounds and values to places of a chart."""

    def __init__(
        self, first: float, last: float, values: Sequence[float], bars: bool = False
    ) -> None:
        low, high = min(values), max(values)
        self._log = not bars and low > 0 and high / low >= LOG_RATIO
        # What the unit adds about the axis.
        self.note = " (log)" if self._log else ""
        if self._log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.0 if bars else 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        self._low, self._high = low - margin, high + margin
        # A single round stands in the middle.
        middle = 0.5 if first == last else 0.0
        self._first, self._last = first - middle, last + middle
        self._rounds = (math.ceil(first), math.floor(last))

    def x(self, current: float) -> float:
        """Return the place of a round."""
        share = (current - self._first) / (self._last - self._first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Return the place of a value."""
        value = math.log10(value) if self._log else value
        share = (value - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def drawn(self) -> list[Markup]:
        """Return grid, numbers and the name of the horizontal axis."""
        parts = list[Markup]()
        for value in self._values():
            y = f"{self.y(value):.1f}"
            ends = {"x1": f"{_LEFT:g}", "x2": f"{_WIDTH - _RIGHT:g}", "y1": y, "y2": y}
            parts.append(element("line", class_="grid", **ends))
            parts.append(_text(_LEFT - 6, self.y(value) + 4, number(value), "end"))
        first, last = self._rounds
        step = max(1, math.ceil(_step(last - first, 8)))
        for current in range(first, last + 1, step):
            parts.append(_text(self.x(current), _HEIGHT - 20, str(current), "middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, _HEIGHT - 4, "round", "middle"))
        return parts

    def _values(self) -> list[float]:
        step = _step(self._high - self._low, 5)
        if self._log:
            step = max(step, 0.25)
        count = math.floor(self._high / step) - math.ceil(self._low / step) + 1
        first = math.ceil(self._low / step)
        ticks = [(first + i) * step for i in range(count)]
        return [10**tick for tick in ticks] if self._log else ticks


def _step(span: float, most: int) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten with few steps."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(p for m in (1, 2, 5, 10, 20) if span / (p := m * power) <= most)


def _finite(points: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _colour(place: int) -> str:
    return f"var(--s{place % SERIES})"


def _key(place: int, bar: bool = False) -> Markup:
    """Return the mark of a series in the legend."""
    shape = (
        element("rect", x=2, y=1, width=20, height=8, style=f"fill: {_colour(place)}")
        if bar
        else element(
            "line",
            x1=0,
            x2=24,
            y1=5,
            y2=5,
            style=f"stroke: {_colour(place)}; stroke-width: 2",
            stroke_dasharray=_DASHES[place % len(_DASHES)] or None,
        )
    )
    return element(
        "svg", shape, width=24, height=10, viewbox="0 0 24 10", aria_hidden="true"
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _figure(
    title: str,
    unit: str,
    told: str,
    drawn: Sequence[Markup],
    keys: Sequence[tuple[str, Markup]],
) -> Markup:
    picture = element(
        "svg",
        *drawn,
        class_="chart",
        viewbox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{title} ({unit}). {told}",
    )
    legend = [element("span", mark, " ", name) for name, mark in keys]
    caption = element(
        "figcaption", element("b", title), element("span", unit, class_="unit")
    )
    return element("figure", caption, picture, element("p", *legend, class_="legend"))
