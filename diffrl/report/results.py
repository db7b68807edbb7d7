"""The tables of a report: a row for each run, families side by side; pass rates with intervals; means over seeds."""

from collections.abc import Sequence
from statistics import mean

import numpy as np

from diffrl.analysis import paired_bootstrap
from diffrl.pass_rates import PassRates
from diffrl.report.charts import Interval, brief, percent, whisker
from diffrl.report.html import Child, Html, el, join
from diffrl.report.runs import ABSENT, Group, ReportRun

MAIN = "held_out/t1.0"
SETS = {  # of report_*.json, as readers call them
    "held_out/t1.0": "held-out, temperature 1.0",
    "held_out/t0.4": "held-out, temperature 0.4",
    "held_out/greedy": "held-out, greedy",
    "train/t1.0": "training problems, temperature 1.0",
}


def interval(rates: PassRates, seed: int, k: int = 1) -> Interval:
    """pass@k, and its interval when problems are drawn anew."""
    values = rates.per_problem(k)
    return paired_bootstrap(np.zeros(len(values)), values, seed=seed)


def gain(before: PassRates, after: PassRates, seed: int, k: int = 1) -> Interval | None:
    """None where the problems are not the same."""
    if before.families != after.families or k > min(before.num_samples, after.num_samples):
        return None
    return paired_bootstrap(before.per_problem(k), after.per_problem(k), seed=seed)


def shown_interval(found: Interval | None, *, signed: bool = False) -> Html | str:
    """45.0% [39.1, 50.6]; of a difference +22.5 [18.1, 27.1], in points."""
    if found is None:
        return ABSENT
    value, low, high = (100 * part for part in found)
    told = f"{value:+.1f}" if signed else f"{value:.1f}%"
    return join([told, " ", el("small", f"[{low:.1f}, {high:.1f}]", cls="nowrap")])


def table(heads: Sequence[str], rows: Sequence[Sequence[Child]], caption: str) -> Html:
    """The first cell of a row is its name; a wide table scrolls by itself."""
    head = el("thead", el("tr", *(el("th", name, scope="col") for name in heads)))
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    made = el("table", head, el("tbody", *body), aria_label=caption)
    box = el("div", made, cls="scroll", tabindex=0, role="region", aria_label=caption)
    return el("div", el("p", caption, cls="caption", aria_hidden="true"), box, cls="table")


def overview(runs: Sequence[ReportRun]) -> Html:
    """What every run is."""
    rows = [
        [
            run.name,
            run.family,
            run.stage,
            run.method,
            str(run.seed),
            f"{run.num_steps:,}",
            f"{run.run.snapshot.num_rows:,}" if run.is_rl else ABSENT,
            latest(run, "reward/mean"),
            latest(run, "eval/pass@1", share=True),
            latest(run, "loss/diffusion"),
            latest(run, "validation/diffusion"),
        ]
        for run in runs
    ]
    heads = [
        "run",
        "family",
        "stage",
        "method",
        "seed",
        "steps",
        "rollouts",
        "reward",
        "eval pass@1",
        "loss",
        "validation",
    ]
    kept = [n for n in range(len(heads)) if n < 3 or any(row[n] != ABSENT for row in rows)]
    caption = "The runs; reward, pass rate and losses are the newest of each"
    return table([heads[n] for n in kept], [[row[n] for n in kept] for row in rows], caption)


def latest(run: ReportRun, key: str, *, share: bool = False) -> str:
    _, values = run.points(key)
    return ABSENT if not values else percent(values[-1]) if share else brief(values[-1])


