"""The pool, on real sandboxes and on scripted ones that fail in the ways it is made for."""

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.canary import CanaryError, require_canary
from sandbox.pool import SandboxClosedError, SandboxOverloadedError, SandboxPool
from sandbox.process import ProcessSandbox
from sandbox.types import (
    SandboxError,
    SandboxUnavailableError,
    Submission,
    SubmissionTooLargeError,
    TestStatus,
    Verdict,
)

WAIT_S = 60.0  # for what takes milliseconds
PASSED, FAILED = TestStatus.PASSED, TestStatus.FAILED


def program(id_: str, code: str = "def f(x): return x * x", *tests: str) -> Submission:
    return Submission(id=id_, code=code, tests=tests or ("assert f(3) == 9",))


def verdict_of(submission: Submission, *statuses: TestStatus) -> Verdict:
    details, beside = ("",) * len(statuses), (False,) * len(statuses)
    return Verdict(id=submission.id, statuses=statuses, details=details, beside=beside, cpu_s=0.25)


class Scripted:
    """A sandbox whose `judge` does what `script` says; canaries are judged rightly unless the script has one for them."""

    name = "scripted"

    def __init__(self, script: Callable[["Scripted", Submission], Verdict | None], slots: int = 1) -> None:
        self.script = script
        self.slots = slots
        self.judged: list[str] = []
        self.closed = 0
        self.inside = self.most_inside = 0
        self.lock = threading.Lock()

    def judge(self, submission: Submission) -> Verdict:
        with self.lock:
            self.judged.append(submission.id)
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            scripted = self.script(self, submission)
        finally:
            with self.lock:
                self.inside -= 1
        if scripted is not None:
            return scripted
        if submission.id == "canary/right":
            return verdict_of(submission, PASSED, PASSED)
        if submission.id == "canary/wrong":
            return verdict_of(submission, PASSED, FAILED)
        return verdict_of(submission, PASSED)

    def survivors(self) -> list[str]:
        return []

    def close(self) -> None:
        self.closed += 1


class Factory:
    """Starts scripted sandboxes and remembers them."""

    def __init__(self, script: Callable[[Scripted, Submission], Verdict | None] = lambda s, p: None, slots: int = 1):
        self.script = script
        self.slots = slots
        self.made: list[Scripted] = []

    def __call__(self) -> Scripted:
        self.made.append(Scripted(self.script, self.slots))
        return self.made[-1]

    def judged(self) -> list[list[str]]:
        """What each sandbox judged, canaries as one word."""
        merged = []
        for sandbox in self.made:
            ids = [id_ for id_ in sandbox.judged if id_ != "canary/wrong"]
            merged.append(["canary" if id_ == "canary/right" else id_ for id_ in ids])
        return merged


class Gate:
    """A script that holds every program until it is opened, and no canary but with `canaries`."""

    def __init__(self, *, canaries: bool = False) -> None:
        self.canaries = canaries
        self.open = threading.Event()

    def __call__(self, sandbox: Scripted, submission: Submission) -> None:
        if submission.id.startswith("canary") == self.canaries:
            assert self.open.wait(WAIT_S)


def in_threads(pool: SandboxPool, submissions: list[Submission]) -> list[Future[Verdict]]:
    """Judges all at the same time; every future is done when this returns."""
    with ThreadPoolExecutor(len(submissions)) as threads:
        futures = [threads.submit(pool.judge, submission) for submission in submissions]
        for future in futures:
            future.exception(WAIT_S)
    return futures


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def descendants() -> set[int]:
    found, parents = set(), [os.getpid()]
    while parents:
        children = []
        for pid in parents:
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # ended meanwhile
                    children += [int(word) for word in path.read_text().split()]
        found |= set(children)
        parents = children
    return found


# Real sandboxes


