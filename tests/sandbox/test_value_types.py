"""Value types across the link: every right program is paid in full, no lying object is, and trust is stated."""

import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.judge.expectations import shares_state, sources_of_objects
from sandbox.process import ProcessSandbox
from sandbox.types import Limits, Submission, TestStatus
from tests.sandbox.attacks.attack import HANDMADE
from tests.sandbox.object_programs import HELPERS, LIES, RIGHT_OBJECTS
from tests.sandbox.value_programs import (
    RIGHT_ENUMS,
    RIGHT_FUNCTIONS,
    RIGHT_ITERATORS,
    RIGHT_NAMED_TUPLES,
    RIGHT_VALUES,
    Case,
)

RIGHT = [*RIGHT_ENUMS, *RIGHT_NAMED_TUPLES, *RIGHT_VALUES, *RIGHT_ITERATORS, *RIGHT_FUNCTIONS, *RIGHT_OBJECTS]
CASES = [*RIGHT, *LIES, *HELPERS]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ProcessSandbox]:
    with ProcessSandbox() as sandbox:
        yield sandbox


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_program_gets_what_it_deserves(sandbox: ProcessSandbox, case: Case) -> None:
    limits = Limits(cpu_s=10, wall_s=60)
    verdict = sandbox.judge(Submission(id=case.name, code=case.code, tests=case.tests, limits=limits, **case.options))
    rate = verdict.statuses.count(TestStatus.PASSED) / len(case.tests)
    assert rate == case.accept, (case.property, [*zip(case.tests, verdict.statuses, verdict.details, strict=True)])
    assert verdict.beside == (case.trust == "low",) * len(case.tests), (case.property, verdict)


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_right_programs_are_right_in_plain_python(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for test in case.tests:
        module = types.ModuleType("solution")
        monkeypatch.setitem(sys.modules, "solution", module)  # Enums and dataclasses look their module up
        exec(case.code, vars(module))
        exec(test, vars(module))


def test_there_are_many_and_no_name_twice() -> None:
    assert max(Counter(case.name for case in CASES).values()) == 1
    assert len(RIGHT) >= 100 and len(LIES) >= 25


_CHANGES = {
    "changed": "x = [0]; f(x); assert x == [1, 2]",
    "returned": "x = [0]; assert f(x) is x",
    "untouched": "x, expected = [0], [4]; f(x); assert expected == [4]",
    "wanted": "x, expected = [0], [4]; assert f(x) == expected",
    "rebound": "expected = 4; x = [0]; f(x); assert expected == 9",
}


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ({"v": None, "m": [[0, ["l", 1, 2]]]}, {"changed", "untouched"}),
        ({"v": ["ref", 0]}, {"returned", "untouched"}),
        ({"v": ["l", 4], "m": [[1, ["l", 9]]]}, {"untouched"}),  # 1 is what it returns
        ({"v": None, "m": [[1, ["l", 9]]]}, set()),  # garbage from here on
        ({"v": None, "m": [[-1, ["l", 9]]]}, set()),
        ({"v": None, "m": [[0, ["d"]]]}, set()),
        ({"v": None, "m": {"expected": 9}}, set()),
        ({"v": ["ref", 5]}, set()),
        ({"v": None, "w": [[0, ["l", 9]]]}, set()),
        ({"v": None, "g": {"expected": ["value", 9]}}, {"untouched"}),
        ({"v": None, "g": {"f": 1}}, set()),
    ],
)
def test_changes_told_by_hand_reach_what_was_passed_and_nothing_else(
    sandbox: ProcessSandbox, answer: dict[str, Any], passes: set[str]
) -> None:
    tests = tuple(_CHANGES.values())
    verdict = sandbox.judge(Submission(id="m", code=f"{HANDMADE}\nserve(lambda m: {answer!r})", tests=tests))
    passed = {name for name, status in zip(_CHANGES, verdict.statuses, strict=True) if status is TestStatus.PASSED}
    assert passed == passes, verdict


_NAMES_THAT_CHANGE = """
n, inner, keep = 0, ([],), lambda: True
def count():
    global n
    n += 1
def define():
    global late
    late = 1
def drop():
    global keep
    del keep
def put():
    inner[0].append(0)
    return len(inner[0])
class Stack:
    items = ()
def give():
    Stack.items += (n,)
    return Stack
"""


@pytest.mark.parametrize(
    ("test", "statuses"),
    [
        ("before = n; count(); assert n == before + 1", "passed passed passed"),
        ("define(); assert late == 1", "error passed passed"),  # what a test starts without, it stays without
        ("assert keep(); drop()", "passed error error"),
        ("before = len(inner[0]); assert put() == before + 1", "passed passed passed"),
        ("before = len(Stack.items); assert len(give().items) == before + 1", "passed passed passed"),
    ],
)
def test_each_test_starts_with_the_names_as_the_program_has_them_then(
    sandbox: ProcessSandbox, test: str, statuses: str
) -> None:
    verdict = sandbox.judge(Submission(id="n", code=_NAMES_THAT_CHANGE, tests=(test,) * 3))
    assert [status.value for status in verdict.statuses] == statuses.split(), verdict


@pytest.mark.parametrize(
    ("test", "sources"),
    [
        ("assert f(2) == 4", set()),
        ("assert abs(f(2) - 4) < 1e-6 and math.isclose(f(2), 4)", set()),
        ("r = f(2); r.sort(); assert r == [1] and f('a').upper() == 'A'", set()),
        ("def check(candidate): assert candidate(2) == f(2)", set()),
        ("assert Stack(2) == f(2)", {"Stack"}),
        ("s = f(2); assert s.val == 1 and g(2)", {"f"}),
        ("for n in f(2): assert n.val == g(1)", {"f"}),
        ("xs = []\nxs.append(f(2))\nassert xs[0].val == g(1)", {"f"}),
        ("def walk(n): return n.next\nassert walk(f(2)) == g(1)", {"f", "g", "Stack"}),
        ("assert isinstance(f(2), g)", {"g"}),
        ("class A(g): pass\nassert f(A())", {"g"}),
        ("assert g.parse('x') == f(2)", {"g"}),
    ],
)
def test_only_the_tests_source_says_which_names_yield_objects(test: str, sources: set[str]) -> None:
    names = frozenset({"f", "g", "Stack"} if "Stack" in sources else {"f", "g"})
    assert sources_of_objects(("", test), names, "f") == sources


def test_an_entry_point_in_cap_words_may_be_a_function() -> None:
    assert sources_of_objects(("assert Sort([1]) == [1]",), frozenset({"Sort"}), "Sort") == set()
    assert sources_of_objects(("assert Sort([1]).keys_seen == 1",), frozenset({"Sort"}), "Sort") == {"Sort"}


@pytest.mark.parametrize(
    ("test", "shared"),
    [
        ("assert f(open) and open('x')", True),
        ("import contextlib\nwith contextlib.redirect_stdout(x): f()", True),
        ("import sys\nsys.stdin = x", True),
        ("from unittest.mock import patch", True),
        ("import random\nrandom.seed(1)", True),
        ("door.open(); stdout = 1; import random; random.choice([1])", False),
    ],
)
def test_only_the_tests_source_says_whether_it_needs_the_programs_process(test: str, shared: bool) -> None:
    assert shares_state((test,)) is shared
