"""Several sandboxes as one: waits for a free slot, retries elsewhere, replaces what broke, trusts nothing untested.

A member judges nothing before it has judged the canary rightly: one right and one wrong tiny program, each with exactly
the verdict it must get. The canary runs at first use, after every replacement and every `canary_every` submissions. The
first SandboxError on a member is charged to its submission and retires the member; whatever else was in there is judged
again elsewhere at no charge, verdicts included, because the same event may have falsified them.

There are no threads here: starts, canaries and retries run in the callers' own. A pool whose members are pods that
come and go: pods.py.
"""

import contextlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from sandbox.canary import require_canary
from sandbox.types import (
    Sandbox,
    SandboxError,
    SandboxRefusedError,
    SandboxUnavailableError,
    Submission,
    SubmissionTooLargeError,
    Verdict,
)

_MAX_FAILURES = 3  # starts or canaries of one member that go wrong in a row
_REST_S = 30.0  # how long such a member is left alone while others work


class SandboxOverloadedError(SandboxError):
    """Too many submissions wait already."""


class SandboxClosedError(SandboxError):
    """The pool was closed before there was a verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """Gauges of this moment, and totals since the pool was made; canaries are in no total but their own.

    PoolStats(slots=4, busy=2, waiting=0, statuses={"passed": 12, "failed": 3}, errors={"SandboxError": 1}, cpu_ms=81.0,
              restarts=1, canaries=5, busy_s=0.7, waited_s=0.1)
    """

    slots: int
    busy: int  # slots in use
    waiting: int  # submissions without a slot
    statuses: Mapping[str, int]  # of tests
    errors: Mapping[str, int]  # failures of the judge by class, those that a retry made good included
    cpu_ms: float  # of programs
    restarts: int  # members replaced
    canaries: int
    busy_s: float  # seconds in slots, over all submissions: their growth in a second is the mean number of busy slots
    waited_s: float  # seconds waited, over all submissions: likewise the mean length of the queue


@dataclass(slots=True, eq=False)
class Member:
    """One sandbox at its place in the pool; when it breaks, another takes the place."""

    place: int
    slots: int
    sandbox: Sandbox | None = None
    busy: int = 0
    fit: bool = False  # judged the canary rightly; until then at most one submission is in here, to see to that
    retired: bool = False
    refuses: bool = False  # full, or about to leave: takes nothing for now
    elsewhere: int = 0  # submissions that it has from others
    since_canary: int = 0
    failures: int = 0  # of starts and canaries at this place, in a row
    rests_until: float = 0.0

    def has_room(self) -> bool:
        return not self.refuses and self.busy < (self.slots if self.fit else 1)

    def load(self) -> float:
        return (self.busy + self.elsewhere) / self.slots


@dataclass(slots=True, eq=False)
class _Ticket:
    """A submission that waits for a slot."""

    avoid: set[int]
    member: Future[Member] = field(default_factory=Future)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An attempt without a verdict.

    _Failure(error=SandboxError("the sandbox left"), blame="submission")
    """

    error: SandboxError
    blame: Literal["submission", "member", "neighbour"]  # who broke the sandbox, as far as can be told


class _Gauge:
    """A number of submissions, and its integral over time."""

    def __init__(self) -> None:
        self.count = 0
        self._offset = 0.0

    def add(self, change: int) -> None:
        self.count += change
        self._offset -= change * time.monotonic()

    def seconds(self) -> float:
        return self._offset + self.count * time.monotonic()


