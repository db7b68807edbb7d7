"""`make bench-judge`: what one judged program costs, against what a user would otherwise have.

Side by side, in rounds: both backends of ours, warm; `docker run`, `docker exec` into a warm container and bubblewrap,
each with one interpreter per program (code, then all asserts; exit status 0 passes); and one interpreter per assert.
CPU is that of the whole machine (engine and kernel included), so nothing else should run. Programs are judged one after
the other; the warm backends also at two slots. All of them must agree on which programs pass.
"""

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox.container import ContainerSandbox
from sandbox.image.build import build_image
from sandbox.process import ProcessSandbox
from sandbox.types import Sandbox, Submission, TestStatus
from tests.container_engine import container_engine

ROUNDS = 5
TAG = "diffrl-sandbox:bench"
RIGHT, WRONG = "def f(x):\n    return x * x\n", "def f(x):\n    return x * x if x < 2 else 0\n"
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
BWRAP = ("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev")
RUN = ("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")

Judge = Callable[[str, tuple[str, ...]], bool]  # code, asserts -> whether all pass


def exits_well(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def warm(sandbox: Sandbox) -> Judge:
    def judge(code: str, tests: tuple[str, ...]) -> bool:
        verdict = sandbox.judge(Submission(id="bench", code=code, tests=tests))
        return all(status == TestStatus.PASSED for status in verdict.statuses)

    return judge


def whole_program(*command: str) -> Judge:
    return lambda code, tests: exits_well(*command, code + "\n".join(tests))


def interpreter_per_assert(code: str, tests: tuple[str, ...]) -> bool:
    passed = [exits_well(sys.executable, "-I", "-S", "-c", code + test) for test in tests]
    return all(passed)


def busy_s() -> float:
    """CPU seconds that the machine has spent on anything since it started."""
    user, nice, system, _, _, irq, softirq, *_ = (int(word) for word in Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(judge: Judge, tests: tuple[str, ...], programs: int, slots: int) -> tuple[float, float]:
    """(CPU ms per program, programs per second)"""
    codes = [RIGHT, WRONG] * (programs // 2)
    cpu, started = busy_s(), time.perf_counter()
    with ThreadPoolExecutor(slots) as threads:
        passed = list(threads.map(lambda code: judge(code, tests), codes))
    wall, cpu = time.perf_counter() - started, busy_s() - cpu
    assert passed == [code is RIGHT for code in codes], "wrong verdicts"
    return 1000 * cpu / programs, programs / wall


def main() -> None:
    for tool in ("bwrap", "docker"):
        assert shutil.which(tool), f"needs {tool}: run `make system engine`"
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(container_engine())
        build_image("base", TAG, engine_url=engine)
        docker = ("docker", "--host", engine)
        keeper = subprocess.check_output(
            [*docker, "run", "--detach", "--rm", *RUN, "--entrypoint=/usr/bin/sleep", TAG, "3600"], text=True
        ).strip()
        stack.callback(subprocess.run, [*docker, "kill", keeper], capture_output=True)
        container = stack.enter_context(ContainerSandbox(image=TAG, slots=2, engine_url=engine))
        process = stack.enter_context(ProcessSandbox())
        python = (sys.executable, "-I", "-S", "-c")
        run = (*docker, "run", "--rm", *RUN, f"--entrypoint={PYTHON[0]}", TAG, *PYTHON[1:])
        sides: dict[str, tuple[Judge, int, int]] = {  # judge, programs in a round, slots
            "docker backend": (warm(container), 100, 1),
            "docker backend, 2 slots": (warm(container), 100, 2),
            "process backend": (warm(process), 100, 1),
            "docker run per program": (whole_program(*run), 6, 1),
            "docker exec per program": (whole_program(*docker, "exec", keeper, *PYTHON), 10, 1),
            "bubblewrap per program": (whole_program(*BWRAP, *python), 20, 1),
            "interpreter per assert, no sandbox": (interpreter_per_assert, 10, 1),
        }
        results = {(name, count): [] for name in sides for count in (1, 15)}
        for _ in range(ROUNDS):
            for name, count in results:
                judge, programs, slots = sides[name]
                tests = tuple(f"assert f({x}) == {x * x}" for x in range(3, 3 + count))
                results[name, count].append(measure(judge, tests, programs, slots))
    report(results)


def report(results: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    cpu = {key: statistics.median(ms for ms, _ in rounds) for key, rounds in results.items()}
    rate = {key: statistics.median(per_s for _, per_s in rounds) for key, rounds in results.items()}
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; medians of {ROUNDS} rounds\n"
    )
    print("| | 1 assert: CPU ms | programs/s | 15 asserts: CPU ms | programs/s |\n|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in results):
        cells = [f"{cpu[name, count]:.1f} | {rate[name, count]:.1f}" for count in (1, 15)]
        print(f"| {name} | {' | '.join(cells)} |")
    docker, process = "docker backend", "process backend"
    per_assert = cpu["interpreter per assert, no sandbox", 15]
    print(
        f"\n15 asserts, CPU: an interpreter per assert costs {per_assert / cpu[docker, 15]:.1f} times the docker backend,"
    )
    print(f"  {per_assert / cpu[process, 15]:.1f} times the process backend (target: 10)")
    print(
        f"1 assert, CPU: docker run costs {cpu['docker run per program', 1] / cpu[docker, 1]:.1f} times the docker backend"
    )
    print(
        f"  (target: 20)\ndocker backend / process backend, CPU: {cpu[docker, 1] / cpu[process, 1]:.2f} for 1 assert,"
    )
    print(f"  {cpu[docker, 15] / cpu[process, 15]:.2f} for 15 (target: between 0.67 and 1.5)")


if __name__ == "__main__":
    main()
