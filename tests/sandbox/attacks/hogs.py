"""Programs that take too much, never end, or hand over what is hard to digest."""

from sandbox.types import Limits, TestMode
from tests.sandbox.attacks.attack import ALIVE, ANY_RATE, HANDMADE, LIMITS_HOLD, RIGHT, ROOM, SQUARE, attacks

_ONE = ("assert f(3) == 9",)
_BURN = "import os, signal, threading\ndef burn(n=2 * 10**7):\n    while n: n -= 1\n"  # about 0.3 s of CPU

_CPU_ELSEWHERE = {
    "cpu_in_children": """
def once():
    if (pid := os.fork()) == 0: burn(); os._exit(0)
    os.waitpid(pid, 0)""",
    "cpu_in_children_that_nobody_reaps": """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def once():
    if (pid := os.fork()) == 0: burn(); os._exit(0)
    try: os.waitpid(pid, 0)
    except OSError: pass""",
    "cpu_in_grandchildren": """
r, w = os.pipe()
def once():
    if os.fork() == 0:
        if os.fork() == 0: burn(); os.write(w, b"1")
        os._exit(0)
    os.wait(); os.read(r, 1)""",
    "cpu_in_threads": """
def once():
    thread = threading.Thread(target=burn); thread.start(); thread.join()""",
}

_ENDLESS = {
    "sleeps": "import time, signal\nfor n in range(1, 31): n in (9, 17, 19) or signal.signal(n, signal.SIG_IGN)\n"
    "def f(x): time.sleep(99)",
    "one_long_call_in_c": "import re\ndef f(x): return re.match('(a*)*b', 'a' * 40)",
    "cpu_before_the_first_test": "import sys\nsys.setswitchinterval(1e-6)\nn = 0\nwhile n < 10**9: n += 1" + RIGHT,
    "generator_without_end": ("def f(x):\n    while True: yield x\n", "assert list(f(3)) == [9]"),
    "half_a_frame": HANDMADE + "import time\ndef call(m): raw(b'\\0\\0\\1\\0{'); time.sleep(99)\nserve(call)",
    "a_frame_of_four_gigabytes": HANDMADE
    + "import time\ndef call(m): raw(b'\\xff\\xff\\xff\\xff{'); time.sleep(99)\nserve(call)",
    "frames_without_end": HANDMADE
    + """
def call(m):
    while True: _sock.sendall((struct.pack("!I", 9) + b'{"r": -1}') * 1000)
serve(call)""",
    "requests_without_end": HANDMADE
    + """
def call(m):
    ops = "call", "get", "set", "next", "names", "test", "link"
    for n in range(10**9): send({"q": n, "op": ops[n % 7], "on": n % 50 - 5, "a": [], "name": "x"})
serve(call)""",
    "stopped_by_its_own_child": "import os, time\ndef f(x):\n    if os.fork() == 0: os.kill(os.getppid(), 19); time.sleep(99)\n"
    "    time.sleep(0.2)\n",
}

_HARD_TO_DIGEST = {
    "huge_results": (
        "made = iter(['a' * 10**8, [0] * 10**7, 1 << 10**8, b'a' * 10**8, range(10**18), {1: 'x' * 4 * 10**7}])\n"
        "def f(x): return next(made)",
        *SQUARE * 2,
    ),
    "results_that_fight_encoding": (
        """
class Knot:
    def __getattr__(self, name): return getattr(self, name + "x")
    def __repr__(self): return repr(self)
    __class__ = property(lambda self: 1 / 0)
    def __reduce__(self): return (exec, ("import os; os.kill(1, 9)",))
class Meta(type):
    __name__ = property(lambda c: 1 / 0); __module__ = property(lambda c: 1 / 0); __mro__ = property(lambda c: 1 / 0)
    def __eq__(c, o): return True
    __hash__ = None
Odd = type.__call__(Meta, "A", (), {})
class Rows(list):
    def __iter__(self):
        while True: yield self
deep = []
for _ in range(10**5): deep = [deep]
loop = {}; loop["x"] = [loop]
made = iter([Knot(), Odd(), Rows(), deep, loop, type("\\ud800", (), {})(), type("n" * 10**6, (), {})()])
def f(x): return next(made)
""",
        *SQUARE * 2,
        "assert f(3) == 9",
    ),
    "exceptions_that_fight_encoding": (
        """
class Long(Exception):
    def __str__(self): return str(self)
class Args(Exception):
    args = property(lambda self: 1 / 0)
class Never(BaseException):
    def __init__(self, *a): raise self
errors = iter([lambda: ValueError("x" * 10**7), Long, Args, lambda: ValueError("\\ud800\\x1b[2J\\n"), Never,
    lambda: KeyError([0] * 10**6), lambda: ExceptionGroup("g", [ValueError(1)] * 1000), lambda: Exception(*range(10**5)),
    GeneratorExit])
def f(x): raise next(errors)()
""",
        *SQUARE * 3,
    ),
}

