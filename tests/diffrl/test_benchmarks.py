import re

import pytest

from diffrl.benchmarks import benchmark_problems, canonical_code, completion_to_code, infilling_tasks
from diffrl.data.problems import load_problems
from diffrl.types import Problem
from tests.diffrl.test_problems import HUMANEVAL, passes, write_jsonl
from tests.shared_files import shared_file


def test_programs_of_a_benchmark(tmp_path):
    path = write_jsonl(tmp_path / "humaneval.jsonl", HUMANEVAL)
    [problem] = benchmark_problems("humaneval", path)
    assert [problem] == load_problems("humaneval", path)
    completion = "Here:\n```python\ndef square(x):\n    return half(2 * x) * math.floor(x)\n```\n"
    program = completion_to_code(problem, completion)
    assert program.startswith("import math\n") and program.endswith("math.floor(x)\n")
    assert passes(problem, program) and passes(problem, canonical_code(problem))
    future = "from __future__ import annotations\ndef square(x): ...\n"
    assert completion_to_code(problem, f"```python\n{future}```") == future
    assert completion_to_code(problem, "no block") == ""
    with pytest.raises(ValueError, match="problem x has no solution"):
        canonical_code(Problem(id="x", prompt="", prompt_tests=(), reward_tests=("assert f(1)",)))
    with pytest.raises(ValueError, match="'humanevil' is not known: choose from humaneval"):
        benchmark_problems("humanevil", tmp_path)


def test_a_setup_that_the_prompt_does_not_show_stays_with_the_tests():
    for setup in ("root = Node(1)", "def answer(x): return x * x"):
        problem = Problem(id="x", prompt="Square x.", prompt_tests=(), reward_tests=("assert f(1) == 1",), setup=setup)
        assert completion_to_code(problem, "```python\nx = 1\n```") == "x = 1\n"


def test_canonical_programs_of_humaneval():
    problems = benchmark_problems("humaneval", shared_file("data/humaneval/HumanEval.jsonl.gz"))
    assert len(problems) == 164
    for problem in problems:
        compile(canonical_code(problem), problem.id, "exec", dont_inherit=True)
    for number in (0, 10, 32, 38, 50, 115, 163):  # four of them use helpers that the prompt gives
        problem = problems[number]
        assert passes(problem, completion_to_code(problem, f"```python\n{canonical_code(problem)}```"))


@pytest.mark.parametrize(("name", "num_rows"), [("SingleLineInfilling", 1033), ("RandomSpanInfillingLight", 164)])
def test_programs_of_infilling_tasks(name, num_rows):
    tasks = infilling_tasks(shared_file(f"data/humaneval_infilling/HumanEval-{name}.jsonl.gz"))
    assert len({task.problem.id for task in tasks}) == num_rows
    for task in tasks:
        whole = task.program(task.middle)
        assert whole == canonical_code(task.problem) == f"{task.prefix}{task.middle}{task.suffix}"
        compile(whole, task.problem.id, "exec", dont_inherit=True)
    helped = [t for t in tasks if re.search(r"/(32|38|50|115)/", t.problem.id)]  # checks that call a given helper, too
    assert len(helped) >= 4
    for task in (tasks[0], *helped, tasks[-1]):
        assert passes(task.problem, task.program(task.middle)), task.problem.id


def test_infilling_rows_that_cannot_be_used(tmp_path):
    row = {**HUMANEVAL, "suffix": "\n"}
    [task] = infilling_tasks(write_jsonl(tmp_path / "good.jsonl", row, row), limit=1)
    assert (task.prefix, task.middle, task.suffix) == (row["prompt"], row["canonical_solution"], "\n")
    assert passes(task.problem, task.program("    return x**2\n"))
    with pytest.raises(AssertionError):
        passes(task.problem, task.program("    return x\n"))
    for change, message in (
        ({"suffix": None}, "bad.jsonl line 2 .format humaneval_infilling.: field 'suffix' is missing"),
        ({"canonical_solution": None}, "line 2 .* field 'canonical_solution' is missing"),
        ({"test": "assert f(1)"}, "line 2 .* field 'test' defines no check"),
    ):
        with pytest.raises(ValueError, match=message):
            infilling_tasks(write_jsonl(tmp_path / "bad.jsonl", row, {**row, **change}))
    with pytest.raises(ValueError, match="limit is 0"):
        infilling_tasks(tmp_path / "good.jsonl", limit=0)
