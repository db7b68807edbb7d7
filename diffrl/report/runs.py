"""What a report says of a run, read from its folder; and which runs are seeds of one configuration."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.board.orders import StepOrder
from diffrl.board.reading import mapping
from diffrl.board.run import Run, open_run
from diffrl.errors import ConfigError
from diffrl.pass_rates import PassRates, read_report
from diffrl.resume import MEANINGS, fields_of, kind_of

MAX_ORDER_FILES = 60  # evenly spaced over the run's rollouts
FAMILIES = {"diffusion": "diffusion", "causal": "autoregressive"}  # as readers call them
OWN = ("seed", "run_dir")  # what seeds of one configuration differ in
ABSENT = "—"
Points = tuple[list[int], list[float]]  # steps done, values


class ReportRun:
    """One run, read once. `notes` are what could not be read of it."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        self.unreadable: list[str] = []
        self.config: dict[str, Any] = dict(fields_of(mapping(run.path / "config.yaml")))
        if not self.config:
            self.unreadable.append("config.yaml cannot be read")
        self.facts = self.read_json("run.json")
        self.before, self.after = self.rates("before"), self.rates("after")
        run.refresh()

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.run.path / name).read_text())
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            self.unreadable.append(f"{name} cannot be read")
            return {}
        return value

    def rates(self, when: str) -> dict[str, PassRates]:
        """Of report_WHEN.json; none where the run has not written it."""
        file = self.run.path / f"report_{when}.json"
        if not file.is_file():
            return {}
        try:
            found = read_report(file)
            return {key: rates for key, rates in found.items() if rates.per_problem(1)}
        except (ValueError, LookupError, TypeError, AttributeError):
            self.unreadable.append(f"{file.name} cannot be read")
            return {}

    @property
    def notes(self) -> list[str]:
        """Without what is only said of runs of reinforcement learning, where this is none."""
        said = self.run.notes if self.is_rl else [note for note in self.run.notes if "no rollouts yet" not in note]
        return [*self.unreadable, *said]

    @property
    def is_empty(self) -> bool:
        return not (self.run.series.rows or self.run.snapshot.num_rows or self.before or self.after)

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", ABSENT))

    @property
    def is_rl(self) -> bool:
        return self.stage == "rl" or self.run.snapshot.num_rows > 0 or any(self.points("reward/mean")[0])

    @property
    def seed(self) -> int:
        value = self.config.get("seed")
        return value if isinstance(value, int) else 0

    @property
    def method(self) -> str:
        """coupled, sequence: the estimator, and the objective where it is not the recipe's."""
        estimator, objective = self.config.get("method.estimator"), self.config.get("method.objective")
        return ", ".join(str(part) for part in (estimator, objective) if part not in (None, "token")) or ABSENT

    @cached_property
    def family(self) -> str:
        """diffusion or autoregressive; configs that name none are of diffusion models."""
        return FAMILIES.get(str(self.config.get("model.family", "diffusion")), ABSENT)

    @cached_property
    def num_steps(self) -> int:
        """Steps done."""
        last = [max(self.run.series.rows, default=-1), *(int(s) for s in self.run.snapshot.steps[-1:])]
        return max(last) + 1

    def points(self, key: str) -> Points:
        rows = sorted(self.run.series.rows.items())
        found = [(step + 1, row[key]) for step, row in rows if key in row]
        return [step for step, _ in found], [value for _, value in found]

    @cached_property
    def orders(self) -> list[StepOrder]:
        """AR-ness of some completions of some steps."""
        chunks = sorted(self.run.chunks.items())
        picked = np.unique(np.linspace(0, len(chunks) - 1, min(MAX_ORDER_FILES, len(chunks))).astype(int))
        found: dict[int, StepOrder] = {}
        for number in picked.tolist():
            path, chunk = chunks[number]
            try:
                found |= self.run.look_at_orders(path, chunk)
            except (ValueError, OSError):  # pyarrow's are ValueErrors
                self.unreadable.append(f"{path.name}: the order of decoding cannot be read")
        return [found[step] for step in sorted(found)]


