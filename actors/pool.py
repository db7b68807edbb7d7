"""Pools of interchangeable workers that may die, and the pipeline sample -> judge that runs on two of them.

Work is a pure function of its arguments (seeds and weights travel in the call), so a call whose worker died is simply
made again on another one. A sampled group goes on to the judge as an object reference, from node to node; the driver
reads it too, to draw its views.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

from actors.weights import Weights
from diffrl.sampler import SamplingParams
from diffrl.types import Problem, RolloutGroup, ScoredGroup

# How Ray says that a worker, or the node with its results, is gone.
WORKER_LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
# Per worker that does one thing at a time: one running, one waiting, so that a worker never idles between calls.
MAX_IN_FLIGHT = 2
MAX_DEATHS = 3  # of workers in a row without a single result, per worker of the pool


class WorkersKeepDyingError(RuntimeError):
    """Restarting does not help; the message carries the last death."""


def kill(actor: Any) -> None:
    """End an actor at once. Its class's type, which `ray.remote` gives to the handle, is not one that ray.kill admits."""
    ray.kill(actor)


@dataclass(frozen=True, slots=True)
class Call:
    key: int  # ordinal of the group it is about
    method: str
    args: tuple[Any, ...]
    avoid: int | None = None  # slot of the worker that failed on it before


class WorkerPool:
    """Hands calls to workers and replaces those that die."""

    def __init__(self, make_worker: Callable[[], Any], size: int, *, in_flight: int = MAX_IN_FLIGHT):
        """`in_flight`: calls that a worker has at a time."""
        self.make_worker = make_worker
        self.in_flight = in_flight
        self.workers = [make_worker() for _ in range(size)]
        self.waiting: deque[Call] = deque()
        self.running: dict[ray.ObjectRef, tuple[Call, int, Any]] = {}  # call, slot, worker
        self.deaths = 0  # in a row
        self.num_restarts = 0

    def wait_ready(self) -> None:
        """Until every worker's constructor has run; what one of them raised is raised here."""
        ray.get([worker.__ray_ready__.remote() for worker in self.workers])

    def submit(self, key: int, method: str, *args: Any, avoid: int | None = None) -> None:
        self.waiting.append(Call(key, method, args, avoid))
        self.dispatch()

    def dispatch(self) -> None:
        load = [0] * len(self.workers)
        for _, slot, _ in self.running.values():
            load[slot] += 1
        for _ in range(len(self.waiting)):
            call = self.waiting.popleft()
            slots = [s for s in range(len(load)) if s != call.avoid or len(load) == 1]
            slot = min(slots, key=lambda s: load[s])
            if load[slot] >= self.in_flight:
                self.waiting.append(call)
                continue
            ref = getattr(self.workers[slot], call.method).remote(*call.args)
            self.running[ref] = (call, slot, self.workers[slot])
            load[slot] += 1

    def finish(self, ref: ray.ObjectRef) -> tuple[Call, int, Any] | None:
        """The call, slot and value of a ready reference; None when its worker died and the call was queued again."""
        call, slot, worker = self.running.pop(ref)
        try:
            value = ray.get(ref)
        except WORKER_LOST as error:  # the one failure that is expected here
            self.replace(slot, worker, error)
            self.waiting.appendleft(call)
            self.dispatch()
            return None
        self.deaths = 0
        self.dispatch()
        return call, slot, value

    def replace(self, slot: int, dead: Any, error: Exception) -> None:
        """A new worker in the place of a dead one, unless the failure of another of its calls has already brought it."""
        if self.workers[slot] is not dead:
            return
        self.deaths += 1
        if self.deaths > MAX_DEATHS * len(self.workers):
            raise WorkersKeepDyingError(f"workers keep dying, the last one with: {error}") from error
        kill(dead)
        self.workers[slot] = self.make_worker()
        self.num_restarts += 1

    def call(self, method: str, *args: Any) -> Any:
        """One call on some worker, waited for; made again when that worker dies. For when no other work is under way."""
        assert not self.running and not self.waiting
        self.submit(0, method, *args)
        while True:
            ready, _ = ray.wait(list(self.running), num_returns=1)
            done = self.finish(ready[0])
            if done is not None:
                return done[2]

    def close(self) -> None:
        for worker in self.workers:
            kill(worker)

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call every worker once, all at the same time; a dead one is replaced and asked again."""
        workers = list(self.workers)
        refs = [getattr(worker, method).remote(*args) for worker in workers]
        results: list[Any] = [None] * len(workers)
        for slot in range(len(workers)):
            while True:
                try:
                    results[slot] = ray.get(refs[slot])
                    break
                except WORKER_LOST as error:
                    self.replace(slot, workers[slot], error)
                    workers[slot] = self.workers[slot]
                    refs[slot] = getattr(workers[slot], method).remote(*args)
        return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One group to sample and judge. Request(ordinal=17, problem=Problem(...), seeds=(1, 2), params=..., weights=...)"""

    ordinal: int
    problem: Problem
    seeds: tuple[int, ...]
    params: SamplingParams
    weights: Weights
    guarded: tuple[int, ...] = ()  # indices of samples to take once more, exactly


