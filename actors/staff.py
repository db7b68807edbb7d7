"""The workers of a pool, apart from their work: which there are, whether they have a place, what they answer, how they end.

A worker for which no node has room is no failure: its calls go to the others until it has a place.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.calls import WORKER_LOST, Worker
from actors.processes import account, end_process, place_of
from diffrl.config import SupervisionConfig
from diffrl.errors import RunStoppedError

QUESTIONS = "questions"  # Ray's concurrency group of a worker for what is asked beside its work
ANSWER_S = 5.0
UNKNOWN_S = 1.0  # from the start of a worker to when it is looked for in the cluster's table
PLACE_S = 30.0  # from then to when the others no longer count on it, if it has no process
CLOSE_S = 10.0  # a worker ends what it holds


def kill(actor: Any) -> None:
    """End an actor at once, a frozen one within seconds. Its class's type, which `ray.remote` gives to the handle, is not
    one that ray.kill admits."""
    ray.kill(actor)


class Staff:
    """Slots, each with a worker, or with none for a while. Whoever hands out work (pool.py) starts and replaces them."""

    def __init__(self, make_worker: Callable[[], Any], role: str, config: SupervisionConfig):
        self.make_worker = make_worker
        self.role = role
        self.config = config
        self.slots: list[Worker] = []
        self.starting: dict[ray.ObjectRef, Worker] = {}  # by the call that answers when the constructor is through
        self.restart_at: dict[int, float] = {}  # slots without a worker
        self.num_restarts: int = 0  # those to come too
        self.restarted_at: list[float] = []

    @property
    def workers(self) -> list[Any]:
        return [worker.handle for worker in self.slots]

    def inquire(self, method: str, *args: Any) -> list[Any]:
        """Ask every worker at once, beside what it is doing; None for those that do not answer soon."""
        asked = {
            getattr(worker.handle, method).options(concurrency_group=QUESTIONS).remote(*args): worker.slot
            for worker in self.slots
            if worker.works
        }
        answers: list[Any] = [None] * len(self.slots)
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []:
            try:
                answers[asked[ref]] = ray.get(ref)
            except WORKER_LOST:  # whoever waits for its work will see to it
                continue
        return answers

    # Places

    @property
    def is_placing(self) -> bool:
        """Whether a worker needs a place that it may not have got yet."""
        return bool(self.restart_at) or any(worker.waits is not False for worker in self.starting.values())

    def look_for_places(self, now: float) -> None:
        """Which of the workers that start have a process by now; its constructor's time counts from then."""
        for worker in self.starting.values():
            if worker.waits is not False and now - worker.since > UNKNOWN_S:
                if place_of(worker.handle).pid is not None:
                    worker.waits, worker.since = False, now
                elif now - worker.since > PLACE_S:
                    worker.waits = True
        self.require_a_place()

    def is_overdue(self, worker: Worker) -> bool:
        """Whether it has waited for a place for so long that nobody waits for it."""
        return bool(worker.waits) and time.monotonic() - worker.since > self.config.start_s

    def require_a_place(self) -> None:
        """RunStoppedError when none of the workers has found one in time."""
        if self.slots and all(map(self.is_overdue, self.slots)):
            raise RunStoppedError(
                f"supervision.start_s: in {self.config.start_s:g} seconds no {self.role} worker has found a place in the "
                f"cluster, all {len(self.slots)} wait; add nodes, end what else runs there, or ask for less, and go on with "
                "--resume auto"
            )

    # Ends

    def end(self, worker: Worker, reason: str, *, late: bool) -> None:
        """And say so, without its log, which may be slow to get. One that is late may be frozen."""
        worker.place = worker.place or place_of(worker.handle)
        kill(worker.handle)
        if late:
            end_process(worker.place)
        who = f"{worker.place.class_name} {worker.slot} ({worker.place})"
        print(f"{self.role} worker lost: {reason}; this was {who}", file=sys.stderr, flush=True)

    def account(self, worker: Worker, what: str) -> str:
        place = worker.place or place_of(worker.handle)
        return f"{what}; this was {account(f'{place.class_name} {worker.slot}', place)}"

    def close(self) -> None:
        for worker in self.slots:
            kill(worker.handle)
