"""Scripts (stdin mode) and unittests: what passes, what each failure is called, and what no program can forge."""

import contextlib
import json
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from sandbox.container import ContainerSandbox
from sandbox.judge.grading import runs_beside
from sandbox.process import ProcessSandbox
from sandbox.types import Limits, Sandbox, Submission, TestMode, TestStatus, Verdict

LIMITS = Limits(cpu_s=1.0, wall_s=15)
PASSED, FAILED, ERROR, KILLED = TestStatus.PASSED, TestStatus.FAILED, TestStatus.ERROR, TestStatus.KILLED


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if request.param == "process":
        sandbox: Sandbox = ProcessSandbox()
    else:
        url, image = (request.getfixturevalue(name) for name in ("container_engine", "judge_image"))
        sandbox = ContainerSandbox(image=image, slots=1, engine_url=url)
    with contextlib.closing(sandbox):
        yield sandbox


def run_script(sandbox: Sandbox, code: str, *cases: tuple[str, str], limits: Limits = LIMITS) -> Verdict:
    tests = tuple(json.dumps({"stdin": stdin, "stdout": stdout}) for stdin, stdout in cases)
    verdict = sandbox.judge(Submission(id="t", code=code, tests=tests, mode=TestMode.STDIN, limits=limits))
    assert verdict.trust == "high"
    return verdict


@pytest.mark.parametrize(
    "code",
    [
        "print(input()); print(input())",
        "import sys\nfor line in sys.stdin: print(line, end='', flush=True)",
        "import sys; sys.stdout.write(sys.stdin.read()); sys.stdout.flush(); sys.exit()",
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()); sys.exit(0)",
        "import os; os.write(1, os.read(0, 100)); exit()",
        "print(open(0).read()); quit()",
        "open('/dev/stdout', 'w').write(open('/dev/stdin').read())",
        "import os; os.system('cat')",
        "import subprocess; print(subprocess.run(['cat'], capture_output=True, text=True).stdout)",
        "import io, sys\ntext = sys.stdin.read()\nsys.stdout = io.TextIOWrapper(sys.stdout.detach()); print(text)",
        "f = open(1, 'w', closefd=False); f.write(open(0).read())",
        "import atexit, sys\natexit.register(lambda: print(text))\ntext = sys.stdin.read()",
        "import sys, threading, time\n"
        "def late(): time.sleep(0.2); print(sys.stdin.read())\nthreading.Thread(target=late).start()",
        "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 26)\n"
        "def deep(n): return deep(n - 1) if n else print(sys.stdin.read())\n"
        "threading.Thread(target=deep, args=(20000,)).start()",
        "def main(): print(*__import__('sys').stdin, sep='')\nif __name__ == '__main__': main()",
        "class A:\n    def __del__(self): print(text)\ntext = open(0).read()\na = A()\ndel a",
        "from multiprocessing import Pool\nimport sys\ndef same(line): return line\n"
        "if __name__ == '__main__':\n    with Pool(2) as pool: print(''.join(pool.map(same, sys.stdin)))",
    ],
)
def test_scripts_read_and_write_as_they_like(sandbox: Sandbox, code: str) -> None:
    verdict = run_script(sandbox, code, ("3 4\nhé\n", "3 4\nhé\n"), ("3 4\nhé\n", "3 4\nhe\n"))
    assert verdict.statuses == (PASSED, FAILED), verdict.details


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a  \nb\t\r\n\n \n", "a\nb", True),
        ("", "\n\n", True),
        ("a\n\nb", "a\nb", False),
        (" a", "a", False),
        ("a  b", "a b", False),
        ("A", "a", False),
        ("1.0", "1", False),
        ("a", "a\nb", False),
        ("a\x00", "a", False),
        ("", "a", False),
    ],
)
def test_only_white_space_at_line_ends_and_blank_lines_at_the_end_are_free(
    sandbox: Sandbox, printed: str, expected: str, same: bool
) -> None:
    verdict = run_script(sandbox, "import sys; sys.stdout.write(sys.stdin.read())", (printed, expected))
    assert verdict.statuses == (PASSED if same else FAILED,)


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("raise ValueError('no')", ERROR, "ValueError: no"),
        ("assert False", ERROR, "AssertionError"),
        ("def f(:", ERROR, "SyntaxError"),
        ("import sys; sys.exit(3)", ERROR, "exit status 3"),
        ("import sys; sys.exit('no')", ERROR, "exit status 1"),
        ("import os; os._exit(2)", ERROR, "exit status 2"),
        ("import atexit, os; atexit.register(os._exit, 5)", ERROR, "exit status 5"),
        ("x = bytearray(8 << 30)", TestStatus.OUT_OF_MEMORY, "MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", KILLED, "signal 9"),
        ("import os; os.abort()", KILLED, "signal 6"),
        ("while True: pass", TestStatus.TIMEOUT, "CPU time"),
        ("import subprocess; subprocess.run(['python3', '-c', 'while 1: pass'])", TestStatus.TIMEOUT, "CPU time"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", KILLED, "signal 9"),
    ],
)
def test_a_script_that_ends_badly_fails_whatever_it_printed(
    sandbox: Sandbox, code: str, status: TestStatus, detail: str
) -> None:
    verdict = run_script(sandbox, f"print('right', flush=True)\n{code}", ("", "right"), limits=Limits(cpu_s=0.3))
    assert verdict.statuses == (status,)
    assert detail in verdict.details[0]


