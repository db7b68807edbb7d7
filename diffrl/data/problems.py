"""Files of problems -> `Problem`: MBPP (full and sanitized), HumanEval, and our own `problems` format.

A file is JSONL, JSONL.gz or Parquet, one problem a row. At most one test is shown in the prompt, and a shown
test is never graded. To add a data set: write one converter (row -> Problem), add one line to `DATASETS`. A
converter raises ValueError with a short reason; `load_problems` puts the file and the line in front.
"""

import ast
import builtins
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from diffrl.prompts import parse_python
from diffrl.types import Problem, TestModeName

_NOTHING = ast.Module(body=[], type_ignores=[])

Row = Mapping[str, Any]
RowConverter = Callable[[Row, int], Problem]  # (row, how many tests to show: 0 or 1)


def load_problems(
    format: str, path: str | Path, *, num_prompt_tests: int = 1, limit: int | None = None
) -> list[Problem]:
    """The first `limit` problems of a file (None: all), in its order.

    `format` is a key of `DATASETS`. Raises ValueError, one line, for a bad argument, a missing or unreadable
    file, and a row that lacks a field or is left without a graded test.
    """
    if format not in DATASETS:
        raise ValueError(f"format: {format!r} is not a data set: choose from {', '.join(DATASETS)}")
    if num_prompt_tests not in (0, 1):
        raise ValueError(f"num_prompt_tests is {num_prompt_tests}: at most one test is shown: give 0 or 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more, or null for the whole file")
    problems: list[Problem] = []
    for place, row in islice(read_rows(Path(path)), limit):
        try:
            problem = DATASETS[format](row, num_prompt_tests)
            _check_graded(problem)
        except ValueError as error:
            raise ValueError(f"{path} {place} (format {format}): {error}") from None
        problems.append(problem)
    return problems


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where the row stands, row) of a .jsonl, .jsonl.gz or .parquet file; blank lines are skipped."""
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ValueError(f"{path} has an unknown ending: give a .jsonl, .jsonl.gz or .parquet file")
    if not path.is_file():
        raise ValueError(f"no file at {path}: check the path")
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def mbpp_row(row: Row, num_prompt_tests: int) -> Problem:
    """MBPP, both full (text, test_setup_code, challenge_test_list) and sanitized (prompt, test_imports).

    The first test of test_list is shown; the others and the challenge tests are graded. With no test shown
    the instruction names the entry point, since nothing else ties the tests to the program. A row whose tests
    are all copies of the first (mbpp/37) shows none, so that it keeps a graded one.
    """
    instruction = _text(row, "text" if "text" in row else "prompt").strip()
    code = _text(row, "code")
    tests = _texts(row, "test_list")
    setup = [_text(row, "test_setup_code", ""), *_texts(row, "test_imports", ())]
    entry_point = _entry_point(code, tests)
    shown = tests[:num_prompt_tests]
    graded = _without((*tests[num_prompt_tests:], *_texts(row, "challenge_test_list", ())), shown)
    if not graded and len(tests) > 1:
        shown, graded = (), tests[:1]
    if not shown and entry_point:
        instruction = f"{instruction} Name the function `{entry_point}`."
    return Problem(
        id=f"mbpp/{_identifier(row, 'task_id')}",
        prompt=instruction,
        prompt_tests=shown,
        reward_tests=graded,
        entry_point=entry_point,
        setup="\n".join(part for part in setup if part),
        solution=code,
        family="mbpp",
    )


def humaneval_row(row: Row, num_prompt_tests: int) -> Problem:
    """HumanEval, asked as an instruction; graded by its check function.

    The examples in the docstring are what is shown, so there are no prompt tests (`num_prompt_tests` changes
    nothing). Whatever stands before the entry point in the prompt (imports, helper functions) is given: three
    checks call such a helper, so it is the tests' setup.
    """
    given, entry_point = _text(row, "prompt"), _text(row, "entry_point")
    body = re.search(rf"^(async )?def {re.escape(entry_point)}\b", given, re.MULTILINE)
    if body is None:
        raise ValueError(f"field 'prompt' does not define the entry point {entry_point!r}")
    test = _text(row, "test")
    return Problem(
        id=_identifier(row, "task_id"),
        prompt="Complete the following Python function. Give the whole program in one markdown code block.\n"
        f"```python\n{given.strip()}\n```",
        prompt_tests=(),
        reward_tests=(test,) if re.search(r"^def check\(", test, re.MULTILINE) else (),
        test_mode="check_function",
        entry_point=entry_point,
        setup=given[: body.start()].strip(),
        solution=given + _text(row, "canonical_solution"),
        family="humaneval",
    )


def problems_row(row: Row, num_prompt_tests: int) -> Problem:
    """Our format: the fields of `Problem`; those with a default may be missing. Other columns are ignored.

    The row's own split of the tests stands, save that at most `num_prompt_tests` of its prompt tests are
    shown; the rest of them are graded where they can be (asserts).
    """
    names = [field.name for field in fields(Problem)]
    for name in row:
        close = get_close_matches(name, [n for n in names if n not in row], n=1, cutoff=0.85)
        if name not in names and close:
            raise ValueError(f"field {name!r} is unknown: did you mean {close[0]!r}?")
    mode = _text(row, "test_mode", "asserts")
    if mode not in get_args(TestModeName):
        raise ValueError(f"field 'test_mode' is {mode!r}: choose from {', '.join(get_args(TestModeName))}")
    entry_point = _text(row, "entry_point", "") or None
    if mode == "check_function" and entry_point is None:
        raise ValueError("field 'entry_point' is missing: test_mode check_function calls it")
    prompt_tests = _texts(row, "prompt_tests")
    if mode == "stdin":
        for test in (*prompt_tests, *_texts(row, "reward_tests")):
            _check_stdin_test(test)
    unshown = prompt_tests[num_prompt_tests:] if mode in ("asserts", "stdin") else ()
    shown = prompt_tests[:num_prompt_tests]
    return Problem(
        id=_identifier(row, "id"),
        prompt=_text(row, "prompt"),
        prompt_tests=shown,
        reward_tests=_without((*unshown, *_texts(row, "reward_tests")), shown),
        test_mode=cast(TestModeName, mode),
        entry_point=entry_point,
        setup=_text(row, "setup", ""),
        solution=_text(row, "solution", "") or None,
        family=_text(row, "family", ""),
    )


DATASETS: dict[str, RowConverter] = {
    "mbpp": mbpp_row,
    "humaneval": humaneval_row,
    "problems": problems_row,
}


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", _json_row(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} after line {number}: damaged gzip ({error}): fetch the file again") from None


def _json_row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # with or without a byte order mark
    except (
        ValueError,
        RecursionError,
    ) as error:  # bad UTF-8, bad JSON, numbers or nesting beyond Python's limits
        raise ValueError(f"{path} line {number}: not JSON in UTF-8 ({error}): mend or remove the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number}: a {type(row).__name__}, not an object: give one object a line")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} after row {number}: damaged Parquet ({reason}): fetch it again") from None


def _text(row: Row, field: str, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"field {field!r} is missing: the row has {', '.join(row) or 'no field'}")
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is of type {type(value).__name__}: give a string")
    return value


def _texts(row: Row, field: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """A list of strings; blank ones are dropped."""
    value = row.get(field)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"field {field!r} is missing: the row has {', '.join(row) or 'no field'}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"field {field!r} is of type {type(value).__name__}: give a list of strings")
    return tuple(item for item in value if item.strip())


def _identifier(row: Row, field: str) -> str:
    value = row.get(field)
    return str(value) if isinstance(value, int) else _text(row, field)


def _check_stdin_test(test: str) -> None:
    try:
        fields_ = json.loads(test)
    except ValueError as error:
        raise ValueError(f"test {test[:60]!r} of test_mode stdin is not JSON ({error})") from None
    if not isinstance(fields_, dict) or not all(isinstance(fields_.get(key), str) for key in ("stdin", "stdout")):
        raise ValueError(f'test {test[:60]!r} of test_mode stdin must be {{"stdin": text, "stdout": text}}')


def _without(graded: tuple[str, ...], shown: tuple[str, ...]) -> tuple[str, ...]:
    """A test that is shown is not graded, even when the row lists it twice."""
    seen = {test.strip() for test in shown}
    return tuple(test for test in graded if test.strip() not in seen)


def _check_graded(problem: Problem) -> None:
    if not problem.reward_tests:
        raise ValueError(f"problem {problem.id} has no graded test left: leave it out, or set num_prompt_tests to 0")


def _entry_point(code: str, tests: tuple[str, ...]) -> str | None:
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
