"""GSM8K (arXiv 2110.14168), 8-shot: the last number of the answer must be the right one, to the digit.

The eight worked examples are the first rows of the benchmark's own training split: train.jsonl beside the file of problems, or
the hub's. The calculator's marks (<<16-3=13>>) are left out of them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from diffrl.benchmarks.post_processing import last_number
from diffrl.benchmarks.task import Task
from diffrl.data.row_files import Row, RowError, hub_rows, is_hub_name, read_rows, text_of
from diffrl.types import Problem

NUM_EXAMPLES = 8
STOPS = ("\nQuestion:",)
_MARK = re.compile(r"<<.*?>>")


def gsm8k_task(row: Row) -> Task:
    """Without the examples. Rows have no names; `with_examples` numbers them."""
    right = right_number(row)
    question = f"Question: {text_of(row, 'question').strip()}\nAnswer:"
    problem = Problem(
        id="gsm8k",
        prompt=question,
        prompt_tests=(),
        reward_tests=(f"the last number is {right}",),
        solution=_MARK.sub("", text_of(row, "answer")),
        family="gsm8k",
    )
    return Task(problem=problem, prefix=question, stops=STOPS, answer=right)


def right_number(row: Row) -> str:
    """As `last_number` writes it. Raises RowError."""
    _, mark, number = text_of(row, "answer").rpartition("#### ")
    right = last_number(number) if mark else None
    if right is None:
        raise RowError("field 'answer' does not end in '#### NUMBER': give the rows of GSM8K", "answer")
    return right


def with_examples(tasks: Sequence[Task], data: str) -> list[Task]:
    """Every question behind the examples. Raises ValueError where they are not to be had."""
    train = Path(data).with_name("train.jsonl")
    if not is_hub_name(data) and not train.is_file():
        raise ValueError(
            f"{train} is missing: GSM8K is asked with {NUM_EXAMPLES} examples of it; put it beside the problems"
        )
    rows = hub_rows(data, "train") if is_hub_name(data) else read_rows(train)
    try:
        shown = [gsm8k_task(row).problem for _, row in islice(rows, NUM_EXAMPLES)]
    except RowError as error:
        raise ValueError(f"{train} (format gsm8k): {error}") from None
    examples = "".join(f"{problem.prompt} {problem.solution}\n\n" for problem in shown)
    asked = []
    for number, task in enumerate(tasks):
        text = examples + task.problem.prompt
        asked.append(replace(task, prefix=text, problem=replace(task.problem, id=f"gsm8k/{number}", prompt=text)))
    return asked
