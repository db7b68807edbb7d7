import base64
import json
import pickle
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from diffrl.benchmarks import Task, benchmark_tasks, canonical_code, completion_to_code, infilling_tasks
from diffrl.benchmarks.evalplus import MBPP_TYPES, literal
from diffrl.data.problems import load_problems
from diffrl.types import Problem
from tests.diffrl.test_problems import FULL, HUMANEVAL, passes, write_jsonl
from tests.shared_files import shared_file

CHECKED = {  # of EvalPlus
    "task_id": "HumanEval/999",
    "prompt": HUMANEVAL["prompt"],
    "canonical_solution": HUMANEVAL["canonical_solution"],
    "entry_point": "square",
    "base_input": [[2], [3]],
    "plus_input": [[0.5], [-1]],
    "atol": 0,
}
BIGCODE = {
    "task_id": "BigCodeBench/999",
    "complete_prompt": 'import json\n\ndef task_func(x):\n    """As JSON."""\n',
    "instruct_prompt": "Write task_func(x), which gives JSON. You should write self-contained code starting with: ...",
    "code_prompt": "import json\n\ndef task_func(x):\n",
    "canonical_solution": "    return json.dumps(x)",
    "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_one(self):\n"
    "        self.assertEqual(task_func([1]), '[1]')\n",
    "entry_point": "task_func",
}
CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
LIVE = {
    "question_id": "abc1",
    "question_content": "Add two numbers.",
    "public_test_cases": json.dumps(CASES),
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES * 2)))).decode(),
}
MATH = {"question": "What is 2 + 3?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"}


def task_of(benchmark: str, path: Path, row: dict) -> Task:
    [task] = benchmark_tasks(benchmark, write_jsonl(path / "rows.jsonl", row)).tasks
    return task


def test_programs_of_training(tmp_path):
    problem = task_of("humaneval", tmp_path, HUMANEVAL).problem
    assert [problem] == load_problems("humaneval", tmp_path / "rows.jsonl")
    completion = "Here:\n```python\ndef square(x):\n    return half(2 * x) * math.floor(x)\n```\n"
    program = completion_to_code(problem, completion)
    assert program.startswith("import math\n") and program.endswith("math.floor(x)\n")
    assert passes(problem, program) and passes(problem, canonical_code(problem))
    future = "from __future__ import annotations\ndef square(x): ...\n"
    assert completion_to_code(problem, f"```python\n{future}```") == future
    assert completion_to_code(problem, "no block") == ""
    with pytest.raises(ValueError, match="problem x has no solution"):
        canonical_code(Problem(id="x", prompt="", prompt_tests=(), reward_tests=("assert f(1)",)))


def test_programs_of_humaneval_tasks(tmp_path):
    for benchmark, row in (("humaneval", HUMANEVAL), ("humaneval_plus", CHECKED)):
        task = task_of(benchmark, tmp_path, row)
        assert task.prefix == HUMANEVAL["prompt"]
        written = task.program("    return half(2 * x) * x\n\ndef more", "completion")
        assert written == HUMANEVAL["prompt"] + "    return half(2 * x) * x\n"
        answered = task.program("```python\ndef square(x):\n    return half(x) * 2 * x\n```", "chat")
        assert answered.startswith("import math\n\n\ndef half(x)")
        for program in (written, answered, canonical_code(task.problem)):
            assert passes(task.problem, program)
        assert task.program("from __future__ import annotations\n", "chat").startswith("from __future__")
        for nothing in ("", " \n", "\ndef g(): pass"):
            assert task.program(nothing, "completion") == ""
        assert task.program("```python\n\n```", "chat") == task.program("", "chat") == ""


def test_mbpp_is_its_test_split(tmp_path):
    path = write_jsonl(tmp_path / "mbpp.jsonl", FULL, {**FULL, "task_id": 11}, {**FULL, "task_id": 511})
    found = benchmark_tasks("mbpp", path)
    [task], left_out = found.tasks, found.num_left_out
    assert left_out == 2 and task.problem.id == "mbpp/11"
    assert task.prefix == '"""\nWrite a function to square a number.\nassert int(square(2)) == 4\n"""\n'
    assert task.problem.reward_tests[:3] == tuple(FULL["test_list"])  # the shown one is graded too
    text = "def square(x):\n    return x * x\n\nassert square(1) == 1"
    assert task.program(text, "completion") == task.prefix + "def square(x):\n    return x * x\n"
    assert passes(task.problem, task.program(text, "completion")) and task.prefix in task.problem.prompt


