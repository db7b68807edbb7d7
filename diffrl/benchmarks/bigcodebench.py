"""BigCodeBench (arXiv 2406.15877), full or hard by the file: programs that use libraries, graded by unittest classes.

`complete` gives the function's head and docstring, `instruct` an instruction in words, which only instruct models are asked.
An answer that is a whole program follows the head with an empty body, as in the benchmark's calibrated score: what the
answer forgot to import is there.
"""

from diffrl.benchmarks.evalplus import HUMANEVAL_STOPS
from diffrl.benchmarks.task import Task
from diffrl.data.row_files import Row, identifier_of, text_of
from diffrl.types import Problem


def complete_task(row: Row) -> Task:
    prompt = text_of(row, "complete_prompt").strip() + "\n"
    question = (
        f"Complete this Python program. Give the whole program in one markdown code block.\n```python\n{prompt}```"
    )
    return Task(
        problem=_problem(row, question, "bigcodebench_complete"),
        prefix=prompt,
        before=prompt,
        stops=HUMANEVAL_STOPS,
        given=_head(row),
    )


def instruct_task(row: Row) -> Task:
    question = text_of(row, "instruct_prompt").strip()
    return Task(problem=_problem(row, question, "bigcodebench_instruct"), prefix=None, given=_head(row))


def _head(row: Row) -> str:
    return text_of(row, "code_prompt").rstrip() + "\n    pass"


def _problem(row: Row, question: str, family: str) -> Problem:
    return Problem(
        id=identifier_of(row, "task_id"),
        prompt=question,
        prompt_tests=(),
        reward_tests=(text_of(row, "test"),),
        test_mode="unittest",
        entry_point=text_of(row, "entry_point"),
        solution=text_of(row, "complete_prompt") + "\n" + text_of(row, "canonical_solution"),
        family=family,
    )
