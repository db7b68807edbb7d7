"""What was measured of each source, as tables of plain values, and the claims that follow.

A table is {"about": ..., "rows": [...]}: JSON as it stands; plots and summary are made of tables alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffrl.analysis.claims import (
    CODE_MATH,
    RL_ORDER,
    RL_STEPS,
    SINK,
    TEMPERATURE_ORDER,
    TEMPERATURE_PASS,
    Claim,
    Wanted,
    compared,
)
from diffrl.analysis.samples import Looks, Measures, OrderMap
from diffrl.analysis.statistics import estimate

Table = dict[str, Any]
Setting = tuple[float, int]  # temperature, steps
CLAIMED = ("local@1", "global@1")  # the AR-ness that claims are about
BY_TEMPERATURE = (*CLAIMED, "order_diversity", "token_diversity", "distinct", "pass@1")
SINK_PART = 0.25  # of the window: what is "right behind the prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class MathResult:
    """MathResult(measures=Measures(...), right=0.02)"""

    measures: Measures
    right: float  # share of samples whose last number is the answer: whether the model can do it at all


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """A model folder. ModelResult(name="rl", cells={(0.2, 30): Measures(...), (0.2, 15): ...}, main=(0.2, 30),
    order=OrderMap(...), looks={"microcode/affine-3-5": Looks(...), ...}, math=None)"""

    name: str
    cells: Mapping[
        Setting, Measures
    ]  # all numbers of steps at the main temperature, all temperatures at the full steps
    main: Setting  # full steps
    order: OrderMap  # of the main cell
    looks: Mapping[str, Looks]
    math: MathResult | None

    @property
    def overall(self) -> Measures:
        return self.cells[self.main]

    def by_temperature(self) -> list[tuple[float, Measures]]:
        return sorted((t, measures) for (t, steps), measures in self.cells.items() if steps == self.main[1])

    def by_steps(self) -> list[tuple[int, Measures]]:
        """Most steps first."""
        return sorted(((s, m) for (t, s), m in self.cells.items() if t == self.main[0]), key=lambda pair: -pair[0])

    def loss(self, steps: int, k: int = 1) -> dict[str, float]:
        """Accuracy of each problem that goes when it is decoded in so many steps."""
        full, few = (self.cells[self.main[0], s].column(f"pass@{k}") for s in (self.main[1], steps))
        return {id: full[id] - few[id] for id in full if id in few}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The rollouts that a run stored; a "problem" is one group of it.

    RunResult(name="rl", overall=Measures(...), order=OrderMap(...), steps=((0, Measures(...)), (1, Measures(...)), ...))
    """

    name: str
    overall: Measures
    order: OrderMap
    steps: tuple[tuple[int, Measures], ...]


Result = ModelResult | RunResult


def tables_of(results: Sequence[Result], claims: Sequence[Claim], *, max_k: int, seed: int) -> dict[str, Table]:
    """By file name; those that would be empty are left out."""
    models = [result for result in results if isinstance(result, ModelResult)]
    runs = [result for result in results if isinstance(result, RunResult)]
    found: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "claims": (
            "claims of the paper: the difference after - before, its 95% bootstrap interval over problems, and the verdict",
            [claim.row() for claim in claims],
        ),
        "ar_ness": (
            "AR-ness@k of the text, mean over problems and its 95% interval; of models at the main temperature, full steps",
            [row | {"source": r.name} for r in results for row in ar_ness_rows(r.overall, max_k, seed)],
        ),
        "decoding_order": (
            "share[p][s]: of the tokens in position bin p of the window, those that are revealed in step bin s",
            [
                {"source": result.name} | asdict(result.order) | {"share": [list(row) for row in result.order.share]}
                for result in results
            ],
        ),
        "entropy_sink": (
            "before the first steps that reveal something: mean over problems of the probability of the most probable token, "
            "and of the entropy in nats, at each hidden position; null where none is hidden",
            [row for model in models for row in sink_rows(model)],
        ),
        "pass_at_k": (
            "pass@k at each temperature with full steps, mean over problems and its 95% interval",
            [row for model in models for row in pass_rows(model, seed)],
        ),
        "temperature": (
            "measures of diffrl.analysis.samples.Measures at each temperature with full steps, mean and 95% interval",
            [
                {"source": model.name, "temperature": t, **row}
                for model in models
                for t, measures in model.by_temperature()
                for row in rows_of(measures, BY_TEMPERATURE, seed)
            ],
        ),
        "steps": (
            "at the main temperature: accuracy (pass@1), what of it is lost against full steps, AR-ness, and how many times "
            "fewer forward passes",
            [row for model in models for row in step_rows(model, seed)],
        ),
        "math": (
            "AR-ness@k of code and of math at the main temperature, full steps; right: share of math samples whose last number "
            "is the answer",
            [row for model in models if model.math for row in math_rows(model, model.math, max_k, seed)],
        ),
        "training": (
            "of the rollouts that a run stored, step by step of the training: mean over groups and its 95% interval",
            [
                {"source": run.name, "step": step, **row}
                for run in runs
                for step, measures in run.steps
                for row in rows_of(measures, (*CLAIMED, "pass@1", "order_diversity", "token_diversity"), seed)
            ],
        ),
    }
    return {name: {"about": about, "rows": rows} for name, (about, rows) in found.items() if rows}