def test_details_are_one_line_of_printable_text(sandbox: Sandbox) -> None:
    code = r"raise ValueError('a\n\x1b[31m\ud800' + 'x' * 10**5)"
    detail = run_script(sandbox, code, ("", "")).details[0]
    assert detail.startswith("ValueError: a ?[31m?xxx")
    assert len(detail) == 200


def test_waiting_scripts_end_with_not_run(sandbox: Sandbox) -> None:
    code = "import time; print('right', flush=True); time.sleep(60)"
    verdict = run_script(sandbox, code, *[("", "right")] * 4, limits=Limits(wall_s=0.5))
    assert verdict.statuses == (TestStatus.TIMEOUT,) * 2 + (TestStatus.NOT_RUN,) * 2


def test_megabytes_of_input_block_nobody(sandbox: Sandbox) -> None:
    text = "".join(f"{n} {n * n}\n" for n in range(400_000))
    assert len(text) > 6 << 20
    ignores = run_script(sandbox, "print(1)", (text, "1"))
    copies = run_script(
        sandbox,
        "import os\nwhile b := os.read(0, 9999): os.write(1, b)",
        (text, text),
        limits=Limits(output_kb=1 << 13),
    )
    assert ignores.statuses == copies.statuses == (PASSED,)


def test_output_ends_at_the_limit(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=30, wall_s=300, output_kb=64)
    tracemalloc.start()
    started = time.monotonic()
    verdict = run_script(
        sandbox,
        "print(end=input() * int(input()))",
        *((f"x\n{n}", "x" * n) for n in (1 << 16, (1 << 16) + 1, 1 << 24)),
        limits=limits,
    )
    endless = run_script(sandbox, "import os\nwhile True: os.write(1, b'x' * 9999)", ("", ""), limits=limits)
    seconds, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.statuses == (PASSED, FAILED, FAILED)
    assert endless.statuses == (FAILED,)
    assert verdict.details[2] == endless.details[0] == "printed more than 64 kB"
    assert seconds < 20  # not the 30 CPU seconds that an endless loop may take
    assert peak < 6 * 1024 * (1 << 16)  # far below what was printed; the expected text itself is the most of it


@pytest.mark.parametrize(
    "code",
    [
        "import os, time\nprint('right', flush=True)\nif os.fork() == 0: time.sleep(100)",
        "import subprocess\nprint('right', flush=True)\nsubprocess.Popen(['sleep', '100'], start_new_session=True)",
        "import threading, time\nprint('right')\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
    ],
)
def test_what_a_script_leaves_running_delays_nothing(sandbox: Sandbox, code: str) -> None:
    started = time.monotonic()
    assert run_script(sandbox, code, ("", "right"), ("", "right")).statuses == (PASSED, PASSED)
    assert time.monotonic() - started < 10


def test_each_case_has_a_fresh_process(sandbox: Sandbox) -> None:
    code = "import builtins\nassert not hasattr(builtins, 'seen')\nbuiltins.seen = True\nprint(input())"
    assert run_script(sandbox, code, ("a", "a"), ("b", "b")).statuses == (PASSED, PASSED)


