"""`diffrl data show`, `validate` and `stats`: what they print, and their exit status."""

import json
from pathlib import Path

import pytest

from tests.actors.conftest import Called, one_line

OWN = {
    "id": "a/1",
    "prompt": "Square x.",
    "prompt_tests": ["assert f(1) == 1"],
    "reward_tests": ["assert f(2) == 4", "assert f(3) == 9"],
    "solution": "def f(x):\n    return x * x",
    "license": "MIT",
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [OWN, {**OWN, "id": "b", "reward_tests": 3}, {**OWN, "id": "a/1", "license": None, "solution": None}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return str(path)


def test_show(called: Called, file: str) -> None:
    status, out, err = called("data", "show", file)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "== a/1 (tests asserts, license MIT)"
    assert "pass this test:\nassert f(1) == 1\n-- graded tests (2)\nassert f(2) == 4\n" in out
    assert out.endswith("-- solution\ndef f(x):\n    return x * x\n")
    assert called("data", "show", file, "--limit", "9")[1].count("== a/1") == 2
    one_line(called("data", "show", file, "--id", "c"), ["--id: 'c': no problem has this id"])


def test_validate(called: Called, file: str) -> None:
    status, out, _ = called("data", "validate", file)
    assert status == 1
    lines = out.splitlines()
    assert lines[0] == "line 2\treward_tests\tfield 'reward_tests' is of type int: give a list of strings"
    assert lines[1].startswith("line 4\t-\tnot JSON in UTF-8")
    assert lines[2:] == [f"{file}: 2 problems, 2 bad rows"]
    assert called("data", "validate", file, "--max-bad-rows", "2")[0] == 0


def test_stats(called: Called, file: str) -> None:
    status, out, _ = called("data", "stats", file, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["problems"], found["bad_rows"], found["duplicate_ids"], found["with_solution"]) == (2, 2, 1, 1)
    assert found["graded_tests"] == {"min": 2, "median": 2, "mean": 2, "max": 2}
    assert found["licenses"] == {"MIT": 1, "(none)": 1} and found["test_modes"] == {"asserts": 2}
    assert "licenses           MIT 1, (none) 1" in called("data", "stats", file)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.jsonl"], "no file at no.jsonl"),
        (["a.jsonl", "--format", "mpbb"], "format: 'mpbb' is not a data set: choose from mbpp"),
        (["a.jsonl", "--num-prompt-tests", "2"], "num_prompt_tests is 2"),
        (["a.jsonl", "--difficulty", "harder"], "--difficulty: 'harder' must be one of hard, medium, easy, all"),
    ],
)
def test_bad_input_is_one_line(called: Called, arguments: list[str], message: str) -> None:
    one_line(called("data", "stats", *arguments), [message])
