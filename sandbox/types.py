"""What crosses the border of the sandbox: a Submission goes in, a Verdict comes out, or a SandboxError is raised.

A Verdict says something about the PROGRAM. A SandboxError says that the judge itself failed and that nothing
is known about the program: it is retried elsewhere, and it is never turned into a reward.
"""

from dataclasses import dataclass
from enum import StrEnum


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resources of one submission.

    Limits(cpu_s=2.0, wall_s=20.0, memory_mb=512, output_kb=64, max_processes=32)

    CPU time decides a failure; wall time is a wide backstop, so a loaded node does not turn right answers into wrong ones.
    """

    cpu_s: float = 2.0  # CPU seconds for each test
    wall_s: float = 20.0  # wall-clock seconds for each test
    memory_mb: int = 512  # address space of the solution's process
    output_kb: int = 64  # what the solution may print before the rest is dropped
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

    Verdict(id="mbpp/2/0", statuses=(TestStatus.PASSED,), details=("",), cpu_s=0.004, trust="high")
    """

    id: str
    statuses: tuple[TestStatus, ...]
    details: tuple[str, ...]  # one short human-readable line per test, "" when there is nothing to say
    cpu_s: float  # CPU seconds of the solution over all tests
    trust: str  # "high": asserts ran in another process than the solution; "low": beside it


class SandboxError(Exception):
    """The judge failed; nothing is known about the program."""


class SandboxUnavailableError(SandboxError):
    """This machine cannot run the backend at all; the message names the way out."""
