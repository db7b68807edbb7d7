"""The host's side of one submission: two sandboxes in, a verdict out. Every backend runs this.

One sandbox runs the program, the other the tests; for each pair of children the host makes a fresh socket between
them, so a leftover of an earlier program has no line to anyone. The host drives test by test, so what hangs or dies
costs one test: both children are replaced, the code is run again, the rest still runs.

Time. A test fails with `timeout` when the program (or the test itself) has used `cpu_s` CPU seconds in it. `wall_s`
is for what sleeps or waits. When two tests have run into `wall_s`, or the submission has taken 2 * wall_s + cpu_s *
tests in all, the remaining tests are `not_run`. The top-level code has the same limits; when it fails, every test
gets its outcome at once.

Failures of the zygotes raise SandboxError. Whatever the two children do, die of, or send, is the program's outcome.
"""

import contextlib
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from sandbox.judge import frames
from sandbox.types import Limits, SandboxError, Submission, TestStatus, Verdict

_FIRST_LOOK_S, _LOOK_EVERY_S = 0.05, 0.1  # how often a running test's CPU time is measured
_ZYGOTE_ANSWER_S = 60.0  # a zygote answers at once; this long means that it is lost, whatever the load
_REPLY_BYTES = 1 << 20
_EVALUATOR_MEMORY_MB = 1024
_FILE_BYTES = 32 << 20
_GRADED = {status.value: status for status in TestStatus}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one test came to.

    Outcome(status=TestStatus.FAILED, detail="AssertionError")
    """

    status: TestStatus
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A zygote's answer: CPU seconds below it, how its child ended by itself (a wait status), whether it is still fit
    for use.

    Usage(cpu_s=0.21, ended=9, dirty=False)
    """

    cpu_s: float
    ended: int | None
    dirty: bool = False