def test_many_threads_share_two_real_sandboxes() -> None:
    before = descendants()
    submissions = [
        program(f"p{i}", f"def f(x): return x + {i}", f"assert f(1) == {1 + i}", "assert f(1) == 5") for i in range(24)
    ]
    with SandboxPool(ProcessSandbox, 2) as pool:
        assert (pool.name, pool.slots) == ("process", 2)
        verdicts = [future.result() for future in in_threads(pool, submissions)]
        stats = pool.stats()
        assert pool.survivors() == []
    for i, verdict in enumerate(verdicts):
        assert verdict.id == f"p{i}"
        assert verdict.statuses == (PASSED, PASSED if i == 4 else FAILED)
    assert stats.statuses == {"passed": 25, "failed": 23}
    assert (stats.slots, stats.busy, stats.waiting, stats.errors, stats.restarts, stats.canaries) == (2, 0, 0, {}, 0, 2)
    assert stats.cpu_ms == pytest.approx(1000 * sum(verdict.cpu_s for verdict in verdicts))
    assert descendants() == before


def test_real_sandboxes_that_are_killed_cost_no_verdict() -> None:
    before = descendants()
    with SandboxPool(ProcessSandbox, 2, attempts=50) as pool, ThreadPoolExecutor(4) as threads:
        pool.judge(program("warm"))
        slow = "import time\ndef f(x):\n    time.sleep(0.02)\n    return x * x\n"
        futures: list[Future[Verdict]] = []
        killer, kills, deadline = random.Random(0), 0, time.monotonic() + 100
        while pool.stats().restarts < 3 and time.monotonic() < deadline:
            futures += [threads.submit(pool.judge, program(str(len(futures) + i), slow)) for i in range(4)]
            time.sleep(0.1)
            if victims := descendants() - before:
                with contextlib.suppress(ProcessLookupError):  # a program that has just ended
                    os.kill(killer.choice(sorted(victims)), signal.SIGKILL)
                    kills += 1
        statuses = [future.result().statuses for future in futures]
        stats = pool.stats()
    # A killed program is that program's outcome; killed sandboxes are ours, and leave no trace in a verdict.
    killed = statuses.count((TestStatus.KILLED,))
    assert statuses.count((PASSED,)) + killed == len(futures) and killed <= kills
    assert stats.restarts >= 3 and sum(stats.errors.values()) >= stats.restarts
    assert descendants() == before


# Retries


def failing(*ids: str, times: int = 1000) -> Callable[[Scripted, Submission], None]:
    """A script that raises SandboxError for these submissions, so many times in all."""
    left = Counter(dict.fromkeys(ids, times))

    def script(sandbox: Scripted, submission: Submission) -> None:
        if left[submission.id] > 0:
            left[submission.id] -= 1
            raise SandboxError(f"broke on {submission.id}")

    return script


def test_a_failure_is_retried_on_another_member() -> None:
    factory = Factory(failing("bad", times=1))
    with SandboxPool(factory, 2) as pool:
        pool.judge(program("a"))
        assert pool.judge(program("bad")).statuses == (PASSED,)
        assert factory.judged() == [["canary", "a", "bad"], ["canary", "bad"]]
        assert [sandbox.closed for sandbox in factory.made] == [1, 0]
        assert pool.judge(program("b")).statuses == (PASSED,)
        stats = pool.stats()
        assert (stats.errors, stats.restarts, stats.canaries) == ({"SandboxError": 1}, 1, 2)


def test_a_retry_waits_for_the_other_member_rather_than_take_the_same_place() -> None:
    gate, breaks = Gate(), failing("bad", times=1)

    def script(sandbox: Scripted, submission: Submission) -> None:
        if submission.id == "long":
            gate(sandbox, submission)
        breaks(sandbox, submission)

    factory = Factory(script)
    with SandboxPool(factory, 2) as pool, ThreadPoolExecutor(2) as threads:
        long = threads.submit(pool.judge, program("long"))
        until(lambda: "long" in factory.made[0].judged)
        bad = threads.submit(pool.judge, program("bad"))
        until(lambda: pool.stats().waiting == 1)
        gate.open.set()
        assert (long.result(WAIT_S).statuses, bad.result(WAIT_S).statuses) == ((PASSED,), (PASSED,))
    assert factory.judged() == [["canary", "long", "bad"], ["canary", "bad"]]


def test_after_the_last_attempt_the_error_is_raised_and_every_broken_member_replaced() -> None:
    factory = Factory(failing("bad"))
    with SandboxPool(factory, 2, attempts=3) as pool:
        with pytest.raises(SandboxError, match="broke on bad"):
            pool.judge(program("bad"))
        assert pool.judge(program("good")).statuses == (PASSED,)
    # With both places tried, the third attempt takes a fresh sandbox at one of them.
    assert factory.judged() == [["canary", "bad"]] * 3 + [["canary", "good"]]
    assert all(sandbox.closed for sandbox in factory.made)


