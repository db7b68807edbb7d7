"""What one test came to, and when its time has run out. Used by the session."""

import time
from dataclasses import dataclass

from sandbox.judge.zygote_client import ZygoteClient
from sandbox.types import Limits, TestStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one test came to.

    Outcome(status=TestStatus.FAILED, detail="AssertionError")
    """

    status: TestStatus
    detail: str = ""


class Clock:
    """CPU and wall-clock time of the test that runs now."""

    def __init__(self, solution: ZygoteClient, evaluator: ZygoteClient, limits: Limits) -> None:
        self._clients = solution, evaluator
        self._limits = limits
        self.seen_cpu_s = 0.0, 0.0  # last known totals of the submission, of program and evaluator
        self.wall_timeouts = 0  # tests of this submission that ran into the wall-clock limit
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()
        self._base: list[float] | None = None
        self.ended: int | None = None  # wait status of the program, once it is seen to have ended by itself

    def look(self) -> Outcome | None:
        """An Outcome when the test's time has run out."""
        elapsed = time.monotonic() - self._started
        program, evaluator = (client.usage() for client in self._clients)
        now = program.cpu_s, evaluator.cpu_s
        if self._base is None:  # totals at the start of this test, as far as is known now
            self._base = [max(seen, cpu_s - elapsed) for seen, cpu_s in zip(self.seen_cpu_s, now, strict=True)]
        self.seen_cpu_s, self.ended = now, program.ended
        if max(cpu_s - base for cpu_s, base in zip(now, self._base, strict=True)) >= self._limits.cpu_s:
            return Outcome(status=TestStatus.TIMEOUT, detail=f"more than {self._limits.cpu_s:g} s of CPU time")
        if elapsed >= self._limits.wall_s:
            self.wall_timeouts += 1
            return Outcome(status=TestStatus.TIMEOUT, detail=f"no answer within {self._limits.wall_s:g} s")
        return None
