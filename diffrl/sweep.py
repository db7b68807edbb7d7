"""A sweep: the runs of a grid of overrides, and what they came to over seeds. `actors/sweep.py` runs them.

A group is what differs in `seed` alone. Of each metric there is `final`, the mean over the last tenth of a run's values (of what
is measured now and then the last one), `curve`, the mean over all of them, and `points`, step by step; each as mean, standard
deviation and range over the group's runs.
"""

import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from diffrl.config_file import parse_value
from diffrl.curves import BLUE, GREEN, ORANGE, VERMILION, series_of
from diffrl.errors import ConfigError
from diffrl.metrics import unit

SEED = "seed"
SHOWN = (
    *("reward/mean", "reward/solved_frac", "eval/pass@1", "loss/kl"),
    *("loss/diffusion", "validation/diffusion"),
)
LAST = 10  # `final` is over a tenth of the values
MOST_RUNS = 1000
COLORS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Axis(key="method.estimator", values=("coupled", "full_mask"))"""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run. Cell(settings={"method.estimator": "coupled", "seed": 0})"""

    settings: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]

    @property
    def name(self) -> str:
        """Of its folder."""
        return name_of(self.settings)

    @property
    def group(self) -> str:
        return name_of({key: value for key, value in self.settings.items() if key != SEED}) or "all"


def name_of(settings: Mapping[str, Any]) -> str:
    parts = [
        f"{key.rpartition('.')[2]}-{value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip("-.")[:150]


def parse_axis(text: str) -> Axis:
    """KEY=VALUE,VALUE with YAML values, of which those with commas stand in their own brackets or quotes. Raises ConfigError."""
    key, sign, listed = text.partition("=")
    way_out = "must be KEY=VALUE,VALUE, such as method.estimator=coupled,full_mask or seed=0,1,2"
    if not (key and sign and listed.strip()):
        raise ConfigError(f"--over: {text!r} {way_out}")
    try:
        values = parse_value(f"[{listed}]")
        shown = [json.dumps(value) for value in values]
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"--over: {text!r} {way_out}; quote what YAML reads otherwise") from error
    if twice := next((value for value in shown if shown.count(value) > 1), None):
        raise ConfigError(f"--over: {key}: {twice} is there twice; name each value once")
    return Axis(key=key, values=tuple(values))


def cells_of(texts: Sequence[str]) -> list[Cell]:
    """All combinations, the last axis first. Raises ConfigError."""
    axes = [parse_axis(text) for text in texts]
    keys = [axis.key for axis in axes]
    if not axes:
        raise ConfigError("--over: not given; say what differs between the runs, such as --over seed=0,1,2")
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--over: {twice} is there twice; put all its values behind one")
    if "run_dir" in keys:
        raise ConfigError("--over: run_dir is the sweep's own: every run gets a folder in --out; leave it out")
    found = [
        Cell(settings=dict(zip(keys, values, strict=True))) for values in itertools.product(*(a.values for a in axes))
    ]
    if len(found) > MOST_RUNS:
        raise ConfigError(f"--over: {len(found)} runs are more than {MOST_RUNS}; name fewer values")
    names = [cell.name for cell in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--over: two runs would be called {twice}; their values differ in signs only, choose others")
    return found


# What they came to


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over runs. Spread(mean=1.9, deviation=0.05, low=1.84, high=1.95); no deviation of a single one."""

    mean: float
    deviation: float | None
    low: float
    high: float

    def __str__(self) -> str:
        several = "" if self.deviation is None else f" ±{self.deviation:.2g} [{self.low:.4g}..{self.high:.4g}]"
        return f"{self.mean:.4g}{several}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A metric of a group. Course(final=Spread(...), curve=Spread(...), points=((1, Spread(...)), ...)); steps count from 1."""

    final: Spread
    curve: Spread
    points: tuple[tuple[int, Spread], ...]  # of steps at which every run has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Group(name="estimator-coupled", settings={"method.estimator": "coupled"}, seconds=Spread(...), num_runs=3,
    metrics={"reward/mean": Course(...)})"""

    name: str
    settings: Mapping[str, Any]
    num_runs: int
    seconds: Spread | None  # None: not recorded
    metrics: Mapping[str, Course]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run's own record. Finished(cell=Cell(...), seconds=131.2, rows=({"step": 0, "reward/mean": 1.2, ...}, ...))"""

    cell: Cell
    seconds: float | None
    rows: Sequence[Mapping[str, Any]]


