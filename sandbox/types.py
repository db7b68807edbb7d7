"""What crosses the border of the sandbox: a Submission goes in, a Verdict comes out, or a SandboxError is raised.

A Verdict says something about the PROGRAM. A SandboxError says that the judge itself failed and that nothing
is known about the program: it is retried elsewhere, and it is never turned into a reward.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class TestStatus(StrEnum):
    """Outcome of one graded test. Only `PASSED` pays."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    PASSED = "passed"
    FAILED = "failed"  # an assertion did not hold
    ERROR = "error"  # the program or the test raised something else
    TIMEOUT = "timeout"  # CPU seconds or the wide wall-clock limit ran out
    OUT_OF_MEMORY = "out_of_memory"
    KILLED = "killed"  # the program died or left before it answered (sys.exit, os._exit, a signal)
    NOT_RUN = "not_run"  # the submission's total time ran out before this test


class TestMode(StrEnum):
    """How the strings in `Submission.tests` are run against the code."""

    __test__ = False

    ASSERTS = "asserts"  # each test is Python source whose asserts call the solution (MBPP, AceCode)
    CHECK_FUNCTION = "check_function"  # each test defines check(candidate); candidate is the entry point (HumanEval)
    STDIN = "stdin"  # each test is JSON {"stdin": text, "stdout": text}; the code is a whole script
    UNITTEST = "unittest"  # each test defines unittest.TestCase classes that use the entry point (BigCodeBench)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resources of one submission.

    Limits(cpu_s=2.0, wall_s=20.0, memory_mb=512, output_kb=1024, max_processes=32)

    CPU time decides a failure; wall time is a wide backstop, so a loaded node does not turn right answers into wrong ones.
    """

    cpu_s: float = 2.0  # CPU seconds for each test
    wall_s: float = 20.0  # wall-clock seconds for each test
    memory_mb: int = 512  # address space of the solution's process
    output_kb: int = 1024  # what a script may print (stdin mode); elsewhere what is printed is thrown away
    max_processes: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One program and the tests it is graded by.

    Submission(id="mbpp/2/0", code="def f(x):\\n    return x * x\\n", tests=("assert f(3) == 9",),
               mode=TestMode.ASSERTS, entry_point="f", setup="import math", limits=Limits())
    """

    id: str
    code: str
    tests: tuple[str, ...]
    mode: TestMode = TestMode.ASSERTS
    entry_point: str | None = None
    setup: str = ""  # source that the tests need (imports, helpers); runs before each test, beside the tests
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One status per test, in the order of `Submission.tests`.

    Verdict(id="mbpp/2/0", statuses=(TestStatus.PASSED,), details=("",), beside=(False,), cpu_s=0.004)
    """

    id: str
    statuses: tuple[TestStatus, ...]
    details: tuple[str, ...]  # one short human-readable line per test, "" when there is nothing to say
    beside: tuple[bool, ...]  # which tests ran beside the solution, or let its classes decide: it could forge them
    cpu_s: float  # CPU seconds of the solution over all tests

    @property
    def trust(self) -> str:
        """ "high": every test ran in another process than the solution; "low": at least one beside it."""
        return "low" if any(self.beside) else "high"


class SandboxError(Exception):
    """The judge failed; nothing is known about the program."""


class SandboxUnavailableError(SandboxError):
    """The backend cannot be used at all as things stand; the message names the way out."""


class SandboxRefusedError(SandboxError):
    """A pod that is full, or about to leave, did not take the submission; nothing is broken."""


class SubmissionTooLargeError(SandboxError):
    """The submission does not fit into a frame; no other sandbox will take it either."""


class Sandbox(Protocol):
    """A backend: something that judges. Methods may be called from several threads."""

    @property
    def name(self) -> str:
        """The word that selects this backend: docker, process or pod."""
        ...

    @property
    def slots(self) -> int:
        """How many submissions are judged at the same time."""
        ...

    def judge(self, submission: Submission) -> Verdict:
        """A verdict about the program. Raises SandboxError, and is then still usable, starting anew what broke."""
        ...

    def survivors(self) -> list[str]:
        """Processes, files and System V objects that judged programs left behind; empty when all is well."""
        ...

    def close(self) -> None:
        """Ends everything that was started. A later `judge` would start it again."""
        ...
