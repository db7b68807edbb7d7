"""`make bench-telemetry`: what telemetry and the writing of rollouts add to a step.

The whole RL loop of configs/quickstart.yaml, from random weights. In one run steps with everything on (metrics of the step,
metrics.jsonl, the default sinks, advice, the rollouts as Parquet) alternate with steps that write nothing, in the order
on, off, off, on, so that what drifts meets both alike. Two answers: the ratio of the medians of the steps' seconds, which
has the noise of steps, and the seconds that the parts themselves took of the steps with everything on, which has not.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import ray

import actors.driver
from actors.driver import Run
from actors.learner import Learner
from actors.prepare import prepare
from actors.run_start import begin
from actors.system import System, connect
from actors.telemetry import Telemetry
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.step_metrics import step_metrics

WARM_UP = 2  # steps that are not measured
GOAL = 0.01  # of a step, without the rollouts


class Switch:
    """Whether things are on, and the seconds that each took since the step began."""

    def __init__(self):
        self.on = True
        self.parts: dict[str, float] = defaultdict(float)

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        """None when things are off."""
        if not self.on:
            return None
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.parts[part] += time.perf_counter() - began


class Switched(Telemetry):
    def __init__(self, switch: Switch, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.switch = switch

    def step(self, *args: Any) -> None:
        self.switch.timed("lines and sinks", partial(super().step, *args))


class Alternating(Run):
    switch: Switch
    steps: list[tuple[bool, float, dict[str, float]]]  # on, seconds, of the parts

    def step(self, step: int) -> None:
        self.switch.on, self.switch.parts = step % 4 in (0, 3), defaultdict(float)
        began = time.perf_counter()
        super().step(step)
        self.steps.append((self.switch.on, time.perf_counter() - began, dict(self.switch.parts)))

    def record(self, *args: Any) -> None:
        self.switch.timed("rollouts", partial(super().record, *args))


def config_of(folder: str, steps: int, changes: list[str]) -> RLConfig:
    """Of the quickstart, without checks and reports between the steps."""
    plain = ["report=null", "sync.every=null", "checkpoint.every=10000", "sandbox.max_masked_share=1.0"]
    named = [f"run_dir={folder}/run", f"train.steps={steps}"]
    config = load_config("configs/quickstart.yaml", [*named, *plain, *changes])
    assert isinstance(config, RLConfig)
    return config


def measure(steps: int, changes: list[str]) -> list[tuple[bool, float, dict[str, float]]]:
    switch = Switch()

    def switched_metrics(*args: Any) -> dict[str, float]:
        return switch.timed("metrics of the step", lambda: step_metrics(*args)) or {}

    with tempfile.TemporaryDirectory() as folder, patch.object(actors.driver, "step_metrics", switched_metrics):
        config = config_of(folder, steps + WARM_UP, changes)
        prepared, start = prepare(config), begin(config, None)
        assert start is not None
        with (
            Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
            System(prepared.config, prepared.tokenizer) as system,
            Switched(switch, start.folder, prepared.num_steps, config=config.telemetry) as telemetry,
        ):
            run = Alternating(prepared, start, system, learner, telemetry)
            run.switch, run.steps = switch, []
            run.train()
    return run.steps[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="a multiple of 4")
    parser.add_argument("changes", nargs="*", help="of the config, such as train.prompts_per_step=4")
    options = parser.parse_args()
    connect(None, 8.0, log_to_driver=False)
    steps = measure(options.steps, options.changes)
    on, off = ([seconds for is_on, seconds, _ in steps if is_on == wanted] for wanted in (True, False))
    parts = [taken for is_on, _, taken in steps if is_on]
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, ray {version('ray')}; "
        f"{len(on)} steps with everything on, {len(off)} with nothing\n"
    )
    print("| | median of a step, s | least to most |\n|---|---|---|")
    for name, seconds in (("everything on", on), ("nothing", off)):
        print(f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} to {max(seconds):.3f} |")
    print(f"\nratio of the medians: {statistics.median(on) / statistics.median(off):.4f}\n")
    print("| part | median, ms | share of a step |\n|---|---|---|")
    shares = {}
    for name in ("metrics of the step", "lines and sinks", "rollouts"):
        taken = statistics.median(part.get(name, 0.0) for part in parts)
        shares[name] = taken / statistics.median(off)
        print(f"| {name} | {1000 * taken:.1f} | {100 * shares[name]:.2f}% |")
    telemetry = shares["metrics of the step"] + shares["lines and sinks"]
    verdict = "met" if telemetry <= GOAL else "missed"
    print(
        f"\ntelemetry without rollouts: {100 * telemetry:.2f}% of a step; at most {100 * GOAL:g}% is the goal: {verdict}"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
