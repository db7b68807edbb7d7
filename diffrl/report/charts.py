"""Charts as SVG inside the page. Colours are classes of style.css, so that they follow light and dark; lines differ in their
dashes too, and every chart says in words what it shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffrl.curves import trend
from diffrl.report.html import Html, el, join
from diffrl.report.runs import Group

WIDTH, HEIGHT = 360, 208
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 32
NUM_STYLES = 6  # of lines, in style.css
MAX_BARS = 40
DOTS = 12  # up to so many values are marked one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Mean over the seeds of a group, and their smallest and largest value.

    Curve(label="coupled, 3 seeds", number=0, steps=[1, 2], mean=[0.5, 0.6], low=[0.4, 0.6], high=[0.6, 0.7], num_seeds=3)
    """

    label: str
    number: int
    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    num_seeds: int

    @property
    def words(self) -> str:
        spread = f" ({brief(self.low[-1])} to {brief(self.high[-1])})" if self.num_seeds > 1 else ""
        first, last = f"{brief(self.mean[0])} at step {self.steps[0]}", f"{brief(self.mean[-1])}{spread}"
        return f"{self.label}: {first}, {last} at step {self.steps[-1]}"


def curve_of(group: Group, key: str) -> Curve | None:
    """None where no run of the group has measured it."""
    steps, values = group.curve(key)
    if not steps:
        return None
    parts = {"mean": values.mean(axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}
    rows = {name: row.tolist() for name, row in parts.items()}
    return Curve(label=group.label, number=group.number, steps=steps, num_seeds=len(values), **rows)


def line_chart(title: str, unit: str, curves: Sequence[Curve], *, limits: tuple[float, float] | None = None) -> Html:
    """`limits`: of the vertical axis; else what the curves need."""
    last, first = max(c.steps[-1] for c in curves), min(c.steps[0] for c in curves)
    ends = [v for c in curves for v in (min(c.low), max(c.high))]
    y_ticks = ticks(*(limits or (min(ends), max(ends))))
    bottom, top = limits or (min(y_ticks[0], min(ends)), max(y_ticks[-1], max(ends)))

    def x(step: float) -> float:
        return LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    drawn = [axes(y_ticks, y, x, first, last)]
    for curve in curves:
        drawn.append(drawn_curve(curve, x, y))
    words = f"{title} ({unit}). {'; '.join(c.words for c in curves)}"
    picture = svg(WIDTH, HEIGHT, words, drawn)
    named = None if unit == title.lower() else el("small", unit)
    return el("figure", el("figcaption", el("b", title), " ", named), picture, cls="card chart")


def drawn_curve(curve: Curve, x, y) -> Html:
    """A band between the seeds and a line; faint behind it what a long line's trend is the mean of."""
    style = f"s{curve.number % NUM_STYLES}"
    parts: list[Html] = []
    low, mean, high = (trend(values) for values in (curve.low, curve.mean, curve.high))
    if curve.num_seeds > 1:
        forth = [(x(s), y(v)) for s, v in zip(curve.steps, high, strict=True)]
        back = [(x(s), y(v)) for s, v in zip(curve.steps, low, strict=True)]
        parts.append(el("path", d=f"{path_of([*forth, *reversed(back)])}Z", cls=f"band {style}"))
    elif mean != list(curve.mean):
        raw = [(x(s), y(v)) for s, v in zip(curve.steps, curve.mean, strict=True)]
        parts.append(el("path", d=path_of(raw), cls=f"raw {style}"))
    points = [(x(s), y(v)) for s, v in zip(curve.steps, mean, strict=True)]
    parts.append(el("path", d=path_of(points), cls=f"line {style}"))
    if len(points) <= DOTS:
        parts += [el("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=2.6, cls=f"dot {style}") for px, py in points]
    return join(parts)


def axes(y_ticks: Sequence[float], y, x, first: int, last: int) -> Html:
    parts: list[Html] = []
    for value in y_ticks:
        at = f"{y(value):.1f}"
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, cls="grid"))
        parts.append(el("text", brief(value), x=LEFT - 6, y=f"{y(value) + 4:.1f}", cls="tick end"))
    steps = sorted({first, last, *(int(t) for t in ticks(first, last) if t == int(t) and first <= t <= last)})
    room = (last - first) * 0.09  # or numbers would run into each other
    for step in steps:
        if step in (first, last) or min(step - first, last - step) > room:
            kind = "tick end" if step == last and last > first else "tick middle"
            parts.append(el("text", step, x=f"{x(step):.1f}", y=HEIGHT - BOTTOM + 15, cls=kind))
    parts.append(el("text", "steps", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 3, cls="tick middle"))
    return join(parts)


def bars(steps: np.ndarray, shares: Sequence[np.ndarray], names: Sequence[str], title: str) -> Html:
    """Stacked shares, one bar for each part of the steps. shares: one array for each name, summing to 1 at every step."""
    parts: list[Html] = []
    bins = np.array_split(np.arange(len(steps)), min(MAX_BARS, len(steps)))
    width = (WIDTH - LEFT - RIGHT) / len(bins)
    height = HEIGHT - TOP - BOTTOM
    for number, rows in enumerate(bins):
        done = 0.0
        for name, share in zip(names, shares, strict=True):
            part = float(share[rows].mean())
            if part > 0:
                where = {"x": f"{LEFT + number * width:.1f}", "y": f"{TOP + height * (1 - done - part):.1f}"}
                size = {"width": f"{max(0.5, width - 0.8):.1f}", "height": f"{height * part:.2f}"}
                parts.append(el("rect", cls=f"v-{name.replace(' ', '-')}", **where, **size))
                done += part
    scale = ticks(0, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value * height

    labels = [el("text", percent(t, 0), x=LEFT - 6, y=f"{y(t) + 4:.1f}", cls="tick end") for t in scale]
    first, last = int(steps[0]) + 1, int(steps[-1]) + 1
    labels.append(el("text", first, x=LEFT, y=HEIGHT - BOTTOM + 15, cls="tick"))
    if last > first:
        labels.append(el("text", last, x=WIDTH - RIGHT, y=HEIGHT - BOTTOM + 15, cls="tick end"))
    labels.append(el("text", "steps", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 3, cls="tick middle"))
    ends = [f"{n} {percent(float(s[0]), 0)} to {percent(float(s[-1]), 0)}" for n, s in zip(names, shares, strict=True)]
    return svg(WIDTH, HEIGHT, f"{title}, from the first to the last step: {', '.join(ends)}", [*parts, *labels])


Interval = tuple[float, float, float]  # estimate, low, high


def whisker(before: Interval | None, after: Interval | None, words: str) -> Html:
    """Shares of 1 on a line: hollow before, filled after, each with its interval."""
    width, height, pad = 180, 26, 8

    def x(value: float) -> str:
        return f"{pad + value * (width - 2 * pad):.1f}"

    drawn = [el("line", x1=x(v), x2=x(v), y1=3, y2=height - 3, cls="grid") for v in (0, 0.25, 0.5, 0.75, 1)]
    for interval, kind, y in ((before, "hollow", 9), (after, "full", 17)):
        if interval is not None:
            value, low, high = interval
            drawn.append(el("line", x1=x(low), x2=x(high), y1=y, y2=y, cls="interval"))
            drawn.append(el("circle", cx=x(value), cy=y, r=3.6, cls=kind))
    return svg(width, height, words, drawn, cls="whisker")


def svg(width: int, height: int, words: str, drawn: Sequence[Html], cls: str = "plot") -> Html:
    return el("svg", *drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=words, cls=cls)


def path_of(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about four steps apart."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 2, high + abs(low) / 2)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [round(n * size, 12) for n in range(math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9) + 1)]


def brief(value: float) -> str:
    """Three digits: 0.0123, 12.3, 45,600, 1.2e-06"""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{digits}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"
