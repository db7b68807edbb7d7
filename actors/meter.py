"""Who is busy in a pool, how long the queue is, what a call takes: totals over time, at a cost that is the same for every
event, however many workers there are."""

import time
from collections import deque

from diffrl.step_metrics import RoleUse

MAX_CALLS = 10_000  # whose seconds are kept between two looks


class Meter:
    """Of one pool. Whatever changes is noted when it does."""

    def __init__(self):
        self.now = self.began = time.monotonic()
        self.busy: set[int] = set()  # slots of workers with a call
        self.num_workers = self.num_waiting = 0
        self.busy_s = self.worker_s = self.waiting_s = 0.0
        self.call_s: deque[float] = deque(maxlen=MAX_CALLS)

    def worker(self, slot: int, *, busy: bool) -> None:
        self.pass_time()
        (self.busy.add if busy else self.busy.discard)(slot)

    def queue(self, num_waiting: int, num_workers: int) -> None:
        self.pass_time()
        self.num_waiting, self.num_workers = num_waiting, num_workers

    def pass_time(self) -> None:
        """Until now all was as it was noted last."""
        before, self.now = self.now, time.monotonic()
        passed = self.now - before
        self.busy_s += passed * len(self.busy)
        self.worker_s += passed * self.num_workers
        self.waiting_s += passed * self.num_waiting

    def taken(self) -> RoleUse:
        """Since the last look."""
        self.pass_time()
        use = RoleUse(
            seconds=self.now - self.began,
            worker_s=self.worker_s,
            busy_s=self.busy_s,
            waiting_s=self.waiting_s,
            call_s=tuple(self.call_s),
        )
        self.began, self.busy_s, self.worker_s, self.waiting_s = self.now, 0.0, 0.0, 0.0
        self.call_s.clear()
        return use
