import gzip
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.data.problems import DATASETS, load_problems
from diffrl.types import Problem
from tests.shared_files import shared_file

FULL = {
    "text": "Write a function to square a number. ",
    "code": "def half(x):\r\n  return x / 2\r\ndef square(x):\r\n  return x * x",
    "task_id": 7,
    "test_setup_code": "n = 3",
    "test_list": ["assert int(square(2)) == 4", "assert square(n) == 9", "assert square(0) == 0"],
    "challenge_test_list": ["assert square(-1) == 1", "assert int(square(2)) == 4 "],
}
SANITIZED = {
    "prompt": "Write a function to square a number.",
    "code": "def square(x):\n  return x * x",
    "task_id": 8,
    "source_file": "book.ipynb",
    "test_imports": ["import math", "import re"],
    "test_list": ["assert math.isclose(square(2), 4)", "assert square(3) == 9"],
}
HUMANEVAL = {
    "task_id": "HumanEval/999",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
    'def square(x):\n    """Square.\n    >>> square(2)\n    4\n    """\n',
    "canonical_solution": "    return x * x\n",
    "test": "def check(candidate):\n    assert candidate(half(6)) == 9\n",
    "entry_point": "square",
}
OWN = {"id": "a/1", "prompt": "Square x.", "prompt_tests": ["assert f(1) == 1"], "reward_tests": ["assert f(2) == 4"]}


def write_jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def passes(problem: Problem, program: str) -> bool:
    """Trusted programs only: everything in one namespace, where the sandbox would use two processes."""
    space: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program, space)
        exec(problem.setup, space)
        for test in problem.reward_tests:
            exec(test, space)
            if problem.test_mode == "check_function":
                space["check"](space[problem.entry_point])
    return True


def test_mbpp_full(tmp_path):
    [problem] = load_problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", FULL))
    assert problem == Problem(
        id="mbpp/7",
        prompt="Write a function to square a number.",
        prompt_tests=("assert int(square(2)) == 4",),
        reward_tests=("assert square(n) == 9", "assert square(0) == 0", "assert square(-1) == 1"),
        entry_point="square",
        setup="n = 3",
        solution=FULL["code"],
        family="mbpp",
    )
    assert passes(problem, problem.solution or "")


def test_mbpp_sanitized(tmp_path):
    [problem] = load_problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", SANITIZED))
    assert problem == Problem(
        id="mbpp/8",
        prompt="Write a function to square a number.",
        prompt_tests=("assert math.isclose(square(2), 4)",),
        reward_tests=("assert square(3) == 9",),
        entry_point="square",
        setup="import math\nimport re",
        solution=SANITIZED["code"],
        family="mbpp",
    )


def test_mbpp_without_shown_test_names_the_function(tmp_path):
    [problem] = load_problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", SANITIZED), num_prompt_tests=0)
    assert problem.prompt == "Write a function to square a number. Name the function `square`."
    assert problem.prompt_tests == ()
    assert problem.reward_tests == tuple(SANITIZED["test_list"])


def test_mbpp_tests_that_are_all_the_same_are_graded_not_shown(tmp_path):
    row = {**SANITIZED, "test_list": ["assert square(1) == 1", "assert square(1) == 1\r\n"]}
    [problem] = load_problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", row))
    assert (problem.prompt_tests, problem.reward_tests) == ((), ("assert square(1) == 1",))
    assert problem.prompt.endswith("Name the function `square`.")


@pytest.mark.parametrize(
    ("code", "test", "entry_point"),
    [
        ("class Pair: ...\ndef chain(pairs): ...", "assert chain([Pair(1, 2), Pair(3, 4)]) == 2", "chain"),
        ("class Pair: ...", "assert Pair(1, 2).a == 1", "Pair"),
        ("def broken(:", "assert sorted(broken(1)) == [1]", "broken"),
        ('def f(x):\n  return "\\d"', "assert set(f(1)) == set(g(1))", "f"),
        ("x = 1", "assert x == 1", None),
    ],
)
def test_mbpp_entry_point(tmp_path, code, test, entry_point):
    row = {**SANITIZED, "code": code, "test_list": [test, test + " "], "challenge_test_list": ["assert True"]}
    [problem] = load_problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", row))
    assert problem.entry_point == entry_point
    assert problem.reward_tests == ("assert True",)  # the shown test came twice and is not graded