def spread(values: Sequence[float]) -> Spread:
    return Spread(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        low=min(values),
        high=max(values),
    )


def groups_of(runs: Sequence[Finished], metrics: Sequence[str] = SHOWN) -> list[Group]:
    """In the order of the runs; a metric that a run of the group does not have is left out."""
    by_group: dict[str, list[Finished]] = {}
    for run in runs:
        by_group.setdefault(run.cell.group, []).append(run)
    return [group_of(name, own, metrics) for name, own in by_group.items()]


def group_of(name: str, runs: Sequence[Finished], metrics: Sequence[str]) -> Group:
    courses = {}
    for key in metrics:
        series: list[dict[int, float]] = []
        for run in runs:
            steps, measured = series_of(run.rows, key)
            series.append(dict(zip(steps, measured, strict=True)))
        if not all(series):
            continue
        values = [list(own.values()) for own in series]
        common = sorted(set.intersection(*(set(own) for own in series)))
        courses[key] = Course(
            final=spread([statistics.fmean(own[-max(1, len(own) // LAST) :]) for own in values]),
            curve=spread([statistics.fmean(own) for own in values]),
            points=tuple((step, spread([own[step] for own in series])) for step in common),
        )
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return Group(
        name=name,
        settings={key: value for key, value in runs[0].cell.settings.items() if key != SEED},
        num_runs=len(runs),
        seconds=spread(seconds) if seconds else None,
        metrics=courses,
    )


def as_json(runs: Sequence[Finished], groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "runs": [{"name": r.cell.name, "settings": dict(r.cell.settings), "seconds": r.seconds} for r in runs],
        "groups": [asdict(group) for group in groups],
    }


def as_markdown(groups: Sequence[Group]) -> str:
    """A row per group: mean ± standard deviation [range] over its runs."""
    keys = list(dict.fromkeys(key for group in groups for key in group.metrics))
    heads = ["runs", "seconds", *(f"{key}, {what}" for key in keys for what in ("final", "curve"))]
    lines = ["| " + " | ".join(["", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    for group in groups:
        words = ", ".join(f"{key} {value}" for key, value in group.settings.items()) or "all"
        cells = [words, str(group.num_runs), "-" if group.seconds is None else str(group.seconds)]
        for key in keys:
            course = group.metrics.get(key)
            cells += ["-", "-"] if course is None else [str(course.final), str(course.curve)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(
    groups: Sequence[Group],
    file: Path,
    *,
    title: str,
    metrics: Sequence[str] | None = None,
    x_label: str = "steps",
    x_per_step: Mapping[str, float] | None = None,
) -> bool:
    """Mean and range over runs of each metric, by step, or by what a step of each group costs. False: nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for group in groups for key in group.metrics if metrics is None or key in metrics))
    if not keys:
        return False
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for index, group in enumerate(groups):
            if key not in group.metrics:
                continue
            color, style = COLORS[index % len(COLORS)], STYLES[index % len(STYLES)]
            scale = 1.0 if x_per_step is None else x_per_step[group.name]
            points = group.metrics[key].points
            x = [scale * step for step, _ in points]
            mark = "o" if len(points) < 15 else None
            axes.plot(
                x,
                [s.mean for _, s in points],
                color=color,
                linestyle=style,
                marker=mark,
                markersize=4,
                label=group.name,
            )
            axes.fill_between(
                x, [s.low for _, s in points], [s.high for _, s in points], color=color, alpha=0.18, linewidth=0
            )
        axes.set(title=key, xlabel=x_label, ylabel=unit(key))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, format=file.suffix[1:])
    return True
