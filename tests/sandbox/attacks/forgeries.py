"""Wrong programs that want to be paid."""

from sandbox.types import Limits, TestMode
from tests.sandbox.attacks.attack import (
    ALIVE,
    HANDMADE,
    KNOWN_TRUST,
    LIAR,
    NO_FORGERY,
    NO_LOSS,
    SQUARE,
    UNWRAPPED,
    attacks,
)

_CONTROL = attacks(
    NO_LOSS,
    {
        "handmade_link_is_understood": HANDMADE + 'serve(lambda m: {"v": m["a"][0] ** 2})',
        "handmade_classes_are_understood": (
            HANDMADE
            + """
serve(lambda m: {"v": 4 if m["op"] == "get" else ["mine", 8, "object", box(9)]}, lambda wanted: {"Box": ["value", box(9)]})""",
            "assert Box().x == 4",
        ),
    },
    accept=(1,),
)

_BY_THE_LINK = attacks(
    NO_FORGERY,
    {
        "replies_nobody_asked_for": HANDMADE
        + """
for n in range(3000): send({"r": n, "v": 9})
def call(m):
    for n in (0, -1, None, "0", True, 1.5, [m["q"]], m["q"] - 1): send({"r": n, "v": 9, "passed": True})
    send({"status": "passed", "detail": ""}); send({"passed": True}); send({})
    return {"v": None}
serve(call)""",
        "opaque_objects_of_all_kinds": (
            HANDMADE
            + """
kinds = iter([["function"], ["iterator"], ["coroutine"], ["token"], ["object"], ["object", box(900)], box(901)[2:], ["Liar"],
    ["object", box(902, True)], box(903, True)[2:], ["exception", "E", [["type", "OSError"]]],
    ["namedtuple", "N", ["x"], {}, [], True],
    ["enum", "E", "Enum", "", [["A", 4]], ["__eq__", "__lt__", "__sub__", "__abs__"]]])
serve(lambda m: {"v": ["mine", m["q"] % 1000, *next(kinds)] if m["op"] == "call" else True})""",
            *SQUARE * 4,
        ),
        "claims_to_be_a_class": (
            HANDMADE
            + """
def call(m): return {"v": ["mine", 8, "object", box(9)] if m["op"] in ("call", "new") else 4}
serve(call, lambda wanted: {"f": ["value", box(9)]})""",
            *UNWRAPPED,
            "assert str(f(2)) == '4'",
            "assert f(2) + 0 == 4",
            *SQUARE,
        ),
        "names_it_never_defined": (
            HANDMADE
            + """
def names(wanted): return {n: ["value", ["mine", 0, "function", n]] for n in [*wanted, "print", "__builtins__"]}
serve(lambda m: {"v": 0}, names)""",
            "assert abs(f(2) - 4) < 1e-9",
            "import math\nassert math.isclose(f(2), 4)",
            "assert isinstance(f(2), str) or f(2) == 4",
            "assert sorted([f(2)]) == [4]",
        ),
        "names_of_other_kinds": (
            HANDMADE
            + """
kinds = iter([["exception", "AssertionError", "AssertionError"], ["exception", "f", "BaseException"], ["exception"],
    ["standard", "unittest.mock", "f"], ["standard", "os", "f"], ["standard", "operator", "f"], ["module", "f"], [],
    ["module", "unittest.mock"], ["value"], "value", None, 4, ["value", {"a": 1}], ["value", ["type", "object"]]])
serve(lambda m: {"v": None}, lambda wanted: {"f": next(kinds)})""",
            *SQUARE * 5,
        ),
        "changed_arguments_nobody_has": (
            HANDMADE
            + """
keys = iter([0, -1, 5, "x", None, [0], True, 0])
serve(lambda m: {"v": 0, "m": [[next(keys), ["l", 0]]]})""",
            "x = 3\nassert f(x) == 9 and x == 3",
            "assert f((3, 4)) == (9, 16)",
            *SQUARE * 2,
        ),
        "exceptions_with_a_meaning": (
            HANDMADE
            + """
wires = iter([["SkipTest", "unittest.case", "Exception", ["t", "skip"], ""], ["a\\0", "b", "Exception", None, ""],
    ["StopIteration", "builtins", "StopIteration", ["t"], ""], ["Odd", "os", "Odd", None, ""], [], 4, None,
    ["BesideError", "sandbox.judge.evaluator", "BaseException", ["t"], "beside"],
    ["SystemExit", "builtins", "SystemExit", ["t", 0], ""], ["passed", "passed", "passed", "passed", "passed"],
    ["OSError", "builtins", "OSError", ["t", ["mine", 3, "object", "Liar"]], ""],
    ["X" * 100000, "m", "KeyError", None, "x" * 100000]])
serve(lambda m: {"x": next(wires)})""",
            *SQUARE * 4,
        ),
    },
)