def test_the_only_member_is_replaced_for_the_retry() -> None:
    factory = Factory(failing("bad", times=1))
    with SandboxPool(factory, 1) as pool:
        assert pool.judge(program("bad")).statuses == (PASSED,)
    assert factory.judged() == [["canary", "bad"], ["canary", "bad"]]


def test_a_submission_that_is_too_large_breaks_nothing() -> None:
    def script(sandbox: Scripted, submission: Submission) -> None:
        if submission.id == "huge":
            raise SubmissionTooLargeError("too large")

    factory = Factory(script)
    with SandboxPool(factory, 2) as pool:
        with pytest.raises(SubmissionTooLargeError):
            pool.judge(program("huge"))
        assert pool.judge(program("a")).statuses == (PASSED,)
        assert factory.judged() == [["canary", "huge", "a"]]
        assert pool.stats().restarts == 0 and pool.stats().errors == {"SubmissionTooLargeError": 1}


def test_neighbours_of_a_failure_are_judged_again_at_no_charge() -> None:
    """What a sandbox says after it broke is not believed, whatever it is."""
    entered = threading.Barrier(3)
    broken = threading.Event()

    def script(sandbox: Scripted, submission: Submission) -> Verdict | None:
        if sandbox is not factory.made[0] or submission.id.startswith("canary") or submission.id == "warm":
            return None
        entered.wait(WAIT_S)
        if submission.id == "bad":
            raise SandboxError("out of memory")
        assert broken.wait(WAIT_S)
        if submission.id == "dragged along":
            raise SandboxError("the sandbox left")
        return verdict_of(submission, TestStatus.KILLED)

    factory = Factory(script, slots=3)
    with SandboxPool(factory, 1, attempts=1) as pool, ThreadPoolExecutor(3) as threads:
        pool.judge(program("warm"))
        futures = {id_: threads.submit(pool.judge, program(id_)) for id_ in ("bad", "dragged along", "falsified")}
        with pytest.raises(SandboxError, match="out of memory"):
            futures["bad"].result(WAIT_S)
        broken.set()
        assert futures["dragged along"].result(WAIT_S).statuses == (PASSED,)
        assert futures["falsified"].result(WAIT_S).statuses == (PASSED,)
        assert pool.stats().statuses == {"passed": 3} and pool.stats().restarts == 1
    assert len(factory.made) == 2 and all(sandbox.closed for sandbox in factory.made)


def test_an_exception_that_is_none_of_ours_is_raised_once_and_frees_the_slot() -> None:
    def script(sandbox: Scripted, submission: Submission) -> None:
        if submission.id == "bug":
            raise ZeroDivisionError

    factory = Factory(script)
    with SandboxPool(factory, 1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.judge(program("bug"))
        assert pool.judge(program("a")).statuses == (PASSED,)
        assert pool.stats().busy == 0
    assert factory.judged() == [["canary", "bug"], ["canary", "a"]]


# Canaries


@pytest.mark.parametrize("lie", [(PASSED, PASSED), (FAILED, FAILED), (FAILED, PASSED), (TestStatus.ERROR,) * 2])
def test_a_sandbox_that_judges_the_canary_wrongly_judges_nothing_else(lie: tuple[TestStatus, ...]) -> None:
    factory = Factory(lambda sandbox, submission: verdict_of(submission, *lie))
    with SandboxPool(factory, 1) as pool:
        with pytest.raises(SandboxUnavailableError, match=", ".join(lie)):
            pool.judge(program("a"))
        assert pool.stats().errors == {"CanaryError": 3}
        assert len(factory.made) == 3  # tried three times
        with pytest.raises(SandboxUnavailableError):
            pool.judge(program("b"))
    assert len(factory.made) == 4  # and once for whoever comes later
    assert {id_ for judged in factory.judged() for id_ in judged} == {"canary"}
    assert all(sandbox.closed for sandbox in factory.made)


def test_a_canary_that_ran_beside_its_tests_is_refused() -> None:
    class Beside(Scripted):
        def judge(self, submission: Submission) -> Verdict:
            verdict = super().judge(submission)
            return Verdict(id=verdict.id, statuses=verdict.statuses, details=("", ""), beside=(False, True), cpu_s=0.0)

    with pytest.raises(CanaryError, match="low trust"):
        require_canary(Beside(lambda sandbox, submission: None))


def test_the_canary_is_judged_again_every_so_often() -> None:
    factory = Factory()
    with SandboxPool(factory, 1, canary_every=3) as pool:
        for i in range(7):
            pool.judge(program(str(i)))
    assert factory.judged() == [["canary", "0", "1", "2", "canary", "3", "4", "5", "canary", "6"]]


def test_while_the_canary_is_judged_nobody_else_is_let_in_and_then_everybody() -> None:
    canaries, programs = Gate(canaries=True), Gate()

    def script(sandbox: Scripted, submission: Submission) -> None:
        canaries(sandbox, submission)
        programs(sandbox, submission)

    factory = Factory(script, slots=3)
    with SandboxPool(factory, 1) as pool, ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(pool.judge, program(str(i))) for i in range(3)]
        until(lambda: (pool.stats().busy, pool.stats().waiting) == (1, 2))
        canaries.open.set()
        until(lambda: pool.stats().busy == 3)
        programs.open.set()
        assert [future.result(WAIT_S).statuses for future in futures] == [(PASSED,)] * 3
    assert factory.made[0].judged[:2] == ["canary/right", "canary/wrong"]


