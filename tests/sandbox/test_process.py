"""The process backend: statuses one by one, what crosses the link, recovery, and the refusal without bubblewrap."""

import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.process import ProcessSandbox, require_available
from sandbox.types import (
    Limits,
    SandboxError,
    SandboxUnavailableError,
    Submission,
    TestMode,
    TestStatus,
    Verdict,
)

SHORT = Limits(cpu_s=0.5, wall_s=1.5)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ProcessSandbox]:
    with ProcessSandbox() as sandbox:
        yield sandbox


def judge(
    sandbox: ProcessSandbox,
    code: str,
    *tests: str,
    mode: TestMode = TestMode.ASSERTS,
    entry_point: str | None = None,
    setup: str = "",
) -> Verdict:
    submission = Submission(
        id="t", code=code, tests=tests, mode=mode, entry_point=entry_point, setup=setup, limits=SHORT
    )
    return sandbox.judge(submission)


def zygote_pid(sandbox: ProcessSandbox, which: int) -> int:
    assert sandbox._pair is not None
    pid = sandbox._pair[which]._process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("return x * x", TestStatus.PASSED),
        ("return x", TestStatus.FAILED),
        ("raise ValueError(x)", TestStatus.ERROR),
        ("assert False", TestStatus.FAILED),
        ("return len(bytearray(8 << 30))", TestStatus.OUT_OF_MEMORY),
        ("import os; os._exit(0)", TestStatus.KILLED),
        ("import sys; sys.exit(0)", TestStatus.KILLED),
        ("import os; os.kill(os.getpid(), 9)", TestStatus.KILLED),
        ("while True: pass", TestStatus.TIMEOUT),
        ("import time; time.sleep(60)", TestStatus.TIMEOUT),
    ],
)
def test_status(sandbox: ProcessSandbox, body: str, status: TestStatus) -> None:
    verdict = judge(sandbox, f"def f(x):\n    {body}\n", "assert f(3) == 9")
    assert verdict.statuses == (status,)
    assert verdict.trust == "high"
    assert (verdict.details == ("",)) == (status is TestStatus.PASSED)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def f(x) return x", TestStatus.ERROR),
        ("import sys; sys.exit(0)", TestStatus.KILLED),
        ("while True: pass", TestStatus.TIMEOUT),
        ("x = bytearray(8 << 30)", TestStatus.OUT_OF_MEMORY),
    ],
)
def test_code_that_does_not_load_costs_all_tests_once(sandbox: ProcessSandbox, code: str, status: TestStatus) -> None:
    started = time.monotonic()
    verdict = judge(sandbox, code, *["assert f(3) == 9"] * 50)
    assert verdict.statuses == (status,) * 50
    assert time.monotonic() - started < 10  # fifty times 0.5 s would be more


def test_sleeping_tests_end_with_not_run(sandbox: ProcessSandbox) -> None:
    verdict = judge(sandbox, "import time\ndef f(x): time.sleep(60)", *["assert f(3) == 9"] * 4)
    assert verdict.statuses == (TestStatus.TIMEOUT,) * 2 + (TestStatus.NOT_RUN,) * 2


def test_a_hang_costs_one_test_and_the_program_starts_again(sandbox: ProcessSandbox) -> None:
    code = "n = 0\ndef f(x):\n    global n\n    n += 1\n    while x == 1: pass\n    return n\n"
    verdict = judge(sandbox, code, "assert f(0) == 1", "assert f(1)", "assert f(0) == 1", "assert f(0) == 2")
    assert verdict.statuses == (
        TestStatus.PASSED,
        TestStatus.TIMEOUT,
        TestStatus.PASSED,
        TestStatus.PASSED,
    )


def test_a_test_that_hangs_is_a_timeout(sandbox: ProcessSandbox) -> None:
    verdict = judge(sandbox, "def f(x): return x", "while True: pass", "assert f(1) == 1")
    assert verdict.statuses == (TestStatus.TIMEOUT, TestStatus.PASSED)


def test_arguments_changed_in_place_come_back(sandbox: ProcessSandbox) -> None:
    code = """
def f(a, d, s, *, m):
    a.append(4); d["k"] = [1]; s.discard(1); m[0][0] = 7
"""
    test = """
a, d, s, row = [3], {}, {1, 2}, [0]
m = [row, [1]]
assert f(a, d, s, m=m) is None
assert (a, d, s, m) == ([3, 4], {"k": [1]}, {2}, [[7], [1]])
assert row == [7]
"""
    assert judge(sandbox, code, test).statuses == (TestStatus.PASSED,)