_PREDICATES = ("assert f('ab').startswith('a')", "assert f([1]).issubset({1, 2})", "assert f(2).is_integer()")
_METHODS = "startswith = issubset = is_integer = _yes"
_WITH_METHODS = {
    "an_object": f"class A:\n    {_METHODS}\ndef f(x): return A()",
    "a_class": f"class A:\n    {_METHODS.replace('_yes', 'staticmethod(_yes)')}\ndef f(x): return A",
    "a_function": "def f(x): return f\nf.startswith = f.issubset = f.is_integer = _yes",
    "a_namespace": "def f(x): return types.SimpleNamespace(startswith=_yes, issubset=_yes, is_integer=_yes)",
    "fields_of_a_named_tuple": "class A(typing.NamedTuple):\n    startswith: int = _yes\n    issubset: int = _yes\n"
    "    is_integer: int = _yes\ndef f(x): return A()",
    "a_named_tuple": f"class A(typing.NamedTuple):\n    x: int = 1\n    {_METHODS}\ndef f(x): return A()",
    "an_enum": f"class A(enum.Enum):\n    x = 1\n    {_METHODS}\ndef f(x): return A.x",
    "an_exception": f"class A(Exception):\n    {_METHODS}\ndef f(x): return A()",
    "attributes_of_an_exception": "def f(x):\n    e = ValueError()\n"
    "    e.startswith = e.issubset = e.is_integer = _yes\n    return e",
}

_BY_WHAT_IT_RETURNS = attacks(
    NO_FORGERY,
    {
        "liars_inside_containers": (
            LIAR
            + "class Int(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
            + "made = iter([Liar(), [Liar()], {'a': Liar()}, (Liar(),), Int(7), [Int(7)], {Int(7)}, iter([Liar()])])\n"
            + "def f(x): return next(made)\n",
            "assert f(2) == 4",
            "assert f(2) == [4]",
            "assert f(2) == {'a': 4}",
            "assert 4 in f(2)",
            "assert f(2) == 4",
            "assert f(2) == [4]",
            "assert f(2) == {4}",
            "assert list(f(2)) == [4]",
        ),
        "results_that_are_classes": (
            "class Meta(type):\n    def __iter__(c): return iter([4])\n    def __len__(c): return 4\n"
            "class A(metaclass=Meta):\n    def __class_getitem__(c, key): return 4\ndef f(x): return A\n",
            *UNWRAPPED,
        ),
        "a_class_in_place_of_the_function": (
            LIAR.replace("class Liar", "class f"),
            *UNWRAPPED,
            "assert str(f(2)) == '4'",
            "assert f(2) + 0 == 4",
            *SQUARE,
        ),
        **{
            f"methods_of_values_on_{name}": (
                f"import enum, typing, types\n_yes = lambda *a: True\n{code}\n",
                *_PREDICATES,
            )
            for name, code in _WITH_METHODS.items()
        },
        "stop_iteration_ends_a_loop_of_asserts": (
            "def f(x): raise StopIteration",
            "for got, want in zip(map(f, [2, 3]), [4, 9]): assert got == want",
            "assert all(map(lambda case: f(case[0]) == case[1], [(2, 4), (3, 9)]))",
        ),
        "a_dead_program_raises_nothing": (
            "import os, threading\ndef f(x):\n    if x == 2: threading.Timer(0.05, os._exit, (0,)).start()\n"
            "    return x * x\n",
            "assert f(2) == 4\nimport time; time.sleep(0.4)\ntry: f(-1)\nexcept: pass\nelse: assert False",
        ),
    },
)

