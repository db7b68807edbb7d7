"""`make bench-control-plane`: what the driver does for one group, with 1 to 512 rollout workers and 1 to 2,048 reward slots.

The driver is the real one: Run, Collector, System, the pools, the driver's side of the learner. What it sends are Ray's
calls, and what it gets are objects of Ray. Only who answers is a stub: a process for each role stands for all workers of
it. A call is answered after a time drawn from what such calls took in a short real run of configs/quickstart.yaml, made
first, with a group, verdicts or metrics of that run. Each rollout worker has the quickstart's six groups a step; there is a
reference for two of them; and every reward slot is a reward worker of its own, the most that this can ask of a driver.

What is not there: hosts and a network between them, a connection to each worker (a case with four processes for each role
shows what connections add), the start of workers, their losses, copies of the weights, checkpoints, evaluation. A stub
does not make the second call of a reward worker wait for the first.
"""

import argparse
import asyncio
import itertools
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
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray.actor import ActorMethod

import actors.pool
import actors.system
from actors.batcher import RolloutStats
from actors.driver import Run
from actors.learner import Learner
from actors.learner_rank import LearnerRank
from actors.pool import QUESTIONS, WorkerPool
from actors.prepare import prepare
from actors.reward import RewardWorker
from actors.run_start import begin
from actors.system import System, connect
from actors.telemetry import Telemetry
from actors.weights import export_buckets, sealed
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.rollout_store import read_all, scored_groups
from diffrl.types import ScoredGroup, UpdateResult
from sandbox.pool import PoolStats

RESULTS = Path(__file__).parent / "results"
GROUPS = 6  # of a rollout worker in a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case(workers=512, slots=2048, stretch=16.0)"""

    workers: int
    slots: int
    stretch: float = 1.0  # of all that was drawn
    processes: int = 1  # of each role
    steps: int = 1  # that are measured, behind one that is not

    def __str__(self) -> str:
        notes = [f"times x {self.stretch:g}"] * (self.stretch != 1) + [f"{self.processes} processes"] * (
            self.processes > 1
        )
        return ", ".join([f"{self.workers}", *notes])


