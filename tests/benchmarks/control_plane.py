"""`make bench-control-plane`: what the driver does for one group, with 1 to 512 rollout workers and 1 to 2,048 reward slots.

The driver is the real one: Run, Collector, System, the pools, the driver's side of the learner. What it sends are calls of
Ray, and what it gets are objects of Ray. Only who answers is a stub: one process that stands for all workers. It answers
after a time drawn from those of a real run of configs/quickstart.yaml, with a group, verdicts or metrics of that run. A step
has four groups for each rollout worker, of which it has three at a time; there is a reference for two of them; and every
reward slot is a reward worker of its own, the most that this can ask of a driver.

The run keeps seconds of steps: a call's are their mean, by Little's law where calls overlap; a reference's, which no run
keeps, are taken for as many as a group costs the learner. What is not there: hosts and a network between them, a connection
to each worker, the start of workers, their losses, copies of the weights, checkpoints, evaluation. A stub does not make the
second call of a reward worker wait for the first.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray.actor import ActorMethod

import actors.learner
import actors.pool
import actors.staff
import actors.system
from actors.driver import Run
from actors.learner import Learner
from actors.prepare import prepare
from actors.run_start import begin
from actors.staff import QUESTIONS
from actors.system import System, connect
from actors.telemetry import Telemetry
from actors.weights import fill_bucket, sealed
from diffrl.config import ModelConfig, RLConfig
from diffrl.config_file import load_config
from diffrl.data.sources import problems_of
from diffrl.models.folders import load_state_dict
from diffrl.models.loading import load_policy_tokenizer
from diffrl.rollout_store import read_all, scored_groups
from diffrl.types import ScoredGroup, UpdateResult

RESULTS = Path(__file__).parent / "results"
GROUPS = 4  # of a rollout worker in a step: of the three that it has at a time one is followed by another


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case(workers=512, slots=2048)"""

    workers: int
    slots: int
    steps: int = 1


