"""Files of problems -> `Problem`: MBPP (full and sanitized), HumanEval, AceCode, P3, stdin/stdout problems, and our own format.

A file is JSONL, JSONL.gz, JSON (a list) or Parquet, one problem a row. At most one test is shown in the prompt, and a shown
test is never graded. To add a data set: write one converter (row -> Problem), add one line to `DATASETS`. A
converter raises RowError; `read_problems` puts the row in front.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import cast, get_args

import pyarrow as pa

from diffrl.data.acecode import Difficulty, acecode_row, split_rows
from diffrl.data.graded import check_graded, entry_point_of, without
from diffrl.data.puzzles import check_stdin_test, p3_row, stdin_row
from diffrl.data.row_files import (
    MAX_ROW_MB,
    BadRow,
    Row,
    RowError,
    Rows,
    identifier_of,
    license_of,
    text_of,
    texts_of,
)
from diffrl.types import Problem, TestModeName

RowConverter = Callable[[Row, int], Problem]  # (row, how many tests to show: 0 or 1)

_STRINGS = pa.list_(pa.field("element", pa.string()))
# Of a file of our own format; what may be null may be missing too. `Problem` says what each column holds.
PROBLEM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # unique
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_tests", _STRINGS, nullable=False),
        pa.field("reward_tests", _STRINGS, nullable=False),
        pa.field("test_mode", pa.string()),  # asserts, check_function, stdin, unittest; null: asserts
        pa.field("entry_point", pa.string()),  # check_function needs it
        pa.field("setup", pa.string()),
        pa.field("solution", pa.string()),
        pa.field("family", pa.string()),
        pa.field("license", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Which rows are read, and how. Raises ValueError for a value outside its range."""

    num_prompt_tests: int = 1  # 0 or 1
    limit: int | None = None  # the first so many problems; None: all
    difficulty: Difficulty = "all"  # of acecode
    max_row_mb: int = MAX_ROW_MB

    def __post_init__(self) -> None:
        if self.num_prompt_tests not in (0, 1):
            raise ValueError(f"num_prompt_tests is {self.num_prompt_tests}: at most one test is shown: give 0 or 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: give 1 or more, or null for the whole file")


def load_problems(
    format: str, path: str | Path, *, num_prompt_tests: int = 1, limit: int | None = None
) -> list[Problem]:
    """The first `limit` problems of a file (None: all), in its order.

    `format` is a key of `DATASETS`. Raises ValueError, one line, for a bad argument, a missing or unreadable
    file, and a row that lacks a field or is left without a graded test.
    """
    options = ReadOptions(num_prompt_tests=num_prompt_tests, limit=limit)
    return list(only_problems(read_problems(format, path, options), format, path))


def only_problems(found: Iterable[Problem | BadRow], format: str, path: str | Path) -> Iterator[Problem]:
    """Raises ValueError for the first bad row."""
    for item in found:
        if isinstance(item, BadRow):
            raise ValueError(f"{path} {item.place} (format {format}): {item.reason}")
        yield item


def read_problems(format: str, path: str | Path, options: ReadOptions | None = None) -> Iterator[Problem | BadRow]:
    """Problems of a file (acecode: also of a folder, or of a data set on the hub), with every row that cannot be used in its
    place. Raises ValueError for an unknown format and for a file of which nothing further can be read."""
    options = options or ReadOptions()
    if format not in DATASETS:
        raise ValueError(f"format: {format!r} is not a data set: choose from {', '.join(DATASETS)}")
    rows: Iterable[tuple[str, Row | RowError]] = Rows(str(path), options.max_row_mb)
    if format == "acecode":
        rows = split_rows(rows, options.difficulty)
    return within_limit((problem_or_bad(place, row, format, options) for place, row in rows), options.limit)


def problem_or_bad(place: str, row: Row | RowError, format: str, options: ReadOptions) -> Problem | BadRow:
    try:
        if isinstance(row, RowError):
            raise row
        problem = DATASETS[format](row, options.num_prompt_tests)
        check_graded(problem)
    except RowError as error:
        return BadRow(place=place, field=error.field, reason=str(error))
    return problem


def within_limit(found: Iterator[Problem | BadRow], limit: int | None) -> Iterator[Problem | BadRow]:
    """Up to and including so many problems; nothing further is read."""
    count = 0
    while limit is None or count < limit:
        for item in islice(found, 1):
            count += isinstance(item, Problem)
            yield item
            break
        else:
            return


