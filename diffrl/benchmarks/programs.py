"""How a completion of training becomes the program that is judged, and the data set's own solution as one."""

from diffrl.prompts import extract_code
from diffrl.types import Problem


def completion_to_code(problem: Problem, text: str) -> str:
    """The program to judge: the code that the prompt gives, then the fenced block; "" without a block.

    HumanEval counts the prompt's own code as part of the program, and a completion need not repeat it. A setup
    that the prompt does not show belongs to the tests alone: it may need the program first, or hold the answer.
    """
    code = extract_code(text)
    given = problem.setup if problem.setup in problem.prompt else ""
    # a __future__ import is only allowed at the top, and says that the program is a whole one
    if not code or not given or "from __future__" in code:
        return code
    return f"{given}\n\n{code}"


def canonical_code(problem: Problem) -> str:
    """The data set's own solution, a whole program: an evaluation of it measures the judge, not a model."""
    if problem.solution is None:
        raise ValueError(f"problem {problem.id} has no solution: leave it out of --solutions canonical")
    return problem.solution
