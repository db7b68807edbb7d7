"""`make study-curation`: does it pay to train on the problems that models find hard?

200 microcode problems are graded by two models, the tuned diffusion model of `make quickstart` and a small autoregressive
one (configs/causal_sft.yaml, trained here). RL (configs/quickstart.yaml) then runs from the tuned model on the hard ones,
and on as many that were drawn at random from the 200, once for each seed. Started again, it goes on where it was.
Writes results/study_curation.md.
"""

import argparse
import json
import os
import platform
import random
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from diffrl.data.microcode import microcode_problems
from tests.benchmarks.quickstart_seeds import ROOT, diffrl
from tests.benchmarks.study_staleness import PARTS, curve, held_out, spread

RESULTS = Path(__file__).parent / "results" / "study_curation.md"
NUM_PROBLEMS = 200
SAMPLES = 8  # of each model
WINDOW = 30  # tokens, as in configs/quickstart.yaml


def curate(model: Path, folder: Path, causal_steps: int) -> None:
    """folder/curated and folder/problems.jsonl, unless they are there."""
    problems = microcode_problems("train", num_prompt_tests=0)
    chosen = problems[:: len(problems) // NUM_PROBLEMS][:NUM_PROBLEMS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.jsonl").write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in chosen))
    causal = folder / "causal"
    if not (causal / "model" / "config.json").exists():
        diffrl(
            "train", "configs/causal_sft.yaml", f"run_dir={causal}", f"train.steps={causal_steps}", "--resume", "auto"
        )
    models = {
        "diffusion": {"backend": "diffusion", "path": str(model), "steps": WINDOW // 2, "cpus_per_worker": 0.5},
        "autoregressive": {"backend": "transformers", "path": str(causal / "model")},
    }
    config = {
        "out": str(folder / "curated"),
        "data": {"source": "problems", "path": str(folder / "problems.jsonl"), "num_prompt_tests": 0},
        "models": {name: {**own, "num_samples": SAMPLES, "max_tokens": WINDOW} for name, own in models.items()},
    }
    (folder / "curate.yaml").write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML
    diffrl("curate", str(folder / "curate.yaml"))


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def train(model: Path, folder: Path, problems: Path, seed: int, steps: int) -> None:
    diffrl(
        *("train", "configs/quickstart.yaml", f"model.path={model}", f"run_dir={folder}", f"seed={seed}"),
        f"data={{source: problems, path: {problems}, num_prompt_tests: 0, max_prompt_tokens: 24}}",
        *(f"train.steps={steps}", "report=null", f"eval.every={steps}", "eval.num_samples=4"),
        *("eval.problems={source: microcode, split: held_out, num_prompt_tests: 0}", "--resume", "auto"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "quickstart" / "sft" / "model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study_curation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--causal-steps", type=int, default=1500)
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"--model: no folder at {options.model}: run `make quickstart` first")
    folder = options.folder.resolve()
    curate(options.model.resolve(), folder, options.causal_steps)
    hard = lines_of(folder / "curated" / "hard.jsonl")
    everything = lines_of(folder / "problems.jsonl")
    for seed in options.seeds:
        drawn = random.Random(seed).sample(everything, len(hard))
        (folder / f"random-{seed}.jsonl").write_text("".join(drawn))
        train(
            options.model.resolve(), folder / f"run-random-{seed}", folder / f"random-{seed}.jsonl", seed, options.steps
        )
        train(
            options.model.resolve(), folder / f"run-hard-{seed}", folder / "curated" / "hard.jsonl", seed, options.steps
        )
    size = options.steps // PARTS
    steps = [f"steps {part * size + 1}-{(part + 1) * size}" for part in range(PARTS)]
    lines = [
        "# Curation: RL on hard problems against RL on random ones",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, no GPU. {len(hard)} of {NUM_PROBLEMS} microcode problems are hard by {SAMPLES} samples each of "
        f"the tuned diffusion model and an autoregressive model (the quantiles of AceCode's split). configs/quickstart.yaml, "
        f"{options.steps} steps, seeds {options.seeds}: mean reward of the training prompts, which differ between the rows, "
        "and held-out pass@1 (4 samples, per cent) at the end; mean over seeds [range].",
        "",
        "| problems | " + " | ".join(steps) + " | held-out pass@1 |",
        "|---" * (PARTS + 2) + "|",
    ]
    for kind in ("hard", "random"):
        folders = [folder / f"run-{kind}-{seed}" for seed in options.seeds]
        curves = [curve(run, "reward/mean") for run in folders]
        cells = [spread([c[part] for c in curves], 2) for part in range(PARTS)]
        cells.append(spread([held_out(run) for run in folders], 1))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    gaps = [held_out(folder / f"run-hard-{s}") - held_out(folder / f"run-random-{s}") for s in options.seeds]
    lines += [
        "",
        "Held-out pass@1, hard against random at the same seed, points: " + ", ".join(f"{g:+.1f}" for g in gaps),
    ]
    RESULTS.write_text("\n".join([*lines, ""]))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
