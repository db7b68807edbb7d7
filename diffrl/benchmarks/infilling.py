"""HumanEval-Infilling: a program with a span cut out."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from diffrl.data.problems import humaneval_row
from diffrl.data.row_files import read_rows
from diffrl.types import Problem

INFILLING = "humaneval_infilling"


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillingTask:
    """A program with a span cut out (HumanEval-Infilling, arXiv 2207.14255; single lines, several lines or random spans).

    InfillingTask(problem=Problem(id="SingleLineInfilling/HumanEval/0/L0", ...), prefix="def f(x):\\n", suffix="    return y\\n",
                  middle="    y = x\\n")
    """

    problem: Problem  # its tests; its solution is the whole program
    prefix: str
    suffix: str
    middle: str  # the span that was cut out

    def program(self, middle: str) -> str:
        """What is judged: the rest of the program is given, so nothing is cut off or added."""
        return self.prefix + middle + self.suffix


def infilling_tasks(path: str | Path, *, limit: int | None = None) -> list[InfillingTask]:
    """The first `limit` tasks of a file of HumanEval-Infilling (None: all). Raises ValueError as `load_problems`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more, or leave it out for the whole file")
    tasks = []
    for place, row in islice(read_rows(Path(path)), limit):
        try:
            if not isinstance(row.get("suffix"), str):
                raise ValueError("field 'suffix' is missing: give the rows of HumanEval-Infilling")
            problem = humaneval_row(row, 0)
            if not problem.reward_tests:
                raise ValueError("field 'test' defines no check(candidate): give the rows of HumanEval-Infilling")
        except ValueError as error:
            raise ValueError(f"{path} {place} (format {INFILLING}): {error}") from None
        task = InfillingTask(
            problem=problem, prefix=row["prompt"], suffix=row["suffix"], middle=row["canonical_solution"]
        )
        whole = task.program(task.middle)
        tasks.append(replace(task, problem=replace(problem, solution=whole, family=INFILLING)))
    return tasks
