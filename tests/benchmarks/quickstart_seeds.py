"""`make quickstart-seeds`: the quickstart end to end for three seeds, and a control run per the first seed whose rewards
are shuffled within each group. Prints what was measured and writes it to tests/benchmarks/results/quickstart_seeds.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from actors.evaluate import PassRates, read_report
from diffrl.analysis import paired_bootstrap

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "quickstart_seeds.md"
STAGES = ("pretrain", "midtrain", "sft", "rl")
KEYS = ("held_out/t1.0", "held_out/t0.4", "held_out/greedy", "train/t1.0")

Report = dict[str, PassRates]


def diffrl(*args: str) -> float:
    """Run one command as a user would; seconds it took."""
    started = time.perf_counter()
    program = Path(sys.executable).parent / "diffrl"
    subprocess.run([str(program), *args], cwd=ROOT, check=True)
    return time.perf_counter() - started


def run_seed(seed: int, folder: Path, overrides: list[str]) -> list[float]:
    """All four stages; seconds of each, and of all else (evaluations, start)."""
    run_dir = folder / f"seed{seed}"
    own = [f"stages.{name}.seed={seed}" for name in STAGES] + [f"stages.rl.{override}" for override in overrides]
    total = diffrl("pipeline", "configs/quickstart_pipeline.yaml", f"run_dir={run_dir}", *own)
    rows = json.loads((run_dir / "pipeline.json").read_text())["stages"]
    parts = [row["seconds"] for row in rows]
    return [*parts, total - sum(parts)]


def reports(run_dir: Path) -> tuple[Report, Report]:
    return read_report(run_dir / "report_before.json"), read_report(run_dir / "report_after.json")


def gain_cell(before: PassRates, after: PassRates, seed: int) -> str:
    gain, low, high = paired_bootstrap(before.per_problem(1), after.per_problem(1), seed=seed)
    rates = f"{100 * before.pass_at(1):.1f} -> {100 * after.pass_at(1):.1f}"
    return f"{rates}, {100 * gain:+.1f} [{100 * low:.1f}..{100 * high:.1f}]"


def seed_table(runs: dict[str, tuple[Report, Report]]) -> list[str]:
    lines = [
        "| run | held-out, T=1.0 | held-out, T=0.4 | held-out, greedy | held-out pass@8 | training problems, T=1.0 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (before, after) in runs.items():
        cells = [gain_cell(before[key], after[key], 0) for key in KEYS]
        k = min(8, before[KEYS[0]].num_samples)
        pass_at_8 = f"{100 * before[KEYS[0]].pass_at(k):.1f} -> {100 * after[KEYS[0]].pass_at(k):.1f}"
        lines.append("| " + " | ".join([name, *cells[:3], pass_at_8, cells[3]]) + " |")
    return lines


def family_table(runs: list[tuple[Report, Report]]) -> list[str]:
    """Held-out pass@1 at T=1.0 per family, mean over seeds."""
    before = [b[KEYS[0]].by_family() for b, _ in runs]
    after = [a[KEYS[0]].by_family() for _, a in runs]
    rows = []
    for family in before[0]:
        old = sum(b[family] for b in before) / len(before)
        new = sum(a[family] for a in after) / len(after)
        rows.append((new - old, f"| {family} | {100 * old:.0f} | {100 * new:.0f} | {100 * (new - old):+.0f} |"))
    rose = sum(gain > 0 for gain, _ in rows)
    return [
        f"{rose} of {len(rows)} families rose.",
        "",
        "| family | before | after | gain |",
        "|---|---|---|---|",
        *(row for _, row in sorted(rows, reverse=True)),
    ]


def mean_gain(runs: list[tuple[Report, Report]], key: str) -> float:
    return sum(a[key].pass_at(1) - b[key].pass_at(1) for b, a in runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("overrides", nargs="*", help="key=value for the RL stage")
    options = parser.parse_args()
    times = {seed: run_seed(seed, options.folder, options.overrides) for seed in options.seeds}
    first = options.seeds[0]
    diffrl(
        *("train", "configs/quickstart.yaml", f"seed={first}", f"run_dir={options.folder}/control"),
        *(f"model.path={options.folder}/seed{first}/sft/model", "reward.shuffle_within_group=true"),
        *options.overrides,
    )
    runs = {f"seed {seed}": reports(options.folder / f"seed{seed}" / "rl") for seed in options.seeds}
    control = reports(options.folder / "control")
    held_out = runs[f"seed {first}"][0][KEYS[0]]
    seconds = "; ".join(
        f"seed {seed}: {sum(parts):.0f} s (" + " + ".join(f"{part:.0f}" for part in parts) + ")"
        for seed, parts in times.items()
    )
    text = "\n".join(
        [
            "# Quickstart over seeds",
            "",
            f"Machine: {os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}, torch {version('torch')}, ray {version('ray')}, "
            f"deepspeed {version('deepspeed')}.",
            f"Held-out: {len(held_out.num_correct)} problems x {held_out.num_samples} samples (greedy: 1). Pass rates in "
            "per cent; gains with 95% intervals, paired bootstrap over problems. The control run's rewards are shuffled "
            "within each group. Settings were chosen on the validation split.",
            "",
            *seed_table({**runs, f"control, seed {first}": control}),
            "",
            f"Mean gain over seeds: held-out T=1.0 {100 * mean_gain(list(runs.values()), KEYS[0]):+.1f}, greedy "
            f"{100 * mean_gain(list(runs.values()), KEYS[2]):+.1f}, training problems "
            f"{100 * mean_gain(list(runs.values()), KEYS[3]):+.1f} points.",
            f"Wall time (pre-training + mid-training + instruction tuning + RL with both reports + evaluations): {seconds}.",
            "",
            "## Families: held-out pass@1 at T=1.0, mean over seeds",
            "",
            *family_table(list(runs.values())),
            "",
        ]
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