def mbpp_row(row: Row, num_prompt_tests: int) -> Problem:
    """MBPP, both full (text, test_setup_code, challenge_test_list) and sanitized (prompt, test_imports).

    The first test of test_list is shown; the others and the challenge tests are graded. With no test shown
    the instruction names the entry point, since nothing else ties the tests to the program. A row whose tests
    are all copies of the first (mbpp/37) shows none, so that it keeps a graded one.
    """
    instruction = text_of(row, "text" if "text" in row else "prompt").strip()
    code = text_of(row, "code")
    tests = texts_of(row, "test_list")
    setup = [text_of(row, "test_setup_code", ""), *texts_of(row, "test_imports", ())]
    entry_point = entry_point_of(code, tests)
    shown = tests[:num_prompt_tests]
    graded = without((*tests[num_prompt_tests:], *texts_of(row, "challenge_test_list", ())), shown)
    if not graded and len(tests) > 1:
        shown, graded = (), tests[:1]
    if not shown and entry_point:
        instruction = f"{instruction} Name the function `{entry_point}`."
    return Problem(
        id=f"mbpp/{identifier_of(row, 'task_id')}",
        prompt=instruction,
        prompt_tests=shown,
        reward_tests=graded,
        entry_point=entry_point,
        setup="\n".join(part for part in setup if part),
        solution=code,
        family="mbpp",
        license=license_of(row),
    )


def humaneval_row(row: Row, num_prompt_tests: int) -> Problem:
    """HumanEval, asked as an instruction; graded by its check function.

    The examples in the docstring are what is shown, so there are no prompt tests (`num_prompt_tests` changes
    nothing). Whatever stands before the entry point in the prompt (imports, helper functions) is given: three
    checks call such a helper, so it is the tests' setup.
    """
    given, entry_point = text_of(row, "prompt"), text_of(row, "entry_point")
    body = re.search(rf"^(async )?def {re.escape(entry_point)}\b", given, re.MULTILINE)
    if body is None:
        raise RowError(f"field 'prompt' does not define the entry point {entry_point!r}", "prompt")
    test = text_of(row, "test")
    return Problem(
        id=identifier_of(row, "task_id"),
        prompt="Complete the following Python function. Give the whole program in one markdown code block.\n"
        f"```python\n{given.strip()}\n```",
        prompt_tests=(),
        reward_tests=(test,) if re.search(r"^def check\(", test, re.MULTILINE) else (),
        test_mode="check_function",
        entry_point=entry_point,
        setup=given[: body.start()].strip(),
        solution=given + text_of(row, "canonical_solution"),
        family="humaneval",
        license=license_of(row),
    )


def problems_row(row: Row, num_prompt_tests: int) -> Problem:
    """Our format: the fields of `Problem`, as `PROBLEM_SCHEMA` says. Other columns are ignored.

    The row's own split of the tests stands, save that at most `num_prompt_tests` of its prompt tests are
    shown; the rest of them are graded where they can be (asserts and stdin).
    """
    names = PROBLEM_SCHEMA.names
    for name in row:
        close = get_close_matches(name, [n for n in names if n not in row], n=1, cutoff=0.85)
        if name not in names and close and name != "licence":
            raise RowError(f"field {name!r} is unknown: did you mean {close[0]!r}?", name)
    for name in names:
        check_field(row, PROBLEM_SCHEMA.field(name))
    mode = text_of(row, "test_mode", "asserts")
    if mode not in get_args(TestModeName):
        known = ", ".join(get_args(TestModeName))
        raise RowError(f"field 'test_mode' is {mode!r}: choose from {known}", "test_mode")
    entry_point = text_of(row, "entry_point", "") or None
    if mode == "check_function" and entry_point is None:
        raise RowError("field 'entry_point' is missing: test_mode check_function calls it", "entry_point")
    prompt_tests = texts_of(row, "prompt_tests")
    if mode == "stdin":
        for field in ("prompt_tests", "reward_tests"):
            for test in texts_of(row, field):
                check_stdin_test(test, field)
    unshown = prompt_tests[num_prompt_tests:] if mode in ("asserts", "stdin") else ()
    shown = prompt_tests[:num_prompt_tests]
    return Problem(
        id=identifier_of(row, "id"),
        prompt=text_of(row, "prompt"),
        prompt_tests=shown,
        reward_tests=without((*unshown, *texts_of(row, "reward_tests")), shown),
        test_mode=cast(TestModeName, mode),
        entry_point=entry_point,
        setup=text_of(row, "setup", ""),
        solution=text_of(row, "solution", "") or None,
        family=text_of(row, "family", ""),
        license=license_of(row),
    )


DATASETS: dict[str, RowConverter] = {
    "mbpp": mbpp_row,
    "humaneval": humaneval_row,
    "acecode": acecode_row,
    "p3": p3_row,
    "stdin": stdin_row,
    "problems": problems_row,
}


def check_field(row: Row, field: pa.Field) -> None:
    """Whether a row has what the schema says, without making a table of it. Raises RowError."""
    if field.name == "id":
        identifier_of(row, "id")  # a number too
    elif pa.types.is_list(field.type):
        texts_of(row, field.name, () if field.nullable else None)
    else:
        text_of(row, field.name, "" if field.nullable else None)


def problem_table(problems: Iterable[Problem]) -> pa.Table:
    """Rows of our format."""
    return pa.Table.from_pylist([asdict(problem) for problem in problems], schema=PROBLEM_SCHEMA)
