"""Right programs that look odd: each is paid in full, because a reward lost is as bad as a reward forged."""

from sandbox.types import Limits, TestMode
from tests.sandbox.attacks.attack import KNOWN_TRUST, NO_LOSS, RIGHT, ROOM, attacks

_SOURCES = {
    "right": RIGHT,
    "crlf_tabs_and_form_feeds": "def f(x):\r\n\tif x:\r\n\t\treturn x * x\r\n\f\r\n\treturn 0\r\n",
    "encoding_cookie": '#!/usr/bin/env python\n# -*- coding: latin-1 -*-\n"""caf\u00e9"""\n' + RIGHT,
    "two_megabytes_of_source": "# padding\n" * 200_000 + RIGHT,
    "main_guard": RIGHT + "if __name__ == '__main__':\n    import sys\n    sys.exit(f(int(input())))\n",
    "slow_start": "n = 3 * 10**6\nwhile n: n -= 1\n" + RIGHT,
    "prints_ten_megabytes": "def f(x):\n    for _ in range(10): print('a' * 10**6)\n    return x * x\n",
}

_ODD_INTERPRETERS = {
    "own_print_and_len": "def print(*a): raise SystemExit\nlen = range = repr = isinstance = None\n" + RIGHT,
    "own_builtins_emptied": "import builtins\nfor name in dir(builtins):\n    if name[0] != '_': builtins.__dict__[name] = None\n"
    + RIGHT,
    "own_modules_broken": "import json, struct, socket, os, sys\njson.dumps = json.loads = struct.pack = os.write = None\n"
    "json.JSONEncoder.encode = json.JSONDecoder.decode = socket.socket = sys.stdout = sys.stderr = None\n" + RIGHT,
    "warnings_are_errors": "import warnings\nwarnings.simplefilter('error')\n" + RIGHT,
    "trace_and_profile": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n" + RIGHT,
    "atexit_and_finalizers": "import atexit, gc, os\natexit.register(os._exit, 1)\ngc.callbacks.append(lambda *a: None)\n"
    "gc.set_threshold(1)\nclass A:\n    def __del__(s): print('bye')\na = A(); a.a = a; del a\n" + RIGHT,
    "timers_and_handlers": "import signal\nhits = []\nsignal.signal(signal.SIGALRM, lambda *a: hits.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n" + RIGHT,
    "alarm_as_a_time_limit": "import signal\ndef late(*a): raise TimeoutError\nsignal.signal(signal.SIGALRM, late)\n"
    "def f(x):\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    n = 0\n    try:\n        while n < 10**9: n += 1\n"
    "    except TimeoutError: return x * x\n",
    "returns_in_finally": "def f(x):\n    try: return 1 / 0\n    finally: return x * x\n",
    "environment_and_working_folder": "import os\ndef f(x):\n    os.environ['X'] = str(x)\n    os.chdir('/')\n"
    "    return int(os.environ['X']) ** 2\n",
    "files_in_the_working_folder": """
import os, pathlib, tempfile
def f(x):
    pathlib.Path("a/b").mkdir(parents=True, exist_ok=True)
    pathlib.Path("a/b/c").write_text(str(x))
    with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryDirectory() as folder:
        file.write(pathlib.Path("a/b/c").read_text()); file.seek(0); os.listdir(folder)
        return int(file.read()) ** 2
""",
    "much_memory": "kept = bytes(300 << 20)\n" + RIGHT,
    "pickles_its_objects": "import pickle\nclass A:\n    def __init__(s, x): s.x = x\n"
    "def f(x): return pickle.loads(pickle.dumps(A(x))).x ** 2\n",
    "ctypes": "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x): return libc.abs(x) ** 2\n",
}

_PROCESSES_AND_THREADS = {
    "subprocess": "import subprocess\ndef f(x):\n    out = subprocess.check_output(f'echo $(({x} * {x}))', shell=True)\n"
    "    return int(out)\n",
    "a_python_of_its_own": "import subprocess, sys\n"
    "def f(x): return int(subprocess.check_output([sys.executable, '-c', f'print(({x}) ** 2)']))\n",
    "fork_and_wait": """
import os
def f(x):
    r, w = os.pipe()
    if (pid := os.fork()) == 0: os.write(w, str(x * x).encode()); os._exit(0)
    os.waitpid(pid, 0)
    return int(os.read(r, 99))
""",
    "multiprocessing": """
import multiprocessing
def square(x): return x * x
def f(x):
    with multiprocessing.get_context("fork").Pool(2) as pool: return pool.map(square, [x])[0]
""",
    "daemon_threads": """
import queue, threading
asked, answers = queue.Queue(), queue.Queue()
def work():
    while True: answers.put(asked.get() ** 2)
threading.Thread(target=work, daemon=True).start()
def f(x): asked.put(x); return answers.get()
""",
    "big_stack_in_a_thread": """
import sys, threading
threading.stack_size(64 << 20); sys.setrecursionlimit(10**6)
def f(x):
    out = []
    thread = threading.Thread(target=lambda: out.append(x * x)); thread.start(); thread.join()
    return out[0]
""",
    "asyncio_inside": "import asyncio\nasync def g(x): await asyncio.sleep(0.001); return x * x\n"
    "def f(x): return asyncio.run(g(x))\n",
    "asyncio_outside": (
        "import asyncio\nasync def f(x): await asyncio.sleep(0.001); return x * x\n",
        "import asyncio\nassert asyncio.run(f(3)) == 9",
        "import asyncio\nasync def both(): return await asyncio.gather(f(2), f(3))\nassert asyncio.run(both()) == [4, 9]",
    ),
}