def rows_of(measures: Measures, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """{"measure": "global@1", "mean": 0.41, "low": 0.36, "high": 0.46, "problems": 60} for each that has a value."""
    rows = []
    for name in names:
        found = estimate(list(measures.column(name).values()), seed=seed)
        if found is not None:
            rows.append(
                {"measure": name, "mean": found.mean, "low": found.low, "high": found.high, "problems": found.count}
            )
    return rows


def ar_ness_rows(measures: Measures, max_k: int, seed: int) -> list[dict[str, Any]]:
    names = [f"{kind}@{k}" for kind in ("local", "global") for k in range(1, max_k + 1)]
    return [
        {"kind": row["measure"].partition("@")[0], "k": int(row["measure"].partition("@")[2])} | row
        for row in rows_of(measures, names, seed)
    ]


def sink_rows(model: ModelResult) -> list[dict[str, Any]]:
    rows = []
    looks = list(model.looks.values())
    for number in range(len(looks[0].probability_KC) if looks else 0):
        probability_NC = np.stack([look.probability_KC[number] for look in looks])
        entropy_NC = np.stack([look.entropy_KC[number] for look in looks])
        if np.isnan(probability_NC).all():  # there are fewer steps
            break
        rows.append(
            {
                "source": model.name,
                "look": number + 1,
                "problems": len(looks),
                "probability": means_of(probability_NC),
                "entropy": means_of(entropy_NC),
            }
        )
    return rows


def means_of(value_NC: np.ndarray) -> list[float | None]:
    """Of each column, over what is no NaN."""
    known_NC = ~np.isnan(value_NC)
    count_C = known_NC.sum(0)
    total_C = np.where(known_NC, value_NC, 0).sum(0, dtype=np.float64)
    return [float(total / count) if count else None for total, count in zip(total_C, count_C, strict=True)]


def pass_rows(model: ModelResult, seed: int) -> list[dict[str, Any]]:
    rows = []
    for temperature, measures in model.by_temperature():
        names = [name for name in measures.values if name.startswith("pass@")]
        rows += [
            {"source": model.name, "temperature": temperature, "k": int(row["measure"].partition("@")[2])} | row
            for row in rows_of(measures, names, seed)
        ]
    return rows


def step_rows(model: ModelResult, seed: int) -> list[dict[str, Any]]:
    rows = []
    full_passes = float(np.mean(model.overall.values["passes"]))
    for steps, measures in model.by_steps():
        passes = float(np.mean(measures.values["passes"]))
        place = {"source": model.name, "steps": steps, "passes": passes, "speedup": full_passes / passes}
        rows += [place | row for row in rows_of(measures, ("pass@1", *CLAIMED), seed)]
        if (lost := estimate(list(model.loss(steps).values()), seed=seed)) is not None:
            rows.append(
                place
                | {"measure": "loss", "mean": lost.mean, "low": lost.low, "high": lost.high, "problems": lost.count}
            )
    return rows


def math_rows(model: ModelResult, math: MathResult, max_k: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"source": model.name, "set": name, "right": math.right if name == "math" else None} | row
        for name, measures in (("code", model.overall), ("math", math.measures))
        for row in ar_ness_rows(measures, max_k, seed)
    ]


# Claims


