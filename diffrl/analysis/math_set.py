"""Questions whose answer is a number, in GSM8K's format (question; answer that ends in `#### 18`), for the comparison of code and
math. Not the benchmark: no examples are shown, and what is compared is the order of decoding."""

from itertools import islice
from pathlib import Path

from diffrl.benchmarks.gsm8k import right_number
from diffrl.benchmarks.post_processing import last_number
from diffrl.data.row_files import RowError, read_rows, text_of
from diffrl.types import Problem


def math_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` questions; the answer is their one test. Raises ValueError that names row and field."""
    problems = []
    for place, row in islice(read_rows(Path(path)), limit):
        try:
            question, number = text_of(row, "question"), right_number(row)
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
    return last_number(text) == problem.reward_tests[0]
