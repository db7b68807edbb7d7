"""AceCode-87K (arXiv 2502.01718): rows with samples of other models and how many tests they passed, split by difficulty.

The split and the completion prompts agree with the release's recipes/process_data.py (apple/ml-diffucoder f735e01). A problem's
mean and standard deviation are of the samples of `MODELS`; percentiles are of the whole set. Departures:
- A row without such samples has no difficulty and is in no split but `all`; there its mean is not a number and empties the split.
- A best sample whose signature does not end its line (`def f(x): return x`) gives no completion prompt; there the prompt would
  hold the whole program.
- A problem's two prompts have different ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import numpy as np

from diffrl.data.graded import entry_point_of, without
from diffrl.data.row_files import Row, RowError, identifier_of, license_of, text_of, texts_of
from diffrl.types import Problem

Difficulty = Literal["hard", "medium", "easy", "all"]
MODELS = ("qwen_coder_2.5", "llama3_instruct")
VARIANT = "diffrl_variant"  # column of a row's second prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Percentiles that bound the splits; the published ones. Medium lies between `medium_low` and `easy`, ends included."""

    hard: float = 20.0
    hard_std: float = 40.0  # hard problems vary at least so much: what nobody ever solves teaches nothing
    medium_low: float = 25.0
    easy: float = 75.0


def difficulties(rates: Sequence[Sequence[float]], quantiles: Quantiles | None = None) -> list[set[str]]:
    """Which of hard, medium and easy each problem is, from its samples' pass rates; nothing where there are none."""
    quantiles = quantiles or Quantiles()
    known = [(np.mean(r), np.std(r)) for r in rates if len(r)]
    if not known:
        return [set() for _ in rates]
    means, stds = zip(*known, strict=True)
    hard, low, easy = (np.percentile(means, q) for q in (quantiles.hard, quantiles.medium_low, quantiles.easy))
    hard_std = np.percentile(stds, quantiles.hard_std)

    def kinds(mean: np.floating, std: np.floating) -> set[str]:
        holds = {"hard": mean <= hard and std >= hard_std, "medium": low <= mean <= easy, "easy": mean >= easy}
        return {name for name, true in holds.items() if true}

    return [kinds(np.mean(r), np.std(r)) if len(r) else set() for r in rates]


def pass_rates_of(row: Row, models: Sequence[str] = MODELS) -> list[float]:
    """Of the samples of these models. Raises RowError."""
    return [i["pass_rate"] for i in inferences_of(row) if i["model_name"] in models]


def inferences_of(row: Row) -> list[dict[str, Any]]:
    """Raises RowError."""
    value = row.get("inferences") or []
    keys = {"completion": str, "model_name": str, "pass_rate": (int, float)}
    good = isinstance(value, list) and all(
        isinstance(item, dict) and all(isinstance(item.get(key), kind) for key, kind in keys.items()) for item in value
    )
    if not good:
        raise RowError("field 'inferences' must be a list of {completion, model_name, pass_rate}", "inferences")
    return value


def split_rows(
    rows: Iterable[tuple[str, Row | RowError]], difficulty: Difficulty
) -> Iterator[tuple[str, Row | RowError]]:
    """The rows of a difficulty in their order, each followed by its completion prompt where it has one. Rows that cannot be
    used pass as errors. A split by difficulty goes through `rows` twice: give something that begins anew, such as `Rows`."""
    kept: Iterable[bool] = repeat(True)
    if difficulty != "all":
        kept = [difficulty in kinds for kinds in difficulties([known_rates(row) for _, row in rows])]
    for (place, row), keep in zip(rows, kept, strict=False):
        try:
            if isinstance(row, RowError):
                raise row
            copy = signature_copy(row)
        except RowError as error:
            yield place, error
            continue
        if keep:
            yield place, row
            if copy is not None:
                yield place, copy


def known_rates(row: Row | RowError) -> list[float]:
    """None of a row that cannot be used."""
    try:
        return [] if isinstance(row, RowError) else pass_rates_of(row)
    except RowError:  # told when the row's turn comes
        return []


def signature_copy(row: Row) -> Row | None:
    """The row asked as a function to complete: the question as the docstring below the signature of its best sample. None
    for questions that address somebody, and where there is no such signature."""
    question, samples = row.get("question"), inferences_of(row)
    if not isinstance(question, str) or "you" in question.lower() or not samples:
        return None
    head, end, _ = max(samples, key=lambda i: i["pass_rate"])["completion"].partition(":\n")
    if not end or not head.strip().startswith("def "):
        return None
    asked = f'Please complete the following problem:\n```\n{head.strip()}:\n    """\n    {question}\n    """\n```\n'
    return {**row, "question": asked, VARIANT: "signature"}


def acecode_row(row: Row, num_prompt_tests: int) -> Problem:
    """The first of test_cases is shown, unless it is the only one; then, or with no test shown, the prompt names what the
    tests call. The solution is a sample that passed all tests, by the row's own word."""
    question, tests = text_of(row, "question").strip(), texts_of(row, "test_cases")
    shown = tests[:num_prompt_tests]
    graded = without(tests, shown)
    if not graded:
        shown, graded = (), tests[:1]
    entry_point = entry_point_of("", tests)
    if not shown and entry_point and entry_point not in question:
        question = f"{question} Name the function `{entry_point}`."
    variant = row.get(VARIANT)
    return Problem(
        id=f"acecode/{identifier_of(row, 'id')}" + (f"/{variant}" if variant else ""),
        prompt=question,
        prompt_tests=shown,
        reward_tests=graded,
        entry_point=entry_point,
        solution=next((i["completion"] for i in inferences_of(row) if i["pass_rate"] == 1), None),
        family=text_of(row, "source", ""),
        license=license_of(row),
    )
