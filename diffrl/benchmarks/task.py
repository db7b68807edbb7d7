"""One problem of a benchmark: how each kind of model is asked, and what is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffrl.benchmarks.post_processing import chat_code, cut_at, last_number
from diffrl.data.row_files import Row
from diffrl.types import Problem

Style = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A problem as a benchmark asks it.

    Task(problem=Problem(id="HumanEval/0", prompt="Complete the following ...", reward_tests=("def check(...): ...",), ...),
         prefix="def f(x):\\n    ...\\n", stops=("\\ndef ",), before="def f(x):\\n    ...\\n", given="import math")
    """

    problem: Problem  # its prompt is the user's message to an instruct model
    prefix: str | None  # what a base model continues; None: base models are not asked
    stops: tuple[str, ...] = ()  # a continuation ends before the first of them
    before: str = ""  # the code that a continuation goes on with
    given: str = ""  # code of the prompt that an answer need not repeat
    answer: str | None = None  # the right number, where no program is asked for
    num_base_tests: int | None = None  # so many tests come first that make a score of their own

    def program(self, text: str, style: Style) -> str:
        """What is judged; "" where the model wrote nothing."""
        if self.answer is not None:
            return last_number(cut_at(text, self.stops)) or ""
        if style == "completion":
            code = cut_at(text, self.stops)
            return self.before + code if code.strip() else ""
        code = chat_code(text)
        # a __future__ import is only allowed at the top, and says that the program is a whole one
        if not code.strip() or not self.given or "from __future__" in code:
            return code if code.strip() else ""
        return f"{self.given}\n\n{code}"


RowToTask = Callable[[Row], Task | None]  # None: not a row of this benchmark. Raises RowError
