"""Runs one test string in a namespace, in the evaluator or beside the solution, and says where a unittest must run.

A test of unittest.TestCase classes passes when at least one of its methods ran and none went wrong. What its decorator
skips does not count; a skip while it runs is a failure, as the program can raise it. An expected failure is a pass, an
unexpected success a failure.

In the evaluator a test cannot be forged. Beside the solution it can: the program shares unittest, the namespace and
the interpreter with it. What stands in its way is little: what the program did to unittest is undone before each
method, and the result is kept in an object that is made after the program's top level has run.
"""

import ast
import builtins
import types
import unittest
from collections.abc import Iterable
from typing import Any

from sandbox.judge.expectations import VALUE_ATTRIBUTES

_MAX_DETAIL = 200
_SETUP = "<setup>"

# Values and pure functions; not random, whose state belongs to a process.
_MODULES_ACROSS = {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"}
_MODULES_ACROSS |= {"itertools", "json", "math", "operator", "re", "statistics", "string", "typing", "unittest"}
_NAMES_BESIDE = {"open", "input", "exec", "eval", "__import__", "globals", "getattr", "hasattr", "setattr", "mock"}
_NAMES_BESIDE |= {"assertLogs", "assertNoLogs", "assertWarns", "assertWarnsRegex"}
_ATTRIBUTES_ACROSS = VALUE_ATTRIBUTES | set(dir(unittest.TestCase)) | {"exception"}  # with assertRaises(...) as e

# This exception ends a method without a result, and it counts as passed. Now nothing is such an exception.
unittest.case.__dict__["_ShouldStop"] = ()
_unittest_modules = [unittest, unittest.case, unittest.loader, unittest.result, unittest.suite]
_unittest_classes = {kind for module in _unittest_modules for kind in vars(module).values() if isinstance(kind, type)}
_UNITTEST = [
    (owner, dict(vars(owner)))
    for owner in (*_unittest_modules, *_unittest_classes)
    if getattr(owner, "__module__", "unittest").startswith("unittest")
]


def compile_test(setup: str, source: str) -> list[types.CodeType]:
    """Both parts of a test, in the order in which they run. Raises what `compile` raises."""
    return [
        compile(text, name, "exec", dont_inherit=True) for name, text in ((_SETUP, setup), ("<test>", source)) if text
    ]


def run_test(
    programs: list[types.CodeType], mode: str, entry_point: str | None, scope: dict[str, Any]
) -> tuple[str, str]:
    """(status, detail) of a test that `compile_test` made, run in `scope`, the namespace of an imported module."""
    earlier = _test_cases(scope)
    candidate = scope.get(entry_point) if entry_point else None  # the test may define the same name
    try:
        for program in programs:
            exec(program, scope)
            if entry_point and program.co_filename == _SETUP:  # which may hold a stub of it
                scope.pop(entry_point, None) if candidate is None else scope.update({entry_point: candidate})
        if mode == "unittest":
            return _run_test_cases([kind for kind in _test_cases(scope) if kind not in earlier])
        if mode == "check_function":
            if candidate is None:
                raise NameError(f"name {entry_point!r} is not defined")
            scope["check"](candidate)
    except BaseException as error:
        return outcome_of(error)
    return "passed", ""


def outcome_of(error: BaseException) -> tuple[str, str]:
    """(status, detail) of a test that ended with this exception."""
    try:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except BaseException:  # an argument that does not want to be printed
        detail = type(error).__name__
    if isinstance(error, AssertionError):
        status = "failed"
    elif isinstance(error, MemoryError):
        status = "out_of_memory"
    elif isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        status = "killed"
    else:
        status = "error"
    return status, detail[:_MAX_DETAIL]


class _Result(unittest.TestResult):
    """Counts what went well and keeps the first thing that did not; the suite stops there."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = self.skipped_by_decorator = 0
        self.problem: tuple[str, str] | None = None

    def startTest(self, test: Any) -> None:
        _restore_unittest()
        super().startTest(test)

    def addSuccess(self, test: Any) -> None:
        self.passed += 1

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.passed += 1

    def addSkip(self, test: Any, reason: str) -> None:
        method = getattr(test, getattr(test, "_testMethodName", ""), None)
        if getattr(type(test), "__unittest_skip__", False) or getattr(method, "__unittest_skip__", False):
            self.skipped_by_decorator += 1
        else:
            self._add_problem(test, "failed", f"skipped while it ran: {reason}")

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._add_problem(test, "failed", "unexpected success")

    def addFailure(self, test: Any, err: Any) -> None:
        self._add_problem(test, *outcome_of(err[1]))

    def addError(self, test: Any, err: Any) -> None:
        self._add_problem(test, *outcome_of(err[1]))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._add_problem(test, *outcome_of(err[1]))

    def _add_problem(self, test: Any, status: str, detail: str) -> None:
        name = getattr(test, "_testMethodName", None) or str(test)  # setUpClass and the like have a description only
        self.problem = self.problem or (status, f"{name}: {detail}"[:_MAX_DETAIL])
        self.shouldStop = True


def _run_test_cases(kinds: list[type[unittest.TestCase]]) -> tuple[str, str]:
    _restore_unittest()
    loader, result = unittest.TestLoader(), _Result()
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(kind) for kind in kinds)
    count = suite.countTestCases()
    suite.run(result)
    if result.problem:
        return result.problem
    if not result.passed:
        return "error", "no test method ran"
    if result.passed + result.skipped_by_decorator < count:  # an exception that unittest uses to end a method
        return "failed", "a test method ended without a result"
    return "passed", ""


def _test_cases(scope: dict[str, Any]) -> list[type[unittest.TestCase]]:
    """The TestCase classes that the module itself defines, in order."""
    kinds = [kind for kind in scope.values() if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    return [kind for kind in dict.fromkeys(kinds) if kind.__module__ == scope["__name__"]]


def _restore_unittest() -> None:
    for owner, kept in _UNITTEST:
        now = vars(owner)
        for name in [name for name in now if name not in kept] if isinstance(owner, type) else ():
            delattr(owner, name)
        for name in [name for name, value in kept.items() if now.get(name) is not value]:
            setattr(owner, name, kept[name])


def runs_beside(setup: str, source: str, entry_point: str | None) -> bool:
    """Whether a unittest must run in the solution's own process; its source alone decides, never the program.

    It runs in the evaluator when arguments, results and exceptions are all that it exchanges with the program. That is
    so when it imports nothing but unittest (no mock) and modules of pure functions; every name that it uses is its own,
    a builtin (no files, no reflection) or the entry point; and every attribute belongs to `self`, to a class or module
    of its own, or is one that plain values have (`result.shape` is a sign of an object of a library); and nothing is
    asynchronous.
    """
    try:
        nodes = [node for text in (setup, source) for node in ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # what this interpreter's settings refuse may still compile there
    own = {"self", "cls"} | {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    own |= {(a.asname or a.name).split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
    known = own | {entry_point} | set(dir(builtins)) | set(_bound(nodes))
    return any(_reaches_out(node, own, known) for node in nodes)


def _reaches_out(node: ast.AST, own: set[str], known: set[str | None]) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name not in _MODULES_ACROSS for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module not in _MODULES_ACROSS or any(alias.name in _NAMES_BESIDE for alias in node.names)
    if isinstance(node, ast.Name):
        return node.id in _NAMES_BESIDE or node.id not in known
    if isinstance(node, ast.Attribute):
        of_own = isinstance(node.value, ast.Name) and node.value.id in own
        return node.attr in _NAMES_BESIDE or not (of_own or node.attr in _ATTRIBUTES_ACROSS)
    return isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith)


def _bound(nodes: Iterable[ast.AST]) -> Iterable[str | None]:
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
