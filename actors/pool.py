"""Pools of interchangeable workers that may die, freeze or hang.

Work is a pure function of its arguments (seeds and weights travel in the call), so a call whose worker was lost is simply
made again on another one. Three kinds of failure are told apart:

- ours: a worker died, froze, or did not answer within its deadline. It is replaced after a back-off, meanwhile the others
  work on. Losses in a row without any result end the run (`max_losses`).
- the problem's: a call that has cost a worker is a suspect and runs alone on the next one, so that what runs beside it is
  not blamed. After `problem_attempts` losses it is given up; what becomes of its problem is the caller's business.
- the code's: what a method of the worker raises is raised here at once, with the worker's name, place and last words.

What an event costs does not depend on the number of workers (`make bench-control-plane`): Ray rings when a call is ready.
Nothing relies on that alone: every POLL_S all calls are looked at, for deadlines and for what has not rung.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.calls import (
    DEADLINES,
    WORKER_LOST,
    Call,
    Done,
    GivenUp,
    Running,
    Worker,
    WorkerRaisedError,
    WorkersKeepDyingError,
)
from actors.loads import Loads
from actors.meter import Meter
from actors.processes import cause_of_death, in_actor, introduce, one_line, place_of
from actors.staff import CLOSE_S, Staff, kill
from actors.watchdog import ActorState, Watchdog
from diffrl.config import SupervisionConfig

# Per worker that does one thing at a time: one running, one waiting, so that a worker never idles between calls.
MAX_IN_FLIGHT = 2
POLL_S = 1.0  # the longest wait without a look at deadlines
BESIDE_S = 0.05  # the longest wait for others without a look at what has rung
FETCH_S = 0.01  # the longest wait for a value on its way here from another node
BELL = threading.Event()  # something has rung, in whatever pool


class WorkerPool(Staff):
    """Hands calls to workers and replaces those that are lost. `next_outcome` is what moves it."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        size: int,
        *,
        role: str = "worker",
        in_flight: int = MAX_IN_FLIGHT,
        concurrency: int = 1,
        config: SupervisionConfig | None = None,
        watchdog: Watchdog | None = None,
    ):
        """`in_flight`: calls that a worker has at a time, of which it runs `concurrency`, in the order it got them."""
        super().__init__(make_worker, role, config or SupervisionConfig())
        self.in_flight = in_flight
        self.concurrency = concurrency
        self.watchdog = watchdog
        self.waiting: deque[Call] = deque()
        self.running: dict[ray.ObjectRef, Running] = {}  # in the order in which they were handed out
        self.rung: deque[ray.ObjectRef] = deque()  # to look at; a thread of Ray's appends
        self.survey = False  # look at all
        self.survey_at = 0.0
        self.loads = Loads(in_flight)
        self.meter = Meter()
        self.num_retries = 0  # calls that were made again
        self.outcomes: deque[Done | GivenUp] = deque()
        self.losses = 0  # in a row
        self.slots = [self.start(slot, replaces=False) for slot in range(size)]

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self.outcomes)

    # Work

    def submit(self, key: int | None, method: str, *args: Any, avoid: int | None = None) -> None:
        self.waiting.append(Call(key, method, args, avoid))
        self.dispatch()

    def forget(self, key: int) -> None:
        """No outcome of calls about this group any more."""
        self.waiting = deque(call for call in self.waiting if call.key != key)
        self.outcomes = deque(outcome for outcome in self.outcomes if outcome.call.key != key)
        for run in self.running.values():
            run.forgotten |= run.call.key == key

    def call(self, method: str, *args: Any) -> Any:
        """One call on some worker, waited for; made again when that worker is lost. For when no other work is under way."""
        assert not self.busy
        self.submit(None, method, *args)
        return self.finished()[0].value

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call every worker that is there once, all at the same time, and wait for one if none is. For when no other work is
        under way."""
        assert not self.busy
        while self.slots and not any(worker.works for worker in self.slots):
            wait_for([self])
        self.waiting.extend(Call(None, method, args, only=worker.slot) for worker in self.slots if worker.works)
        return [done.value for done in sorted(self.finished(), key=lambda done: done.slot)]

    def finished(self) -> list[Done]:
        """What is under way, which must be about no group."""
        done = []
        while (found := next_outcome([self])) is not None:
            assert isinstance(found[1], Done)
            done.append(found[1])
        return done

    def dispatch(self) -> None:
        """Hand out what can be, suspects first: each of them to a worker that has nothing else and gets nothing else."""
        held: list[Call] = []
        reserved: list[Worker] = []  # for suspects, until they are idle
        while self.waiting and any(self.loads.with_room):
            call = self.waiting.popleft()
            worker = self.worker_for(call)
            if worker is not None and not (call.losses and worker.runs):
                self.hand_out(call, worker)
                continue
            held.append(call)
            if worker is not None:
                reserved.append(worker)
                self.loads.set(worker.slot, None)
        self.waiting.extendleft(reversed(held))
        for worker in reserved:
            self.weigh(worker)
        self.meter.queue(len(self.waiting), len(self.slots))

    def worker_for(self, call: Call) -> Worker | None:
        """The one with the least to do of those that have room and may get it."""
        if call.only is not None:
            slot = call.only if self.loads.has_room(call.only) else None
        else:
            slot = next((slot for slot in self.loads.least() if slot != call.avoid), None)
            if slot is None and call.avoid is not None and self.loads.has_room(call.avoid):
                others_wait = all(worker.waits for worker in self.slots if worker.slot != call.avoid)
                slot = call.avoid if others_wait else None
        return None if slot is None else self.slots[slot]

    def hand_out(self, call: Call, worker: Worker) -> None:
        answer = getattr(worker.handle, call.method).remote(*call.args)
        stream = answer if isinstance(answer, ray.ObjectRefGenerator) else None
        ref = answer if stream is None else stream.completed()
        self.running[ref] = worker.runs[ref] = Running(call, worker, stream)
        self.listen_for(ref)
        self.weigh(worker)
        self.begin(worker)

    def weigh(self, worker: Worker) -> None:
        """Note how much a worker has to do; only one that works takes calls."""
        load = sum(self.in_flight if run.call.losses else 1 for run in worker.runs.values())
        self.loads.set(worker.slot, load if worker.works else None)
        self.meter.worker(worker.slot, busy=bool(worker.runs))

    def begin(self, worker: Worker) -> None:
        """Note the time for those calls of a worker that it can run by now."""
        for run in islice(worker.runs.values(), self.concurrency):
            run.since = run.since or time.monotonic()

    # What comes of it

    def tend(self) -> None:
        """Do what is due: restarts, and losses of workers that are late."""
        now = time.monotonic()
        for slot in [slot for slot, at in self.restart_at.items() if at <= now]:
            del self.restart_at[slot]
            self.slots[slot] = self.start(slot, replaces=True)
        self.survey = now >= self.survey_at
        if self.survey:
            self.survey_at = now + POLL_S
            self.look_for_places(now)
            self.find_late(now)
        self.dispatch()

    def find_late(self, now: float) -> None:
        for worker in list(self.starting.values()):
            if worker.waits is False and now - worker.since > self.config.start_s:
                self.lose(worker, f"its constructor was not through within supervision.start_s {self.config.start_s:g}")
        for run in list(self.running.values()):
            if not run.worker.lost and now > self.deadline(run):
                key = DEADLINES.get(run.call.method, "generate_s")
                self.lose(run.worker, f"{run.call.method} did not end within supervision.{key} {self.limit(run):g}")

    def limit(self, run: Running) -> float:
        return getattr(self.config, DEADLINES.get(run.call.method, "generate_s"))

    def deadline(self, run: Running) -> float:
        return float("inf") if run.since is None else run.since + self.limit(run)

    def next_due(self) -> float:
        """When there is something to tend to, however little happens."""
        return min([self.survey_at, *self.restart_at.values()])

    def listen_for(self, ref: ray.ObjectRef) -> None:
        def ring(_error: BaseException | None) -> None:
            self.rung.append(ref)
            BELL.set()

        ref._on_ready(ring)

    def listen(self) -> None:
        """Settle what is ready: of what has rung, or, in a survey, of everything."""
        refs = [self.rung.popleft() for _ in range(len(self.rung))]
        rung = [ref for ref in refs if ref in self.running or ref in self.starting]
        refs = [*self.starting, *self.running] if self.survey else rung
        if not refs:
            return
        ready = ray.wait(refs, num_returns=len(refs), timeout=0 if self.survey else FETCH_S)[0]
        self.rung.extend(set(rung).difference(ready))  # their values are on the way here
        for ref in ready:
            self.settle(ref)

    def settle(self, ref: ray.ObjectRef) -> None:
        """Take in what a reference that is ready has brought."""
        if ref not in self.running and ref not in self.starting:
            return  # the failure of another call of its worker has been seen meanwhile
        worker = self.starting[ref] if ref in self.starting else self.running[ref].worker
        try:
            value = ray.get(ref)
        except WORKER_LOST as error:  # the one failure that is expected here
            if isinstance(error, RayActorError) and error.actor_init_failed and not worker.replaces:
                raised = str(error).strip().rpartition("\n")[2]
                raise WorkerRaisedError(self.account(worker, f"its constructor raised {one_line(raised)}")) from error
            # What a healthy worker raised for want of an object of a lost node is nobody's fault here.
            self.lose(worker, cause_of_death(error), error, blame=not isinstance(error, RayTaskError))
        except RayError as error:
            method = self.running[ref].call.method if ref in self.running else "its start"
            raised = error.cause if isinstance(error, RayTaskError) else error
            what = f"{method} raised {type(raised).__name__}: {one_line(raised)}"
            raise WorkerRaisedError(self.account(worker, what)) from error
        else:
            self.note_life(worker, ref, value)
        self.dispatch()

    def note_life(self, worker: Worker, ref: ray.ObjectRef, value: Any) -> None:
        if self.watchdog is not None:
            self.watchdog.progress()
        if self.starting.pop(ref, None) is not None:
            worker.ready, worker.waits, worker.place = True, False, place_of(worker.handle)
        else:
            run = self.running.pop(ref)
            del worker.runs[ref]
            self.losses = 0
            if run.call.key is not None and run.since is not None:
                self.meter.call_s.append(time.monotonic() - run.since)
            if run.stream is not None:
                value = list(run.stream)
            if not run.forgotten:
                self.outcomes.append(Done(run.call, worker.slot, value, ref))
        if not worker.lost:  # else its slot is another one's
            self.weigh(worker)
        self.begin(worker)

    def lose(self, worker: Worker, reason: str, cause: Exception | None = None, *, blame: bool = True) -> None:
        """Give up a worker: its calls are queued again, those that were running as suspects, and a new one is started
        after a while. Raises WorkersKeepDyingError when that has happened too often."""
        worker.lost = True
        self.loads.set(worker.slot, None)
        self.meter.worker(worker.slot, busy=False)
        self.starting = {ref: other for ref, other in self.starting.items() if other is not worker}
        runs = []
        for ref in [ref for ref in worker.runs if not has_value(ref)]:
            runs.append(self.running.pop(ref))
            del worker.runs[ref]
        self.end(worker, reason, late=cause is None)
        self.losses += 1
        if self.losses > self.config.max_losses * len(self.slots):
            story = self.account(worker, reason)
            raise WorkersKeepDyingError(f"workers keep dying, the last one: {story}") from cause
        self.num_restarts += 1
        rounds = 1 + (self.losses - 1) // len(self.slots)
        self.restart_at[worker.slot] = time.monotonic() + self.config.delay_s(rounds)
        could_run = runs[: self.concurrency] if blame else []
        for run in reversed(runs):
            call = replace(run.call, only=None)  # its worker may have no successor
            if run in could_run and call.key is not None:
                call = replace(call, losses=call.losses + 1)
            if run.forgotten:
                continue
            if call.losses >= self.config.problem_attempts:
                story = self.account(worker, reason).splitlines()
                self.outcomes.append(GivenUp(call, one_line(" ".join([story[0], *story[1:][-1:]]), 600)))
            else:
                self.waiting.appendleft(call)
                self.num_retries += 1
        self.waiting = deque(sorted(self.waiting, key=lambda call: call.losses == 0))

    # Workers

    def start(self, slot: int, *, replaces: bool) -> Worker:
        worker = Worker(self.make_worker(), slot, time.monotonic(), replaces)
        ref = in_actor(worker.handle, introduce)
        self.starting[ref] = worker
        self.listen_for(ref)
        self.weigh(worker)
        if replaces:
            self.restarted_at.append(worker.since)
        return worker

    def wait_ready(self) -> None:
        """Until every worker's constructor has run; what one of them raised is raised here. One that has no place within
        supervision.start_s comes later."""
        while not all(worker.works or self.is_overdue(worker) for worker in self.slots):
            wait_for([self])
        self.require_a_place()

    def renew(self, slot: int) -> None:
        """Replace a healthy worker that has no call."""
        old = self.slots[slot]
        assert slot not in self.restart_at and not old.runs
        if hasattr(old.handle, "close"):
            ray.wait([old.handle.close.remote()], timeout=CLOSE_S)
        self.starting = {ref: other for ref, other in self.starting.items() if other is not old}
        kill(old.handle)
        self.num_restarts += 1
        self.slots[slot] = self.start(slot, replaces=True)

    def states(self) -> list[ActorState]:
        """For a report; another thread may ask."""
        now = time.monotonic()
        return [
            ActorState(
                role=self.role,
                slot=worker.slot,
                place=place_of(worker.handle),
                ready=worker.works,
                calls=tuple(
                    {"method": run.call.method, "ordinal": run.call.key, "seconds": run.since and now - run.since}
                    for run in list(worker.runs.values())
                ),
                waiting=len(self.waiting),
            )
            for worker in self.slots
        ]


def has_value(ref: ray.ObjectRef) -> bool:
    """Whether a reference is ready and its worker lived to answer, if only with an exception."""
    if not ray.wait([ref], timeout=0)[0]:
        return False
    try:
        ray.get(ref)
    except WORKER_LOST:
        return False
    except RayError:
        return True
    return True


def wait_for(pools: Sequence[WorkerPool], beside: "Sequence[ray.ObjectRef]" = ()) -> "list[ray.ObjectRef]":
    """Until something has happened in one of the pools, or to a reference `beside` them, or a moment has passed; those of
    the references that are ready."""
    for pool in pools:
        if pool.watchdog is not None:
            pool.watchdog.check()
        pool.tend()
    BELL.clear()
    if not any(pool.rung for pool in pools):
        due = min((pool.next_due() for pool in pools), default=float("inf")) - time.monotonic()
        timeout = max(0.0, min(POLL_S, due))
        if beside:
            ray.wait(list(beside), num_returns=1, timeout=min(BESIDE_S, timeout))
        else:
            BELL.wait(timeout)
    for pool in pools:
        pool.listen()
    return ray.wait(list(beside), num_returns=len(beside), timeout=0)[0] if beside else []


def next_outcome(pools: Sequence[WorkerPool]) -> tuple[WorkerPool, Done | GivenUp] | None:
    """What ended next in any of the pools; None when nothing is under way."""
    while any(pool.busy for pool in pools):
        for pool in pools:
            if pool.outcomes:
                return pool, pool.outcomes.popleft()
        wait_for(pools)
    return None
