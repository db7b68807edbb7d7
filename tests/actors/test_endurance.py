"""Thousands of steps of a minimal run: memory, files, threads and objects stay where they were after the first few hundred."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray._private.internal_api import memory_summary  # the public way to it is a command

from actors.driver import Run
from actors.processes import place_of
from diffrl.config import RLConfig
from diffrl.config_file import validate
from tests.actors.conftest import opened

pytestmark = pytest.mark.slow
STEPS = 5000
WARM_UP = 1000
EVERY = 250  # as checkpoints are, between which the learner keeps its batches
# Growth in the 4,000 steps behind the warm-up that is not called flat; 5 MB of a process are pools of its allocator.
LIMITS = {"mb": 5.0, "files": 1.0, "threads": 1.0, "objects": 2.0, "object_store_mb": 1.0}


def config_of(run_dir: Path) -> RLConfig:
    config = validate(
        {
            "stage": "rl",
            "run_dir": str(run_dir),
            "model": {"tiny": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1}},
            "data": {"source": "microcode", "split": "train", "num_prompt_tests": 0, "max_prompt_tokens": 24},
            "sampling": {"completion_tokens": 4, "steps": 1, "temperature": 1.0, "top_p": None, "top_k": None},
            "method": {"group_size": 2, "num_iterations": 1, "reference_refresh_steps": 64},
            "train": {"steps": STEPS, "prompts_per_step": 1},
            # Three groups in flight. A worker has a thread for each, and every thread its pools of the allocator.
            "rollout": {"cpus_per_worker": 0.25, "max_staleness": 1, "max_tokens_per_batch": 128},
            "judge": {"cpus_per_worker": 0.25},
            "reference": {"cpus": 0.25},
            "learner": {"cpus_per_rank": 0.25},
            "sandbox": {"backend": "process"},
            "checkpoint": {"every": 250},
        },
        "test",
    )
    assert isinstance(config, RLConfig)
    return config


class Watched(Run):
    """Notes what each process has, now and then."""

    def step(self, step: int) -> None:
        super().step(step)
        if step == WARM_UP - EVERY:
            self.look()  # the first one takes 12 MB of the driver for good
        if step % EVERY == 0 and step >= WARM_UP:
            self.notes.append((step, self.look()))

    def train(self) -> str | None:
        self.notes: list[tuple[int, dict[str, float]]] = []
        return super().train()

    def look(self) -> dict[str, float]:
        actors: dict[str, Any] = {name: pool.workers[0] for name, pool in self.system.pools().items()}
        pids = {name: place_of(actor).pid for name, actor in {**actors, "learner": self.learner.ranks[0]}.items()}
        seen = {}
        for name, pid in {**pids, "driver": psutil.Process().pid}.items():
            process = psutil.Process(pid)
            with process.oneshot():
                seen[f"{name} mb"] = process.memory_info().rss / 2**20
                seen[f"{name} files"] = process.num_fds()
                seen[f"{name} threads"] = process.num_threads()
        said = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
        found = re.search(r"Plasma memory usage (\d+) MiB, (\d+) objects", said)
        assert found is not None
        seen["cluster object_store_mb"], seen["cluster objects"] = float(found[1]), float(found[2])
        return seen


def test_nothing_grows(ray_cluster, tmp_path: Path):
    began = time.monotonic()
    with opened(config_of(tmp_path / "run"), Watched) as run:
        assert isinstance(run, Watched)
        run.train()
    steps = np.array([step for step, _ in run.notes])
    print(f"{STEPS} steps in {time.monotonic() - began:.0f} s; growth in {STEPS - WARM_UP} steps, by a straight line:")
    growth = {}
    for key in run.notes[0][1]:
        values = np.array([seen[key] for _, seen in run.notes])
        growth[key] = float(np.polyfit(steps, values, 1)[0]) * (STEPS - WARM_UP)
        print(f"{key:24} {growth[key]:+8.2f}  ", " ".join(f"{value:.1f}" for value in values))
    assert {key: value for key, value in growth.items() if value > LIMITS[key.split()[-1]]} == {}