_CALLBACKS = {
    "callbacks_that_call_back": (
        "def f(g, x): return g(x - 1) + 1 if x else 0\n",
        "def g(x): return f(g, x) if x > 0 else 0\nassert f(g, 20) == 20",
    ),
    "callbacks_from_threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(g, xs):\n"
        "    with ThreadPoolExecutor(4) as pool: return list(pool.map(g, xs))\n",
        "assert f(lambda x: x * x, range(200)) == [x * x for x in range(200)]",
    ),
}

_DEPTH = "def f(x): return x and 1 + f(x - 1)\n"
_ERRORS = """
class NegativeError(ValueError): pass
def f(x):
    if x < 0: raise NegativeError(f"{x} < 0")
    if x == 0: raise ZeroDivisionError
    return x * x
"""
_USES = {
    "state_is_kept_between_asserts": (
        "calls = []\ndef f(x):\n    calls.append(x)\n    return len(calls)\n",
        *(f"assert f(0) == {n}" for n in (1, 2, 3)),
        "assert calls == [0, 0, 0]",
    ),
    "deep_recursion": ("import sys\nsys.setrecursionlimit(10**5)\n" + _DEPTH, "assert f(50000) == 50000"),
    "recursion_near_the_default_limit": (_DEPTH, "assert f(950) == 950"),
    "recursion_error_is_caught": "def g(x): return g(x)\ndef f(x):\n    try: g(x)\n    except RecursionError: return x * x\n",
    "expected_exceptions": (
        _ERRORS,
        "try: f(-1)\nexcept ValueError as e: assert str(e) == '-1 < 0'\nelse: assert False",
        "try: f(-1)\nexcept NegativeError: pass\nelse: assert False",
        "try: f(0)\nexcept ArithmeticError: pass\nelse: assert False",
        "assert f(3) == 9",
    ),
    "arguments_changed_in_place": (
        "def f(rows, seen): rows[0].reverse(); rows[1].append(0); seen.add(3)\n",
        "row = [1, 2]; rows, seen = [row, []], set()\nassert f(rows, seen) is None\n"
        "assert rows == [[2, 1], [0]] and row == [2, 1] and seen == {3}",
    ),
    "big_results": (
        "def f(n): return {'text': 'a' * n, 'rows': list(range(n)), 'number': 3 ** n}\n",
        "v = f(200000)\nassert len(v['text']) == 200000 and v['rows'][-1] == 199999 and v['number'] == 3 ** 200000",
    ),
    "endless_generator": (
        "def f(x):\n    while True:\n        yield x\n        x *= x\n",
        "g = f(2)\nassert [next(g), next(g), next(g)] == [2, 4, 16]",
    ),
    "an_iterator_of_its_own": (
        "class Count:\n    n = 0\n    def __iter__(s): return s\n    def __next__(s):\n        s.n += 1\n"
        "        if s.n > 3: raise StopIteration\n        return s.n\ndef f(x): return list(Count())\n",
        "assert f(1) == [1, 2, 3]",
    ),
    "decorated_and_partial": (
        "import functools\n@functools.lru_cache(None)\ndef g(n): return n if n < 2 else g(n - 1) + g(n - 2)\n"
        "f = functools.partial(g)\nclass Call:\n    def __call__(s, x): return x * x\nh = Call()\n",
        "assert f(30) == 832040 and g(30) == 832040 and h(3) == 9",
    ),
    "a_function_named_like_a_module": (
        "class Node: pass\ndef queue(x): return x * x\n",
        "assert queue(3) == 9",
        "Node\nassert queue(2) == 4",
    ),
    "a_method_of_a_class": ("class Solution:\n    def f(self, x): return x * x\n", "assert Solution().f(3) == 9"),
    "objects_from_a_factory": (
        "class Bag:\n    def __init__(self, items): self.items = items\n    def __len__(self): return len(self.items)\n"
        "    @classmethod\n    def of(cls, *items): return cls(items)\n",
        "assert len(Bag.of(1, 2)) == 2",
    ),
    "objects_used_by_the_test": (
        "class Account:\n    def __init__(self, owner): self.owner, self.sum = owner, 0\n"
        "    def put(self, n): self.sum += n; return self.sum\n",
        "a = Account('x'); b = Account('y')\nassert a.put(3) == 3 and b.put(4) == 4 and a.put(1) == 4\n"
        "assert (a.owner, a.sum) == ('x', 4)",
    ),
}