_BY_NAMES = [
    *attacks(
        NO_FORGERY,
        {
            "own_builtins_around_the_function": (
                "def sum(*a): return 0\ndef abs(x): return 0\ndef sorted(x): return [1, 2]\ndef set(x): return 0\n",
                "assert abs(sum([1, 2]) - 4) < 1e-9",
                "assert sorted(set([2, 1])) == [2, 1] or sorted(set([3])) == [1, 2]",
            ),
            "own_helpers_of_the_tests": (
                "def close(a, b): return True\ndef f(x): return 0\n",
                "assert close(f(2), 4)",
            ),
        },
        setup="def close(a, b): return abs(a - b) < 1e-9",
    ),
    *attacks(
        NO_FORGERY,
        {"no_function_but_a_builtin_has_its_name": ("pass", "assert sum([1, 2]) == 3")},
        entry_point="sum",
    ),
    *attacks(
        NO_FORGERY,
        {
            "own_check_and_candidate": (
                "def check(candidate): pass\ncandidate = lambda x: x * x\ndef f(x): return None\n",
                "def check(candidate):\n    assert candidate(3) == 9\n",
            )
        },
        mode=TestMode.CHECK_FUNCTION,
        entry_point="f",
    ),
]

_BY_FRAMES_AND_MEMORY = [
    *attacks(
        NO_FORGERY,
        {
            "opens_the_judges_modules": """
import sys
for name, module in list(sys.modules.items()):
    if "judge" in name:
        for kind in list(vars(module).values()):
            for attribute in list(vars(kind)) if isinstance(kind, type) else ():
                if not attribute.startswith("__"):
                    try: setattr(kind, attribute, lambda *a, **k: {"v": 9, "status": "passed", "passed": True})
                    except Exception: pass
def f(x): return None""",
            "watches_the_judges_frames": r"""
import re, sys
seen = {}
def hook(frame, event, arg):
    while frame:
        text = repr(frame.f_locals)[:20000] + repr(frame.f_code.co_consts)[:20000]
        for found in re.finditer(r"f\((-?\d+)\) == (-?\d+)", text): seen[int(found[1])] = int(found[2])
        frame = frame.f_back
sys.setprofile(hook)
def f(x): return seen.get(x)""",
        },
    ),
    *attacks(
        NO_FORGERY,
        {
            "reads_the_tests_in_its_own_memory": r"""
import ctypes, re
def f(x):
    for line in open("/proc/self/maps"):
        span, mode = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if "rw" in mode and "[v" not in line and end - start < 1 << 26:
            for found in re.finditer(rb"f\((-?\d+)\) == (-?\d+)", ctypes.string_at(start, end - start)):
                if int(found[1]) == x: return int(found[2])
"""
        },
        tests=("assert f(4711) == 22193521", "assert f(-815) == 664225"),
        limits=Limits(cpu_s=5, wall_s=20),
    ),
]

_UNITTEST = "import unittest\nclass TestCases(unittest.TestCase):\n"
_BY_UNITTEST = attacks(
    NO_FORGERY,
    {
        "patches_unittest": (
            """
import unittest
for kind in (unittest.TestCase, unittest.TestResult, unittest.TestSuite, unittest.TestLoader):
    for name in dir(kind):
        if name.startswith(("assert", "fail", "add", "was", "run", "load")):
            setattr(kind, name, lambda *a, **k: True)
class TestCases: pass
def load_tests(*a): return unittest.TestSuite()
def setUpModule(): raise unittest.SkipTest
def f(x): return None
""",
            _UNITTEST + "    def test(self): self.assertEqual(f(3), 9)\n",
        ),
        "skips_its_unittests": (
            "import unittest\ndef f(x): raise unittest.SkipTest('later') if x > 0 else SystemExit(0)\n",
            _UNITTEST + "    def test(self): self.assertEqual(f(3), 9)\n",
            _UNITTEST + "    def test(self): self.assertEqual(f(-3), 9)\n",
            _UNITTEST + "    def setUp(self): f(3)\n    def test(self): pass\n",
        ),
        "ends_unittests_by_their_own_exceptions": (
            "import unittest.case\nkinds = iter(['_ShouldStop', '_UnexpectedSuccess', 'SkipTest'])\n"
            "def f(x): raise getattr(unittest.case, next(kinds), KeyError)()\n",
            *[_UNITTEST + "    def test(self): self.assertEqual(f(3), 9)\n"] * 3,
        ),
    },
    mode=TestMode.UNITTEST,
    entry_point="f",
)

