"""`make bench-judge`: wall time per submission, warm two-process judge against what a user would otherwise have: one
isolated interpreter (`python -I -S` in bubblewrap) per submission, code and asserts in one process, exit status as verdict.

Both sides run the same submissions, alternating, and must agree on which ones pass.
"""

import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from sandbox.process import ProcessSandbox
from sandbox.types import Submission, TestStatus

ROUNDS = 40
TESTS = tuple(f"assert f({x}) == {x * x}" for x in (2, 3, -1, 10))
PROGRAMS = {"right": "def f(x):\n    return x * x\n", "wrong": "def f(x):\n    return x + 2\n"}
BWRAP = ("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev")


def fresh_interpreter(code: str) -> bool:
    """One bubblewrap and one interpreter for the whole submission."""
    program = code + "\n".join(TESTS)
    return subprocess.run([*BWRAP, sys.executable, "-I", "-S", "-c", program], capture_output=True).returncode == 0


def warm_judge(sandbox: ProcessSandbox) -> Callable[[str], bool]:
    def judge(code: str) -> bool:
        verdict = sandbox.judge(Submission(id="bench", code=code, tests=TESTS))
        return all(status == TestStatus.PASSED for status in verdict.statuses)

    return judge


def main() -> None:
    assert shutil.which("bwrap"), "needs bubblewrap: apt-get install bubblewrap"
    with ProcessSandbox() as sandbox:
        sides = {"warm two-process judge": warm_judge(sandbox), "fresh interpreter": fresh_interpreter}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for kind, code in PROGRAMS.items():
                for name, judge in sides.items():
                    started = time.perf_counter()
                    passed = judge(code)
                    times[name].append(1000 * (time.perf_counter() - started))
                    assert passed == (kind == "right"), (name, kind)
    print(f"{platform.machine()}, Python {platform.python_version()}; {ROUNDS} rounds of a right and a wrong program")
    for name, values in times.items():
        low, median, high = (statistics.quantiles(values, n=20)[i] for i in (0, 9, 18))
        print(f"{name}: median {median:.1f} ms, 5..95% {low:.1f}..{high:.1f}")
    one, other = (statistics.median(values) for values in times.values())
    print(f"ratio {other / one:.1f}")


if __name__ == "__main__":
    main()