SCALES = [
    Case(workers=1, slots=1, steps=6),
    Case(workers=8, slots=32, steps=4),
    Case(workers=64, slots=256, steps=2),
    Case(workers=256, slots=1024),
    Case(workers=512, slots=2048),
]
BESIDE = [Case(workers=512, slots=2048, stretch=16.0), Case(workers=64, slots=256, processes=4)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Of a real run. Recording(seconds={"generate": [1.9, ...], ...}, groups=[ScoredGroup(...), ...], update={"loss/kl": ...})"""

    seconds: dict[str, list[float]]
    groups: list[ScoredGroup]
    update: dict[str, float]


# The real run


class Recorded(WorkerPool):
    """Notes how long calls take, from when their worker could begin."""

    seconds: ClassVar[dict[str, list[float]]] = defaultdict(list)

    def note_life(self, worker: Any, ref: ray.ObjectRef, value: Any) -> None:
        run = self.running.get(ref)
        if run is not None and run.since is not None:
            self.seconds[run.call.method].append(time.monotonic() - run.since)
        super().note_life(worker, ref, value)


def config_of(folder: str, model: str, *changes: str) -> RLConfig:
    config = load_config(
        "configs/quickstart.yaml", [f"run_dir={folder}/run", f"model.path={model}", "report=null", *changes]
    )
    assert isinstance(config, RLConfig)
    return config


def record(model: str, steps: int) -> Recording:
    with tempfile.TemporaryDirectory() as folder, patch.object(actors.system, "WorkerPool", Recorded):
        config = config_of(folder, model, f"train.steps={steps}", "sandbox.backend=process", "sync.every=null")
        prepared, start = prepare(config), begin(config, None)
        assert start is not None
        with (
            Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
            System(prepared.config, prepared.tokenizer) as system,
            Telemetry(start.folder, prepared.num_steps) as telemetry,
        ):
            Run(prepared, start, system, learner, telemetry).train()
        rows = [json.loads(line) for line in (start.folder / "metrics.jsonl").read_text().splitlines()]
        table = read_all(start.folder / "rollouts")
        groups = scored_groups(table, {p.id: p for p in prepared.problems}, prepared.tokenizer)
    update = {key: value for key, value in rows[-1].items() if key.split("/")[0] in ("loss", "first", "optim")}
    return Recording(
        seconds={**Recorded.seconds, "update": [row["time/learner"] for row in rows]}, groups=groups, update=update
    )


# The stubs


class Times:
    """Drawn from those of a recording."""

    def __init__(self, recording: Recording, stretch: float):
        self.seconds = recording.seconds
        self.stretch = stretch
        self.random = random.Random(0)

    def draw(self, method: str) -> float:
        return self.stretch * self.random.choice(self.seconds[method])


class Workers:
    """Many workers of one role."""

    def __init__(self, recording: Recording, stretch: float, stats: RolloutStats | PoolStats):
        self.groups = recording.groups
        self.times = Times(recording, stretch)
        self.state = stats

    def like(self, ordinal: int) -> ScoredGroup:
        return self.groups[ordinal % len(self.groups)]

    async def generate(self, problem: Any, ordinal: int, seeds: Any, params: Any, weights: Any, guarded: Any) -> Any:
        await asyncio.sleep(self.times.draw("generate"))
        return replace(self.like(ordinal).group, problem=problem, ordinal=ordinal, policy_version=weights.version)

    async def score(self, group: Any, previous: Any) -> Any:
        await asyncio.sleep(self.times.draw("score"))
        return self.like(group.ordinal).judgements

    async def logprobs(self, batch: Any, weights: Any) -> torch.Tensor:
        await asyncio.sleep(self.times.draw("logprobs"))
        return torch.zeros(len(batch.views), *batch.completion_ids_BC.shape)

    async def pull(self, weights: Any) -> int:
        await asyncio.sleep(self.times.draw("pull"))
        return weights.version

    async def stats(self) -> RolloutStats | PoolStats:
        return self.state

    async def close(self) -> None:
        pass


def light(_actor: Any) -> float:
    """Instead of a look at all processes of the machine, which a stub would take for every worker that it stands for."""
    return 100.0


def spawner_of(recording: Recording, case: Case) -> Callable[..., Callable[[], Any]]:
    """In the place of `actors.system.spawner`."""
    settings: Any = {"num_cpus": 0, "max_concurrency": 100_000, "concurrency_groups": {QUESTIONS: 1}}
    shared = ray.put(recording)

    def spawner(actor_class: type, options: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        judge = PoolStats(
            slots=1, busy=0, waiting=0, statuses={}, errors={}, cpu_ms=0, restarts=0, canaries=0, busy_s=0, waited_s=0
        )
        stats = judge if actor_class is RewardWorker else RolloutStats()
        remote: Any = ray.remote(**settings)(Workers)
        return itertools.cycle([remote.remote(shared, case.stretch, stats) for _ in range(case.processes)]).__next__

    return spawner


class StubRank(LearnerRank):
    """Never changes its weights."""

    def __init__(self, recording: Recording, stretch: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.times, self.metrics = Times(recording, stretch), recording.update

    @ray.method
    def start(self, address: str, port: int) -> None:
        pass

    @ray.method
    def update(self, batch: Any) -> UpdateResult:
        time.sleep(self.times.draw("update"))
        self.version += 1
        return UpdateResult(version=self.version, metrics=self.metrics)

    @ray.method(num_returns="streaming")
    def export(self, part: Any) -> Any:
        yield from sealed(export_buckets(self.model, part))


class StubLearner(Learner):
    def __init__(self, recording: Recording, stretch: float, *args: Any):
        self.stub = (recording, stretch)
        super().__init__(*args)

    def make_rank(self, number: int) -> Any:
        remote: Any = ray.remote(StubRank).options(num_cpus=0)
        return remote.remote(*self.stub, self.config, self.tokenizer, rank=number, total_steps=self.total_steps)


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
            self.stack.enter_context(patch.object(place, name, self.counted(key, getattr(place, name))))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()

    def now(self) -> Counter[str]:
        wall = time.perf_counter()
        times = {"wall": wall, "cpu": time.process_time(), "loop": time.thread_time(), "busy": wall - self.blocked_s}
        return Counter({**self.counts, **times})


class Measured(Run):
    """Its steps, and nothing after the last."""

    def measure(self, meter: Meter) -> list[Counter[str]]:
        marks = []
        for step in range(self.prepared.num_steps):
            marks.append(meter.now())
            self.ask_ahead(step)
            self.step(step)
        return [*marks, meter.now()]


def simulate(model: str, recording: Recording, case: Case) -> dict[str, float]:
    """Of one group, except `per_s`, groups a second, and `share`, of the time that the driver is busy."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = config_of(
            folder,
            model,
            f"train={{steps: {1 + case.steps}, prompts_per_step: {GROUPS * case.workers}}}",
            f"rollout={{num_workers: {case.workers}, cpus_per_worker: 0, max_tokens_per_batch: 1024}}",
            f"judge={{num_workers: {case.slots}, cpus_per_worker: 0}}",
            f"reference={{num_workers: {max(1, case.workers // 2)}, cpus: 0}}",
            "learner={num_ranks: 1, cpus_per_rank: 0}",
            "sandbox={backend: process, slots: 1}",
            "sync.every=null",
        )
        stack.enter_context(patch.object(actors.system, "spawner", spawner_of(recording, case)))
        stack.enter_context(patch.object(actors.system, "resident_mb", light))
        prepared, start = prepare(config), begin(config, None)
        assert start is not None
        learner = stack.enter_context(
            StubLearner(recording, case.stretch, prepared.config, prepared.tokenizer, prepared.num_steps)
        )
        system = stack.enter_context(System(prepared.config, prepared.tokenizer))
        telemetry = stack.enter_context(Telemetry(start.folder, prepared.num_steps))
        run = Measured(prepared, start, system, learner, telemetry)
        with Meter() as meter:
            marks = run.measure(meter)
    num_groups = case.steps * GROUPS * case.workers
    spent = {key: (marks[-1][key] - marks[1][key]) for key in marks[-1]}
    return {
        **{key: value / num_groups for key, value in spent.items()},
        "per_s": num_groups / spent["wall"],
        "share": spent["busy"] / spent["wall"],
    }