SEARCH = r"""
import os, re, sys
needle = re.compile(rb"secre[t]-[0-9]{6}")
found = set()
for line in open("/proc/self/maps"):
    start, end = (int(n, 16) for n in line.split()[0].split("-"))
    try:
        with open("/proc/self/mem", "rb", 0) as memory:
            memory.seek(start)
            found |= set(needle.findall(memory.read(end - start)))
    except (OSError, OverflowError, ValueError): pass
for folder, _, names in [*os.walk("/proc/self/fd"), *os.walk("/proc/1"), *os.walk("/tmp"), *os.walk("/dev/shm")]:
    for name in names:
        try:
            fd = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            found |= set(needle.findall(os.read(fd, 1 << 20)))
        except OSError: pass
print(*(text.decode() for text in found - {b"secret-" + sys.stdin.read().encode()}))
"""


def test_the_expected_text_is_nowhere_in_reach(sandbox: Sandbox) -> None:
    limits = Limits(cpu_s=20, wall_s=100)
    verdict = run_script(sandbox, SEARCH, ("111111", "secret-222222"), ("", ""), limits=limits)
    assert verdict.statuses == (FAILED, PASSED), verdict.details  # it ran to its end, and found nothing


@pytest.mark.parametrize(
    "code",
    [
        "import json, os, struct\n"
        "for message in ({'status': 'passed', 'detail': ''}, {'passed': True}, {'loaded': True}, {'cpu': 0, 'ended': 0}):\n"
        "    body = json.dumps(message).encode()\n"
        "    for fd in range(1, 64):\n"
        "        try: os.write(fd, struct.pack('!I', len(body)) + body); os.write(fd, body)\n"
        "        except OSError: pass",
        "import os; os._exit(0)",
        "import sys; sys.stdout.close(); sys.exit(0)",
        "import os; os.execvp('true', ['true'])",
    ],
)
def test_only_the_right_text_passes(sandbox: Sandbox, code: str) -> None:
    assert run_script(sandbox, code, ("", "right")).statuses == (FAILED,)


@pytest.mark.parametrize("test", ["", "[]", "{}", '{"stdin": 1, "stdout": "1"}', '{"stdin": ""}', "assert True"])
def test_a_test_that_is_no_case_is_an_error(sandbox: Sandbox, test: str) -> None:
    verdict = sandbox.judge(Submission(id="t", code="print(1)", tests=(test,), mode=TestMode.STDIN))
    assert verdict.statuses == (ERROR,)
    assert "stdin and stdout" in verdict.details[0]


# Unittests.


def run_unittest(sandbox: Sandbox, code: str, *tests: str, setup: str = "") -> Verdict:
    return sandbox.judge(
        Submission(id="t", code=code, tests=tests, mode=TestMode.UNITTEST, entry_point="f", setup=setup, limits=LIMITS)
    )


def cases(body: str, base: str = "unittest.TestCase", before: str = "") -> str:
    return f"import unittest\n{before}\nclass TestCases({base}):\n" + "".join(f"    {x}\n" for x in body.split("\n"))


