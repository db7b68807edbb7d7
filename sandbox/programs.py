"""One solution and its tests from a user's files, and the verdict in words.

The file of tests holds one of these, found out by looking unless the mode is given:
  asserts          top-level assert statements, each a test of its own. What stands before the first is the setup of all;
                   statements between two asserts belong to every test after them
  check_function   a function check(candidate): the whole file is one test
  unittest         classes derived from unittest's TestCase: the whole file is one test
  stdin            lines of JSON {"stdin": text, "stdout": text}, each a test; the solution is a script

The solution's names are there by themselves. `from NAME import ...`, NAME being the solution's file, is left out.
"""

import ast
import json
from pathlib import Path

from sandbox.types import Limits, Submission, TestMode, TestStatus, Verdict

_MAX_SHOWN = 100


def read_submission(
    solution: str | Path, tests: str | Path, mode: TestMode | None, entry_point: str | None, limits: Limits
) -> Submission:
    """Raises ValueError with the way out for files that cannot be read or hold no tests."""
    code, source = _read("solution", solution), _read("tests", tests)
    mode = mode or infer_mode(source)
    setup, parts = split_tests(source, mode, Path(solution).stem)
    if mode is TestMode.CHECK_FUNCTION and entry_point is None:
        entry_point = only_function(code)
    return Submission(
        id=Path(solution).name,
        code=code,
        tests=tuple(parts),
        mode=mode,
        entry_point=entry_point,
        setup=setup,
        limits=limits,
    )


def infer_mode(source: str) -> TestMode:
    """What kind of tests a file holds, by its top-level statements."""
    if source.lstrip().startswith("{"):
        return TestMode.STDIN
    for node in _parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            return TestMode.CHECK_FUNCTION
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in node.bases):
            return TestMode.UNITTEST
    return TestMode.ASSERTS


def split_tests(source: str, mode: TestMode, solution: str = "") -> tuple[str, list[str]]:
    """(setup, tests); ValueError when there is no test."""
    setup: list[str] = []
    tests: list[str] = []
    between: list[str] = []
    if mode is TestMode.STDIN:
        tests = [line for line in source.splitlines() if line.strip()]
        for line in tests:
            _check_stdin_test(line)
    else:
        body = [n for n in _parse(source).body if not (isinstance(n, ast.ImportFrom) and n.module == solution)]
        if mode is not TestMode.ASSERTS:
            tests = [ast.unparse(ast.Module(body, []))]
        else:
            for node in body:
                if isinstance(node, ast.Assert):
                    tests.append("\n".join([*between, ast.unparse(node)]))
                else:
                    (between if tests else setup).append(ast.unparse(node))
    if not tests:
        raise ValueError("tests: no top-level assert, no check(candidate), no TestCase class: write one of them")
    return "\n".join(setup), tests


def only_function(code: str) -> str:
    """The name of the one top-level function."""
    try:
        names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError):  # the judge will say so
        return "candidate"
    if len(names) != 1:
        raise ValueError(f"solution: {len(names)} top-level functions: name the one to check with --entry-point")
    return names[0]


def verdict_lines(submission: Submission, verdict: Verdict) -> list[str]:
    """A line per test, and one for them all."""
    lines = []
    for number, test in enumerate(submission.tests, start=1):
        shown = test.splitlines()[-1] if submission.mode is TestMode.ASSERTS else f"{submission.mode} {number}"
        shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 3] + "..."
        detail = verdict.details[number - 1]
        lines.append(f"{verdict.statuses[number - 1]:<13}  {shown}" + (f"  # {detail}" if detail else ""))
    passed = verdict.statuses.count(TestStatus.PASSED)
    return [*lines, f"{passed} of {len(lines)} tests passed, {verdict.trust} trust, {verdict.cpu_s:.3f} s of CPU time"]


def _check_stdin_test(line: str) -> None:
    try:
        test = json.loads(line)
    except ValueError as error:
        raise ValueError(f"tests: {line[:_MAX_SHOWN]!r} is not JSON ({error})") from None
    if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("stdin", "stdout")):
        raise ValueError(f'tests: {line[:_MAX_SHOWN]!r} must be {{"stdin": text, "stdout": text}}')


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"tests: not valid Python: {error}") from None


def _read(what: str, path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: {path} cannot be read ({error}): give a text file") from None