class Pool(ABC):
    """A Sandbox made of several, and a queue in front of them. SandboxPool and PodPool say which they are."""

    def __init__(self, name: str, *, attempts: int = 2, max_waiting: int = 1000, canary_every: int = 500) -> None:
        assert attempts >= 1 and max_waiting >= 0 and canary_every >= 1
        self.name = name
        self._members: list[Member] = []
        self._most_busy = math.inf
        self._over = False  # closed for good
        self._attempts = attempts
        self._max_waiting = max_waiting
        self._canary_every = canary_every
        self._lock = threading.Lock()
        self._somebody_left = threading.Condition(self._lock)
        self._queue: deque[_Ticket] = deque()
        self._busy, self._waiting = _Gauge(), _Gauge()
        self._statuses: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._cpu_s = 0.0
        self._restarts = self._canaries = 0

    @abstractmethod
    def _replace(self, member: Member, unfit: bool) -> None:
        """Takes a member that broke out of the list. With the lock held."""

    @abstractmethod
    def _is_hopeless(self, unfit: int) -> bool:
        """Whether a submission that has met `unfit` unfit members should give up."""

    @abstractmethod
    def _renewed(self) -> list[Member]:
        """The members that the pool has after it was closed."""

    @property
    def slots(self) -> int:
        """How many submissions are judged at the same time."""
        return sum(member.slots for member in self._members)

    def judge(self, submission: Submission) -> Verdict:
        """A verdict about the program, or one exception: the SandboxError of the last attempt, SandboxUnavailableError
        when no member can be brought to judge as it must, SandboxOverloadedError, SandboxClosedError."""
        members = self._members  # close() puts another list in its place
        avoid: set[int] = set()
        attempts, unfit = self._attempts, 0
        while True:
            member = self._enter(members, avoid)
            try:
                outcome = self._attempt(member, submission)
            except BaseException:
                self._retire(member)
                raise
            finally:
                self._leave(member)
            if isinstance(outcome, Verdict):
                return outcome
            if outcome.blame == "submission":
                attempts -= 1
                avoid.add(member.place)
                if attempts == 0 or isinstance(outcome.error, SubmissionTooLargeError):
                    raise outcome.error
            elif outcome.blame == "member":
                unfit += 1
                if self._is_hopeless(unfit):
                    raise SandboxUnavailableError(
                        f"no {self.name} sandbox can be brought to judge as it must: {outcome.error}"
                    ) from outcome.error

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                slots=self.slots,
                busy=self._busy.count,
                waiting=self._waiting.count,
                statuses=dict(self._statuses),
                errors=dict(self._errors),
                cpu_ms=1000 * self._cpu_s,
                restarts=self._restarts,
                canaries=self._canaries,
                busy_s=self._busy.seconds(),
                waited_s=self._waiting.seconds(),
            )

    def survivors(self) -> list[str]:
        """What judged programs left behind in any member."""
        sandboxes = [member.sandbox for member in self._members]
        return [name for sandbox in sandboxes if sandbox is not None for name in sandbox.survivors()]

    def close(self) -> None:
        """Ends every member and returns when nobody is inside any more. Who waits gets SandboxClosedError; who is being
        judged, that or a verdict. A later `judge` would start new members."""
        with self._lock:
            old = self._members
            self._members = self._renewed()
            for member in old:
                member.retired = True
            while self._queue:
                self._unqueue(self._queue[0]).set_exception(SandboxClosedError("the pool was closed"))
        for member in old:
            _end(member)
        with self._lock:
            self._somebody_left.wait_for(lambda: not any(member.busy for member in old))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # One attempt, by the thread that holds a slot.

    def _attempt(self, member: Member, submission: Submission) -> Verdict | _Failure:
        try:
            self._make_fit(member)
        except SandboxError as error:
            self._retire(member, error, unfit=True)
            return _Failure(error=error, blame="member")
        assert member.sandbox is not None
        try:
            verdict = member.sandbox.judge(submission)
        except SubmissionTooLargeError as error:  # nothing is broken
            with self._lock:
                self._errors[type(error).__name__] += 1
            return _Failure(error=error, blame="submission")
        except SandboxRefusedError as error:  # nor here
            member.refuses = True
            return _Failure(error=error, blame="neighbour")
        except SandboxError as error:
            first = self._retire(member, error)
            return _Failure(error=error, blame="submission" if first else "neighbour")
        with self._lock:
            if member.retired:  # what broke it may have falsified this verdict
                return _Failure(error=SandboxError("another submission broke the sandbox"), blame="neighbour")
            member.since_canary += 1
            self._statuses.update(map(str, verdict.statuses))
            self._cpu_s += verdict.cpu_s
            return verdict

    def _make_fit(self, member: Member) -> None:
        """Tests the member if that is due. Raises SandboxError."""
        assert member.sandbox is not None
        with self._lock:
            if member.fit and member.since_canary < self._canary_every:
                return
            member.since_canary = 0  # whoever comes next need not test it again
            self._canaries += 1
        require_canary(member.sandbox)
        with self._lock:
            member.fit = True
            member.failures = 0
            self._dispatch()

    def _retire(self, member: Member, error: SandboxError | None = None, *, unfit: bool = False) -> bool:
        """Takes a broken member out; False when that had been done before."""
        with self._lock:
            if error is not None:
                self._errors[type(error).__name__] += 1
            if member.retired:
                return False
            member.retired = True
            self._restarts += 1
            self._replace(member, unfit)
            return True

    # Slots.

    def _enter(self, members: list[Member], avoid: set[int]) -> Member:
        """Takes a slot, waiting for it if need be; at a place in `avoid` only if there is no other."""
        ticket = _Ticket(avoid)
        with self._lock:
            if members is not self._members or self._over:
                raise SandboxClosedError("the pool was closed")
            self._queue.append(ticket)
            self._waiting.add(1)
            self._dispatch()
            if not ticket.member.done() and len(self._queue) > self._max_waiting:
                self._unqueue(ticket)
                raise SandboxOverloadedError(f"{self._max_waiting} submissions wait for a sandbox already")
        try:
            return ticket.member.result()
        except BaseException:  # closed, or interrupted
            with self._lock:
                if ticket in self._queue:
                    self._unqueue(ticket)
            if ticket.member.done() and ticket.member.exception() is None:
                self._leave(ticket.member.result())
            raise

    def _leave(self, member: Member) -> None:
        if member.retired:
            _end(member)
        with self._lock:
            member.busy -= 1
            self._busy.add(-1)
            self._dispatch()
            self._somebody_left.notify_all()

    def _dispatch(self) -> None:
        """Gives slots to those who wait, first come first served. With the lock held, whenever a slot may be free."""
        for ticket in list(self._queue):
            if self._busy.count >= self._most_busy or not any(member.has_room() for member in self._members):
                return
            member = self._pick(ticket.avoid)
            if member is not None:
                member.busy += 1
                self._busy.add(1)
                self._unqueue(ticket).set_result(member)

    def _pick(self, avoid: set[int]) -> Member | None:
        now = time.monotonic()
        members = [m for m in self._members if m.failures < _MAX_FAILURES or now >= m.rests_until] or self._members
        members = [m for m in members if m.place not in avoid and not m.refuses] or members
        return min((m for m in members if m.has_room()), key=lambda m: (not m.fit, m.load()), default=None)

    def _unqueue(self, ticket: _Ticket) -> Future[Member]:
        self._queue.remove(ticket)
        self._waiting.add(-1)
        return ticket.member


