"""Reward workers with containers while both are killed at random: one verdict per program or none, never a wrong one."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import docker
import numpy as np
import pytest
import ray

from actors.groups import Pipeline, Request
from actors.pool import WORKER_LOST, WorkerPool
from actors.reward import RewardWorker
from actors.system import spawner
from actors.weights import Tensors, Weights
from diffrl.config import SandboxConfig
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.sampler import SamplingParams
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup
from sandbox.container import ContainerSandbox
from sandbox.types import Limits, Submission
from tests.conftest import RayCluster

pytestmark = pytest.mark.docker
GROUP_SIZE, CONCURRENCY = 8, 8
TESTS = ("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")
PROGRAMS = {  # code, statuses, how often
    "right": ("def f(x): return x * x", "passed passed passed", 30),
    "partial": ("def f(x): return x + 2", "passed failed passed", 20),
    "wrong": ("def f(x): return None", "failed failed failed", 20),
    "raises": ("def f(x): return x / 0", "error error error", 10),
    "no syntax": ("def f(x) return x", "error error error", 5),
    "leaves": ("import os\ndef f(x):\n    os._exit(0)", "killed killed killed", 3),
    "hangs once": ("def f(x):\n    while x == 3: pass\n    return x * x", "passed timeout passed", 2),
    "hoards": ("def f(x): return len(bytearray(8 << 30))", "out_of_memory out_of_memory out_of_memory", 2),
    "litters": (
        "import os\nfor folder in ('/tmp', '/dev/shm'):\n    os.makedirs(f'{folder}/{os.getuid()}/b/c')\nif os.fork() == 0:\n"
        "    os.setsid()\n    while True: os.times()\ndef f(x): return x * x",
        "passed passed passed",
        4,
    ),
    "prints": ("def f(x):\n    print('x' * 10**6)\n    return x * x", "passed passed passed", 4),
}


def program_of(ordinal: int, index: int) -> str:
    names = list(PROGRAMS)
    return random.Random(f"{ordinal} {index}").choices(names, [PROGRAMS[name][2] for name in names])[0]


class Sampler:
    """Answers with the programs that belong to the ordinal."""

    def generate(self, problem, ordinal, seeds, params, weights, guarded) -> RolloutGroup:
        ids = np.zeros(1, dtype=np.int32)
        rollouts = tuple(
            Rollout(
                sample_index=index,
                seed=seed,
                completion_ids_C=ids,
                step_map_C=ids,
                probability_C=ids,
                num_tokens=1,
                text=f"```python\n{PROGRAMS[program_of(ordinal, index)][0]}\n```",
            )
            for index, seed in enumerate(seeds)
        )
        return RolloutGroup(problem=problem, ordinal=ordinal, policy_version=0, prompt_ids_P=ids, rollouts=rollouts)


class Sniper(threading.Thread):
    """Kills a container every half second or so, and now and then the process of a reward worker."""

    def __init__(self, engine_url: str, judges: WorkerPool) -> None:
        super().__init__(daemon=True)
        self.client = docker.DockerClient(base_url=engine_url)
        self.judges = judges
        self.random = random.Random(0)
        self.killed_containers = self.killed_workers = 0
        self.over = threading.Event()

    def run(self) -> None:
        shots = 0
        while not self.over.wait(self.random.uniform(0.3, 0.9)):
            shots += 1
            if shots % 8 == 3:
                self.kill_worker()
            else:
                self.kill_container()
        self.client.close()

    def kill_container(self) -> None:
        containers = self.client.containers.list(ignore_removed=True, filters={"label": "diffrl.sandbox"})
        if containers:
            try:
                self.random.choice(containers).kill("SIGKILL")
                self.killed_containers += 1
            except docker.errors.APIError:  # it ended between the two calls
                pass

    def kill_worker(self) -> None:
        worker = self.random.choice(self.judges.workers)
        try:
            os.kill(ray.get(worker.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
            self.killed_workers += 1
        except WORKER_LOST:
            pass


@pytest.mark.parametrize(
    "num_groups",
    [pytest.param(40, id="320 programs"), pytest.param(250, id="2000 programs", marks=pytest.mark.slow)],
)
def test_every_program_gets_its_verdict_or_none(
    ray_cluster: RayCluster,
    container_engine: str,
    judge_image: str,
    num_groups: int,
) -> None:
    config = SandboxConfig(backend="docker", image=judge_image, slots=CONCURRENCY // 2, cpu_s=0.3, attempts=3)
    environment = {"runtime_env": {"env_vars": {"DOCKER_HOST": container_engine}}}
    judges = WorkerPool(
        spawner(RewardWorker, {"num_cpus": 0.5, **environment}, config, dict(RECIPE_WEIGHTS)), CONCURRENCY // 4
    )
    rollouts = WorkerPool(spawner(Sampler, {"num_cpus": 0.5}), 1)
    judges.wait_ready()
    problem = Problem(id="p", prompt="", prompt_tests=(), reward_tests=TESTS)
    weights = Weights(
        version=0, hf_config={}, num_tokens=None, tensors=Tensors(entries=(), hashes=(), buckets=()), adapter=None
    )
    requests = [
        Request(
            ordinal=ordinal,
            problem=problem,
            seeds=tuple(range(GROUP_SIZE)),
            params=SamplingParams(algorithm="entropy", steps=1, temperature=0.0, top_p=None, top_k=None),
            weights=weights,
        )
        for ordinal in range(num_groups)
    ]
    sniper = Sniper(container_engine, judges)
    sniper.start()
    try:
        scored = Pipeline(rollouts, judges, judge_attempts=3).run(requests)
    finally:
        sniper.over.set()
        sniper.join()
        judges.close()
        rollouts.close()

    assert sorted(group.group.ordinal for group in scored) == list(range(num_groups))
    masked = [j for group in scored for j in group.judgements if not j.valid]
    assert wrong_verdicts(scored) == []
    print(
        f"{num_groups * GROUP_SIZE} programs, {sniper.killed_containers} containers and {sniper.killed_workers} workers"
        f" killed, {judges.num_restarts} workers restarted, {len(masked)} samples masked"
    )
    assert sniper.killed_containers >= 2 and sniper.killed_workers >= 1
    assert len(masked) <= 0.05 * num_groups * GROUP_SIZE
    assert_nothing_left(container_engine)


def wrong_verdicts(scored: list[ScoredGroup]) -> list[tuple[str, Judgement]]:
    wrong = []
    for group in scored:
        for index, judgement in enumerate(group.judgements):
            name = program_of(group.group.ordinal, index)
            expected = tuple(PROGRAMS[name][1].split())
            pays = 0.5 + 2 * expected.count("passed") / 3 if name != "no syntax" else 0.25
            if judgement.valid and (judgement.statuses != expected or abs(judgement.reward - pays) > 1e-6):
                wrong.append((name, judgement))
    return wrong


def assert_nothing_left(engine_url: str) -> None:
    """No container, no process under a uid of programs, no mount of a container."""
    client = docker.DockerClient(base_url=engine_url)
    folder = engine_url.removeprefix("unix://").rpartition("/")[0]
    deadline = time.monotonic() + 60
    while True:
        containers = client.containers.list(all=True, ignore_removed=True)
        processes = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if uid_of(pid) >= 1 << 20]
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {folder}/data/" in line]
        if not containers and not processes and not [mount for mount in mounts if "/merged" in mount]:
            break
        assert time.monotonic() < deadline, (containers, processes, mounts)
        time.sleep(0.1)
    client.close()


def uid_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("\nUid:")[2].split()[0])


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_memory_stays_flat(container_engine: str, judge_image: str, count: int) -> None:
    client = docker.DockerClient(base_url=container_engine)
    with ContainerSandbox(image=judge_image, slots=1, engine_url=container_engine, recycle_after=10**6) as sandbox:
        used = []
        for number in range(count):
            name = program_of(number, 0)
            if "timeout" not in PROGRAMS[name][1]:
                submission = Submission(id="m", code=PROGRAMS[name][0], tests=TESTS, limits=Limits(cpu_s=1))
                assert " ".join(sandbox.judge(submission).statuses) == PROGRAMS[name][1]
            if number in (count // 4, count - 1):
                container = client.api.inspect_container(sandbox.container_id)["State"]["Pid"]
                used.append((resident_kb(container), resident_kb(os.getpid())))
    client.close()
    print(f"resident kB of the container and of this process: {used[0]} after a quarter, {used[1]} after {count}")
    assert used[1][0] < 1.1 * used[0][0]
    assert used[1][1] < used[0][1] + 10_000


def resident_kb(pid: int) -> int:
    """Of a process and everything below it."""
    below = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    own = int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])
    return own + sum(map(resident_kb, below))