# What is told


def row_of(case: Case, got: dict[str, float]) -> str:
    return (
        f"| {case} | {case.slots:,} | {GROUPS * case.workers:,} | {got['calls']:.2f} | {got['gets']:.2f} "
        f"| {got['puts']:.3f} | {got['waits'] + got['rests']:.2f} | {1000 * got['cpu']:.1f} | {1000 * got['loop']:.1f} "
        f"| {1000 * got['busy']:.1f} | {got['per_s']:.1f} | {100 * got['share']:.0f}% |"
    )


def draw(measured: list[tuple[Case, dict[str, float]]], path: Path) -> None:
    """Of one group, and groups a second, over the number of rollout workers."""
    panels: list[tuple[str, list[tuple[str, str, list[float]]]]] = [
        (
            "driver, ms a group",
            [
                ("CPU, all threads", "#c33", [1000 * got["cpu"] for _, got in measured]),
                ("outside waiting", "#36c", [1000 * got["busy"] for _, got in measured]),
            ],
        ),
        ("calls of Ray a group", [("", "#333", [got["calls"] for _, got in measured])]),
        ("groups a second", [("", "#383", [got["per_s"] for _, got in measured])]),
    ]
    width, height, bottom, left = 300, 260, 210, 45
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
    parts.append(f'<text x="{1.5 * width}" y="{height - 10}" text-anchor="middle">rollout workers</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a tuned model, as the quickstart's second last stage leaves it")
    parser.add_argument("--steps", type=int, default=4, help="of the real run")
    model = str(Path(parser.parse_args().model).resolve())
    connect(None, 8.0, log_to_driver=False)
    recording = record(model, parser.parse_args().steps)
    drawn = "; ".join(
        f"{method} {np.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        for method, seconds in recording.seconds.items()
    )
    lines = [
        f"{platform.platform()}, {os.cpu_count()} CPUs, ray {version('ray')}, torch {torch.__version__}; seconds that were "
        f"drawn, medians (least to most): {drawn}",
        "",
        "| rollout workers | reward slots | groups a step | calls | gets | puts | waits | CPU of all threads, ms | CPU of the "
        "loop, ms | outside waiting, ms | groups/s | driver busy |",
        f"|{'---|' * 12}",
    ]
    print("\n".join(lines), flush=True)
    measured = []
    for case in (*SCALES, *BESIDE):
        measured.append((case, simulate(model, recording, case)))
        lines.append(row_of(*measured[-1]))
        print(lines[-1], flush=True)
    draw(measured[: len(SCALES)], RESULTS / "control_plane.svg")
    ray.shutdown()


if __name__ == "__main__":
    main()
