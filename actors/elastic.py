"""A pool of workers that follows its backlog between a minimum and a maximum, apart from all other pools.

The minimum starts with the run, which has room for it before it begins (placement.py). While calls wait for more than a
moment there is one worker for each call, up to the maximum, as far as the cluster has places; for the others the autoscaler
is asked, until they are there or the burst is over. The last workers leave when they have had nothing to do for a while;
what the autoscaler makes of their nodes is its business. Work is a pure function of its arguments, so no result depends on
how many workers there were.

Ray keeps one request for a whole cluster: of several runs the last one that asks is heard, until another asks again.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray._private.state import state as global_state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from actors.calls import Worker
from actors.placement import Ask, autoscaling_state, bundles_of, nodes_of, room, selects
from actors.pool import WorkerPool
from actors.staff import CLOSE_S, kill

MOMENT_S = 2.0  # a call may wait
LOOK_S = 1.0  # from one look at the backlog to the next
ASK_S = 10.0  # after which the autoscaler is asked again, in case that another run has asked meanwhile


class Places(Protocol):
    def free(self) -> float:
        """For how many more workers there is room now."""
        ...

    def ask(self, count: int) -> None:
        """Have room made for so many workers in all."""
        ...

    def refused(self, count: int) -> bool:
        """Whether it is known that there can be none for so many."""
        ...

    def release(self) -> None:
        """Nothing is asked any more."""
        ...


class Room:
    """Places on the nodes of the run's cluster for the workers of one role, beside those of the others."""

    def __init__(self, asks: Sequence[Ask], section: str):
        (self.own,) = (each for each in asks if each.section == section)
        self.others = [each for each in asks if each is not self.own]
        self.head = GcsClient(address=ray.get_runtime_context().gcs_address)

    def free(self) -> float:
        rests = global_state.available_resources_per_node()
        nodes = [node for node in nodes_of(self.head) if selects(self.own.labels, node.labels)]
        return sum(room(rests.get(node.id, {}), self.own.bundle) for node in nodes)

    def bundles(self, count: int) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
        """Of the whole run: what is asked is compared with all that a cluster has, whoever uses it."""
        return bundles_of([*self.others, replace(self.own, count=count)])

    def ask(self, count: int) -> None:
        bundles, selectors = self.bundles(count)
        request_resources(bundles=bundles, bundle_label_selectors=selectors)

    def refused(self, count: int) -> bool:
        """An autoscaler v2 says so of what it was asked last, of which it then adds nothing."""
        state = autoscaling_state(self.head)
        number = len(self.bundles(count)[0])
        return state is not None and any(
            number == sum(request.count for request in constraint.resource_requests)
            for constraint in state.infeasible_cluster_resource_constraints
        )

    def release(self) -> None:
        request_resources(bundles=[])


class ElasticPool(WorkerPool):
    """Begins with `size` workers, has up to `most`, and those above `size` leave after `idle_s` without work."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        size: int,
        *,
        most: int,
        idle_s: float,
        places: Places,
        beside: Sequence[WorkerPool] = (),
        **settings: Any,
    ):
        """`beside`: pools on the same nodes, whose workers come first."""
        super().__init__(make_worker, size, **settings)
        self.least, self.most, self.idle_s = size, most, idle_s
        self.places = places
        self.pools = (self, *beside)
        self.resize_at = 0.0
        self.waits_since: dict[int | None, float] = {}  # by key of a call with which nobody has begun
        self.used_at: dict[Worker, float] = {}
        self.leaving: dict[ray.ObjectRef, tuple[Worker, float]] = {}  # by the call that ends what it holds; since when
        self.asked, self.asked_at = 0, 0.0
        self.too_many = most + 1  # workers for which there can be no room
        places.release()  # what a driver that was killed has asked for

    def tend(self) -> None:
        super().tend()
        now = time.monotonic()
        if now < self.resize_at:
            return
        self.resize_at = now + LOOK_S
        before = len(self.slots)
        self.shrink(now)
        with suppress(RayError):  # a head that does not answer for a while keeps nobody from working
            self.grow(now)
        if len(self.slots) != before:
            print(f"{self.role} workers: {len(self.slots)} of {self.least} to {self.most}", file=sys.stderr, flush=True)

    # Grow

    def grow(self, now: float) -> None:
        lacking = self.wanted(now) - len(self.slots)
        if lacking > 0 and not any(pool.is_placing for pool in self.pools):
            for _ in range(int(min(lacking, self.places.free()))):
                self.slots.append(self.start(len(self.slots), replaces=True))
                lacking -= 1
        self.request(lacking, now)

    def wanted(self, now: float) -> int:
        waiting = [call.key for call in self.waiting]
        waiting += [run.call.key for run in self.running.values() if run.since is None]
        self.waits_since = {key: self.waits_since.get(key, now) for key in waiting}
        late = any(now - since > MOMENT_S for since in self.waits_since.values())
        num_calls = len(self.running) + len(self.waiting) if late else 0
        return max(len(self.slots), min(self.most, num_calls))

    def request(self, lacking: int, now: float) -> None:
        """Ask for those that are lacking; for half of them when there can be no room for all, which would add nothing."""
        there = len(self.slots)
        if lacking == 0:
            self.too_many = self.most + 1
        elif self.asked and self.places.refused(self.asked):
            self.too_many = min(self.too_many, self.asked)
        count = there + lacking if there + lacking < self.too_many else (there + self.too_many) // 2
        if count <= there:
            self.release()
        elif count != self.asked or now - self.asked_at > ASK_S:
            self.places.ask(count)
            self.asked, self.asked_at = count, now

    def release(self) -> None:
        if self.asked:
            self.places.release()
            self.asked = 0

    # Shrink

    def shrink(self, now: float) -> None:
        """Of workers with equally much to do the first get the next call, so that the last are those with nothing."""
        busy = {run.worker for run in self.running.values()} | {w for w in self.starting.values() if not w.waits}
        self.used_at = {w: now if w in busy else self.used_at.get(w, now) for w in self.slots}
        while len(self.slots) > self.least and now - self.used_at[self.slots[-1]] > self.idle_s:
            self.let_go(self.slots.pop(), now)
        for ref, (worker, since) in list(self.leaving.items()):
            if ray.wait([ref], timeout=0)[0] or now - since > CLOSE_S:
                kill(worker.handle)
                del self.leaving[ref]

    def let_go(self, worker: Worker, now: float) -> None:
        self.restart_at.pop(worker.slot, None)
        self.loads.set(worker.slot, None)
        self.starting = {ref: other for ref, other in self.starting.items() if other is not worker}
        if worker.works and hasattr(worker.handle, "close"):
            self.leaving[worker.handle.close.remote()] = (worker, now)
        else:
            kill(worker.handle)

    def close(self) -> None:
        for worker, _ in self.leaving.values():
            kill(worker.handle)
        with suppress(RayError):  # the cluster may be what was lost
            self.release()
        super().close()