def test_humaneval(tmp_path):
    path = write_jsonl(tmp_path / "humaneval.jsonl", HUMANEVAL)
    [problem] = load_problems("humaneval", path)
    assert problem == Problem(
        id="HumanEval/999",
        prompt="Complete the following Python function. Give the whole program in one markdown code block.\n"
        f"```python\n{HUMANEVAL['prompt'].strip()}\n```",
        prompt_tests=(),
        reward_tests=(HUMANEVAL["test"],),
        test_mode="check_function",
        entry_point="square",
        setup="import math\n\n\ndef half(x):\n    return x / 2",
        solution=HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],
        family="humaneval",
    )
    assert load_problems("humaneval", path, num_prompt_tests=0) == [problem]


def test_own_format_round_trip(tmp_path):
    full = Problem(
        id="a/1",
        prompt="Square x.\n",
        prompt_tests=("assert f(1) == 1",),
        reward_tests=("\ndef check(candidate):\n    assert candidate(2) == 4\n",),
        test_mode="check_function",
        entry_point="f",
        setup="import math",
        solution="def f(x): return x * x",
        family="squares",
    )
    least = Problem(id="b", prompt="P", prompt_tests=(), reward_tests=("assert f(2) == 4",))
    path = write_jsonl(tmp_path / "own.jsonl", asdict(full), asdict(least))
    assert load_problems("problems", path) == [full, least]
    pq.write_table(pa.Table.from_pylist([asdict(full), asdict(least)]), tmp_path / "own.parquet")
    assert load_problems("problems", tmp_path / "own.parquet") == [full, least]


def test_own_format_shows_at_most_num_prompt_tests(tmp_path):
    row = {**OWN, "prompt_tests": ["assert f(1) == 1", "assert f(0) == 0"], "difficulty": 3}
    path = write_jsonl(tmp_path / "own.jsonl", row)
    [one] = load_problems("problems", path)
    assert (one.prompt_tests, one.reward_tests) == (("assert f(1) == 1",), ("assert f(0) == 0", "assert f(2) == 4"))
    [none] = load_problems("problems", path, num_prompt_tests=0)
    assert none.prompt_tests == ()
    assert none.reward_tests == ("assert f(1) == 1", "assert f(0) == 0", "assert f(2) == 4")


def test_file_kinds_and_limit(tmp_path):
    rows = [{**OWN, "id": str(i)} for i in range(3)]
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(row) for row in rows).encode())
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (plain, packed, tmp_path / "a.parquet"):
        assert [problem.id for problem in load_problems("problems", path)] == ["0", "1", "2"]
        assert [problem.id for problem in load_problems("problems", str(path), limit=2)] == ["0", "1"]
    plain.write_text(json.dumps(rows[0]) + "\nnot JSON\n")
    assert len(load_problems("problems", plain, limit=1)) == 1  # what is not asked for is not read


def test_a_new_data_set_is_a_function_and_a_line(tmp_path, monkeypatch):
    def squares(row, num_prompt_tests):
        return Problem(id=row["n"], prompt="", prompt_tests=(), reward_tests=("assert f(2) == 4",))

    monkeypatch.setitem(DATASETS, "squares", squares)
    assert load_problems("squares", write_jsonl(tmp_path / "a.jsonl", {"n": "one"}))[0].id == "one"


