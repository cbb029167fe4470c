"""Where the lines and marks of the figures go; templates/figures.html.j2 draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from lego.report.cells import dig, is_number
from lego.report.confidence import NUM_BINS, Confidence
from lego.report.summary import Measured

WIDTH = 480  # of every figure, in units of its viewBox: about a pixel
HEIGHT = 250
LEFT, RIGHT, TOP, BOTTOM = 52, 466, 14, 204
# a mark for each series that is told apart by its shape, as a path around (0, 0)
_SHAPES = {
    "square": "M-5-5h10v10h-10z",
    "circle": "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z",
    "diamond": "M0-7L7 0L0 7L-7 0z",
    "triangle": "M0-7L7 5.5H-7z",
    "cross": "M-7-2.5h4.5v-4.5h5v4.5h4.5v5h-4.5v4.5h-5v-4.5h-4.5z",
    "down": "M0 7L7-5.5H-7z",
    "bar": "M-7-3h14v6h-14z",
}
_STYLES = ("ink1", "ink2", "ink3", "ink4")  # colours of lines, in report.css
_ROW = 46  # height of a row of the savings figure


class Tick(NamedTuple):
    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Values to places along an axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int, form: str = "{:g}") -> list[Tick]:
        values = MaxNLocator(count).tick_values(self.low, self.high)
        inside = [v for v in values if self.low - 1e-9 <= v <= self.high + 1e-9]
        # adding 0.0 makes a negative zero a zero
        return [Tick(self(v), form.format(round(v, 9) + 0.0)) for v in inside]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    right: str  # the outline of all bars
    wrong: str
    threshold: float | None
    threshold_text: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Mark:
    x: float
    y: float
    title: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    name: str
    shape: str
    style: str  # CSS class
    label: str  # beside the mark; empty where the legend names it
    line: str  # through all marks; empty for marks alone
    marks: list[Mark]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    series: list[Series]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class SavingsRow:
    y: float
    name: str
    text: str
    measured: float
    quartiles: tuple[float, float] | None
    ideal: float | None


@dataclass(frozen=True, kw_only=True)
class Savings:
    height: float
    base: float  # 1x
    rows: list[SavingsRow]
    ticks: list[Tick]


def histogram(found: Confidence) -> Histogram:
    """Stacked bars of NUM_BINS bins over [0, 1], and the threshold."""
    top = max([1, *(r + w for r, w in zip(found.right, found.wrong, strict=True))])
    x, y = Scale(0, 1, LEFT, RIGHT), Scale(0, 1.05 * top, BOTTOM, TOP)
    shown = found.threshold if found.threshold is not None and 0 <= found.threshold <= 1 else None
    return Histogram(
        right=_bars(x, y, [0] * NUM_BINS, found.right),
        wrong=_bars(x, y, found.right, found.wrong),
        threshold=None if shown is None else x(shown),
        threshold_text="" if shown is None else f"threshold {shown:.3f}",
        x_ticks=x.ticks(5),
        y_ticks=y.ticks(4, "{:,.0f}"),
    )


def _bars(x: Scale, y: Scale, base: Sequence[int], counts: Sequence[int]) -> str:
    parts = []
    for i, (below, count) in enumerate(zip(base, counts, strict=True)):
        if count:
            left, right = x(i / NUM_BINS) + 0.5, x((i + 1) / NUM_BINS) - 0.5
            low, high = y(below), y(below + count)
            parts.append(f"M{left:.1f} {low}V{high}H{right:.1f}V{low}z")
    return "".join(parts)


class Point(NamedTuple):
    """Quality at a cost; ranges are intervals."""

    cost: float
    bits: float
    cost_range: tuple[float, float] | None = None
    bits_range: tuple[float, float] | None = None


def baseline_points(results: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The dense models, whose names begin with `dense`, then LEGO by each criterion."""
    points = {}
    for key in ("baselines", "criteria"):
        values = dig(results, key)
        for name, found in values.items() if isinstance(values, Mapping) else ():
            cost, bits = dig(found, "true_cost"), dig(found, "bits_per_byte")
            if is_number(cost) and is_number(bits):
                label = f"dense, {found['num_layers']} layers" if key == "baselines" else name
                points[label] = [Point(cost, bits)]
    return points


def scatter(lines: Mapping[str, Sequence[Point]]) -> Scatter | None:
    """Bits per byte against true cost; None if there is nothing to draw."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    costs = [v for p in points for v in (p.cost, *(p.cost_range or ()))]
    bits = [v for p in points for v in (p.bits, *(p.bits_range or ()))]
    x = Scale(*_padded(costs), LEFT, RIGHT)
    y = Scale(*_padded(bits), BOTTOM, TOP)
    shapes = cycle(path for name, path in _SHAPES.items() if name != "square")
    styles = cycle(_STYLES)
    series = []
    for name, line in lines.items():
        dense = name.startswith(("dense", "full depth"))
        marks = [
            Mark(
                x=x(p.cost),
                y=y(p.bits),
                title=f"{name}: {p.bits:.4f} bits per byte at {100 * p.cost:.1f} % of the bytes",
                x_range=p.cost_range and (x(p.cost_range[0]), x(p.cost_range[1])),
                y_range=p.bits_range and (y(p.bits_range[0]), y(p.bits_range[1])),
            )
            for p in line
        ]
        through = "M" + "L".join(f"{m.x} {m.y}" for m in marks) if len(marks) > 1 else ""
        series.append(
            Series(
                name=name,
                shape=_SHAPES["square"] if dense else next(shapes),
                style="dense" if dense else next(styles),
                label=name if dense else "",
                line=through,
                marks=marks,
            )
        )
    percents = [Tick(tick.at, f"{100 * float(tick.text):g}") for tick in x.ticks(5)]
    return Scatter(series=series, x_ticks=percents, y_ticks=y.ticks(5))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    room = 0.08 * (max(values) - min(values)) or 0.05
    return min(values) - room, max(values) + room


def savings(measurements: Sequence[Measured]) -> Savings | None:
    """Measured speedups with quartiles, and what the saved bytes would allow."""
    found = [m for m in measurements if is_number(dig(m.found, "speedup"))]
    if not found:
        return None
    values = [1.0]
    for m in found:
        ideal, low_high = _ideal(m), _quartiles(m)
        values += [m.found["speedup"], *(low_high or ()), *([ideal] if ideal else [])]
    x = Scale(*_padded(values), 0, RIGHT - 60)
    rows = [
        SavingsRow(
            y=34 + _ROW * i,
            name=f"{m.name}, {m.criterion}",
            text=f"{m.found['speedup']:.2f}\N{MULTIPLICATION SIGN}",
            measured=x(m.found["speedup"]),
            quartiles=(q := _quartiles(m)) and (x(q[0]), x(q[1])),
            ideal=(i_ := _ideal(m)) and x(i_),
        )
        for i, m in enumerate(found)
    ]
    ticks = x.ticks(6, "{:g}\N{MULTIPLICATION SIGN}")
    return Savings(height=_ROW * len(found) + 52, base=x(1.0), rows=rows, ticks=ticks)


def _ideal(m: Measured) -> float | None:
    cost = dig(m.found, "true_cost")
    return 1 / cost if is_number(cost) and cost > 0 else None


def _quartiles(m: Measured) -> tuple[float, float] | None:
    found = dig(m.found, "speedup_quartiles")
    if isinstance(found, list) and len(found) == 2 and all(map(is_number, found)):
        return found[0], found[1]
    return None
