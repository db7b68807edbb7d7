"""Synthetic runs with real configs and pass rates, for reports; rollouts and curves are those of board_run.py."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffrl.config import RLConfig
from diffrl.config_file import dump_config, validate
from diffrl.run_folder import MetricsFile
from tests.diffrl.board_run import Shape, make_run

SETS = {"held_out/t1.0": 8, "held_out/t0.4": 8, "held_out/greedy": 1, "train/t1.0": 8}  # samples of each
NUM_PROBLEMS = 40


def make_rl_run(
    folder: Path, seed: int, method: Mapping[str, object] | None = None, shape: Shape | None = None, skill: float = 0.6
) -> Path:
    """A finished run: 45% before, about `skill` after."""
    shape = shape or Shape(steps=12, groups=3, group_size=4, seed=seed, gain=skill - 0.3)
    make_run(folder, shape)
    config = validate(
        {
            "stage": "rl",
            "run_dir": str(folder),
            "seed": seed,
            "data": {"source": "microcode"},
            "model": {"family": "causal" if (method or {}).get("estimator") == "causal" else "diffusion"},
            "method": {"group_size": shape.group_size, **(method or {})},
            "train": {"steps": shape.steps, "prompts_per_step": shape.groups},
            "report": {"problems": {"source": "microcode", "split": "held_out"}, "num_samples": 8},
        },
        "test",
    )
    assert isinstance(config, RLConfig)
    (folder / "config.yaml").write_text(dump_config(config))
    rng = random.Random(f"{folder.name}/{seed}")
    for when, rate in (("before", 0.45), ("after", skill)):
        write_rates(folder, when, {key: counts(rng, rate, samples) for key, samples in SETS.items()})
    return folder


def counts(rng: random.Random, rate: float, samples: int) -> list[int]:
    """Problems are harder and easier than the mean."""
    return [sum(rng.random() < rate + rng.uniform(-0.3, 0.3) for _ in range(samples)) for _ in range(NUM_PROBLEMS)]


def write_rates(folder: Path, when: str, correct: Mapping[str, Sequence[int]]) -> None:
    rows = {
        key: {"num_samples": SETS[key], "num_correct": list(c), "families": ["sum"] * len(c)}
        for key, c in correct.items()
    }
    (folder / f"report_{when}.json").write_text(json.dumps(rows) + "\n")


def make_sft_run(folder: Path, seed: int, steps: int = 60) -> Path:
    """A supervised run: losses alone."""
    folder.mkdir(parents=True)
    data = {"source": "files", "path": "sft.jsonl"}
    raw = {"stage": "sft", "run_dir": str(folder), "seed": seed, "data": data, "train": {"steps": steps}}
    (folder / "config.yaml").write_text(dump_config(validate(raw, "test")))
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "attempt": 1}) + "\n")
    rng, metrics = random.Random(seed), MetricsFile(folder)
    for step in range(steps):
        row = {"step": step, "loss/diffusion": 0.4 + 3 / (1 + step / 8) + rng.gauss(0, 0.05), "optim/grad_norm": 1.0}
        metrics.write(row | ({"validation/diffusion": 0.5 + 3 / (1 + step / 8)} if step % 20 == 19 else {}))
    metrics.close()
    return folder