class Pipeline:
    """Requests in, scored groups out, in whatever order they finish. Judging starts while later groups are sampled."""

    def __init__(self, rollouts: WorkerPool, judges: WorkerPool, *, judge_attempts: int):
        self.rollouts = rollouts
        self.judges = judges
        self.judge_attempts = judge_attempts

    def run(
        self,
        requests: Iterable[Request],
        on_sampled: Callable[[RolloutGroup], None] = lambda group: None,
        also: WorkerPool | None = None,
        on_also: Callable[[int, Any], None] = lambda key, value: None,
    ) -> Iterator[ScoredGroup]:
        """Sample and judge. `on_sampled` sees each group as soon as it exists, and may submit work about it to the
        pool `also`, whose results have all gone to `on_also` when the iteration ends.
        """
        for request in requests:
            self.rollouts.submit(
                request.ordinal,
                "generate",
                request.problem,
                request.ordinal,
                request.seeds,
                request.params,
                request.weights,
                request.guarded,
            )
        groups: dict[int, tuple[RolloutGroup, ray.ObjectRef]] = {}
        attempts: dict[int, int] = {}
        pools = [self.rollouts, self.judges, *([also] if also else [])]
        while any(pool.running or pool.waiting for pool in pools):
            refs = [ref for pool in pools for ref in pool.running]
            ready, _ = ray.wait(refs, num_returns=1)
            pool = next(pool for pool in pools if ready[0] in pool.running)
            done = pool.finish(ready[0])
            if done is None:
                continue
            call, slot, value = done
            if pool is self.rollouts:
                groups[value.ordinal] = (value, ready[0])
                self.judges.submit(value.ordinal, "score", ready[0], None)
                on_sampled(value)
            elif pool is self.judges:
                ordinal = call.key
                group, ref = groups[ordinal]
                attempts[ordinal] = attempts.get(ordinal, 0) + 1
                if all(j.valid for j in value) or attempts[ordinal] >= self.judge_attempts:
                    del groups[ordinal]
                    own = len(group.rollouts)
                    yield ScoredGroup(group=group, judgements=value[:own], twin_judgements=value[own:])
                else:
                    self.judges.submit(ordinal, "score", ref, value, avoid=slot)
            else:
                on_also(call.key, value)


class GroupBuffer:
    """Whole groups between sampling and learning: reserve a slot per ordinal, commit what arrives in any order, take in
    order of ordinals. What the learner sees therefore does not depend on who finished first.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.slots: dict[int, ScoredGroup | None] = {}

    def reserve(self, ordinal: int) -> None:
        assert len(self.slots) < self.capacity, "reserved more groups than the staleness bound allows"
        assert ordinal not in self.slots
        self.slots[ordinal] = None

    def commit(self, scored: ScoredGroup) -> None:
        ordinal = scored.group.ordinal
        assert self.slots[ordinal] is None, "a group is committed once"
        self.slots[ordinal] = scored

    def take(self, count: int) -> list[ScoredGroup]:
        """The `count` lowest ordinals; all must have been committed."""
        ordinals = sorted(self.slots)[:count]
        taken = [self.slots.pop(o) for o in ordinals]
        groups = [group for group in taken if group is not None]
        assert len(groups) == count, "took a group that was never committed"
        return groups
