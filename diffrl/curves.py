"""curves.png of a run: how its rewards, or its loss, went. Drawn from metrics.jsonl alone, so it can be drawn anew at any time.

Colours are those of Okabe and Ito, which people tell apart whatever colours they see; lines differ in their marks too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrl.metrics import unit
from diffrl.status import read_lines

CURVES = "curves.png"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SMOOTH = 20  # a line's trend is the mean over a twentieth of the steps
DPI = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Line(key="reward/mean", color="#0072B2", dots=False): dots for what is measured now and then."""

    key: str
    color: str
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Panel(title="Reward", lines=(Line(...),)); the unit of its metrics names the axis."""

    title: str
    lines: tuple[Line, ...]


RL = (
    Panel(
        title="Rewards",
        lines=(
            Line(key="reward/mean", color=BLUE),
            Line(key="reward/part/pass_rate", color=ORANGE),
            Line(key="reward/part/format", color=GREEN),
        ),
    ),
    Panel(
        title="pass@1",
        lines=(
            Line(key="group/pass@1", color=BLUE),
            Line(key="eval/pass@1", color=VERMILION, dots=True),
        ),
    ),
    Panel(title="KL to the reference (loss/kl)", lines=(Line(key="loss/kl", color=BLUE),)),
    Panel(title="Gradient before clipping (optim/grad_norm)", lines=(Line(key="optim/grad_norm", color=BLUE),)),
)
SUPERVISED = (
    Panel(
        title="Loss",
        lines=(
            Line(key="loss/diffusion", color=BLUE),
            Line(key="validation/diffusion", color=VERMILION, dots=True),
        ),
    ),
    Panel(title="Gradient before clipping (optim/grad_norm)", lines=(Line(key="optim/grad_norm", color=BLUE),)),
)
Series = tuple[list[int], list[float]]  # steps done, values


def write_curves(folder: Path) -> Path | None:
    """`folder/curves.png`, from the lines that can be read of its metrics.jsonl; None where there is nothing to show."""
    rows, _ = read_lines(folder / "metrics.jsonl")
    panels = RL if any("reward/mean" in row for row in rows) else SUPERVISED
    series = {line.key: series_of(rows, line.key) for panel in panels for line in panel.lines}
    if not any(steps for steps, _ in series.values()):
        return None
    path = folder / CURVES
    part = folder / f".{CURVES}.part"
    draw(panels, series, f"{folder.resolve().parent.name}/{folder.resolve().name}").savefig(part, format="png", dpi=DPI)
    part.replace(path)
    return path


def series_of(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """In the order of steps, of a step that was done again the newest; what is not finite is left out."""
    values = {
        int(row["step"]) + 1: float(row[key])
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key]) and "step" in row
    }
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def trend(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a twentieth of all in sum."""
    half = len(values) // SMOOTH // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(panels: Sequence[Panel], series: Mapping[str, Series], title: str) -> Any:
    """A matplotlib Figure, without any global state of that library."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second, and only the end of a run needs it
    from matplotlib.figure import Figure

    columns = 2
    rows = -(-len(panels) // columns)
    width, height = 5.5 * columns, 3.4 * rows + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Margins of our own: to have them worked out takes as long as to draw.
    inches = {"left": 0.9 / width, "right": 1 - 0.2 / width, "bottom": 0.55 / height, "top": 1 - 0.75 / height}
    figure.subplots_adjust(**inches, wspace=0.22, hspace=0.3)
    figure.suptitle(title)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        drawn = [line for line in panel.lines if series[line.key][0]]
        for line in drawn:
            steps, values = series[line.key]
            if line.dots or len(values) == 1:
                axes.plot(steps, values, "o--", color=line.color, markersize=4, linewidth=1, label=line.key)
            else:
                smooth = trend(values)
                if smooth != values:
                    axes.plot(steps, values, color=line.color, alpha=0.3, linewidth=0.8)
                axes.plot(steps, smooth, color=line.color, linewidth=1.8, label=line.key)
        axes.set(title=panel.title, xlabel="steps", ylabel=unit(panel.lines[0].key))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            axes.legend(frameon=False, fontsize="small")
        elif not drawn:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
    return figure
