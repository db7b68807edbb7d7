"""What `diffrl data show`, `validate` and `stats` say of a file of problems."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, median
from typing import Any

from diffrl.data.row_files import BadRow
from diffrl.errors import ConfigError
from diffrl.prompts import build_prompt
from diffrl.types import Problem

MAX_NAMED = 10  # families and licences


def shown_problem(problem: Problem) -> str:
    """One problem for a reader: what the model sees, and what it does not."""
    facts = {"tests": problem.test_mode, "entry point": problem.entry_point, "family": problem.family}
    facts |= {"license": problem.license}
    graded = "\n".join(problem.reward_tests)
    parts = {
        f"== {problem.id} (" + ", ".join(f"{name} {value}" for name, value in facts.items() if value) + ")": "",
        "-- prompt": build_prompt(problem),
        "-- setup": problem.setup,
        f"-- graded tests ({len(problem.reward_tests)})": graded,
        "-- solution": problem.solution or "",
    }
    return "\n".join(f"{head}\n{text}".strip() for head, text in parts.items() if text or head.startswith("=="))


def chosen(found: Iterable[Problem | BadRow], id: str | None) -> Iterator[Problem]:
    """The problems, or the one of this id. Raises ConfigError where there is none."""
    any_found = False
    for item in found:
        if isinstance(item, Problem) and id in (None, item.id):
            any_found = True
            yield item
    if not any_found:
        what = "no problem can be read; `diffrl data validate` says why" if id is None else "no problem has this id"
        raise ConfigError(f"--id: {id!r}: {what}" if id is not None else what)


def stats_of(found: Iterable[Problem | BadRow]) -> dict[str, Any]:
    """Numbers of a set; an id that occurs again counts as duplicate."""
    problems, num_bad, seen = 0, 0, Counter[str]()
    counts: dict[str, Counter[str]] = {"test_modes": Counter(), "families": Counter(), "licenses": Counter()}
    shown, graded, lengths, solved = [], [], [], 0
    for item in found:
        if isinstance(item, BadRow):
            num_bad += 1
            continue
        problems += 1
        seen[item.id] += 1
        counts["test_modes"][item.test_mode] += 1
        counts["families"][item.family or "(none)"] += 1
        counts["licenses"][item.license or "(none)"] += 1
        shown.append(len(item.prompt_tests))
        graded.append(len(item.reward_tests))
        lengths.append(len(build_prompt(item)))
        solved += item.solution is not None
    return {
        "problems": problems,
        "bad_rows": num_bad,
        "duplicate_ids": problems - len(seen),
        "with_solution": solved,
        "shown_tests": spread(shown),
        "graded_tests": spread(graded),
        "prompt_characters": spread(lengths),
        **{name: dict(counter.most_common()) for name, counter in counts.items()},
    }


def spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": median(values), "mean": round(mean(values), 2), "max": max(values)}


def stats_text(stats: dict[str, Any]) -> str:
    """A line per number; of families and licences the most frequent."""
    lines = []
    for name, value in stats.items():
        if isinstance(value, dict):
            parts = [f"{key} {amount}" for key, amount in list(value.items())[:MAX_NAMED]]
            more = len(value) - len(parts)
            value = ", ".join(parts) + (f", and {more} more" if more else "")
        lines.append(f"{name.replace('_', ' '):<18} {value}")
    return "\n".join(lines)