def test_results_are_compared_as_evalplus_does(tmp_path):
    def verdicts(row: dict, program: str) -> list[bool]:
        problem = task_of("humaneval_plus", tmp_path, row).problem
        return [right(replace(problem, reward_tests=(test,)), program) for test in problem.reward_tests]

    def square(result: str) -> str:
        return f"def square(x):\n    return {result}\n"

    assert verdicts(CHECKED, square("x * x")) == [True, True]
    assert verdicts(CHECKED, square("x * abs(x)")) == [True, False]  # the further inputs find it
    assert verdicts(CHECKED, square("x * x + (5e-7 if x == 0.5 else 0)")) == [True, True]
    assert verdicts(CHECKED, square("x * x + (2e-6 if x == 0.5 else 0)")) == [True, False]
    assert verdicts(CHECKED, square("x * x + (5e-7 if x == 2 else 0)")) == [False, True]  # integers are exact
    assert verdicts(CHECKED, square("x * x + 5e-7 * (x == -1)")) == [True, False]  # and the type is the reference's
    assert verdicts({**CHECKED, "atol": 0.1}, square("x * x + 0.05")) == [False, False]
    listed = {**CHECKED, "canonical_solution": "    return [x * 1.0, 0.5]\n"}
    assert verdicts(listed, square("[x + 5e-7, 0.5]")) == [True, True]
    assert verdicts(listed, square("(x * 1.0, 0.5)")) == [False, False]
    assert verdicts(listed, square("[x * 1.0]")) == [False, False]
    changing = {**CHECKED, "canonical_solution": "    x.append(1)\n    return x\n"}
    changing |= {"base_input": [[[1]]], "plus_input": []}
    assert verdicts(changing, square("x + [1]")) == [True]  # a reference that changes its input gets a copy


def right(problem: Problem, program: str) -> bool:
    try:
        return passes(problem, program)
    except (AssertionError, TypeError):
        return False


@pytest.mark.parametrize(
    ("number", "name", "reference", "program", "inputs"),
    [
        ("Mbpp/2", "f", "return (1, 2)", "return [2, 1, 1]", [[[1], [2]]]),  # compared as sets
        ("Mbpp/737", "f", "return object()", "return 3", [["a"]]),  # found, whatever it is
        ("Mbpp/295", "f", "return 7", "return 0", [[8]]),
        ("Mbpp/558", "f", "return 1", "return 6", [[1, 25]]),  # |0 - 2| + |1 - 5|, and the reference counts otherwise
        ("Mbpp/581", "f", "return 1", "return 35", [[3, 4]]),
        ("Mbpp/164", "f", "return 1", "return 2", [[1]]),
        ("HumanEval/32", "f", "return 0.0", "return 2.0", [[[-4, 2]]]),  # a root of 2x - 4
    ],
)
def test_problems_with_several_right_results(tmp_path, number, name, reference, program, inputs):
    row = {"task_id": number, "prompt": f"def {name}(*args):\n", "entry_point": name, "atol": 1e-4, "plus_input": {}}
    row |= {"base_input": inputs, "canonical_solution": f"    {reference}\n"}
    benchmark = "humaneval_plus" if number.startswith("H") else "mbpp_plus"
    problem = task_of(benchmark, tmp_path, row).problem
    assert len(problem.reward_tests) == 1 and passes(problem, f"def {name}(*args):\n    {program}\n")
    if number != "Mbpp/164":  # of which EvalPlus takes everything
        assert not right(problem, f"def {name}(*args):\n    return None\n")


def test_arguments_of_mbpp_plus_get_their_types_back():
    assert MBPP_TYPES[2]([[1], [2]]) == [(1,), (2,)]
    assert MBPP_TYPES[63]([[[1, 2], [3]]]) == [[(1, 2), (3,)]]
    assert MBPP_TYPES[75]([[[1, 2]], 3]) == [[(1, 2)], 3]
    assert MBPP_TYPES[115]([[[1, 1], [], {}]]) == [[{1}, {}, {}]]
    assert MBPP_TYPES[124](["0", "1j"]) == [0.0, 1j]
    assert MBPP_TYPES[259]([[[1, 2]], [[3]]]) == [((1, 2),), ((3,),)]
    assert MBPP_TYPES[278]([[1, [2]]]) == [(1, (2,))]
    assert MBPP_TYPES[580]([[[1, [2]]]]) == (((1, (2,)),),)
    assert MBPP_TYPES[722]([{"a": [1, 2]}, 3]) == [{"a": (1, 2)}, 3]


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2.5, "a", None, True]],
        [(1, [2])],
        [{3}],
        [{1: 2}],
        [{"a": [1]}],
        [float("inf")],
        [1e-320],
        [10**2000],
        [1j],
    ],
)
def test_inputs_are_written_exactly(value):
    written = literal(value)
    assert repr(eval(written, {"json": json})) == repr(value)


