"""The host's side of one submission: two sandboxes in, a verdict out. Every backend runs this.

One sandbox runs the program, the other the tests; for each pair of children the host makes a fresh socket between
them, so a leftover of an earlier program has no line to anyone. The host drives test by test, so what hangs or dies
costs one test: both children are replaced, the code is run again, the rest still runs.

Time. A test fails with `timeout` when the program (or the test itself) has used `cpu_s` CPU seconds in it. `wall_s`
is for what sleeps or waits. When two tests have run into `wall_s`, or the submission has taken 2 * wall_s + cpu_s *
tests in all, the remaining tests are `not_run`. The top-level code has the same limits; when it fails, every test
gets its outcome at once.

A test runs in one of three ways: across (the tests' process calls the program's), beside the program, or as a script
whose output is compared here, so that what it should print never enters its process. Scripts have no `setup`.

Failures of the zygotes raise SandboxError. Whatever the two children do, die of, or send, is the program's outcome.
"""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.judge import frames, script
from sandbox.judge.clock import Clock, Outcome
from sandbox.judge.grading import runs_beside
from sandbox.judge.zygote_client import Usage, ZygoteClient
from sandbox.types import Limits, SandboxError, Submission, SubmissionTooLargeError, TestMode, TestStatus, Verdict

_FIRST_LOOK_S, _LOOK_EVERY_S = 0.05, 0.1  # how often a running test's CPU time is measured
_SEND_S = 60.0  # a child takes its job at once; this long means that it is lost, whatever the load
_REPLY_BYTES = 1 << 20
_EVALUATOR_MEMORY_MB = 1024
_MAX_DETAIL = 200
_GRADED = {status.value: status for status in TestStatus}