def without(row: dict, field: str) -> dict:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("mbpp", {**SANITIZED, "test_list": ["assert square(1) == 1"]}, "problem mbpp/8 has no graded test left"),
        ("humaneval", {**HUMANEVAL, "test": "# none"}, "problem HumanEval/999 has no graded test left"),
        ("problems", {**OWN, "reward_tests": [" "]}, "problem a/1 has no graded test left"),
        ("mbpp", without(SANITIZED, "code"), "field 'code' is missing: the row has prompt, task_id"),
        ("mbpp", without(SANITIZED, "prompt"), "field 'prompt' is missing"),
        ("mbpp", without(SANITIZED, "test_list"), "field 'test_list' is missing"),
        ("mbpp", {**SANITIZED, "test_list": "assert True"}, "field 'test_list' is of type str: give a list of strings"),
        ("mbpp", {**SANITIZED, "code": 3}, "field 'code' is of type int: give a string"),
        ("humaneval", without(HUMANEVAL, "canonical_solution"), "field 'canonical_solution' is missing"),
        ("humaneval", {**HUMANEVAL, "entry_point": "cube"}, "does not define the entry point 'cube'"),
        ("problems", without(OWN, "prompt_tests"), "field 'prompt_tests' is missing"),
        ("problems", {**OWN, "test_mode": "guess"}, "'guess': choose from asserts, check_function, stdin, unittest"),
        ("problems", {**OWN, "test_mode": "stdin"}, "of test_mode stdin is not JSON"),
        ("problems", {**OWN, "test_mode": "stdin", "prompt_tests": [], "reward_tests": ["{}"]}, '{"stdin": text, "st'),
        ("problems", {**OWN, "test_mode": "check_function"}, "field 'entry_point' is missing"),
        ("problems", {**OWN, "entrypoint": "f"}, "field 'entrypoint' is unknown: did you mean 'entry_point'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, format, row, message):
    good = {"mbpp": FULL, "humaneval": HUMANEVAL, "problems": OWN}[format]
    path = write_jsonl(tmp_path / "a.jsonl", good, row)
    with pytest.raises(ValueError) as caught:
        load_problems(format, path)
    text = str(caught.value)
    assert text.startswith(f"{path} line 2 (format {format}): ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            json.dumps(OWN).encode() + b"\n{oops\n",
            "a.jsonl line 2 (format problems): not JSON in UTF-8 (Expecting",
        ),
        ("a.jsonl", b"\n\n\xff\xfe{}\n", "a.jsonl line 3 (format problems): not JSON in UTF-8 ('utf-8' codec"),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "a.jsonl line 1 (format problems): not JSON in UTF-8 (Exceeds"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 (format problems): not JSON in UTF-8 (maximum recursion"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1 (format problems): a list, not an object"),
        ("a.jsonl.gz", b"plain text", "a.jsonl.gz after line 0: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(json.dumps(OWN).encode() * 99)[:-9], "a.jsonl.gz after line 0: damaged gzip"),
        ("a.parquet", b"plain text", "a.parquet after row 0: damaged Parquet"),
        ("a.csv", b"", "a.csv has an unknown ending: give a .jsonl, .jsonl.gz, .json or .parquet"),
        ("missing.jsonl", None, "no file at "),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_problems("problems", path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"format": "mpbb"},
            "format: 'mpbb' is not a data set: choose from mbpp, humaneval, acecode, p3, stdin, problems",
        ),
        ({"format": "mbpp", "num_prompt_tests": 2}, "num_prompt_tests is 2: at most one test is shown"),
        ({"format": "mbpp", "limit": 0}, "limit is 0: give 1 or more"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_problems(path=write_jsonl(tmp_path / "a.jsonl", FULL), **arguments)


@pytest.mark.parametrize(("name", "rows"), [("mbpp.jsonl", 974), ("mbpp_sanitized.jsonl", 427)])
def test_real_mbpp(name, rows):
    path = shared_file(f"data/mbpp/{name}")
    problems = load_problems("mbpp", path)
    source = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(problems) == len({problem.id for problem in problems}) == len(source) == rows
    for problem, row in zip(problems, source, strict=True):
        first, *others = row["test_list"] + row.get("challenge_test_list", [])
        graded = tuple(test for test in others if test != first)  # five rows list the first test again
        assert (problem.prompt_tests, problem.reward_tests) == (((first,), graded) if graded else ((), (first,)))
        assert problem.entry_point and f"{problem.entry_point}(" in first.replace(" (", "(")
    assert [problem.id for problem in problems if not problem.prompt_tests] == (["mbpp/37"] if rows == 974 else [])
    for problem in problems[:40]:
        assert passes(problem, problem.solution or "")


def test_real_humaneval():
    problems = load_problems("humaneval", shared_file("data/humaneval/HumanEval.jsonl.gz"))
    assert [problem.id for problem in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert {p.entry_point for p in problems if "def " in p.setup} == {
        "make_palindrome",
        "find_zero",
        "decode_cyclic",
        "decode_shift",
    }
    for number in (0, 10, 32, 38, 50, 115, 163):
        assert passes(problems[number], problems[number].solution or "")


def test_real_humaneval_plus_has_the_same_fields():
    problems = load_problems("humaneval", shared_file("data/humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz"), limit=3)
    assert [problem.test_mode for problem in problems] == ["check_function"] * 3