TWO = "def test_a(self): self.assertEqual(f(2), 4)\ndef test_b(self): self.assertEqual(f(3), 9)"
HOOKS = """@classmethod
def setUpClass(cls): cls.seen = ["class"]
def setUp(self): self.seen.append("test")
def test_it(self): self.assertEqual((events, self.seen, f(2)), (["module"], ["class", "test"], 4))
def tearDown(self): self.seen.append("down")
@classmethod
def tearDownClass(cls):
    if cls.seen[-1] != "down": raise ValueError"""


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("test", "status", "detail"),
    [
        (cases(TWO), PASSED, ""),
        (cases(TWO.replace("9", "8")), FAILED, "test_b: AssertionError: 9 != 8"),
        (cases("def test_a(self): f('x')"), ERROR, "test_a: TypeError"),
        (cases("def test_a(self):\n    with self.assertRaises(TypeError) as e: f('x')\n    e.exception.args"), PASSED, ""),
        (cases("def helper(self): pass"), ERROR, "no test method ran"),
        ("x = 1", ERROR, "no test method ran"),
        ("import unittest\nclass", ERROR, "SyntaxError"),
        (cases(HOOKS, before="events = []\ndef setUpModule(): events.append('module')"), PASSED, ""),
        (cases(TWO, before="def setUpModule(): f('x')"), ERROR, "setUpModule"),
        (cases("@classmethod\ndef setUpClass(cls): f('x')\n" + TWO), ERROR, "setUpClass"),
        (cases("@classmethod\ndef tearDownClass(cls): assert f(2) == 5\n" + TWO), FAILED, "tearDownClass"),
        (cases("def tearDown(self): self.assertEqual(f(2), 5)\n" + TWO), FAILED, "test_a"),
        (cases("def test_a(self):\n    for x in range(3):\n        with self.subTest(x=x): self.assertLess(f(x), 4)"), FAILED,
         "test_a: AssertionError: 4 not less than 4"),
        (cases("def test_a(self):\n    for x in range(3):\n        with self.subTest(x=x): self.assertLess(f(x), 5)"),
         PASSED, ""),
        (cases("@unittest.skip('no')\ndef test_c(self): assert f(1) == 0\n" + TWO), PASSED, ""),
        (cases("@unittest.skip('no')\ndef test_c(self): assert f(1) == 0"), ERROR, "no test method ran"),
        (cases("def test_c(self): self.skipTest('no')\n" + TWO), FAILED, "test_c: skipped while it ran"),
        (cases("@unittest.expectedFailure\ndef test_a(self): assert f(1) == 0"), PASSED, ""),
        (cases("@unittest.expectedFailure\ndef test_a(self): assert f(1) == 1"), FAILED, "test_a: unexpected success"),
        (cases("def test_a(self): assert f(1)\nasync def test_b(self): assert f(2) == 5", "unittest.IsolatedAsyncioTestCase"),
         FAILED, "test_b"),
        (cases(TWO) + cases("def test_c(self): assert f(1) == 0").replace("TestCases", "Others"), FAILED, "test_c"),
    ],
)  # fmt: skip
def test_unittests_across_and_beside(
    sandbox: Sandbox, test: str, status: TestStatus, detail: str, beside: bool
) -> None:
    beside = beside or "async" in test or detail == "SyntaxError"
    verdict = run_unittest(sandbox, "def f(x): return x ** 2", test, setup="import os" if beside else "")
    assert verdict.statuses == (status,), verdict.details
    assert detail in verdict.details[0]
    assert verdict.beside == (beside,)


def test_each_test_string_has_its_own_status(sandbox: Sandbox) -> None:
    code = "def f(x):\n    while x == 7: pass\n    return x * x"
    tests = [cases(f"def test_a(self): self.assertEqual(f({x}), {y})") for x, y in ((2, 4), (2, 5), (7, 49), (3, 9))]
    tests.insert(2, "import os\n" + tests[0])
    verdict = run_unittest(sandbox, code, *tests)
    assert verdict.statuses == (PASSED, FAILED, PASSED, TestStatus.TIMEOUT, PASSED)
    assert verdict.beside == (False, False, True, False, False)


@pytest.mark.parametrize(
    ("test", "beside"),
    [
        (TWO, False),
        ("import math, json\nfrom datetime import datetime as dt\nx = dt(2020, 1, 1).isoformat()", False),
        ("def test(self): self.assertEqual(sorted(f([3, 1]).items())[0], (1, 'a'.upper()))", False),
        ("class A: x = 1\nA.x.real\nprint(A)", False),
        ("try: f()\nexcept ValueError as e: e.args", False),
        ("from unittest.mock import patch", True),
        ("from unittest import mock", True),
        ("import unittest\nunittest.mock.patch('a')", True),
        ("import os", True),
        ("import random\nrandom.seed(0)", True),
        ("import numpy as np", True),
        ("open('x')", True),
        ("with self.assertLogs(): f()", True),
        ("f(1).shape", True),
        ("pd.DataFrame()", True),  # a name that only the program can have bound
        ("helper(1)", True),
        ("async def test(self): await f()", True),
        ("from os.path import *", True),
        ("x = (", True),
    ],
)
def test_the_source_decides_where_a_unittest_runs(test: str, beside: bool) -> None:
    assert runs_beside("", test, "f") == beside
    assert runs_beside(test, "", "f") == beside
    if test == TWO:
        assert runs_beside("", test, None)