class ZygoteClient:
    """The host's end of a zygote's control socket. Any trouble raises SandboxError."""

    def __init__(self, control: socket.socket, max_processes_base: int = 0) -> None:
        self._control = control
        self._control.settimeout(_ZYGOTE_ANSWER_S)
        self._max_processes_base = max_processes_base

    def hello(self) -> None:
        """Waits for the zygote's first word."""
        self._receive()

    def spawn(self, sock: socket.socket, memory_mb: int, max_processes: int) -> None:
        """Starts a child that owns `sock`; the host's copy of it is closed."""
        limits = {
            "AS": memory_mb << 20,
            "NPROC": max_processes + self._max_processes_base,
            "FSIZE": _FILE_BYTES,
            "NOFILE": 128,
            "CORE": 0,
            "MSGQUEUE": 0,
        }
        with sock:
            self._ask({"op": "spawn", "limits": limits}, (sock.fileno(),))

    def usage(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "usage"})))

    def kill(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "kill"})))

    def end(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "end"})))

    @staticmethod
    def _renamed(answer: dict[str, Any]) -> dict[str, Any]:
        return {"cpu_s": answer.pop("cpu"), **answer}

    def _ask(self, request: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        except OSError as error:
            raise SandboxError(f"the sandbox left: {error}") from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._control.recv(1 << 16)
        except OSError as error:
            raise SandboxError(f"the sandbox does not answer: {error}") from error
        if not data:
            raise SandboxError("the sandbox left")
        return json.loads(data)


class Session:
    """One submission in one pair of sandboxes; `run` is called once."""

    def __init__(self, solution: ZygoteClient, evaluator: ZygoteClient, submission: Submission) -> None:
        self._solution = solution
        self._evaluator = evaluator
        self._submission = submission
        self._limits: Limits = submission.limits
        self._sockets = contextlib.ExitStack()  # whatever is still open when something fails
        self._host: socket.socket | None = None  # to the evaluator's child while both children live
        self._evaluator_cpu_s = self._solution_cpu_s = 0.0  # last seen totals
        self._wall_timeouts = 0
        self._trust = "high"
        self.dirty = False

    def run(self) -> Verdict:
        """Judges the submission and leaves both sandboxes empty. Raises SandboxError."""
        with self._sockets:
            return self._run()

    def _run(self) -> Verdict:
        tests = self._submission.tests
        deadline = time.monotonic() + 2 * self._limits.wall_s + self._limits.cpu_s * len(tests)
        outcomes: list[Outcome] = []
        broken = self._load()
        for test in tests:
            if broken is None and (self._wall_timeouts >= 2 or time.monotonic() > deadline):
                broken = Outcome(status=TestStatus.NOT_RUN, detail="the submission's total time ran out")
            if broken is None and self._host is None:
                broken = self._load()
            outcomes.append(broken or self._test(test))
        self._hang_up()
        ended = self._solution.end(), self._evaluator.end()
        self.dirty = any(usage.dirty for usage in ended)
        return Verdict(
            id=self._submission.id,
            statuses=tuple(outcome.status for outcome in outcomes),
            details=tuple(outcome.detail for outcome in outcomes),
            cpu_s=ended[0].cpu_s,
            trust=self._trust,
        )

    def _load(self) -> Outcome | None:
        """Starts both children and waits until the program's top level has run; an Outcome when that failed."""
        program = self._start_program(beside=False)
        host, theirs = self._socketpair()
        self._host = host
        self._evaluator.spawn(theirs, max(self._limits.memory_mb, _EVALUATOR_MEMORY_MB), self._limits.max_processes)
        job = {
            "op": "link",
            "mode": self._submission.mode.value,
            "setup": self._submission.setup,
            "entry_point": self._submission.entry_point,
        }
        program.settimeout(None)  # O_NONBLOCK would travel with the descriptor
        with program:
            self._send(host, job, (program.fileno(),))
        reply = self._wait(host)
        if isinstance(reply, dict) and reply["status"] == "loaded":
            return None
        return self._settle(reply)

    def _start_program(self, *, beside: bool) -> socket.socket:
        """A fresh child of the solution's zygote with the code in hand; returns the other end of its socket."""
        ours, theirs = self._socketpair()
        self._solution.spawn(theirs, self._limits.memory_mb, self._limits.max_processes)
        self._send(ours, {"code": self._submission.code, "beside": beside})
        return ours

    def _test(self, source: str) -> Outcome:
        assert self._host is not None
        self._send(self._host, {"op": "test", "source": source})
        reply = self._wait(self._host)
        if isinstance(reply, dict) and reply["status"] == "beside":
            self._hang_up()
            return self._test_beside(source)
        return self._settle(reply)

    def _settle(self, reply: dict[str, Any] | Outcome) -> Outcome:
        """An outcome from the evaluator's reply, or from the lack of one; children that are spoilt are dropped."""
        if isinstance(reply, Outcome):
            self._hang_up()
            return reply
        if reply["status"] in _GRADED:
            return Outcome(status=_GRADED[reply["status"]], detail=reply["detail"])
        ended = self._hang_up()[0].ended
        return Outcome(status=TestStatus.KILLED, detail=_how_it_ended(ended))

    def _test_beside(self, source: str) -> Outcome:
        """Runs a test in the program's own process. What that process says is believed: low trust."""
        self._trust = "low"
        submission = self._submission
        with self._start_program(beside=True) as program:
            reply = self._wait(program)
            if isinstance(reply, dict) and reply.get("loaded") is True:
                job = {
                    "setup": submission.setup,
                    "source": source,
                    "mode": submission.mode.value,
                    "entry_point": submission.entry_point,
                }
                try:
                    self._send(program, job)
                except SandboxError:  # the program left, which is its own affair
                    reply = Outcome(status=TestStatus.KILLED, detail="the program left")
                else:
                    reply = self._wait(program)
            ended = self._hang_up()[0].ended
        if isinstance(reply, Outcome):
            return reply
        if reply.get("passed") is True:
            return Outcome(status=TestStatus.PASSED, detail="ran beside the solution")
        return _outcome_of_exception(reply.get("x"), ended)

    def _wait(self, sock: socket.socket) -> dict[str, Any] | Outcome:
        """The next frame on `sock`, or an Outcome when CPU or wall time ran out or its sender died."""
        started = time.monotonic()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        look_s = _FIRST_LOOK_S
        base: tuple[float, float] | None = None
        while not poll.poll(look_s * 1000):
            look_s = _LOOK_EVERY_S
            elapsed = time.monotonic() - started
            solution, evaluator = self._solution.usage(), self._evaluator.usage()
            if base is None:  # totals at the start of this test, as far as is known now
                base = (
                    max(self._solution_cpu_s, solution.cpu_s - elapsed),
                    max(self._evaluator_cpu_s, evaluator.cpu_s - elapsed),
                )
            self._solution_cpu_s, self._evaluator_cpu_s = solution.cpu_s, evaluator.cpu_s
            if max(solution.cpu_s - base[0], evaluator.cpu_s - base[1]) >= self._limits.cpu_s:
                return Outcome(status=TestStatus.TIMEOUT, detail=f"more than {self._limits.cpu_s:g} s of CPU time")
            if elapsed >= self._limits.wall_s:
                self._wall_timeouts += 1
                return Outcome(status=TestStatus.TIMEOUT, detail=f"no answer within {self._limits.wall_s:g} s")
        try:
            sock.settimeout(max(1.0, self._limits.wall_s))
            reply = frames.recv(sock, _REPLY_BYTES)
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
        if self._host is not None:
            self._host.close()
            self._host = None
        solution, evaluator = self._solution.kill(), self._evaluator.kill()
        self._solution_cpu_s, self._evaluator_cpu_s = solution.cpu_s, evaluator.cpu_s
        return solution, evaluator

    def _send(self, sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        sock.settimeout(_ZYGOTE_ANSWER_S)
        try:
            frames.send(sock, message, fds)
        except (OSError, frames.FrameError) as error:
            raise SandboxError(f"could not hand over a message: {error}") from error


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
    return Outcome(status=statuses.get(wire[2], TestStatus.ERROR), detail=f"{wire[0]}: {wire[4]}"[:200])
