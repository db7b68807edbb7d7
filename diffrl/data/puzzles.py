"""P3 puzzles, and problems whose programs read stdin and write stdout.

A puzzle of P3 (arXiv 2106.05784) is a function `sat`: find a value for which it is True. The function is the statement, so the
prompt shows it; what is graded is the value that the program finds.
"""

import ast
import json
import re

from diffrl.data.graded import without
from diffrl.data.row_files import Row, RowError, identifier_of, license_of, text_of, texts_of
from diffrl.prompts import parse_python
from diffrl.types import Problem

IMPORTS = "from typing import *"


def p3_row(row: Row, num_prompt_tests: int) -> Problem:
    """There is no test beside `sat`, so none is shown (`num_prompt_tests` changes nothing). The solution is the first of
    sol_bodies, which may be empty."""
    sat, header = text_of(row, "sat").strip(), text_of(row, "sol_header").strip()
    if not re.match(r"def sat\(", sat) or parse_python(sat) is None:
        raise RowError("field 'sat' is no Python that defines a function sat", "sat")
    if not re.match(r"def sol\(.*\):$", header, re.DOTALL):
        raise RowError(f"field 'sol_header' is {header[:60]!r}: give `def sol(...):`", "sol_header")
    words = text_of(row, "sol_docstring", "").strip().strip('"').strip()
    bodies = texts_of(row, "sol_bodies", ())
    return Problem(
        id=f"p3/{identifier_of(row, 'name')}",
        prompt=f"{words}\nWrite `{header}` that returns a value for which `sat` is True: `sat(sol())`.\n"
        f"```python\n{IMPORTS}\n\n\n{sat}\n```".strip(),
        prompt_tests=(),
        reward_tests=("assert sat(sol()) is True",),
        entry_point="sol",
        setup=f"{IMPORTS}\n{sat}",
        solution=f"{IMPORTS}\n\n\n{header}\n{bodies[0]}" if bodies else None,
        family=f"p3/{text_of(row, 'module', '').removesuffix('.py')}",
        license=license_of(row),
    )


def stdin_row(row: Row, num_prompt_tests: int) -> Problem:
    """Rows as those of APPS and TACO: question, input_output ({"inputs": [...], "outputs": [...]}, also as JSON text), and
    perhaps solutions (a list, also as JSON text). The first test is shown, unless it is the only one."""
    cases = parsed(row, "input_output")
    inputs, outputs = (cases.get(key) for key in ("inputs", "outputs")) if isinstance(cases, dict) else (None, None)
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise RowError("field 'input_output' must be {inputs, outputs}, two lists of the same length", "input_output")
    if isinstance(cases, dict) and cases.get("fn_name"):
        raise RowError("field 'input_output' names a function: no stdin problem, leave it out", "input_output")
    tests = tuple(
        json.dumps({"stdin": lines(given), "stdout": lines(wanted)})
        for given, wanted in zip(inputs, outputs, strict=True)
    )
    for test in tests:
        check_stdin_test(test, "input_output")
    graded = without(tests, tests[:num_prompt_tests])
    shown = tests[:num_prompt_tests] if graded else ()
    solutions = parsed(row, "solutions") if row.get("solutions") else []
    own = solutions if isinstance(solutions, list) else []
    return Problem(
        id=f"stdin/{identifier_of(row, 'id' if row.get('id') is not None else 'problem_id')}",
        prompt=f"{text_of(row, 'question').strip()}\nWrite a whole program that reads stdin and writes stdout.",
        prompt_tests=shown,
        reward_tests=graded or tests[:1],
        test_mode="stdin",
        solution=next((text for text in own if isinstance(text, str) and text.strip()), None),
        family=text_of(row, "difficulty", "") or "stdin",
        license=license_of(row),
    )


def parsed(row: Row, field: str) -> object:
    value = row.get(field)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        try:  # TACO writes Python
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(f"field {field!r} is text that is not JSON", field) from None


def lines(value: object) -> object:
    """Some rows have lists of lines."""
    return "\n".join(value) if isinstance(value, list) and all(isinstance(line, str) for line in value) else value


def check_stdin_test(test: str, field: str) -> None:
    """Raises RowError for anything but JSON {"stdin": text, "stdout": text}."""
    try:
        case = json.loads(test)
    except ValueError as error:
        raise RowError(f"test {test[:60]!r} of test_mode stdin is not JSON ({error})", field) from None
    if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("stdin", "stdout")):
        raise RowError(f'test {test[:60]!r} of test_mode stdin must be {{"stdin": text, "stdout": text}}', field)
