"""Workers that join while others have too much to do, leave when they have nothing to do, and wait for places."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors import elastic, staff
from actors.calls import Done
from actors.elastic import ElasticPool, Places, Room
from actors.pool import WorkerPool, next_outcome, wait_for
from actors.processes import place_of
from actors.system import spawner
from diffrl.config import SupervisionConfig
from diffrl.errors import RunStoppedError
from tests.actors.failing_workers import Held
from tests.actors.test_placement import ask
from tests.actors.test_pool import results_of

CPUS = 0.01  # of a worker
LIMIT_S = 120.0  # of what takes seconds


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "MOMENT_S", 0.2)
    monkeypatch.setattr(elastic, "LOOK_S", 0.1)


@pytest.fixture
def pools() -> Iterator[list[WorkerPool]]:
    """Those that are closed at the end."""
    made: list[WorkerPool] = []
    yield made
    for pool in made:
        pool.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "PLACE_S", 1.0)


def workers(folder: Path, cpus: float = CPUS) -> Any:
    return spawner(Held, {"num_cpus": cpus}, str(folder))


def until(pool: WorkerPool, condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        wait_for([pool])


class Group(Places):
    """Of nodes for so many workers, which are there as soon as they have been asked for."""

    def __init__(self, most: int):
        self.most = most
        self.pool: ElasticPool
        self.asked: list[int] = []

    def free(self) -> float:
        return self.asked[-1] - len(self.pool.slots) if self.asked and self.asked[-1] <= self.most else 0

    def ask(self, count: int) -> None:
        self.asked.append(count)

    def refused(self, count: int) -> bool:
        return count > self.most

    def release(self) -> None:
        self.asked.append(0)


def test_a_pool_follows_its_backlog(ray_cluster, quick: None, pools: list[WorkerPool], tmp_path: Path):
    """Up to its maximum and back; workers that leave end what they hold, and no call is lost or done differently."""
    places = Room([ask("judge", 1, CPUS), ask("rollout", 1)], "judge")
    pool = ElasticPool(workers(tmp_path), 1, most=3, idle_s=1.0, places=places)
    pools.append(pool)
    pool.wait_ready()
    first = pool.workers[0]
    (hold := tmp_path / "hold").touch()
    for value in range(12):
        pool.submit(value, "work", value)
    until(pool, lambda: len(pool.slots) == 3 and len(pool.running) == 6)
    hold.unlink()
    pids = [place_of(worker).pid for worker in pool.workers]
    outcomes = [found[1] for found in iter(lambda: next_outcome([pool]), None)]
    assert sorted((o.call.key, o.value) for o in outcomes if isinstance(o, Done)) == [(v, v * v) for v in range(12)]
    assert {outcome.slot for outcome in outcomes if isinstance(outcome, Done)} == {0, 1, 2}
    until(pool, lambda: len(pool.slots) == 1 and not pool.leaving)
    assert pool.workers == [first] and pool.call("work", 3) == 9 and pool.num_restarts == 0 == pool.losses
    assert len(list(tmp_path.glob("closed-*"))) == 2
    until(pool, lambda: not any(psutil.pid_exists(pid) for pid in pids[1:] if pid))


def test_what_an_autoscaler_refuses_is_asked_for_in_part(
    ray_cluster, quick: None, pools: list[WorkerPool], tmp_path: Path
):
    group = Group(3)
    pool = group.pool = ElasticPool(workers(tmp_path), 1, most=8, idle_s=1000.0, places=group)
    pools.append(pool)
    pool.wait_ready()
    (hold := tmp_path / "hold").touch()
    for value in range(20):
        pool.submit(value, "work", value)
    until(pool, lambda: len(pool.slots) == 3 and group.asked[-1] == 0)
    assert group.asked == [0, 8, 4, 2, 3, 0]
    hold.unlink()
    assert results_of(pool) == {value: value * value for value in range(20)}


def test_nobody_waits_for_a_worker_that_has_no_place(
    ray_cluster, monkeypatch: pytest.MonkeyPatch, pools: list[WorkerPool], tmp_path: Path
):
    """Its node is gone, so to say. Nothing is lost by it, however long it takes; when there is a place again, it works."""
    cpus = 0.8 * ray.cluster_resources()["CPU"] / 2
    pool = WorkerPool(workers(tmp_path, cpus), 2)
    pools.append(pool)
    pool.wait_ready()
    monkeypatch.setattr(staff, "PLACE_S", 1.0)
    pool.config = SupervisionConfig(start_s=2.0, backoff_s=10.0)
    ray.kill(pool.workers[1])
    taker = ray.remote(Held).options(num_cpus=cpus).remote(str(tmp_path))
    pool.submit(0, "work", 0)
    pool.submit(1, "work", 1)
    assert results_of(pool) == {0: 0, 1: 1}
    ray.get(taker.work.remote(1))
    until(pool, lambda: pool.is_overdue(pool.slots[1]))
    assert pool.num_restarts == 1 and pool.is_placing
    for value in range(4):
        pool.submit(value, "work", value, avoid=0)  # there is no other
    assert results_of(pool) == {value: value * value for value in range(4)}
    assert pool.broadcast("work", 5) == [25] and pool.inquire("work", 5) == [25, None]
    ray.kill(taker)
    pool.config = SupervisionConfig()
    until(pool, lambda: pool.slots[1].works)
    assert pool.broadcast("work", 5) == [25, 25] and pool.num_restarts == 1


def test_a_pool_without_any_place_stops_the_run(ray_cluster, impatient: None, pools: list[WorkerPool], tmp_path: Path):
    cpus = ray.cluster_resources()["CPU"] + 1
    pool = WorkerPool(workers(tmp_path, cpus), 2, role="rollout", config=SupervisionConfig(start_s=2.0))
    pools.append(pool)
    with pytest.raises(RunStoppedError) as caught:
        pool.wait_ready()
    message = str(caught.value)
    assert message.startswith("supervision.start_s: in 2 seconds no rollout worker has found a place in the cluster")
    assert "\n" not in message and pool.num_restarts == 0