def test_bigcodebench_is_asked_in_two_ways(tmp_path):
    task = task_of("bigcodebench_complete", tmp_path, BIGCODE)
    assert task.program("    return json.dumps(x)\n\ndef g", "completion").endswith("return json.dumps(x)\n")
    instruct = task_of("bigcodebench_instruct", tmp_path, BIGCODE)
    assert instruct.prefix is None and instruct.problem.prompt == BIGCODE["instruct_prompt"]
    program = instruct.program("```python\ndef task_func(x):\n    return json.dumps(x)\n```", "chat")
    assert program.startswith("import json\n\ndef task_func(x):\n    pass\n\ndef task_func")
    for code in (program, canonical_code(task.problem)):
        space: dict = {}
        exec(code, space)
        assert space["task_func"]([1]) == "[1]"
    assert (task.problem.test_mode, task.problem.reward_tests) == ("unittest", (BIGCODE["test"],))


def test_livecodebench_rows(tmp_path):
    task = task_of("livecodebench", tmp_path, LIVE)
    test = '{"stdin": "1 2\\n", "stdout": "3\\n"}'
    assert task.problem.reward_tests == (test,) * 3 and task.problem.test_mode == "stdin"
    assert task.program("print(3)\n```\nDone.", "completion") == "print(3)"
    assert task.program("```python\nprint(3)\n```", "chat") == "print(3)\n"
    functional = {**LIVE, "public_test_cases": json.dumps([{**CASES[0], "testtype": "functional"}])}
    found = benchmark_tasks("livecodebench", write_jsonl(tmp_path / "two.jsonl", functional, LIVE))
    assert (len(found.tasks), found.num_left_out) == (1, 1)
    hostile = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    with pytest.raises(ValueError, match=r"'private_test_cases' .*more than a text: STACK_GLOBAL"):
        task_of("livecodebench", tmp_path, {**LIVE, "private_test_cases": hostile})


def test_gsm8k_is_asked_with_eight_examples(tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl is missing"):
        task_of("gsm8k", tmp_path, MATH)
    write_jsonl(tmp_path / "train.jsonl", *({**MATH, "question": f"Question {n}?"} for n in range(9)))
    task = task_of("gsm8k", tmp_path, MATH)
    assert task.prefix is not None and task.prefix.endswith("What is 2 + 3?\nAnswer:") and "<<" not in task.prefix
    assert [f"Question {n}?" in task.prefix for n in range(9)] == [True] * 8 + [False]
    assert task.problem.id == "gsm8k/0" and task.answer == "5"
    for text, number in ((" It is 5.00.", "5"), (" 4\n\nQuestion: 5", "4"), ("", ""), (MATH["answer"], "5")):
        assert task.program(text, "completion") == task.program(text, "chat") == number


def test_rows_of_the_hub(monkeypatch):
    """Its client is not asked here: what it would be asked for, and what becomes of its rows."""
    asked = []

    def load_dataset(path, configuration, *, split):
        asked.append((path, configuration, split))
        return [MATH] * 9

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tasks = benchmark_tasks("gsm8k", "openai/gsm8k:main", limit=2).tasks
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert [task.problem.id for task in tasks] == ["gsm8k/0", "gsm8k/1"]
    assert tasks[0].prefix is not None and tasks[0].prefix.count("What is 2 + 3?") == 9


def test_bad_benchmarks_and_rows_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"benchmark: 'humanevil' is unknown, did you mean 'humaneval'.; known: .*mbpp_plus"
    ):
        benchmark_tasks("humanevil", tmp_path)
    for benchmark, row, field in (
        ("humaneval", HUMANEVAL, "test"),
        ("humaneval", HUMANEVAL, "prompt"),
        ("humaneval_plus", CHECKED, "plus_input"),
        ("mbpp_plus", CHECKED, "atol"),
        ("mbpp", FULL, "task_id"),
        ("bigcodebench_complete", BIGCODE, "code_prompt"),
        ("bigcodebench_instruct", BIGCODE, "instruct_prompt"),
        ("livecodebench", LIVE, "public_test_cases"),
        ("gsm8k", MATH, "answer"),
    ):
        path = write_jsonl(tmp_path / "bad.jsonl", row, {name: value for name, value in row.items() if name != field})
        with pytest.raises(ValueError, match=rf"bad.jsonl line 2 .benchmark {benchmark}.: field '{field}'"):
            benchmark_tasks(benchmark, path)
    write_jsonl(tmp_path / "bad.jsonl", HUMANEVAL, HUMANEVAL)
    with pytest.raises(ValueError, match="HumanEval/999 stands there twice"):
        benchmark_tasks("humaneval", tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no problem of humaneval"):
        benchmark_tasks("humaneval", tmp_path / "bad.jsonl")


def test_a_setup_that_the_prompt_does_not_show_stays_with_the_tests():
    for setup in ("root = Node(1)", "def answer(x): return x * x"):
        problem = Problem(id="x", prompt="Square x.", prompt_tests=(), reward_tests=("assert f(1) == 1",), setup=setup)
        assert completion_to_code(problem, "```python\nx = 1\n```") == "x = 1\n"


def test_canonical_programs_of_humaneval():
    tasks = benchmark_tasks("humaneval", shared_file("data/humaneval/HumanEval.jsonl.gz")).tasks
    problems = [task.problem for task in tasks]
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
