"""One fault after the other for a whole run: they cost time, not results, and leave nothing behind."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
import ray
from ray.util import placement_group_table

from actors.disk import free_mb
from actors.driver import Run
from actors.pool import WorkerPool
from actors.processes import place_of
from actors.reward import RewardWorker
from actors.system import System, spawner
from diffrl.checkpoint import committed_steps
from diffrl.config import RLConfig
from diffrl.rollout_store import read_all
from tests.actors.conftest import opened, rl_config
from tests.actors.test_loop import metric_lines
from tests.container_engine import unavailable

pytestmark = [pytest.mark.docker, pytest.mark.slow]
DISK_MB, MIN_FREE_MB = 600, 64
LIMIT_S = 60.0  # of calls that take two
CALM_STEPS = 2  # between faults
LABEL = {"label": "diffrl.sandbox"}


class Chaos:
    """Faults of a run, each kind equally often, in a random order; a fault ends by itself or is made good by the run."""

    def __init__(self, run: Run, engine: str, seed: int):
        self.run = run
        self.client = docker.DockerClient(base_url=engine)
        self.engine_pid = int(Path(engine.removeprefix("unix://")).with_name("pid").read_text())
        self.random = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.threads: list[threading.Thread] = []
        self.broken: list[psutil.Process] = []
        self.kinds: dict[str, Callable[[], None]] = {
            "rollout worker killed": lambda: self.signal("rollout", signal.SIGKILL),
            "reward worker killed": lambda: self.signal("judge", signal.SIGKILL),
            "reference worker killed": lambda: self.signal("reference", signal.SIGKILL),
            "learner's rank killed": lambda: self.signal("learner", signal.SIGKILL),
            "worker frozen": lambda: self.signal(self.random.choice(["rollout", "judge", "reference"]), signal.SIGSTOP),
            "sandbox hangs": lambda: self.container().pause(),
            "container lost": lambda: self.container().kill("SIGKILL"),
            "engine paused": self.pause_engine,
            "disk full": self.fill_disk,
        }
        self.bag: list[str] = []

    def strike(self) -> None:
        """The next fault, at some moment of the next seconds."""
        if not self.bag:
            self.bag = self.random.sample(sorted(self.kinds), len(self.kinds))
        kind, delay_s = self.bag.pop(), self.random.uniform(0, 2)

        def happen() -> None:
            time.sleep(delay_s)
            while True:  # between two containers, or while a worker starts, there may be nothing to break
                with contextlib.suppress(IndexError, ProcessLookupError, psutil.NoSuchProcess, docker.errors.APIError):
                    self.kinds[kind]()
                    break
                time.sleep(0.05)
            self.count[kind] += 1

        self.threads.append(threading.Thread(target=happen, daemon=True))
        self.threads[-1].start()

    def signal(self, role: str, number: int) -> None:
        if role == "learner":
            actors: list[Any] = self.run.learner.ranks
        else:
            actors = self.run.system.pools()[role].workers
        pid = place_of(self.random.choice(actors)).pid
        if pid is None:
            raise ProcessLookupError
        self.broken.append(psutil.Process(pid))
        os.kill(pid, number)

    def container(self) -> Any:
        return self.random.choice(self.client.containers.list(filters=LABEL, ignore_removed=True))

    def pause_engine(self) -> None:
        os.kill(self.engine_pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(self.engine_pid, signal.SIGCONT)

    def fill_disk(self) -> None:
        filler = self.run.folder.parent / "filler"
        filler.write_bytes(bytes(max(0, free_mb(filler.parent) - MIN_FREE_MB // 2) << 20))
        time.sleep(5)
        filler.unlink()

    def end(self) -> None:
        for thread in self.threads:
            thread.join()
        self.client.close()


class Struck(Run):
    chaos: Chaos
    struck_at = 0

    def step(self, step: int) -> None:
        super().step(step)
        if step - self.struck_at >= CALM_STEPS and step + CALM_STEPS < self.prepared.num_steps:
            self.struck_at = step
            self.chaos.strike()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        unavailable(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def with_engine(config: RLConfig, engine: str) -> Callable[[System], None]:
    """Reward workers that use the tests' engine."""

    def prepare(system: System) -> None:
        system.judges.close()
        options = {"num_cpus": 0.25, "runtime_env": {"env_vars": {"DOCKER_HOST": engine}}}
        make = spawner(RewardWorker, options, config.sandbox, dict(config.reward.weights))
        system.judges = WorkerPool(
            make, config.judge.num_workers, role="judge", config=config.supervision, watchdog=system.watchdog
        )

    return prepare