FORGERIES = {
    "skip": "import unittest\ndef f(x): raise unittest.SkipTest('no')",
    "stop": "import unittest.case\ndef f(x): raise unittest.case._ShouldStop",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "exit": "import sys\ndef f(x): sys.exit(0)",
    "leave": "import os\ndef f(x): os._exit(0)",
    "liar": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "liar_of_its_own": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "patched_class": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0",
    "patched_result": "import unittest\nunittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None\n"
    "unittest.case._Outcome.testPartExecutor = None\ndef f(x): return 0",
    "patched_run": "import unittest\nunittest.TestSuite.run = unittest.TestCase.run = lambda s, r=None: None\ndef f(x): return 0",
    "new_method": "import unittest\nunittest.TestCase.__getattribute__ = lambda s, n: print\ndef f(x): return 0",
    "own_tests": "import unittest\nclass TestOwn(unittest.TestCase):\n    def test_x(self): pass\n"
    "unittest.TestLoader.loadTestsFromTestCase = lambda s, k: unittest.TestSuite([TestOwn('test_x')])\ndef f(x): return 0",
    "fake_module": "import sys, types\nfake = types.ModuleType('unittest')\nfake.TestCase = object\n"
    "sys.modules['unittest'] = fake\ndef f(x): return 0",
    "early_answer": "import json, os, struct\nfor m in ({'loaded': True}, {'status': 'passed', 'detail': '', 'passed': True}):\n"
    "    b = json.dumps(m).encode()\n    for fd in range(3, 64):\n"
    "        try: os.write(fd, struct.pack('!I', len(b)) + b)\n        except OSError: pass\nimport time; time.sleep(0.1)",
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", FORGERIES)
def test_these_forgeries_fail_even_beside(sandbox: Sandbox, name: str, beside: bool) -> None:
    test = cases(TWO + "\ndef test_c(self): self.assertEqual(3, 3)", before="import os" if beside else "")
    verdict = run_unittest(sandbox, FORGERIES[name], test)
    assert verdict.beside == (beside,)
    if not (beside and name.startswith("liar")):  # beside, only the test's own words can refuse a lying __eq__
        assert verdict.statuses[0] is not PASSED


SHARED = {
    "patched builtin": (
        "def f(): return open('/x').read()",
        "from unittest.mock import patch, mock_open",
        "def test(self):\n    with patch('builtins.open', mock_open(read_data='hi')): self.assertEqual(f(), 'hi')",
    ),
    "patched library": (
        "import urllib.request as r\ndef f(): return r.urlopen('http://x').read()",
        "from unittest import mock",
        "@mock.patch('urllib.request.urlopen')\ndef test(self, o): o().read.return_value = 3; self.assertEqual(f(), 3)",
    ),
    "seeded": (
        "import random\ndef f(): return random.random()",
        "import random",
        "def test(self):\n    random.seed(1); x = f(); random.seed(1); self.assertEqual(random.random(), x)",
    ),
    "files": (
        "def f(): open('out.txt', 'w').write('hi')",
        "import os, tempfile",
        "def test(self):\n    with tempfile.TemporaryDirectory(dir=os.path.expanduser('~')) as d:\n"
        "        os.chdir(d); f(); self.assertEqual(os.listdir(), ['out.txt']); os.chdir('..')",
    ),
    "captured": (
        "def f(): print('hi')",
        "import io, contextlib",
        "def test(self):\n    s = io.StringIO()\n    with contextlib.redirect_stdout(s): f()\n"
        "    self.assertEqual(s.getvalue(), 'hi\\n')",
    ),
    "objects of the program": (
        "import decimal\nclass P: x = 1\ndef f(): return P()",
        "",
        "def test(self): self.assertIsInstance(f(), P); self.assertEqual(decimal.Decimal(f().x), 1)",
    ),
    "coroutine": (
        "async def f(): return 3",
        "import asyncio",
        "def test(self): self.assertEqual(asyncio.run(f()), 3)",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_shares_the_process_runs_beside(sandbox: Sandbox, name: str) -> None:
    code, before, body = SHARED[name]
    verdict = run_unittest(sandbox, code, cases(body, before=before))
    assert (verdict.statuses, verdict.trust) == ((PASSED,), "low"), verdict.details
    wrong = run_unittest(sandbox, "def f(): return None", cases(body, before=before))
    assert wrong.statuses[0] in (FAILED, ERROR)