class SandboxPool(Pool):
    """`size` sandboxes, all alike.

    with SandboxPool(ProcessSandbox, 2) as pool:
        verdict = pool.judge(submission)

    `start` makes a member and is called again for every replacement. The first member is made here, so that a backend
    that cannot be used at all says so at once; the others when they are needed.
    """

    def __init__(self, start: Callable[[], Sandbox], size: int, **options: int) -> None:
        assert size >= 1
        first = start()
        super().__init__(first.name, **options)
        self._start = start
        self._members = [Member(place, first.slots) for place in range(size)]
        self._members[0].sandbox = first

    def _make_fit(self, member: Member) -> None:
        """Starts the member if it is not running, too."""
        if member.sandbox is None:  # then nobody else is inside
            member.sandbox = self._start()
            member.slots = member.sandbox.slots
        super()._make_fit(member)

    def _replace(self, member: Member, unfit: bool) -> None:
        self._members[member.place] = successor = Member(member.place, member.slots)
        if unfit:
            successor.failures = member.failures + 1
            successor.rests_until = time.monotonic() + _REST_S

    def _is_hopeless(self, unfit: int) -> bool:
        with self._lock:
            if all(member.failures >= _MAX_FAILURES for member in self._members):
                return True
            others_may_work = any(member.fit or member.busy for member in self._members)
            return unfit >= _MAX_FAILURES and not others_may_work

    def _renewed(self) -> list[Member]:
        return [Member(member.place, member.slots) for member in self._members]


def _end(member: Member) -> None:
    """Everyone who leaves a retired member calls this, because a `judge` after its end would have started it anew."""
    if member.sandbox is not None:
        with contextlib.suppress(SandboxError):
            member.sandbox.close()