_BYE = (
    "import os, threading\ndef f(x):\n    if x == 2: threading.Timer(0.05, os._exit, (0,)).start()\n    return x * x\n"
)
_WAYS_TO_LEAVE = """
import os, signal, sys
def throw(kind): raise kind
ways = {1: lambda: sys.exit(0), 2: lambda: throw(KeyboardInterrupt), 3: lambda: throw(GeneratorExit),
        4: lambda: os._exit(0), 5: lambda: os.abort(), 6: lambda: os.kill(os.getpid(), signal.SIGTERM),
        7: lambda: os.closerange(0, 128), 8: lambda: os.execv("/bin/true", ["true"]), 9: lambda: throw(BaseException)}
def f(x): return ways.get(x, lambda: x * x)()
"""
_CROWD = """
import os, threading, time
try:
    while True: threading.Thread(target=time.sleep, args=(99,)).start()
except RuntimeError: pass
try:
    while True: os.pipe()
except OSError: pass
"""

_SOURCES = {
    "source_with_a_null_byte": RIGHT + "\0",
    "source_with_a_lone_surrogate": RIGHT + "y = '\ud800'",
    "source_with_thousands_of_parentheses": f"y = {'(' * 5000}1{')' * 5000}" + RIGHT,
    "source_with_an_endless_sum": f"y = {'+'.join('1' * 100_000)}" + RIGHT,
    "source_with_thousands_of_blocks": "".join(f"{' ' * n}if 1:\n" for n in range(3000)) + RIGHT,
}

_NINE = ('{"stdin": "3\\n", "stdout": "9\\n"}',)

HOGS = [
    *attacks(
        LIMITS_HOLD,
        {
            name: f"{_BURN}{code}\ndef f(x):\n    for _ in range(4): once()\n    return x * x\n"
            for name, code in _CPU_ELSEWHERE.items()
        },
        tests=_ONE,
        limits=Limits(cpu_s=0.5, wall_s=8),
    ),
    *attacks(ALIVE, _ENDLESS, tests=_ONE),
    *attacks(ALIVE, _HARD_TO_DIGEST, limits=Limits(cpu_s=2, wall_s=20)),
    *attacks(ALIVE, _SOURCES, limits=ROOM),
    *attacks(ALIVE, {"threads_and_descriptors_without_end": _CROWD + RIGHT}, accept=(1,), limits=ROOM),
    *attacks(
        ALIVE,
        {"leaves_in_every_way": (_WAYS_TO_LEAVE, *(f"assert f({n}) == {n * n}" for n in range(11)))},
        accept=(round(2 / 11, 4),),
    ),
    *attacks(
        ALIVE,
        {"dies_between_tests": (_BYE, "assert f(2) == 4\nimport time; time.sleep(0.4)", *SQUARE[1:])},
        accept=(round(2 / 3, 4), 1),
    ),
    *attacks(
        ALIVE,
        {
            "a_frame_byte_by_byte_beside_the_test": (
                HANDMADE + "import time\nclass Box:\n    def __eq__(self, other):\n        raw(b'\\0\\0\\1\\0')\n"
                "        for _ in range(100): time.sleep(0.8); raw(b' ')\n",
                "class Sub(Box): pass\nassert Sub() == 4",
            )
        },
        trust="low",
        limits=Limits(cpu_s=0.5, wall_s=1),
    ),
    *attacks(
        LIMITS_HOLD,
        {"output_without_end": "import os\nwhile True: os.write(1, b'9\\n' * 30000)"},
        mode=TestMode.STDIN,
        tests=_NINE,
    ),
    *attacks(
        ALIVE,
        {
            "a_daemon_holds_the_output": "import os, time\nprint(int(input()) ** 2, flush=True)\n"
            "if os.fork() == 0: os.setsid(); time.sleep(99)\n",
            "a_child_goes_on_printing": "import os\nprint(int(input()) ** 2, flush=True)\n"
            "if os.fork() == 0:\n    while True: print('x', flush=True)\n",
        },
        mode=TestMode.STDIN,
        tests=_NINE,
        accept=ANY_RATE,
    ),
]