@pytest.mark.parametrize(("steps", "staleness"), [(40, 1), (200, 0)])
def test_faults_cost_time_and_nothing_else(
    ray_cluster,
    container_engine: str,
    judge_image: str,
    tuned_model,
    problems_file,
    small_disk: Path,
    monkeypatch,
    steps: int,
    staleness: int,
):
    monkeypatch.setenv("DOCKER_HOST", container_engine)

    def config_of(name: str) -> RLConfig:
        limits = {f"{call}_s": LIMIT_S for call in ("generate", "score", "reference", "update", "pull")}
        return rl_config(
            tuned_model,
            problems_file,
            small_disk / name,
            train={"steps": steps, "prompts_per_step": 2},
            rollout={"num_workers": 2, "cpus_per_worker": 0.25, "max_staleness": staleness},
            judge={"num_workers": 2, "cpus_per_worker": 0.25},
            sandbox={"backend": "docker", "image": judge_image, "attempts": 6},
            checkpoint={"every": 10},
            supervision={
                **limits,
                "backoff_s": 0.1,
                "max_losses": 50,
                "problem_attempts": 100,
                "min_free_mb": MIN_FREE_MB,
            },
        )

    before = {process.pid for process in psutil.process_iter()}
    calm = config_of("calm")
    began = time.monotonic()
    with opened(calm, prepare_system=with_engine(calm, container_engine)) as run:
        run.train()
    calm_s, began = time.monotonic() - began, time.monotonic()
    struck = config_of("struck")
    with opened(struck, Struck, with_engine(struck, container_engine)) as run:
        assert isinstance(run, Struck)
        run.chaos = Chaos(run, container_engine, seed=0)
        run.train()
        run.chaos.end()
        restarts = {name: pool.num_restarts for name, pool in run.system.pools().items()}
        restarts["learner"] = run.learner.num_rebuilds
    count = run.chaos.count
    print(
        f"{steps} steps, max_staleness {staleness}: {calm_s:.0f} s undisturbed, {time.monotonic() - began:.0f} s with"
    )
    print(f"{sum(count.values())} faults; restarts: {restarts}")
    print(*(f"{number:4}  {kind}" for kind, number in sorted(count.items())), sep="\n")
    assert sum(count.values()) >= 0.3 * steps and min(count[kind] for kind in run.chaos.kinds) >= steps // 50
    assert sum(restarts.values()) >= 4 * (steps // 50)

    assert metric_lines(small_disk / "struck") == metric_lines(small_disk / "calm")
    mine, theirs = (read_all(small_disk / name / "rollouts").to_pylist() for name in ("struck", "calm"))
    for row in (*mine, *theirs):
        del row["cpu_s"]
    assert mine == theirs and all(row["valid"] for row in mine)
    samples = Counter((row["step"], row["ordinal"], row["sample_index"]) for row in mine)
    assert set(samples.values()) == {1} and len(samples) == steps * 2 * 4
    left, right = (
        {str(f.relative_to(small_disk / n)) for f in (small_disk / n).rglob("*")} for n in ("struck", "calm")
    )
    assert left - {"failed_batches"} == right and committed_steps(small_disk / "struck")[-1] == steps

    deadline = time.monotonic() + 60  # killed processes take a moment
    while (left_over := forgotten(run.chaos, before, container_engine)) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left_over


def workers_here() -> Iterator[tuple[str, psutil.Process]]:
    """Of this cluster, whatever others the machine has."""
    session = ray.get_runtime_context().get_session_name()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            name, raylet = process.name(), process.parent()
            if name.startswith("ray::") and raylet is not None and session in " ".join(raylet.cmdline()):
                yield name, process


def forgotten(chaos: Chaos, before: set[int], engine: str) -> list[str]:
    """Processes, containers, placement groups and shares of the cluster that a run which has ended still holds."""
    processes = [p for p in chaos.broken if p.is_running()]  # by more than its number, which may be another's by now
    names = [name for name, process in workers_here() if process.pid not in before and "IDLE" not in name]
    with contextlib.closing(docker.DockerClient(base_url=engine)) as client:
        containers = client.containers.list(all=True, filters=LABEL, ignore_removed=True)
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    missing = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
    return [str(found) for found in (*processes, *names, *containers, *groups)] + [f"{missing} CPUs"] * (missing > 0)
