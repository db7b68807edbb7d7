"""Which tests are graded, and what they call. A test that is shown is never graded, whatever the source."""

import ast
import builtins

from diffrl.data.row_files import RowError
from diffrl.prompts import parse_python
from diffrl.types import Problem

_NOTHING = ast.Module(body=[], type_ignores=[])


def without(graded: tuple[str, ...], shown: tuple[str, ...]) -> tuple[str, ...]:
    """A test that is shown is not graded, even when the row lists it twice."""
    seen = {test.strip() for test in shown}
    return tuple(test for test in graded if test.strip() not in seen)


def check_graded(problem: Problem) -> None:
    """Raises RowError for a problem that nothing would be graded by."""
    if not problem.reward_tests:
        reason = f"problem {problem.id} has no graded test left: leave it out, or set num_prompt_tests to 0"
        raise RowError(reason, "reward_tests")


def entry_point_of(code: str, tests: tuple[str, ...]) -> str | None:
    """The first name the tests call, outermost first, that the code defines; functions go before classes.

    Code that does not parse leaves the first called name that is not a builtin; None when the tests call
    nothing.
    """
    called = [
        node.func.id
        for test in tests
        for node in ast.walk(parse_python(test) or _NOTHING)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    body = (parse_python(code) or _NOTHING).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    foreign = {name for name in called if not hasattr(builtins, name)}
    for candidates in (functions, classes, foreign):
        for name in called:
            if name in candidates:
                return name
    return None