class Session:
    """One submission in one pair of sandboxes; `run` is called once."""

    def __init__(self, solution: ZygoteClient, evaluator: ZygoteClient, submission: Submission) -> None:
        self._solution = solution
        self._evaluator = evaluator
        self._submission = submission
        self._limits: Limits = submission.limits
        self._clock = Clock(solution, evaluator, submission.limits)
        self._sockets = contextlib.ExitStack()  # whatever is still open when something fails
        self._host: socket.socket | None = None  # to the evaluator's child while both children live
        self._beside: list[bool] = []  # for each test judged so far
        self.dirty = False

    def run(self) -> Verdict:
        """Judges the submission and leaves both sandboxes empty. Raises SandboxError."""
        with self._sockets:
            return self._run()

    def _run(self) -> Verdict:
        tests = self._submission.tests
        deadline = time.monotonic() + 2 * self._limits.wall_s + self._limits.cpu_s * len(tests)
        outcomes: list[Outcome] = []
        broken: Outcome | None = None  # what every further test comes to
        for test in tests:
            if broken is None and (self._clock.wall_timeouts >= 2 or time.monotonic() > deadline):
                broken = Outcome(status=TestStatus.NOT_RUN, detail="the submission's total time ran out")
            way = self._way(test)
            if broken is None and way == self._across and self._host is None:
                broken = self._load()
            self._beside.append(False)
            outcomes.append(broken or way(test))
        self._close_host()
        ended = self._solution.end(), self._evaluator.end()
        self.dirty = any(usage.dirty for usage in ended)
        return Verdict(
            id=self._submission.id,
            statuses=tuple(outcome.status for outcome in outcomes),
            details=tuple(_printable(outcome.detail) for outcome in outcomes),
            beside=tuple(self._beside),
            cpu_s=ended[0].cpu_s,
        )

    def _way(self, test: str) -> Callable[[str], Outcome]:
        submission = self._submission
        if submission.mode is TestMode.STDIN:
            return self._as_script
        if submission.mode is TestMode.UNITTEST and runs_beside(submission.setup, test, submission.entry_point):
            return self._in_program
        return self._across

    def _load(self) -> Outcome | None:
        """Starts both children and waits until the program's top level has run; an Outcome when that failed."""
        host, theirs = self._socketpair()
        self._host = host
        self._evaluator.spawn(theirs, max(self._limits.memory_mb, _EVALUATOR_MEMORY_MB), self._limits.max_processes)
        program = self._start_program("served")  # after the evaluator, which is known then as one to be left alone
        program.settimeout(None)  # O_NONBLOCK would travel with the descriptor
        with program:
            self._send(host, {"op": "link", **self._job()}, (program.fileno(),))
        reply = self._wait(host)
        if isinstance(reply, dict) and reply["status"] == "loaded":
            return None
        return self._settle(reply)

    def _start_program(self, way: str, fds: Sequence[int] = ()) -> socket.socket:
        """A fresh child of the solution's zygote with the code in hand; returns the other end of its socket."""
        ours, theirs = self._socketpair()
        self._solution.spawn(theirs, self._limits.memory_mb, self._limits.max_processes)
        self._send(ours, {"code": self._submission.code, "way": way}, fds)
        return ours

    def _job(self) -> dict[str, Any]:
        submission = self._submission
        return {"mode": submission.mode.value, "setup": submission.setup, "entry_point": submission.entry_point}

    def _across(self, source: str) -> Outcome:
        """Runs a test in the evaluator's child, which calls the program."""
        assert self._host is not None
        self._send(self._host, {"op": "test", "source": source})
        reply = self._wait(self._host)
        self._beside[-1] = isinstance(reply, dict) and reply.get("low") is True
        if not (isinstance(reply, dict) and reply["status"] == "beside"):
            return self._settle(reply)
        if self._submission.mode is TestMode.UNITTEST:  # its source has decided where it runs, nothing else may
            return Outcome(status=TestStatus.ERROR, detail=f"across processes: {reply['detail']}")
        return self._in_program(source)

    def _settle(self, reply: dict[str, Any] | Outcome) -> Outcome:
        """An outcome from the evaluator's reply, or from the lack of one; children that are spoilt are dropped."""
        if isinstance(reply, Outcome):
            self._hang_up()
            return reply
        if reply["status"] in _GRADED:
            return Outcome(status=_GRADED[reply["status"]], detail=reply["detail"])
        ended = self._hang_up()[0].ended
        return Outcome(status=TestStatus.KILLED, detail=_how_it_ended(ended))

    def _in_program(self, source: str) -> Outcome:
        """Runs a test in the program's own process. What that process says is believed: low trust."""
        self._beside[-1] = True
        self._hang_up()
        nonce = os.urandom(8).hex()  # an answer that was sent before the test does not count
        with self._start_program("beside") as program:
            reply = self._wait(program)
            if isinstance(reply, dict) and reply.get("loaded") is True:
                try:
                    self._send(program, {"source": source, "nonce": nonce, **self._job()})
                except SandboxError:  # the program left, which is its own affair
                    reply = Outcome(status=TestStatus.KILLED, detail="the program left")
                else:
                    reply = self._wait(program)
            ended = self._hang_up()[0].ended
        if isinstance(reply, Outcome):
            return reply
        status = reply.get("status")
        if isinstance(status, str) and status in _GRADED and reply.get("nonce") == nonce:
            return Outcome(status=_GRADED[status], detail=str(reply.get("detail")) or "ran beside the solution")
        return _outcome_of_exception(reply.get("x"), ended)

    def _as_script(self, test: str) -> Outcome:
        """Runs the code as a script in a child of its own and compares what it printed."""
        try:
            stdin, expected = script.parse_test(test)
        except ValueError as error:
            return Outcome(status=TestStatus.ERROR, detail=str(error))
        with script.Streams(stdin, self._limits.output_kb << 10) as streams:
            with self._start_program("script", streams.theirs) as link:
                streams.close_theirs()
                self._clock.start()
                outcome = streams.follow(self._clock)
                ended = self._hang_up()[0].ended
                if outcome is None and ended != 0:
                    outcome = _outcome_of_script(link, ended)
            printed = outcome or streams.rest()
        if isinstance(printed, Outcome):
            return printed
        detail = script.difference(printed, expected)
        return Outcome(status=TestStatus.FAILED if detail else TestStatus.PASSED, detail=detail)

    def _wait(self, sock: socket.socket) -> dict[str, Any] | Outcome:
        """The next frame on `sock`, or an Outcome when CPU or wall time ran out or its sender died."""
        self._clock.start()
        sock.settimeout(None)
        try:
            reply = frames.recv(_Watched(sock, self._clock), _REPLY_BYTES)
        except _TimeUpError as error:
            return error.outcome
        except (EOFError, OSError, frames.FrameError):
            return self._sender_died(sock)
        return (
            reply if isinstance(reply, dict) else Outcome(status=TestStatus.KILLED, detail="the program sent garbage")
        )

    def _sender_died(self, sock: socket.socket) -> Outcome:
        ended_solution, ended_evaluator = (usage.ended for usage in self._hang_up())
        if sock is not self._host and ended_evaluator is None:
            return Outcome(status=TestStatus.KILLED, detail=_how_it_ended(ended_solution))
        if (
            ended_evaluator is not None
            and os.WIFSIGNALED(ended_evaluator)
            and os.WTERMSIG(ended_evaluator) == signal.SIGKILL
        ):
            raise SandboxError("the evaluator was killed from outside, probably for lack of memory")
        return Outcome(
            status=TestStatus.KILLED, detail="the test's own process ended: " + _how_it_ended(ended_evaluator)
        )

    def _socketpair(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        for sock in pair:
            self._sockets.enter_context(sock)
        return pair

    def _hang_up(self) -> tuple[Usage, Usage]:
        """Kills both children."""
        self._close_host()
        solution, evaluator = self._solution.kill(), self._evaluator.kill()
        self._clock.seen_cpu_s = solution.cpu_s, evaluator.cpu_s
        return solution, evaluator

    def _close_host(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    def _send(self, sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        sock.settimeout(_SEND_S)
        try:
            frames.send(sock, message, tuple(fds))
        except frames.FrameError as error:
            raise SubmissionTooLargeError(f"the submission is too large: {error}") from None
        except OSError as error:
            raise SandboxError(f"could not hand over a message: {error}") from error


class _TimeUpError(Exception):
    """The clock said so while a frame was awaited."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _Watched:
    """A stream that looks at the clock while it waits, however slowly the other side sends."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock = sock
        self.sendall = sock.sendall
        self._clock = clock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._next_look = time.monotonic() + _FIRST_LOOK_S

    def recv(self, size: int) -> bytes:
        while True:
            left_s = self._next_look - time.monotonic()
            if left_s <= 0:
                if outcome := self._clock.look():
                    raise _TimeUpError(outcome)
                left_s = _LOOK_EVERY_S
                self._next_look = time.monotonic() + left_s
            if self._poll.poll(1000 * left_s):
                return self._sock.recv(size)


def _printable(detail: str) -> str:
    """One line that every file and terminal takes, although a program may have chosen its words."""
    line = " ".join(detail[: 4 * _MAX_DETAIL].split())[:_MAX_DETAIL]
    return "".join(char if char.isprintable() else "?" for char in line)


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "the program closed its line"
    if os.WIFSIGNALED(status):
        return f"the program died of signal {os.WTERMSIG(status)}"
    return f"the program ended by itself with exit status {os.WEXITSTATUS(status)}"


def _outcome_of_exception(wire: Any, ended: int | None) -> Outcome:
    """From [class name, module, nearest standard base, arguments, text], as a program sent it."""
    if not (isinstance(wire, list) and len(wire) == 5 and all(isinstance(wire[i], str) for i in (0, 2, 4))):
        return Outcome(status=TestStatus.KILLED, detail=_how_it_ended(ended))
    statuses = {
        "AssertionError": TestStatus.FAILED,
        "MemoryError": TestStatus.OUT_OF_MEMORY,
        "SystemExit": TestStatus.KILLED,
    }
    return Outcome(status=statuses.get(wire[2], TestStatus.ERROR), detail=f"{wire[0]}: {wire[4]}")


def _outcome_of_script(link: socket.socket, ended: int | None) -> Outcome:
    """Of a script that did not end well; the exception that it may have sent changes no failure into a pass."""
    if ended is None or os.WIFSIGNALED(ended):
        return Outcome(status=TestStatus.KILLED, detail=_how_it_ended(ended))
    try:
        link.setblocking(False)
        reply = frames.recv(link, _REPLY_BYTES)
    except (EOFError, OSError, frames.FrameError):
        reply = None
    outcome = _outcome_of_exception(reply.get("x") if isinstance(reply, dict) else None, ended)
    if outcome.status is TestStatus.OUT_OF_MEMORY:
        return outcome
    return Outcome(status=TestStatus.ERROR, detail=outcome.detail)
