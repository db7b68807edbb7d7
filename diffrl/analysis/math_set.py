"""Questions whose answer is a number, in GSM8K's format (question; answer that ends in `#### 18`), for the comparison of code and
math. Not the benchmark: no examples are shown, and what is compared is the order of decoding."""

import re
from itertools import islice
from pathlib import Path

from diffrl.data.row_files import RowError, read_rows, text_of
from diffrl.types import Problem

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def math_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` questions; the answer is their one test. Raises ValueError that names row and field."""
    problems = []
    for place, row in islice(read_rows(Path(path)), limit):
        try:
            question, answer = text_of(row, "question"), text_of(row, "answer")
            number = number_of(answer.partition("####")[2])
            if number is None:
                raise RowError("field 'answer' does not end in `####` and a number", "answer")
        except RowError as error:
            raise ValueError(f"{path} {place}: {error}") from error
        problems.append(
            Problem(
                id=f"math/{len(problems)}",
                prompt=question,
                prompt_tests=(),
                reward_tests=(number,),
                family="math",
            )
        )
    if not problems:
        raise ValueError(f"{path} holds no questions; give a file with one a line")
    return problems


def is_right(problem: Problem, text: str) -> bool:
    """Whether the last number of a completion is the answer."""
    return number_of(text) == problem.reward_tests[0]


def number_of(text: str) -> str | None:
    """The last number, written without thousands separators and without zeros behind a decimal point; None without one."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