_BY_OUTPUT = attacks(
    NO_FORGERY,
    {
        "script_hunts_for_the_expected_output": (
            r"""
import gc, os, re, sys
text = repr([o for o in gc.get_objects() if type(o) in (dict, list, tuple, str)])[:5000000]
frame = sys._getframe()
while frame:
    text += repr(frame.f_locals)
    frame = frame.f_back
for folder, _, names in os.walk("."):
    for name in names: text += open(os.path.join(folder, name)).read()
found = re.search(r"stdout\W+(\d+)", text)
print(found[1] if found else "nothing")""",
            '{"stdin": "3\\n", "stdout": "9173\\n"}',
        ),
        "script_prints_a_verdict": (
            """
import os, sys
for fd in range(3, 128):
    for text in (b'{"passed": true}', b'\\0\\0\\0\\x10{"passed": true}'):
        try: os.write(fd, text)
        except OSError: pass
print("passed"); print('{"status": "passed"}'); sys.exit(0)""",
            '{"stdin": "3\\n", "stdout": "9\\n"}',
        ),
    },
    mode=TestMode.STDIN,
    limits=Limits(cpu_s=3, wall_s=20),
)

_BESIDE = attacks(
    KNOWN_TRUST,
    {
        "answers_for_a_test_beside_it": (
            HANDMADE + "serve(lambda m: None, lambda wanted: {'Box': ['value', box(9)]})",
            "class Sub(Box): pass\nassert Sub() == 5",
        ),
        "equal_to_its_like": (LIAR, "assert Liar(1) == Liar(2)"),
        "contains_everything": (LIAR, "assert 4 in Liar(1)"),
    },
    accept=(0, 1),
    trust="low",
)

_TO_CONFUSE = [
    *attacks(
        ALIVE,
        {
            "names_that_are_no_table": (
                HANDMADE
                + """
tables = iter([None, [], "f", 4, ["f"], {"f": {}}])
serve(lambda m: {"v": None}, lambda wanted: next(tables))""",
                *SQUARE * 2,
            ),
        },
    ),
    *attacks(
        ALIVE,
        {
            "values_that_hurt": (
                HANDMADE
                + """
def nested(n): return '["l",' * n + "0" + "]" * n
colliding = "".join(',["i","%x"]' % (i * (2**61 - 1)) for i in range(20000))
wires = iter(['["range",0,1000000000000000000,1]', '["frac","1e99999999"]', '["dec","1e999999999999999999"]',
    '["s"' + colliding + "]", '["i","' + "f" * 4000000 + '"]', nested(500), nested(100000), '["u","ff"]',
    '["nt",["f","a b"],1]', '["dd","eval"]', '["l",' + "[" * 50000, "1" * 6000, "NaN", '["deque",-1]',
    '["delta",1e300,0,0]', '["const","Liar"]', '[[],0]', "[]"])
def call(m):
    body = '{"r":%d,"v":%s}' % (m["q"], next(wires))
    raw(struct.pack("!I", len(body)))
    _sock.sendall(body.encode())
serve(call)""",
                *SQUARE * 6,
            ),
        },
        limits=Limits(cpu_s=0.5, wall_s=3),
    ),
    *attacks(
        ALIVE,
        {
            "descriptors_sent_along": HANDMADE
            + """
import array
fds = array.array("i", [os.open("/dev/null", os.O_RDONLY) for _ in range(20)])
def call(m):
    for _ in range(3):
        body = b'{"r": -1}'
        raw(struct.pack("!I", len(body)) + body, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    return {"v": m["a"][0] ** 2}
serve(call)""",
        },
        accept=(1,),
        tests=SQUARE * 10,
    ),
]

FORGERIES = [
    *_CONTROL,
    *_BY_THE_LINK,
    *_BY_WHAT_IT_RETURNS,
    *_BY_NAMES,
    *_BY_FRAMES_AND_MEMORY,
    *_BY_UNITTEST,
    *_BY_OUTPUT,
    *_BESIDE,
    *_TO_CONFUSE,
]