def open_runs(folders: Sequence[str]) -> list[ReportRun]:
    """Raises ConfigError for what is no run, for one that has nothing to report, and for one that is named twice."""
    if not folders:
        raise ConfigError("RUN: not given; give the folder of a run, such as runs/quickstart/rl")
    opened = [open_run(folder) for folder in folders]
    places = [run.path.resolve() for run in opened]
    if twice := next((f for f, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise ConfigError(f"RUN: {twice} is given twice; name every run once")
    runs = [ReportRun(run, name) for run, name in zip(opened, names_of(places), strict=True)]
    if empty := next((f for f, run in zip(folders, runs, strict=True) if run.is_empty), None):
        raise ConfigError(
            f"RUN: {empty} has no step, rollout or report yet; wait for its first step, or give another run"
        )
    return runs


def names_of(places: Sequence[Path]) -> list[str]:
    """What tells runs apart: quickstart/rl of one, coupled-0 and coupled-1 of two in one folder."""
    if len(places) > 1 and len({place.parent for place in places}) == 1:
        return [place.name for place in places]
    short = ["/".join(place.parts[-2:]) for place in places]
    return short if len(set(short)) == len(short) else [str(place) for place in places]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that are seeds of one configuration. Group(label="method.estimator coupled, 3 seeds", runs=(...), number=0)"""

    label: str
    runs: tuple[ReportRun, ...]
    number: int  # of its colour and its dashes

    def curve(self, key: str) -> tuple[list[int], np.ndarray]:
        """Steps that all of its runs have that measure `key` at all, and values [run, step]."""
        points = [dict(zip(*run.points(key), strict=True)) for run in self.runs]
        measured = [values for values in points if values]
        steps = sorted(set.intersection(*(set(values) for values in measured))) if measured else []
        return steps, np.array([[values[step] for step in steps] for values in measured])


def groups_of(runs: Sequence[ReportRun]) -> list[Group]:
    """In the order in which their first runs were given."""
    found: list[list[ReportRun]] = []
    for run in runs:
        like = next((group for group in found if all(is_other_seed(member, run) for member in group)), None)
        if like is None:
            found.append([run])
        else:
            like.append(run)
    firsts = [group[0] for group in found]
    differing = [field for field, _, meaning in differences(firsts) if not meaning and field not in OWN]
    differing = [field for field in differing if not all(equal(firsts[0], other, field) for other in firsts)]
    return [
        Group(label=label_of(group, differing), runs=tuple(group), number=number) for number, group in enumerate(found)
    ]


def label_of(runs: Sequence[ReportRun], differing: Sequence[str]) -> str:
    if len(runs) == 1:
        return runs[0].name
    told = ", ".join(f"{field} {shown_value(runs[0].config.get(field))}" for field in differing[:2])
    return f"{told or runs[0].name}, {len(runs)} seeds"


def is_other_seed(first: ReportRun, second: ReportRun) -> bool:
    """Whether a run is the other one with another seed: all that its result depends on is equal. Runs of one seed are not
    averaged, nor is one whose config cannot be read."""
    if not first.config or not second.config or first.seed == second.seed:
        return False
    fields = {**first.config, **second.config}
    return all(equal(first, second, field) for field in fields if field not in OWN and kind_of(field) != "free")


def equal(first: ReportRun, second: ReportRun, field: str) -> bool:
    """A path is that of the other run, too, when it lies as far from the run's own folder."""
    one, other = first.config.get(field), second.config.get(field)
    if one == other or not field.endswith(".path") or not one or not other:
        return one == other
    places = [os.path.relpath(str(run.config[field]), str(run.config.get("run_dir"))) for run in (first, second)]
    return places[0] == places[1]


def differences(runs: Sequence[ReportRun]) -> list[tuple[str, list[str], str]]:
    """(key, its value in each run, what it means where the result does not depend on it) of what differs."""
    fields: Mapping[str, Any] = {field: None for run in runs for field in run.config if field != "run_dir"}
    found = []
    for field in fields:
        values = [run.config.get(field) for run in runs]
        if any(value != values[0] for value in values[1:]):
            meaning = MEANINGS["free"] if kind_of(field) == "free" else ""
            found.append((field, [shown_value(value) for value in values], meaning))
    return found


def shown_value(value: Any) -> str:
    return value if isinstance(value, str) else "null" if value is None else json.dumps(value, default=str)
