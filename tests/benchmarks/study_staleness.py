"""`make study-staleness`: learning curves at equal updates when rollouts run ahead of them, over seeds.

Runs configs/quickstart.yaml from the tuned model of `make quickstart` with rollout.max_staleness 0, 1 and 2. Every run
sees the same prompts in the same order, so a step's rewards can be compared. Started again, it goes on where it was.
Writes results/study_staleness.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.quickstart_seeds import ROOT, diffrl

RESULTS = Path(__file__).parent / "results" / "study_staleness.md"
PARTS = 6  # of the steps, for which means are shown


def run(model: Path, folder: Path, staleness: int, seed: int, steps: int) -> None:
    diffrl(
        *("train", "configs/quickstart.yaml", f"model.path={model}", f"run_dir={folder}", f"seed={seed}"),
        *(f"rollout.max_staleness={staleness}", f"train.steps={steps}", "report=null", f"eval.every={steps}"),
        *("eval.problems={source: microcode, split: held_out, num_prompt_tests: 0}", "eval.num_samples=4"),
        *("--resume", "auto"),
    )


def curve(folder: Path, key: str) -> list[float]:
    """Means over equal parts of the steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [row[key] for row in rows if key in row]
    size = len(values) // PARTS
    return [statistics.fmean(values[part * size : (part + 1) * size]) for part in range(PARTS)]


def held_out(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return 100 * next(row["eval/pass@1"] for row in rows if "eval/pass@1" in row)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and range over seeds."""
    return f"{statistics.fmean(values):.{digits}f} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "quickstart" / "sft" / "model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study_staleness")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"--model: no folder at {options.model}: run `make quickstart` first")
    for seed in options.seeds:
        for n in options.staleness:
            run(options.model, options.folder / f"{n}-{seed}", n, seed, options.steps)
    size = options.steps // PARTS
    steps = [f"steps {part * size + 1}-{(part + 1) * size}" for part in range(PARTS)]
    lines = [
        "# Staleness: learning curves at equal updates",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, no GPU. configs/quickstart.yaml, {options.steps} steps, seeds {options.seeds}: mean reward of "
        "the training prompts, which are the same in every row, and held-out pass@1 (4 samples, per cent) at the end; mean "
        "over seeds [range].",
        "",
        "| max_staleness | " + " | ".join(steps) + " | held-out pass@1 |",
        "|---" * (PARTS + 2) + "|",
    ]
    for n in options.staleness:
        folders = [options.folder / f"{n}-{seed}" for seed in options.seeds]
        curves = [curve(folder, "reward/mean") for folder in folders]
        cells = [spread([c[part] for c in curves], 2) for part in range(PARTS)]
        cells.append(spread([held_out(folder) for folder in folders], 1))
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    lines += ["", "Held-out pass@1 against max_staleness 0 at the same seed, points:", ""]
    for n in options.staleness[1:]:
        gaps = [held_out(options.folder / f"{n}-{s}") - held_out(options.folder / f"0-{s}") for s in options.seeds]
        lines.append(f"- max_staleness {n}: " + ", ".join(f"{gap:+.1f}" for gap in gaps))
    RESULTS.write_text("\n".join([*lines, ""]))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
