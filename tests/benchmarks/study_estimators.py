"""`make study-estimators`: coupled, decoupled and full_mask RL at equal compute, over seeds.

Runs configs/quickstart.yaml from the tuned model of `make quickstart` with each estimator, as sweeps over seeds. Equal is the
number of floating point operations of a run by diffrl/estimate.py, forward passes of sampling, reference and old scores and of
the learner, where the backward pass counts as two: an estimator whose step costs less gets more steps, and more rollouts with
them. A group of G rollouts is scored in 2 G + 1 rows by `coupled` and `decoupled` and in one by `full_mask`, since siblings
share what hides everything; were the passes of training alone made equal, `full_mask` would get 2 G + 1 times the rollouts.
The learning rate's schedule ends with each run. Started again, it goes on where it was. Writes results/study_estimators.md and
.svg.
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.curves import series_of
from diffrl.estimate import rl_estimate
from diffrl.models.sizes import sizes_of
from diffrl.run_folder import METRICS, read_run
from diffrl.status import read_lines
from diffrl.sweep import Cell, Finished, draw, groups_of
from tests.benchmarks.quickstart_seeds import ROOT, diffrl
from tests.benchmarks.study_staleness import spread

CONFIG = "configs/quickstart.yaml"
RESULTS = Path(__file__).parent / "results" / "study_estimators.md"
ESTIMATORS = ("coupled", "decoupled", "full_mask")  # the first sets the compute
PARTS = 4  # of a run, for which means are shown
HELD_OUT = "{source: microcode, split: held_out, num_prompt_tests: 0, limit: 100}"


def step_cost(model: Path, estimator: str) -> float:
    """Operations of a step."""
    config = load_config(ROOT / CONFIG, [f"model.path={model}", f"method.estimator={estimator}"])
    assert isinstance(config, RLConfig)
    sizes = sizes_of(config.model)
    assert sizes is not None
    return sum(rl_estimate(config, sizes).flops_per_step.values())


def sweep(model: Path, folder: Path, estimator: str, seeds: Sequence[int], steps: int, extra: Sequence[str]) -> None:
    diffrl(
        *(
            "sweep",
            CONFIG,
            f"model.path={model.resolve()}",
            f"train.steps={steps}",
            "report=null",
            f"eval.every={steps}",
        ),
        *(f"eval.problems={HELD_OUT}", "eval.num_samples=4", *extra, "--out", str(folder)),
        *("--over", f"method.estimator={estimator}", "--over", f"seed={','.join(map(str, seeds))}"),
    )


def finished(folder: Path, estimator: str, seed: int) -> Finished:
    cell = Cell(settings={"method.estimator": estimator, "seed": seed})
    run = folder / cell.name
    return Finished(cell=cell, seconds=read_run(run)["finished"], rows=read_lines(run / METRICS)[0])


def rewards(run: Finished) -> list[float]:
    return series_of(run.rows, "reward/mean")[1]


def parts(run: Finished) -> list[float]:
    """Mean rewards of equal parts of the run."""
    values = rewards(run)
    bounds = [len(values) * part // PARTS for part in range(PARTS + 1)]
    return [statistics.fmean(values[low:high]) for low, high in pairwise(bounds)]


def held_out(run: Finished) -> float:
    return 100 * series_of(run.rows, "eval/pass@1")[1][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "quickstart" / "sft" / "model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study_estimators")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24, help="of coupled")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"--model: no folder at {options.model}: run `make quickstart` first")
    if options.steps < PARTS:
        sys.exit(f"--steps: {options.steps} must be at least {PARTS}")
    cost = {name: step_cost(options.model, name) for name in ESTIMATORS}
    relative = {name: cost[name] / cost[ESTIMATORS[0]] for name in ESTIMATORS}
    steps = {name: round(options.steps / relative[name]) for name in ESTIMATORS}
    for name in ESTIMATORS:
        sweep(options.model, options.folder / name, name, options.seeds, steps[name], options.overrides)
    runs = {name: [finished(options.folder / name, name, seed) for seed in options.seeds] for name in ESTIMATORS}
    groups = groups_of([run for own in runs.values() for run in own], ["reward/mean"])
    picture = options.results.with_suffix(".svg")
    draw(
        groups,
        picture,
        title=f"Reward of the training prompts, mean and range over {len(options.seeds)} seeds",
        x_label=f"compute, in steps of {ESTIMATORS[0]}",
        x_per_step={group.name: relative[group.settings["method.estimator"]] for group in groups},
    )
    options.results.write_text("\n".join(report(options, relative, steps, runs, picture.name)))
    print(options.results.read_text())


def report(
    options: argparse.Namespace,
    relative: dict[str, float],
    steps: dict[str, int],
    runs: dict[str, list[Finished]],
    picture: str,
) -> list[str]:
    first = ESTIMATORS[0]
    quarters = [f"reward, part {part + 1} of {PARTS}" for part in range(PARTS)]
    lines = [
        "# Estimators: learning curves at equal compute",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, no GPU. {CONFIG}, seeds {options.seeds}, all from one tuned model. Equal compute: operations "
        "of a run by diffrl/estimate.py, sampling, reference, old scores and learner together; so a cheaper step means more "
        "steps, and more rollouts. Mean reward of the training prompts in equal parts of the run, of the last "
        f"{max(1, options.steps // PARTS)} steps up to step {options.steps}, at which all have made as many updates, and "
        "held-out pass@1 (100 problems, 4 samples, per cent) at the end; mean over seeds [range].",
        "",
        f"![reward against compute]({picture})",
        "",
        "| estimator | cost of a step | steps | "
        + " | ".join(quarters)
        + " | at equal steps | held-out pass@1 | seconds |",
        "|---" * (PARTS + 6) + "|",
    ]
    for name, own in runs.items():
        columns = zip(*(parts(run) for run in own), strict=True)
        equal = [statistics.fmean(rewards(run)[: options.steps][-max(1, options.steps // PARTS) :]) for run in own]
        cells = [name, f"{relative[name]:.2f}", str(steps[name]), *(spread(values, 2) for values in columns)]
        cells += [spread(equal, 2), spread([held_out(run) for run in own], 1)]
        cells.append(spread([run.seconds or 0.0 for run in own], 0))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Held-out pass@1 against {first} at the same seed, points:", ""]
    for name in ESTIMATORS[1:]:
        gaps = [held_out(run) - held_out(base) for run, base in zip(runs[name], runs[first], strict=True)]
        lines.append(f"- {name}: " + ", ".join(f"{gap:+.1f}" for gap in gaps))
    return [*lines, ""]


if __name__ == "__main__":
    main()