def held_out(runs: Sequence[ReportRun]) -> Html | None:
    """pass@1 at temperature 1 before and after, one row for each run that has a report, and each against the first."""
    reported = [run for run in runs if MAIN in run.before or MAIN in run.after]
    if not reported:
        return None
    first, rows = reported[0], []
    for run in reported:
        before, after = run.before.get(MAIN), run.after.get(MAIN)
        ends = [None if rates is None else interval(rates, run.seed) for rates in (before, after)]
        told = gain(before, after, run.seed) if before and after else None
        against = None
        if run is not first and after is not None and MAIN in first.after and same_problems(first, run):
            against = gain(first.after[MAIN], after, run.seed)
        words = f"{run.name}: " + ", ".join(
            f"{when} {100 * end[0]:.1f} per cent" for when, end in zip(("before", "after"), ends, strict=True) if end
        )
        cells = [shown_interval(ends[0]), shown_interval(ends[1]), shown_interval(told, signed=True)]
        rows.append(
            [run.name, run.family, *cells, whisker(ends[0], ends[1], words), shown_interval(against, signed=True)]
        )
    heads = ["run", "family", "before", "after", "gain, points", "0 to 100%", "against the first, points"]
    if len(reported) == 1:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    problems, samples = len(next(iter(rates_of(first))).num_correct), next(iter(rates_of(first))).num_samples
    caption = (
        f"pass@1 on held-out problems at temperature 1.0 ({problems} problems, {samples} samples each, of the first run); "
        "in brackets 95% intervals, by bootstrap over problems; hollow: before, filled: after"
    )
    return table(heads, rows, caption)


def rates_of(run: ReportRun) -> list[PassRates]:
    return [rates[MAIN] for rates in (run.after, run.before) if MAIN in rates]


def same_problems(first: ReportRun, second: ReportRun) -> bool:
    """Whether both were asked the same questions: the same section of the config."""
    fields = {f for run in (first, second) for f in run.config if f.startswith("report.problems.")}
    return bool(fields) and all(first.config.get(f) == second.config.get(f) for f in fields)


def all_sets(runs: Sequence[ReportRun]) -> Html | None:
    """Every set and k of every report."""
    rows: list[list[Child]] = []
    for run in runs:
        for key in dict.fromkeys([*SETS, *run.before, *run.after]):
            before, after = run.before.get(key), run.after.get(key)
            samples = min((rates.num_samples for rates in (before, after) if rates is not None), default=0)
            for k in sorted({1, samples} - {0}) if samples else ():
                ends = [None if rates is None else interval(rates, run.seed, k) for rates in (before, after)]
                told = gain(before, after, run.seed, k) if before and after else None
                name = f"{SETS.get(key, key)}, pass@{k}"
                rows.append([run.name, name, *map(shown_interval, ends), shown_interval(told, signed=True)])
    if not rows:
        return None
    return table(
        ["run", "set", "before", "after", "gain, points"], rows, "All pass rates, with 95% intervals over problems"
    )


def over_seeds(groups: Sequence[Group]) -> Html | None:
    """Mean and spread of what several seeds of a configuration came to."""
    rows: list[list[Child]] = []
    for group in groups:
        if len(group.runs) < 2:
            continue
        rates = [run.after[MAIN].pass_at(1) for run in group.runs if MAIN in run.after]
        both = [run for run in group.runs if MAIN in run.after and MAIN in run.before]
        gains = [run.after[MAIN].pass_at(1) - run.before[MAIN].pass_at(1) for run in both]
        rewards = [values[-1] for run in group.runs if (values := run.points("reward/mean")[1])]
        losses = [values[-1] for run in group.runs if (values := run.points("loss/diffusion")[1])]
        seeds = ", ".join(str(run.seed) for run in group.runs)
        points = [100 * value for value in gains]
        cells = [spread([100 * r for r in rates], "%", 1), spread(points, "", 1), spread(rewards), spread(losses)]
        rows.append([group.label, group.runs[0].family, seeds, *cells])
    if not rows:
        return None
    heads = ["configuration", "family", "seeds", "held-out pass@1 after", "gain, points", "last reward", "last loss"]
    kept = [n for n in range(len(heads)) if any(row[n] != ABSENT for row in rows)]
    caption = "Seeds of one configuration: mean, in brackets the smallest and the largest"
    return table([heads[n] for n in kept], [[row[n] for n in kept] for row in rows], caption)


def spread(values: Sequence[float], unit: str = "", digits: int | None = None) -> Html | str:
    if not values:
        return ABSENT
    shown = [brief(v) if digits is None else f"{v:.{digits}f}" for v in (mean(values), min(values), max(values))]
    return join([f"{shown[0]}{unit}", " ", el("small", f"[{shown[1]}, {shown[2]}]", cls="nowrap")])