@pytest.mark.parametrize(
    ("code", "test"),
    [
        (  # exception classes, builtin and the program's own, with their arguments
            "class Mine(KeyError): pass\ndef f(x):\n    if x: raise ValueError('no', 3)\n    raise Mine('k')",
            """
try: f(1)
except ValueError as error: assert error.args == ("no", 3)
else: assert False
try: f(0)
except Mine as error: assert isinstance(error, KeyError) and error.args == ("k",)
else: assert False""",
        ),
        ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x + 1, [1, 2]) == [2, 3]"),
        (
            "def f(g): return g(g(5))\ndef h(x): return x * 2",
            "assert f(h) == 20 and f(lambda x: h(x) + 1) == 23",
        ),
        (
            "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
            "g = f(); assert [next(g) for _ in range(20)] == [*range(20)]",
        ),
        ("def f(xs, t): return [x for x in xs if type(x) is t]", "assert f(iter([1, 'a', 2.0]), int) == [1]"),
        ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
        ("import math\nTABLE = [1, 2]\ndef f(x): return x", "assert f(math.pi) == math.pi and TABLE == [1, 2]"),
        ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
        (
            "class Stack:\n    def __init__(self): self.items = []\n"
            "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()",
            "s = Stack(); s.push(3); s.push([4]); assert s.pop() == [4] and s.items == [3]",
        ),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
            "assert f().y == 2",
        ),
    ],
)
def test_honest_programs_pass(sandbox: ProcessSandbox, code: str, test: str) -> None:
    verdict = judge(sandbox, code, test)
    assert (verdict.statuses, verdict.trust) == ((TestStatus.PASSED,), "high"), verdict.details


LIAR = "class A:\n" + "".join(
    f"    def __{name}__(s, *o): return {value}\n"
    for name, value in {
        **dict.fromkeys(("eq", "lt", "gt", "le", "ge", "contains", "bool"), "True"),
        "ne": "False",
        "len": "3",
        "abs": "0",
        "iter": "iter([1, 2, 3])",
    }.items()
)


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == 4",
        "assert 4 == f(1)",
        "assert not f(1) != 4",
        "assert f(1) in [4]",
        "assert 4 in f(1)",
        "assert f(1)",
        "assert f(1) < 4",
        "assert len(f(1)) == 3",
        "assert abs(f(1) - 4) < 1e-6",
        "assert abs(f(1)) < 1e-6",
        "assert sorted(f(1)) == [1, 2, 3]",
        "assert [f(1)] == [4]",
        "assert str(f(1)) == '4'",
        "try: assert f(1) == 5\nexcept AssertionError: pass",
    ],
)
def test_an_instance_of_the_programs_class_decides_nothing(sandbox: ProcessSandbox, test: str) -> None:
    verdict = judge(sandbox, LIAR + "def f(x): return A()", test)
    assert (verdict.statuses, verdict.trust) == ((TestStatus.FAILED,), "high")
    as_class = judge(sandbox, LIAR.replace("class A:", "class f:\n    def __init__(s, x): pass"), "assert f(1) == 4")
    assert as_class.statuses == (TestStatus.FAILED,)


def test_a_dead_program_does_not_pass_a_test_that_expects_an_exception(sandbox: ProcessSandbox) -> None:
    test = "try:\n    f(1)\n    assert False\nexcept:\n    pass"
    assert judge(sandbox, "import os\ndef f(x): os._exit(0)", test).statuses == (TestStatus.KILLED,)


@pytest.mark.parametrize("name", ["abs", "math", "isinstance", "all"])
def test_a_program_does_not_decide_what_builtins_mean_to_the_tests(sandbox: ProcessSandbox, name: str) -> None:
    code = f"class L:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 0\ndef {name}(*a): return 0\n"
    code += "math = L\n" if name == "math" else ""
    tests = {
        "abs": "assert abs(f(2) - 4) < 1e-6",
        "math": "assert math.isclose(f(2), 4)",
        "isinstance": "assert isinstance(f(2), str) == 0 and f(2) == 4",
        "all": "assert all([f(2) == 4]) != 0",
    }
    assert judge(sandbox, code, tests[name]).statuses == (TestStatus.FAILED,)


def test_tests_that_need_the_real_classes_run_beside_with_low_trust(sandbox: ProcessSandbox) -> None:
    code = (
        "class P:\n    def __init__(s, x): s.x = x\n"
        "    def __eq__(s, o): return s.x == o.x\n    def __len__(s): return s.x"
    )
    tests = "assert P(1) == P(1)", "assert P(1) == P(2)", "assert len(P(3)) == 3", "assert P(1).x == 1"
    verdict = judge(sandbox, code, *tests)
    passed, failed = TestStatus.PASSED, TestStatus.FAILED
    assert (verdict.statuses, verdict.trust) == ((passed, failed, passed, passed), "low")


def test_check_function_with_helpers_of_the_program(sandbox: ProcessSandbox) -> None:
    code = "def poly(xs, x): return sum(c * x**i for i, c in enumerate(xs))\ndef root(xs): return -xs[0] / xs[1]"
    check = "def check(candidate):\n    assert abs(poly([2, 4], candidate([2, 4]))) < 1e-9\n"
    check_function = TestMode.CHECK_FUNCTION
    verdict = judge(sandbox, code, check, mode=check_function, entry_point="root")
    assert verdict.statuses == (TestStatus.PASSED,)
    missing = judge(sandbox, code, check, mode=check_function, entry_point="roots")
    assert missing.statuses == (TestStatus.ERROR,)
    assert "roots" in missing.details[0]


