"""Work spreads over real pods, which come, drain, vanish and return. The name that leads to them is resolved by the test."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import docker
import pytest
from docker.models.containers import Container

from sandbox.pod import connect, local_pod
from sandbox.pods import PodPool
from sandbox.types import Limits, Submission, TestStatus, Verdict

pytestmark = pytest.mark.docker
PASSED = TestStatus.PASSED
NAME, TOKEN = "sandbox-pods:7010", "t" * 32
SLOTS = 2  # of a pod
WAIT_S = 120.0  # for what takes seconds
LIMITS = Limits(cpu_s=2, wall_s=20)
LATE_S = 5.0  # how much later than the judge's own deadline a pod may be given up


@dataclass
class Pods:
    """Pods of this test, and the name that leads to some of them."""

    engine: docker.DockerClient
    named: list[str] = field(default_factory=list)

    def resolve(self, address: str) -> list[str]:
        assert address == NAME
        return list(self.named)

    def container(self, at: str) -> Container:
        host = at.rpartition(":")[0]
        for container in self.engine.containers.list(filters={"label": "diffrl.sandbox"}):
            networks = container.attrs["NetworkSettings"]["Networks"].values()
            if any(network["IPAddress"] == host for network in networks):
                return container
        raise AssertionError(f"no container has {host}")

    def pool(self, **options: int) -> PodPool:
        return PodPool([NAME], TOKEN, 8, say=pytest.fail, resolver=self.resolve, **options)


@pytest.fixture
def start(container_engine: str, judge_image: str) -> Iterator[Callable[[], str]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(local_pod(judge_image, container_engine, SLOTS, TOKEN))[0]


@pytest.fixture
def pods(container_engine: str) -> Iterator[Pods]:
    with contextlib.closing(docker.DockerClient(container_engine)) as engine:
        yield Pods(engine)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def send(threads: ThreadPoolExecutor, pool: PodPool, count: int, sleep_s: float) -> list[Future[Verdict]]:
    code = f"import time\ndef f(x):\n    time.sleep({sleep_s})\n    return x * x\n"
    submissions = [Submission(id=str(i), code=code, tests=("assert f(3) == 9",), limits=LIMITS) for i in range(count)]
    return [threads.submit(pool.judge, submission) for submission in submissions]


def results(futures: list[Future[Verdict]]) -> list[tuple[TestStatus, ...]]:
    return [future.result(WAIT_S).statuses for future in futures]


def stats(at: str) -> dict[str, int]:
    with contextlib.closing(connect(at, TOKEN)) as connection:
        return connection.stats()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_pods_come_and_drain_without_a_loss(pods: Pods, start: Callable[[], str], threads: ThreadPoolExecutor) -> None:
    leaves, stays, comes = start(), start(), start()
    pods.named = [leaves, stays]
    with pods.pool(attempts=1) as pool:
        accepted = send(threads, pool, 8, sleep_s=4)
        until(lambda: all(stats(at)["busy"] == SLOTS for at in pods.named))
        container = pods.container(leaves)
        container.kill("SIGTERM")
        pods.named.append(comes)
        later = send(threads, pool, 8, sleep_s=0)
        assert results(accepted + later) == [(PASSED,)] * 16
        assert container.wait(timeout=WAIT_S)["StatusCode"] == 0
        assert stats(comes)["judged"] > 2  # more than the canary
        assert pool.stats().errors == {} and pool.stats().restarts == 0


def pause(container: Container) -> Callable[[], None]:
    container.pause()
    return container.unpause


def cut_off(container: Container) -> Callable[[], None]:
    """No packet comes or goes, and nobody says goodbye."""
    pid = container.attrs["State"]["Pid"]

    def link(state: str) -> None:
        subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", "link", "set", "eth0", state], check=True)

    link("down")
    return lambda: link("up")


@pytest.mark.parametrize("vanish", [pytest.param(pause, marks=pytest.mark.slow), cut_off])
def test_a_pod_that_vanishes_is_given_up_in_time_and_used_again_when_it_returns(
    vanish: Callable[[Container], Callable[[], None]],
    pods: Pods,
    start: Callable[[], str],
    threads: ThreadPoolExecutor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vanishes, _ = pods.named = [start(), start()]
    with pods.pool(attempts=2) as pool:
        futures = send(threads, pool, 8, sleep_s=2)
        until(lambda: all(stats(at)["busy"] == SLOTS for at in pods.named))
        before = stats(vanishes)["judged"]
        vanished = time.monotonic()
        come_back = vanish(pods.container(vanishes))
        try:
            until(lambda: pool.stats().restarts > 0)
            given_up_s = time.monotonic() - vanished
            assert results(futures) == [(PASSED,)] * 8
            judged_s = time.monotonic() - vanished
            assert given_up_s <= LIMITS.wall_s + LATE_S
            assert pool.stats().errors["ConnectionLostError"] >= 1
            assert results(send(threads, pool, 8, sleep_s=0)) == [(PASSED,)] * 8  # nobody waits for it
        finally:
            come_back()
        with capsys.disabled():
            print(f"\n{vanish.__name__}: given up after {given_up_s:.1f} s, all judged after {judged_s:.1f} s")
        while stats(vanishes)["judged"] <= before + 8:
            assert results(send(threads, pool, 8, sleep_s=0.5)) == [(PASSED,)] * 8
