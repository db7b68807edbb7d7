"""P3 puzzles, stdin problems, the schema of our own rows, and rows that are too large."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.data.problems import PROBLEM_SCHEMA, ReadOptions, load_problems, problem_table, read_problems
from diffrl.data.row_files import BadRow
from diffrl.prompts import build_prompt
from diffrl.types import Problem
from tests.shared_files import shared_file

PUZZLE = {
    "name": "Roots:0",
    "sat": "def sat(x: int, n=16):\n    return x * x == n",
    "sol_header": "def sol(n=16):",
    "sol_docstring": '    """Find a square root of n."""',
    "sol_bodies": ["    return round(n ** 0.5)"],
    "module": "algebra.py",
}
CASES = {"inputs": ["1\n", "2\n", ["3", "4"]], "outputs": ["1\n", "4\n", ["9", "16"]]}
SQUARES = {
    "id": 7,
    "question": "Square each.",
    "input_output": json.dumps(CASES),
    "solutions": json.dumps(["print(1)"]),
}
OWN = {"id": "a", "prompt": "P", "prompt_tests": [], "reward_tests": ["assert f(2) == 4"]}


def write(path: Path, *rows: dict) -> Path:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def bad_row(path: Path, format: str, **options) -> BadRow:
    (found,) = read_problems(format, path, ReadOptions(**options))
    assert isinstance(found, BadRow)
    return found


def test_a_puzzle(tmp_path):
    [problem] = load_problems("p3", write(tmp_path / "p.json", PUZZLE))
    assert problem.id == "p3/Roots:0" and problem.family == "p3/algebra" and problem.entry_point == "sol"
    assert "Find a square root of n." in problem.prompt and PUZZLE["sat"] in problem.prompt
    assert not any(test in build_prompt(problem) for test in problem.reward_tests)
    space: dict = {}
    exec(f"{problem.solution}\n{problem.setup}\n{problem.reward_tests[0]}", space)
    assert space["sol"]() == 4
    assert bad_row(write(tmp_path / "b.json", {**PUZZLE, "sat": "sat = 1"}), "p3").field == "sat"
    assert bad_row(write(tmp_path / "c.json", {**PUZZLE, "sol_header": "sol"}), "p3").field == "sol_header"


def test_real_puzzles():
    """Python refuses to parse the number of one puzzle."""
    found = list(read_problems("p3", shared_file("data/p3_puzzles/puzzles.json")))
    assert [(row.place, row.field) for row in found if isinstance(row, BadRow)] == [("row 1128", "sat")]
    problems = [problem for problem in found if isinstance(problem, Problem)]
    assert len(problems) == len({problem.id for problem in problems}) == 1714
    assert sum(problem.solution is None for problem in problems) == 54
    for problem in problems[:300:10]:
        exec(f"{problem.solution}\n{problem.setup}\n{problem.reward_tests[0]}", {})


def test_a_stdin_problem(tmp_path):
    [problem] = load_problems("stdin", write(tmp_path / "s.jsonl", SQUARES))
    assert problem.id == "stdin/7" and problem.test_mode == "stdin" and problem.solution == "print(1)"
    assert json.loads(problem.prompt_tests[0]) == {"stdin": "1\n", "stdout": "1\n"}
    assert [json.loads(test)["stdout"] for test in problem.reward_tests] == ["4\n", "9\n16"]
    [again] = load_problems("problems", write(tmp_path / "again.jsonl", asdict(problem)))
    assert again == problem
    for wrong in ("not JSON {", {"inputs": [1], "outputs": ["1"]}, {"inputs": ["1"]}, {**CASES, "fn_name": "f"}):
        assert bad_row(write(tmp_path / "w.jsonl", {**SQUARES, "input_output": wrong}), "stdin").field == "input_output"


def test_own_rows_have_a_schema(tmp_path):
    problem = Problem(id="a", prompt="P", prompt_tests=("assert f(1)",), reward_tests=("assert f(2)",), license="MIT")
    table = problem_table([problem])
    pq.write_table(table, tmp_path / "own.parquet")
    assert pq.read_schema(tmp_path / "own.parquet") == PROBLEM_SCHEMA == table.schema
    assert load_problems("problems", tmp_path / "own.parquet") == [problem]
    assert load_problems("problems", write(tmp_path / "l.jsonl", {**OWN, "licence": "BSD"}))[0].license == "BSD"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 1.5}, "id"),
        ({"prompt": None}, "prompt"),
        ({"reward_tests": "assert True"}, "reward_tests"),
        ({"reward_tests": [1]}, "reward_tests"),
        ({"prompt_tests": None}, "prompt_tests"),
        ({"setup": ["import re"]}, "setup"),
        ({"license": 3}, "license"),
        ({"test_mode": "guess"}, "test_mode"),
        ({"reward_tests": []}, "reward_tests"),
    ],
)
def test_every_row_is_checked_and_named_by_its_field(tmp_path, change, field):
    path = write(tmp_path / "a.jsonl", OWN, {**OWN, **change}, {**OWN, "id": "c"})
    first, bad, last = read_problems("problems", path)
    assert isinstance(first, Problem) and isinstance(last, Problem) and isinstance(bad, BadRow)
    assert (bad.place, bad.field) == ("line 2", field) and bad.reason


def test_a_row_that_is_too_large_is_a_bad_one(tmp_path):
    """Its line is not kept in memory, whatever its size; the rows around it are read."""
    rows = [OWN, {**OWN, "id": "huge", "prompt": "x" * (3 << 20)}, {**OWN, "id": "c"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet"):
        first, bad, last = read_problems("problems", path, ReadOptions(max_row_mb=1))
        assert isinstance(first, Problem) and isinstance(last, Problem) and last.id == "c"
        assert isinstance(bad, BadRow) and bad.reason.startswith("more than 1 MB")
        assert len(load_problems("problems", path)) == 3