def test_setup_runs_before_each_test(sandbox: ProcessSandbox) -> None:
    setup = "import math\nxs = [1]\ndef twice(x): return f(x) * 2"
    tests = "xs.append(2); assert twice(math.floor(2.5)) == 4", "assert xs == [1] and undefined == f(1)"
    verdict = judge(sandbox, "def f(x): return x", *tests, setup=setup)
    assert verdict.statuses == (TestStatus.PASSED, TestStatus.ERROR)
    assert "undefined" in verdict.details[1]


SPY = """
import glob, os, sys
def f(what):
    if what == "files": return sorted(os.listdir("/tmp") + os.listdir("/dev/shm"))
    if what == "env": return dict(os.environ)
    if what == "fds": return len(os.listdir("/proc/self/fd"))
    if what == "pids": return sorted(int(p) for p in os.listdir("/proc") if p.isdecimal())[:1]
    if what == "caps": return [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
    if what == "leave":
        for folder in ("/tmp", "/dev/shm"):
            os.makedirs(folder + "/a/b"); open(folder + "/a/b/c", "w").write("x"); os.chmod(folder + "/a", 0)
        return "left"
    try: open(what, "a").close()
    except OSError: return "refused"
    return "written"
"""


def test_the_program_sees_and_keeps_nothing(sandbox: ProcessSandbox) -> None:
    home, repository = os.path.expanduser("~"), Path(__file__).parents[2]
    tests = [
        "assert f('files') == []",
        "assert f('env') == {}",
        "assert f('fds') <= 5",
        "assert f('pids') == [1]",
        "assert f('caps') == ['0000000000000000']",
        *(
            f"assert f({path!r}) == 'refused'"
            for path in ("/x", "/dev/x", "/usr/x", "/opt/judge/x", f"{home}/x", f"{repository}/x")
        ),
        "assert f('leave') == 'left'",
    ]
    for _ in range(2):  # the second submission meets what the first one left
        verdict = judge(sandbox, SPY, *tests)
        assert verdict.statuses == (TestStatus.PASSED,) * len(tests), verdict.details


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls by their numbers on x86_64")
def test_system_calls_that_reach_beyond_the_program_are_refused(sandbox: ProcessSandbox) -> None:
    code = """
import ctypes, errno, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def f(number, *arguments):
    return "done" if libc.syscall(number, *arguments) >= 0 else errno.errorcode[ctypes.get_errno()]
def limits(pid):
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)
"""
    new_user, new_everything = 0x10000000, 0x7E020000
    tests = (
        f"assert f(272, {new_user}) == 'EPERM'",  # unshare
        f"assert f(56, {new_everything} | 17, 0, 0, 0, 0) == 'EPERM'",  # clone
        "assert f(435, 0, 0) == 'ENOSYS'",  # clone3
        "assert f(250, 0, -3, 1) == 'EPERM'",  # keyctl
        "assert f(321, 0, 0, 0) == 'EPERM'",  # bpf
        "assert f(302, 1, 7, 0, 0) == 'EPERM'",  # prlimit64 of the zygote
        "assert f(302, 0, 7, 0, 0) == 'done' and limits(0)[0] > 0",  # of itself
        "import os; assert os.getpid() > 1",
    )
    verdict = judge(sandbox, code, *tests)
    assert verdict.statuses == (TestStatus.PASSED,) * len(tests), verdict.details


@pytest.mark.parametrize("which", [0, 1], ids=["solution", "evaluator"])
def test_a_dead_zygote_is_a_sandbox_error_and_the_next_call_recovers(which: int) -> None:
    with ProcessSandbox() as sandbox:
        assert judge(sandbox, "def f(x): return x", "assert f(1) == 1").statuses == (TestStatus.PASSED,)
        os.kill(zygote_pid(sandbox, which), signal.SIGKILL)
        with pytest.raises(SandboxError):
            judge(sandbox, "def f(x): return x", "assert f(1) == 1")
        assert judge(sandbox, "def f(x): return x", "assert f(1) == 1").statuses == (TestStatus.PASSED,)


def test_sandboxes_are_recycled() -> None:
    with ProcessSandbox(recycle_after=2) as sandbox:
        pids = []
        for _ in range(2):
            judge(sandbox, "", "assert True")
            pids.append(zygote_pid(sandbox, 0))
            judge(sandbox, "", "assert True")
        assert pids[0] != pids[1]


def test_refusal_without_bubblewrap_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailableError) as raised:
        require_available()
    message = str(raised.value)
    assert "apt-get install bubblewrap" in message and "sandbox.allow_unisolated: true" in message
    assert "\n" not in message
    with pytest.raises(SandboxUnavailableError):
        ProcessSandbox()


def test_refusal_when_bubblewrap_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxUnavailableError, match="No permissions to create a namespace"):
        require_available()


def test_plain_subprocesses_when_the_user_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ProcessSandbox(allow_unisolated=True) as sandbox:
        code = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    while x == 3: pass\n    return x * x"
        verdict = judge(sandbox, code, "assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16")
    passed, killed, timeout = TestStatus.PASSED, TestStatus.KILLED, TestStatus.TIMEOUT
    assert verdict.statuses == (passed, killed, timeout, passed)