def claims_of(results: Sequence[Result], *, seed: int) -> list[Claim]:
    """In the order of CLAIMS. What RL did is the difference between the first and the last of several models, and of a run
    between its first and its last fifth of the steps."""
    models = [result for result in results if isinstance(result, ModelResult)]
    found: list[Claim | None] = []
    for model in models:
        found += temperature_claims(model, seed)
    if len(models) > 1:
        found += model_claims(models[0], models[-1], seed)
    found += [claim for r in results if isinstance(r, RunResult) for claim in run_claims(r, seed)]
    for model in models:
        found += [math_claim(model, measure, seed) for measure in CLAIMED if model.math]
        found.append(sink_claim(model, seed))
    return [claim for claim in found if claim is not None]


def temperature_claims(model: ModelResult, seed: int) -> list[Claim | None]:
    """Between the lowest and the highest temperature; pass@k at the largest k."""
    sweep = model.by_temperature()
    if len(sweep) < 2:
        return []
    (low, cold), (high, hot) = sweep[0], sweep[-1]
    largest = max(int(name.partition("@")[2]) for name in cold.values if name.startswith("pass@"))
    asked: list[tuple[str, str, Wanted]] = [(TEMPERATURE_ORDER, name, "lower") for name in CLAIMED]
    asked.append((TEMPERATURE_PASS, f"pass@{largest}", "higher"))
    return [
        compared(
            claim,
            model.name,
            name,
            wanted,
            (f"temperature {low:g}", cold.column(name)),
            (f"temperature {high:g}", hot.column(name)),
            seed=seed,
        )
        for claim, name, wanted in asked
    ]


def model_claims(before: ModelResult, after: ModelResult, seed: int) -> list[Claim | None]:
    names = f"{before.name} -> {after.name}"
    found = [
        compared(
            RL_ORDER,
            names,
            name,
            "lower",
            (before.name, before.overall.column(name)),
            (after.name, after.overall.column(name)),
            seed=seed,
        )
        for name in CLAIMED
    ]
    half = half_steps(before, after)
    if half is not None:
        found.append(
            compared(
                RL_STEPS,
                names,
                f"pass@1 at {before.main[1]} less at {half} steps",
                "lower",
                (before.name, before.loss(half)),
                (after.name, after.loss(half)),
                seed=seed,
            )
        )
    return found


def half_steps(before: ModelResult, after: ModelResult) -> int | None:
    half = before.main[1] // 2
    return half if all((model.main[0], half) in model.cells for model in (before, after)) else None


def run_claims(run: RunResult, seed: int) -> list[Claim | None]:
    size = max(1, len(run.steps) // 5)
    if len(run.steps) < 2:
        return []
    early, late = run.steps[:size], run.steps[-size:]
    return [
        compared(
            RL_ORDER,
            run.name,
            name,
            "lower",
            (f"rollouts of {words_of(early)}", columns(early, name)),
            (f"of {words_of(late)}", columns(late, name)),
            seed=seed,
            paired=False,
        )
        for name in CLAIMED
    ]


def words_of(steps: Sequence[tuple[int, Measures]]) -> str:
    first, last = steps[0][0] + 1, steps[-1][0] + 1
    return f"step {first}" if first == last else f"steps {first} to {last}"


def columns(steps: Sequence[tuple[int, Measures]], name: str) -> dict[str, float]:
    return {id: value for _, measures in steps for id, value in measures.column(name).items()}


def math_claim(model: ModelResult, name: str, seed: int) -> Claim | None:
    assert model.math is not None
    return compared(
        CODE_MATH,
        model.name,
        name,
        "lower",
        ("math", model.math.measures.column(name)),
        ("code", model.overall.column(name)),
        seed=seed,
        paired=False,
    )


def sink_claim(model: ModelResult, seed: int) -> Claim | None:
    """At the first look: the first quarter of the window against the rest."""
    parts: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for id, look in model.looks.items():
        probability_C = look.probability_KC[0]
        edge = max(1, int(len(probability_C) * SINK_PART))
        if edge < len(probability_C):
            parts[0][id], parts[1][id] = float(probability_C[edge:].mean()), float(probability_C[:edge].mean())
    return compared(
        SINK,
        model.name,
        "probability of the most probable token",
        "higher",
        ("rest of the window", parts[0]),
        ("its first quarter", parts[1]),
        seed=seed,
    )
