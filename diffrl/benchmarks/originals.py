"""HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732) with their own tests.

MBPP's problems are those of its test split, task_id 11 to 510, of the full file or the sanitized one. As in EvalPlus the
prompt is a docstring with the instruction and the first assert; all asserts are graded, the shown one too.
"""

from dataclasses import replace

from diffrl.benchmarks.evalplus import HUMANEVAL_STOPS, MBPP_STOPS, mbpp_question
from diffrl.benchmarks.task import Task
from diffrl.data.problems import humaneval_row, mbpp_row
from diffrl.data.row_files import Row, RowError, text_of, texts_of

MBPP_TEST_SPLIT = range(11, 511)


def humaneval_task(row: Row) -> Task:
    problem, prefix = humaneval_row(row, 0), text_of(row, "prompt").strip() + "\n"
    if not problem.reward_tests:
        raise RowError("field 'test' defines no check(candidate): give the rows of HumanEval", "test")
    return Task(problem=problem, prefix=prefix, before=prefix, stops=HUMANEVAL_STOPS, given=problem.setup)


def mbpp_task(row: Row) -> Task | None:
    number = row.get("task_id")
    if not isinstance(number, int):
        raise RowError("field 'task_id' is missing: give the rows of MBPP, whose task_id is a number", "task_id")
    problem = mbpp_row(row, 0)
    if not problem.reward_tests:
        raise RowError("field 'test_list' is empty: remove the row", "test_list")
    if number not in MBPP_TEST_SPLIT:
        return None
    words = text_of(row, "text" if "text" in row else "prompt").strip()
    prefix = f'"""\n{words}\n{texts_of(row, "test_list")[0].strip()}\n"""\n'
    question = replace(problem, prompt=mbpp_question(prefix))
    return Task(problem=question, prefix=prefix, before=prefix, stops=MBPP_STOPS)
