"""Two tiny programs of ours, a right and a wrong one: a sandbox that judges either of them otherwise is broken."""

from sandbox.types import Limits, Sandbox, SandboxError, Submission, TestStatus

_TESTS = ("assert f(3) == 9", "assert f(-2) == 4")
_LIMITS = Limits(cpu_s=5.0, wall_s=60.0)
_PROGRAMS = {
    "right": ("def f(x):\n    return x * x\n", (TestStatus.PASSED, TestStatus.PASSED)),
    "wrong": ("def f(x):\n    return x * 3\n", (TestStatus.PASSED, TestStatus.FAILED)),
}


class CanaryError(SandboxError):
    """A program of ours got another verdict than it must get; the message names it."""


def require_canary(sandbox: Sandbox) -> None:
    """Returns when both programs are judged as they must be; else CanaryError, or the sandbox's own SandboxError."""
    for name, (code, expected) in _PROGRAMS.items():
        verdict = sandbox.judge(Submission(id=f"canary/{name}", code=code, tests=_TESTS, limits=_LIMITS))
        if verdict.statuses != expected or verdict.trust != "high":
            raise CanaryError(
                f"the {name} canary must be judged {', '.join(expected)}, and was judged"
                f" {', '.join(verdict.statuses)} with {verdict.trust} trust"
            )
