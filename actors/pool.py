"""Pools of interchangeable workers that may die, freeze or hang.

Work is a pure function of its arguments (seeds and weights travel in the call), so a call whose worker was lost is simply
made again on another one. Three kinds of failure are told apart:

- ours: a worker died, froze, or did not answer within its deadline. It is replaced after a back-off, meanwhile the others
  work on. Losses in a row without any result end the run (`max_losses`).
- the problem's: a call that has cost a worker is a suspect and runs alone on the next one, so that what runs beside it is
  not blamed. After `problem_attempts` losses it is given up; what becomes of its problem is the caller's business.
- the code's: what a method of the worker raises is raised here at once, with the worker's name, place and last words.

A worker for which no node has room is no failure: its calls go to the others until it has a place.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from actors.processes import account, cause_of_death, in_actor, introduce, one_line, place_of
from actors.watchdog import ActorState, Watchdog
from diffrl.config import SupervisionConfig
from diffrl.errors import RunStoppedError

# Per worker that does one thing at a time: one running, one waiting, so that a worker never idles between calls.
MAX_IN_FLIGHT = 2
POLL_S = 1.0  # the longest wait without a look at deadlines
QUESTIONS = "questions"  # Ray's concurrency group of a worker for what is asked beside its work
ANSWER_S = 5.0
PLACE_S = 30.0  # from the start of a worker to when the others no longer count on it, if it has no process by then
CLOSE_S = 10.0  # a worker ends what it holds


def kill(actor: Any) -> None:
    """End an actor at once, a frozen one within seconds. Its class's type, which `ray.remote` gives to the handle, is not
    one that ray.kill admits."""
    ray.kill(actor)


class WorkerPool:
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
        self.make_worker = make_worker
        self.role = role
        self.in_flight = in_flight
        self.concurrency = concurrency
        self.config = config or SupervisionConfig()
        self.watchdog = watchdog
        self.waiting: deque[Call] = deque()
        self.running: dict[ray.ObjectRef, Running] = {}  # in the order in which they were handed out
        self.starting: dict[ray.ObjectRef, Worker] = {}  # by the call that answers when the constructor is through
        self.restart_at: dict[int, float] = {}  # slots without a worker
        self.look_at = 0.0  # for places
        self.outcomes: deque[Done | GivenUp] = deque()
        self.losses = 0  # in a row
        self.num_restarts = 0  # those to come too
        self.restarted_at: list[float] = []
        self.slots = [self.start(slot, replaces=False) for slot in range(size)]

    @property
    def workers(self) -> list[Any]:
        return [worker.handle for worker in self.slots]

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self.outcomes)

    @property
    def is_placing(self) -> bool:
        """Whether a worker needs a place that it may not have got yet."""
        return bool(self.restart_at) or any(worker.waits is not False for worker in self.starting.values())

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

    def finished(self) -> list[Done]:
        """What is under way, which must be about no group."""
        done = []
        while (found := next_outcome([self])) is not None:
            assert isinstance(found[1], Done)
            done.append(found[1])
        return done

    def dispatch(self) -> None:
        """Hand out what can be, suspects first: each of them to a worker that has nothing else and gets nothing else."""
        load = {worker.slot: 0 for worker in self.slots if worker.works}
        for run in self.running.values():
            if not run.worker.lost:
                load[run.worker.slot] += self.in_flight if run.call.losses else 1
        calls = sorted(self.waiting, key=lambda call: call.losses == 0)
        self.waiting.clear()
        for call in calls:
            slots = [s for s in load if s == call.only or (call.only is None and s != call.avoid)]
            if not slots and call.avoid in load and all(w.waits for w in self.slots if w.slot != call.avoid):
                slots = [call.avoid]
            slot = min(slots, key=load.__getitem__, default=None)
            if slot is None or load[slot] >= (1 if call.losses else self.in_flight):
                self.waiting.append(call)
                if slot is not None and call.losses:
                    load[slot] = self.in_flight  # until it is idle
                continue
            load[slot] += self.in_flight if call.losses else 1
            worker = self.slots[slot]
            answer = getattr(worker.handle, call.method).remote(*call.args)
            stream = answer if isinstance(answer, ray.ObjectRefGenerator) else None
            self.running[answer if stream is None else stream.completed()] = Running(call, worker, stream)
            self.begin(worker)

    def begin(self, worker: Worker) -> None:
        """Note the time for those calls of a worker that it can run by now."""
        for run in [run for run in self.running.values() if run.worker is worker][: self.concurrency]:
            run.since = run.since or time.monotonic()

    # What comes of it

    def tend(self) -> None:
        """Do what is due: restarts, and losses of workers that are late."""
        now = time.monotonic()
        for slot in [slot for slot, at in self.restart_at.items() if at <= now]:
            del self.restart_at[slot]
            self.slots[slot] = self.start(slot, replaces=True)
        self.look_for_places(now)
        for worker in list(self.starting.values()):
            if worker.waits is False and now - worker.since > self.config.start_s:
                self.lose(worker, f"its constructor was not through within supervision.start_s {self.config.start_s:g}")
        for run in list(self.running.values()):
            if not run.worker.lost and now > self.deadline(run):
                key = DEADLINES.get(run.call.method, "generate_s")
                self.lose(run.worker, f"{run.call.method} did not end within supervision.{key} {self.limit(run):g}")
        self.dispatch()

    def look_for_places(self, now: float) -> None:
        """Which of the workers that start have a process by now; its constructor's time counts from then."""
        if now < self.look_at:
            return
        self.look_at = now + POLL_S
        for worker in self.starting.values():
            if worker.waits is not False and now - worker.since > POLL_S:
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

    def limit(self, run: Running) -> float:
        return getattr(self.config, DEADLINES.get(run.call.method, "generate_s"))

    def deadline(self, run: Running) -> float:
        return float("inf") if run.since is None else run.since + self.limit(run)

    def next_due(self) -> float:
        """When there is something to tend to, however little happens."""
        starts = [worker.since + self.config.start_s for worker in self.starting.values() if worker.waits is False]
        return min(
            [*self.restart_at.values(), *starts, *map(self.deadline, self.running.values())], default=float("inf")
        )

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
            self.losses = 0
            if run.stream is not None:
                value = list(run.stream)
            if not run.forgotten:
                self.outcomes.append(Done(run.call, worker.slot, value, ref))
        self.begin(worker)

    def lose(self, worker: Worker, reason: str, cause: Exception | None = None, *, blame: bool = True) -> None:
        """Give up a worker: its calls are queued again, those that were running as suspects, and a new one is started
        after a while. Raises WorkersKeepDyingError when that has happened too often."""
        worker.lost = True
        self.starting = {ref: other for ref, other in self.starting.items() if other is not worker}
        refs = [ref for ref, run in self.running.items() if run.worker is worker and not has_value(ref)]
        runs = [self.running.pop(ref) for ref in refs]
        story = self.account(worker, reason)  # before it is gone
        kill(worker.handle)
        print(f"{self.role} worker lost: {story.splitlines()[0]}", file=sys.stderr, flush=True)
        self.losses += 1
        if self.losses > self.config.max_losses * len(self.slots):
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
                told = story.splitlines()
                self.outcomes.append(GivenUp(call, one_line(" ".join([told[0], *told[1:][-1:]]), 600)))
            else:
                self.waiting.appendleft(call)

    # Workers

    def start(self, slot: int, *, replaces: bool) -> Worker:
        worker = Worker(self.make_worker(), slot, time.monotonic(), replaces)
        self.starting[in_actor(worker.handle, introduce)] = worker
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
        assert slot not in self.restart_at and not any(run.worker is old for run in self.running.values())
        if hasattr(old.handle, "close"):
            ray.wait([old.handle.close.remote()], timeout=CLOSE_S)
        self.starting = {ref: other for ref, other in self.starting.items() if other is not old}
        kill(old.handle)
        self.num_restarts += 1
        self.slots[slot] = self.start(slot, replaces=True)

    def close(self) -> None:
        for worker in self.slots:
            kill(worker.handle)

    def account(self, worker: Worker, what: str) -> str:
        place = worker.place or place_of(worker.handle)
        return f"{what}; this was {account(f'{place.class_name} {worker.slot}', place)}"

    def states(self) -> list[ActorState]:
        """For a report; another thread may ask."""
        now = time.monotonic()
        runs = list(self.running.values())
        return [
            ActorState(
                role=self.role,
                slot=worker.slot,
                place=place_of(worker.handle),
                ready=worker.ready and not worker.lost,
                calls=tuple(
                    {"method": run.call.method, "ordinal": run.call.key, "seconds": run.since and now - run.since}
                    for run in runs
                    if run.worker is worker
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
    refs = {ref: pool for pool in pools for ref in (*pool.starting, *pool.running)}
    due = min((pool.next_due() for pool in pools), default=float("inf")) - time.monotonic()
    timeout = max(0.0, min(POLL_S, due))
    if not refs and not beside:
        time.sleep(timeout)
        return []
    ready = ray.wait([*beside, *refs], num_returns=1, timeout=timeout)[0]
    for ref in ready:
        if ref in refs:
            refs[ref].settle(ref)
    return [ref for ref in ready if ref not in refs]


def next_outcome(pools: Sequence[WorkerPool]) -> tuple[WorkerPool, Done | GivenUp] | None:
    """What ended next in any of the pools; None when nothing is under way."""
    while any(pool.busy for pool in pools):
        for pool in pools:
            if pool.outcomes:
                return pool, pool.outcomes.popleft()
        wait_for(pools)
    return None