CASES = [
    Case(workers=1, slots=1, steps=3),
    Case(workers=8, slots=32, steps=2),
    Case(workers=64, slots=256),
    Case(workers=256, slots=1024),
    Case(workers=512, slots=2048),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Of a real run. Recording(model=Path("runs/a/model"), seconds={"generate": [2.4, ...], ...}, groups=[ScoredGroup(...),
    ...], update={"loss/kl": ...})"""

    model: Path
    seconds: dict[str, list[float]]  # by method of a worker
    groups: list[ScoredGroup]
    update: dict[str, float]  # metrics


def config_of(folder: str, model: Path, *changes: str) -> RLConfig:
    config = load_config(
        "configs/quickstart.yaml", [f"run_dir={folder}/run", f"model.path={model}", "report=null", *changes]
    )
    assert isinstance(config, RLConfig)
    return config


def recording_of(run: Path, steps: int = 10) -> Recording:
    """Of its last steps. A run keeps seconds of steps, not of calls: their means."""
    config = load_config(run / "config.yaml")
    assert isinstance(config, RLConfig)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-steps:]
    table = read_all(run / "rollouts")
    table = table.slice(len(table) - steps * config.train.prompts_per_step * config.method.group_size)
    problems = {problem.id: problem for problem in problems_of(config.data)}
    groups = scored_groups(table, problems, load_policy_tokenizer(ModelConfig(path=str(run / "model"))))
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        num_groups = config.train.prompts_per_step
        num_tokens = num_groups * config.method.group_size * row["rollout/completion_tokens"]
        sampling_s = num_tokens * config.rollout.num_workers / row["rollout/tokens_per_second"]  # of all workers
        seconds["generate"].append(sampling_s * config.groups_in_flight / num_groups)
        step_s = sum(value for key, value in row.items() if key.startswith("time/"))
        busy_slots = sum(value for key, value in row.items() if key.endswith("/busy_slots"))
        seconds["score"].append(busy_slots * step_s / num_groups / config.sandbox.slots)
        seconds["logprobs"].append(row["time/learner"] / num_groups)
        seconds["pull"].append(row["time/pull"])
        seconds["update"].append(row["time/learner"])
    update = {key: value for key, value in rows[-1].items() if key.split("/")[0] in ("loss", "first", "optim")}
    return Recording(model=run / "model", seconds=seconds, groups=groups, update=update)


# The stubs


class Stub:
    """Many workers of all roles, and the learner's rank."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.random = random.Random(0)
        self.version = 0

    async def work(self, method: str) -> None:
        await asyncio.sleep(self.random.choice(self.recording.seconds[method]))

    def like(self, ordinal: int) -> ScoredGroup:
        return self.recording.groups[ordinal % len(self.recording.groups)]

    async def generate(self, problem: Any, ordinal: int, seeds: Any, params: Any, weights: Any, guarded: Any) -> Any:
        await self.work("generate")
        return replace(self.like(ordinal).group, problem=problem, ordinal=ordinal, policy_version=weights.version)

    async def score(self, group: Any, previous: Any) -> Any:
        await self.work("score")
        return self.like(group.ordinal).judgements

    async def logprobs(self, batch: Any, weights: Any) -> torch.Tensor:
        await self.work("logprobs")
        return torch.zeros(len(batch.views), *batch.completion_ids_BC.shape)

    async def pull(self, weights: Any) -> int:
        await self.work("pull")
        return weights.version

    async def stats(self) -> SimpleNamespace:
        """Both those of a reward worker and those of a rollout worker."""
        of_slots = {"errors": {}, "cpu_ms": 0.0, "restarts": 0, "busy_s": 0.0, "waited_s": 0.0}
        return SimpleNamespace(num_passes=0, num_tokens_passed=0, num_useful_tokens=0, **of_slots)

    async def close(self) -> None:
        pass

    async def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    async def start(self, address: str, port: int) -> None:
        self.version = 0

    async def update(self, batch: Any) -> UpdateResult:
        await self.work("update")
        self.version += 1
        return UpdateResult(version=self.version, metrics=self.recording.update)

    async def identity(self) -> dict[str, Any]:
        config = json.loads((self.recording.model / "config.json").read_text())
        return {"version": self.version, "hf_config": config, "num_tokens": None}

    @ray.method(num_returns="streaming")
    async def export(self, part: Any) -> Any:
        for piece in sealed([fill_bucket(load_state_dict(self.recording.model), 0)]):
            yield piece


def stub_of(recording: Recording) -> Any:
    settings: Any = {"num_cpus": 0, "max_concurrency": 100_000, "concurrency_groups": {QUESTIONS: 1}}
    remote: Any = ray.remote(**settings)(Stub)
    return remote.remote(recording)


def light(_actor: Any) -> float:
    """Instead of a look at all processes of the machine, which a stub would take for every worker that it stands for."""
    return 100.0


class StubLearner(Learner):
    def __init__(self, stub: Any, *args: Any):
        self.stub = stub
        super().__init__(*args)

    def make_rank(self, number: int) -> Any:
        return self.stub


# What is measured


@dataclass
class Meter:
    """What this process has done by now; a context in which it is counted."""

    counts: Counter[str] = field(default_factory=Counter)
    blocked_s: float = 0.0

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.blocked_s += time.perf_counter() - wall - (time.thread_time() - cpu)

        return call

    def __enter__(self) -> "Meter":
        self.stack = ExitStack()
        for place, name, key in (
            (ActorMethod, "_remote", "calls"),
            (ray, "put", "puts"),
            (ray, "get", "gets"),
            (ray, "wait", "waits"),
            (actors.pool.BELL, "wait", "rests"),
        ):
            self.counts[key] = 0  # told of what never happens too
            self.stack.enter_context(patch.object(place, name, self.counted(key, getattr(place, name))))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()

    def now(self) -> Counter[str]:
        wall = time.perf_counter()
        times = {"wall": wall, "cpu": time.process_time(), "loop": time.thread_time(), "busy": wall - self.blocked_s}
        return Counter({**self.counts, **times})


class Steps(Run):
    """Nothing before the first of them, nothing after the last."""

    def train(self) -> None:
        for step in range(self.prepared.num_steps):
            self.ask_ahead(step)
            self.step(step)


def simulate(recording: Recording, stub: Any, case: Case) -> dict[str, float]:
    """What the driver spent on a group."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = config_of(
            folder,
            recording.model,
            f"train={{steps: {case.steps}, prompts_per_step: {GROUPS * case.workers}}}",
            f"rollout={{num_workers: {case.workers}, cpus_per_worker: 0, max_tokens_per_batch: 1024}}",
            f"judge={{num_workers: {case.slots}, cpus_per_worker: 0}}",
            f"reference={{num_workers: {max(1, case.workers // 2)}, cpus: 0}}",
            "learner={num_ranks: 1, cpus_per_rank: 0}",
            "sandbox={backend: process, slots: 1}",
            "sync.every=null",
        )
        stack.enter_context(patch.object(actors.system, "spawner", lambda *args, **kwargs: lambda: stub))
        for module in (actors.pool, actors.staff, actors.learner):  # the stub outlives the case
            stack.enter_context(patch.object(module, "kill", lambda actor: None))
        stack.enter_context(patch.object(actors.system, "resident_mb", light))
        prepared, start = prepare(config), begin(config, None)
        assert start is not None
        learner = stack.enter_context(StubLearner(stub, prepared.config, prepared.tokenizer, prepared.num_steps))
        system = stack.enter_context(System(prepared.config, prepared.tokenizer))
        telemetry = stack.enter_context(Telemetry(start.folder, prepared.num_steps))
        run = Steps(prepared, start, system, learner, telemetry)
        with Meter() as meter:
            before = meter.now()
            run.train()
            after = meter.now()
    return {key: (after[key] - before[key]) / (case.steps * GROUPS * case.workers) for key in after}


# What is told


def row_of(case: Case, got: dict[str, float]) -> str:
    return (
        f"| {case.workers} | {case.slots:,} | {GROUPS * case.workers:,} | {got['calls']:.2f} | {got['gets']:.2f} "
        f"| {got['puts']:.3f} | {got['waits'] + got['rests']:.2f} | {1000 * got['cpu']:.1f} | {1000 * got['loop']:.1f} "
        f"| {1000 * got['busy']:.1f} |"
    )


def draw(measured: list[tuple[Case, dict[str, float]]], path: Path) -> None:
    """Over the number of rollout workers."""
    panels: list[tuple[str, list[tuple[str, str, list[float]]]]] = [
        (
            "CPU of the driver, ms a group",
            [
                ("all threads", "#c33", [1000 * got["cpu"] for _, got in measured]),
                ("the loop", "#36c", [1000 * got["loop"] for _, got in measured]),
            ],
        ),
        (
            "messages a group",
            [
                ("calls of actors", "#c33", [got["calls"] for _, got in measured]),
                ("objects got", "#36c", [got["gets"] for _, got in measured]),
            ],
        ),
    ]
    width, height, bottom, left = 400, 260, 210, 45
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width * len(panels)}" height="{height}" fill="white"/>',
    ]
    for number, (title, lines) in enumerate(panels):
        highest = max(value for _, _, values in lines for value in values) * 1.15
        x0 = number * width + left
        xs = [x0 + (width - left - 25) * index / (len(measured) - 1) for index in range(len(measured))]
        parts.append(f'<text x="{x0}" y="18">{title}</text>')
        for share in (0.0, 0.5, 1.0):
            y = bottom - (bottom - 30) * share / 1.15
            parts.append(f'<path d="M{x0} {y:.1f}H{x0 + width - left - 20}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{highest * share / 1.15:.3g}</text>')
        for x, (case, _) in zip(xs, measured, strict=True):
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{case.workers}</text>')
        for row, (name, colour, values) in enumerate(lines):
            points = [(x, bottom - (bottom - 30) * value / highest) for x, value in zip(xs, values, strict=True)]
            parts.append(
                f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" fill="none" stroke="{colour}"/>'
            )
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
            parts.append(f'<text x="{x0 + 120}" y="{bottom - 24 + 14 * row}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width * len(panels) / 2}" y="{height - 10}" text-anchor="middle">rollout workers</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of configs/quickstart.yaml")
    recording = recording_of(parser.parse_args().run.resolve())
    connect(None, 8.0, log_to_driver=False)
    drawn = "; ".join(
        f"{method} {np.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        for method, seconds in recording.seconds.items()
    )
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, ray {version('ray')}, torch {torch.__version__}; seconds that were "
        f"drawn, medians (least to most): {drawn}\n"
    )
    print(
        "| rollout workers | reward slots | groups a step | calls | gets | puts | waits | CPU of all threads, ms ",
        end="",
    )
    print(f"| CPU of the loop, ms | outside waiting, ms |\n|{'---|' * 10}", flush=True)
    stub = stub_of(recording)
    simulate(recording, stub, CASES[0])  # whatever is done once
    measured = []
    for case in CASES:
        measured.append((case, simulate(recording, stub, case)))
        print(row_of(*measured[-1]), flush=True)
    draw(measured, RESULTS / "control_plane.svg")
    ray.shutdown()


if __name__ == "__main__":
    main()
