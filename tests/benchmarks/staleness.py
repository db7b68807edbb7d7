"""`make bench-staleness`: how close the time of a step comes to its slowest stage when rollouts run ahead of updates.

The whole RL loop runs on a minimal model. Each stage (rollouts, judging, reference, learner) gets a delay for which its
worker sleeps, once for each group or update; one stage in turn is the slowest. Beside the seconds of a step stands what
the slowest stage was busy in that very run, delay and own work together; their ratio is what is asked for.
"""

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from actors.driver import Run
from actors.learner import Learner
from actors.pool import WorkerPool
from actors.prepare import prepare
from actors.reference import Reference
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker
from actors.run_start import begin
from actors.system import System, connect, spawner
from actors.telemetry import Telemetry
from diffrl.config import RLConfig
from diffrl.config_file import validate

RESULTS = Path(__file__).parent / "results" / "staleness.md"
STAGES = ("rollout", "judge", "reference", "learner")
GROUPS = 8  # of a step
WARM_UP = 3  # steps that are not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measured(step_s=4.3, stage_s=4.1)"""

    step_s: float  # median
    stage_s: float  # mean of what the slowest stage was busy in a step


class Slow:
    """What a slow worker adds to a plain one: one call at a time takes at least so much longer."""

    def __init__(self, delay_s: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.delay_s = delay_s
        self.turn = threading.Lock()
        self.busy_s = 0.0

    def slowly(self, work: Callable[[], Any]) -> Any:
        with self.turn:
            began = time.perf_counter()
            result = work()
            time.sleep(self.delay_s)
            self.busy_s += time.perf_counter() - began
            return result


class SlowRollouts(Slow, RolloutWorker):
    def generate(self, *args: Any) -> Any:
        return self.slowly(partial(RolloutWorker.generate, self, *args))


class SlowJudge(Slow, RewardWorker):
    def score(self, *args: Any) -> Any:
        return self.slowly(partial(RewardWorker.score, self, *args))


class SlowReference(Slow, Reference):
    def logprobs(self, *args: Any) -> Any:
        return self.slowly(partial(Reference.logprobs, self, *args))


class SlowLearner(Learner):
    delay_s = 0.0
    busy_s = 0.0

    def update(self, batch: Any) -> Any:
        began = time.perf_counter()
        result = super().update(batch)
        delay_s = self.delay_s
        self.call("__ray_call__", lambda rank: time.sleep(delay_s))
        self.busy_s += time.perf_counter() - began
        return result

    def publish(self) -> Any:
        began = time.perf_counter()
        weights = super().publish()
        self.busy_s += time.perf_counter() - began
        return weights


class Timed(Run):
    """Notes when each step begins, and what each stage has been busy by then."""

    def step(self, step: int) -> None:
        self.notes.append((time.perf_counter(), self.busy()))
        super().step(step)

    def train(self) -> str | None:
        self.notes: list[tuple[float, dict[str, float]]] = []
        return super().train()

    def busy(self) -> dict[str, float]:
        seen = {
            name: sum(pool.inquire("__ray_call__", lambda worker: worker.busy_s))
            for name, pool in self.system.pools().items()
        }
        assert isinstance(self.learner, SlowLearner)
        return seen | {"learner": self.learner.busy_s}


def config_of(run_dir: Path, staleness: int, steps: int) -> RLConfig:
    config = validate(
        {
            "stage": "rl",
            "run_dir": str(run_dir),
            "model": {"tiny": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1}},
            "data": {"source": "microcode", "split": "train", "num_prompt_tests": 0, "max_prompt_tokens": 24},
            "sampling": {"completion_tokens": 8, "steps": 2, "temperature": 1.0, "top_p": None, "top_k": None},
            "method": {"group_size": 2, "num_iterations": 1},
            "train": {"steps": steps, "prompts_per_step": GROUPS},
            "rollout": {"cpus_per_worker": 0.25, "max_staleness": staleness, "max_tokens_per_batch": 1},
            "judge": {"cpus_per_worker": 0.25},
            "reference": {"cpus": 0.25},
            "learner": {"cpus_per_rank": 0.25},
            "sandbox": {"backend": "process"},
            "sync": {"every": None},
            "checkpoint": {"every": 10_000},
        },
        "benchmark",
    )
    assert isinstance(config, RLConfig)
    return config


def slow_down(system: System, config: RLConfig, delays: dict[str, float]) -> None:
    """Put slow workers in the place of those that have not begun yet."""
    for pool in system.pools().values():
        pool.close()
    watched: Any = {"config": config.supervision, "watchdog": system.watchdog}
    each = {stage: seconds / GROUPS for stage, seconds in delays.items()}
    tokenizer = prepare(config).tokenizer
    rollouts = {"completion_tokens": config.sampling.completion_tokens, "threads": 1}
    options = {"num_cpus": 0.25}
    two_at_a_time = {**options, "max_concurrency": 2}
    tokens = config.max_tokens_per_batch
    system.rollouts = WorkerPool(
        spawner(SlowRollouts, two_at_a_time, each["rollout"], tokenizer, max_tokens=tokens, **rollouts),
        1,
        concurrency=2,
        **watched,
    )
    reward = dict(config.reward.weights)
    system.judges = WorkerPool(spawner(SlowJudge, options, each["judge"], config.sandbox, reward), 1, **watched)
    system.reference = WorkerPool(
        spawner(SlowReference, options, each["reference"], threads=1, attend_padding=False), 1, **watched
    )


def measure(staleness: int, delays: dict[str, float], slowest: str, steps: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder) / "run", staleness, steps + WARM_UP + 1)
        prepared, start = prepare(config), begin(config, None)
        assert start is not None
        with (
            SlowLearner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
            System(prepared.config, prepared.tokenizer) as system,
            Telemetry(start.folder, prepared.num_steps) as telemetry,
        ):
            learner.delay_s = delays["learner"]
            slow_down(system, prepared.config, delays)
            run = Timed(prepared, start, system, learner, telemetry)
            run.train()
    notes = run.notes[WARM_UP:]
    times = [after - before for (before, _), (after, _) in pairwise(notes)]
    busy = notes[-1][1][slowest] - notes[0][1][slowest]
    return Measured(step_s=statistics.median(times), stage_s=busy / len(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", type=float, default=4.0, help="seconds a step of the slowest stage")
    parser.add_argument("--other", type=float, default=1.5, help="and of the others")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    connect(None, 4.0, log_to_driver=False)
    lines = [
        "# Rollouts ahead of updates",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, ray {version('ray')}, "
        "no GPU.",
        f"{GROUPS} groups a step; the slowest stage sleeps {options.slow:g} s a step, the others {options.other:g} s "
        f"(beside their own work); medians of {options.steps} steps. Ratio: seconds of a step to what the slowest stage "
        "was busy in it.",
        "",
        "| slowest stage | max_staleness | step, s | slowest stage, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for slowest in STAGES:
        delays = {stage: options.slow if stage == slowest else options.other for stage in STAGES}
        for staleness in (0, 1, 2):
            got = measure(staleness, delays, slowest, options.steps)
            row = f"| {slowest} | {staleness} | {got.step_s:.2f} | {got.stage_s:.2f} | {got.step_s / got.stage_s:.2f} |"
            print(row, flush=True)
            lines.append(row)
    RESULTS.write_text("\n".join([*lines, ""]))
    print(RESULTS.read_text())
    ray.shutdown()


if __name__ == "__main__":
    main()