_BESIDE = {
    "objects_compared_by_the_test": (
        "import dataclasses\n@dataclasses.dataclass(order=True)\nclass Point:\n    x: int\n    y: int\n",
        "assert Point(1, 2) == Point(1, 2)",
        "assert Point(1, 2) < Point(1, 3)",
        "assert str(Point(1, 2)) == 'Point(x=1, y=2)'",
    ),
}

_SCRIPTS = {
    "reads_with_input": "for _ in range(2): print(int(input()) ** 2)",
    "reads_all_at_once": "import sys\nprint('\\n'.join(str(int(x) ** 2) for x in sys.stdin.read().split()), end='')",
    "reads_bytes": "import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(b'%d\\n' % int(line) ** 2)",
    "reads_until_the_end": "while True:\n    try: print(int(input()) ** 2)\n    except EOFError: break",
    "opens_its_descriptors": "import os\nfor line in open(0): os.write(1, b'%d  \\n' % int(line) ** 2)",
    "has_a_main_guard": "def main():\n    for _ in '12': print(int(input()) ** 2)\nif __name__ == '__main__': main()",
    "exits_with_zero": "import sys\nfor line in sys.stdin: print(int(line) ** 2)\nsys.exit(0)",
    "ends_in_a_hurry": "import os, sys\nfor line in sys.stdin: print(int(line) ** 2)\nsys.stdout.flush(); os._exit(0)",
    "leaves_a_thread": "import sys, threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    "for line in sys.stdin: print(int(line) ** 2)",
    "prints_at_its_end": "import atexit\natexit.register(lambda: print(b))\n"
    "a, b = int(input()) ** 2, int(input()) ** 2\nprint(a)",
    "talks_on_stderr": "import sys\nfor _ in '12': print('n?', file=sys.stderr); print(int(input()) ** 2)",
    "prints_from_children": "import os\nfor _ in '12':\n    x = int(input())\n"
    "    if os.fork() == 0: print(x ** 2, flush=True); os._exit(0)\n    os.wait()",
}

_UNITTEST = """
import unittest
class TestCases(unittest.TestCase):
    def setUp(self): self.cases = {2: 4, 3: 9}
    def test_values(self):
        for x, want in self.cases.items():
            with self.subTest(x=x): self.assertEqual(f(x), want)
    def test_error(self):
        with self.assertRaises(TypeError): f("a")
        with self.assertRaisesRegex(TypeError, "multiply"): f("a")
    def tearDown(self): self.cases.clear()
"""
_CHECK = "METADATA = {}\ndef check(candidate):\n    assert candidate(3) == 9\n    assert helper(candidate(2)) == 4\n"

HONEST = [
    *attacks(NO_LOSS, _SOURCES | _ODD_INTERPRETERS | _PROCESSES_AND_THREADS | _USES, accept=(1,), limits=ROOM),
    *attacks(NO_LOSS, _CALLBACKS, accept=(1,), limits=Limits(cpu_s=5, wall_s=5)),
    *attacks(KNOWN_TRUST, _BESIDE, accept=(1,), trust="low"),
    *attacks(
        NO_LOSS,
        {
            "named_like_a_builtin": (
                "def sum(a, b): return a + b + 1\n",
                "assert sum(1, 2) == 4",
                "assert max([sum(1, 2)]) == 4",
            )
        },
        accept=(1,),
        entry_point="sum",
    ),
    *attacks(
        NO_LOSS,
        {"check_function": ("def helper(x): return x\n" + RIGHT, _CHECK)},
        accept=(1,),
        mode=TestMode.CHECK_FUNCTION,
        entry_point="f",
    ),
    *attacks(NO_LOSS, {"unittests": (RIGHT, _UNITTEST)}, accept=(1,), mode=TestMode.UNITTEST, entry_point="f"),
    *attacks(
        NO_LOSS,
        {f"script_that_{name}": code for name, code in _SCRIPTS.items()},
        accept=(1,),
        mode=TestMode.STDIN,
        tests=('{"stdin": "3\\n4\\n", "stdout": "9\\n16\\n"}',),
    ),
]