def test_a_member_that_goes_bad_is_found_by_the_canary_and_replaced() -> None:
    def script(sandbox: Scripted, submission: Submission) -> Verdict | None:
        worn = sandbox is factory.made[0] and sandbox.judged.count("canary/right") > 1
        return verdict_of(submission, *[PASSED] * len(submission.tests)) if worn else None

    factory = Factory(script)
    with SandboxPool(factory, 1, canary_every=2) as pool:
        for i in range(4):
            pool.judge(program(str(i)))
        assert pool.stats().restarts == 1
    assert factory.judged() == [["canary", "0", "1", "canary"], ["canary", "2", "3"]]
    assert factory.made[0].closed


def test_a_member_that_cannot_be_started_leaves_the_work_to_the_others() -> None:
    factory = Factory(lambda sandbox, submission: time.sleep(0.01))

    def start() -> Scripted:
        if factory.made:
            raise SandboxError("no room")
        return factory()

    with SandboxPool(start, 3) as pool:
        verdicts = [future.result() for future in in_threads(pool, [program(str(i)) for i in range(12)])]
        assert [verdict.statuses for verdict in verdicts] == [(PASSED,)] * 12
        assert 1 <= pool.stats().errors["SandboxError"] <= 6  # three tries at each of the two places


def test_a_backend_that_cannot_be_started_says_so_at_once() -> None:
    def start() -> Scripted:
        raise SandboxUnavailableError("no engine: start one")

    with pytest.raises(SandboxUnavailableError, match="no engine: start one"):
        SandboxPool(start, 2)


# Queue and end


def test_a_full_queue_refuses_at_once() -> None:
    gate = Gate()
    with SandboxPool(Factory(gate), 1, max_waiting=2) as pool, ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(pool.judge, program(str(i))) for i in range(3)]
        until(lambda: (pool.stats().busy, pool.stats().waiting) == (1, 2))
        with pytest.raises(SandboxOverloadedError, match="2 submissions wait"):
            pool.judge(program("too many"))
        assert pool.stats().waiting == 2
        gate.open.set()
        assert [future.result(WAIT_S).statuses for future in futures] == [(PASSED,)] * 3
        stats = pool.stats()
        assert (stats.busy, stats.waiting) == (0, 0)
        assert stats.waited_s > 0 and stats.busy_s > 0


def test_submissions_are_judged_in_the_order_of_their_arrival() -> None:
    gate = Gate()
    factory = Factory(gate)
    with SandboxPool(factory, 1) as pool, ThreadPoolExecutor(6) as threads:
        for i in range(6):
            threads.submit(pool.judge, program(str(i)))
            until(lambda i=i: pool.stats().busy + pool.stats().waiting == i + 1)
        gate.open.set()
    assert factory.judged() == [["canary", *"012345"]]


def test_gauges_grow_with_time_while_submissions_are_inside() -> None:
    gate = Gate()
    with SandboxPool(Factory(gate, slots=2), 1) as pool, ThreadPoolExecutor(3) as threads:
        for i in range(3):
            threads.submit(pool.judge, program(str(i)))
        until(lambda: (pool.stats().busy, pool.stats().waiting) == (2, 1))
        before, started = pool.stats(), time.monotonic()
        time.sleep(0.2)
        after, seconds = pool.stats(), time.monotonic() - started
        assert after.busy_s - before.busy_s == pytest.approx(2 * seconds, rel=0.2)
        assert after.waited_s - before.waited_s == pytest.approx(seconds, rel=0.2)
        gate.open.set()


def test_close_from_another_thread_ends_everything_and_the_pool_can_be_used_again() -> None:
    gate = Gate()
    factory = Factory(gate)
    pool = SandboxPool(factory, 2)
    with ThreadPoolExecutor(7) as threads:
        futures = [threads.submit(pool.judge, program(str(i))) for i in range(6)]
        until(lambda: (pool.stats().busy, pool.stats().waiting) == (2, 4))
        closing = threads.submit(pool.close)
        until(lambda: sum(future.done() for future in futures) == 4)
        assert not closing.done()  # two are still inside
        gate.open.set()
        closing.result(WAIT_S)
        for future in futures:
            assert isinstance(future.exception(WAIT_S), SandboxClosedError)
    assert all(sandbox.closed for sandbox in factory.made)
    assert pool.judge(program("later")).statuses == (PASSED,)
    assert factory.judged()[-1] == ["canary", "later"]
    pool.close()
    pool.close()
    assert all(sandbox.closed for sandbox in factory.made)


def test_close_ends_real_sandboxes_in_the_middle_of_their_work() -> None:
    before = descendants()
    pool = SandboxPool(ProcessSandbox, 2)
    slow = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x * x\n"
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(pool.judge, program(str(i), slow)) for i in range(8)]
        until(lambda: pool.stats().waiting > 0 and pool.stats().canaries == 2)
        pool.close()
        assert descendants() == before
        ended = Counter(type(future.exception(WAIT_S)).__name__ for future in futures)
    assert ended["SandboxClosedError"] >= 1 and ended["SandboxClosedError"] + ended["NoneType"] == 8


@pytest.mark.parametrize("seed", range(5))
def test_whatever_breaks_every_submission_ends_once(seed: int) -> None:
    """Members fail at random in every way; verdicts stay right, slots are kept, nothing untested judges."""
    rng, lock = random.Random(seed), threading.Lock()

    def script(sandbox: Scripted, submission: Submission) -> Verdict | None:
        with lock:
            fate, pause = rng.random(), rng.random() * 0.004
        time.sleep(pause)
        if submission.id.startswith("canary"):
            return verdict_of(submission, PASSED, PASSED) if fate < 0.1 else None
        if fate < 0.1:
            raise SandboxError("broke")
        return verdict_of(submission, PASSED if int(submission.id) % 2 else FAILED)

    factory = Factory(script, slots=2)
    submissions = [program(str(i)) for i in range(200)]
    pool = SandboxPool(factory, 4, canary_every=10)
    with ThreadPoolExecutor(20) as threads:
        futures = [threads.submit(pool.judge, submission) for submission in submissions]
        outcomes = [(future.exception(WAIT_S), future) for future in futures]
    verdicts = [future.result() for error, future in outcomes if error is None]
    assert len(verdicts) > 150 and {type(error) for error, _ in outcomes} <= {type(None), SandboxError}
    for verdict in verdicts:
        assert verdict.statuses == ((PASSED,) if int(verdict.id) % 2 else (FAILED,))
    stats = pool.stats()
    assert stats.statuses == Counter(str(verdict.statuses[0]) for verdict in verdicts)
    assert (stats.busy, stats.waiting) == (0, 0)
    assert stats.restarts == len([sandbox for sandbox in factory.made if sandbox.closed]) > 0
    pool.close()
    for sandbox in factory.made:
        assert sandbox.closed and sandbox.most_inside <= 2
        assert sandbox.judged[:2] in (["canary/right"], ["canary/right", "canary/wrong"])
