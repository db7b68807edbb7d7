"""From a section that names problems to problems, and their order."""

import random
import sys
from collections.abc import Iterator, Sequence

from diffrl.config import ProblemsConfig
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import ReadOptions, read_problems
from diffrl.data.row_files import BadRow
from diffrl.errors import ConfigError
from diffrl.seeds import derive_seed
from diffrl.types import Problem


def problems_of(config: ProblemsConfig, field: str = "data") -> list[Problem]:
    """`field`: the section, as errors name it. Bad rows within the config's budget are left out and named on stderr. Raises
    ConfigError."""
    if config.source == "microcode":
        problems = microcode_problems(config.split, num_prompt_tests=config.num_prompt_tests)
        return problems[: config.limit]
    assert config.path is not None
    problems, bad = [], []
    try:
        for item in read_problems(config.source, config.path, read_options(config)):
            (bad if isinstance(item, BadRow) else problems).append(item)
            if len(bad) > config.max_bad_rows:
                raise ValueError(beyond_budget(config, bad[-1]))
    except ValueError as error:
        raise ConfigError(f"{field}.path: {error}") from error
    if not problems:
        raise ConfigError(f"{field}.path: {config.path} holds no problems; give a file with one a line")
    for row in bad:
        print(f"{field}.path: {config.path} {row.place} left out: {row.reason}", file=sys.stderr)
    return problems


def check_ids(problems: Sequence[Problem], field: str = "data") -> None:
    """Raises ConfigError for an id that occurs twice."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ConfigError(f"{field}.path: two problems have the id {problem.id!r}; give each its own")
        seen.add(problem.id)


def beyond_budget(config: ProblemsConfig, row: BadRow) -> str:
    budget = f"; more than max_bad_rows {config.max_bad_rows}" if config.max_bad_rows else ""
    return f"{config.path} {row.place} (format {config.source}): {row.reason}{budget}"


def read_options(config: ProblemsConfig) -> ReadOptions:
    return ReadOptions(
        num_prompt_tests=config.num_prompt_tests,
        limit=config.limit,
        difficulty=config.difficulty,
        max_row_mb=config.max_row_mb,
    )


def prompt_stream(problems: Sequence[Problem], seed: int, first: int = 0) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) from ordinal `first` on, without end: every epoch is a permutation of its own."""
    epoch, skipped = divmod(first, len(problems))
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        for place in range(skipped, len(order)):
            yield epoch * len(order) + place, problems[order[place]]
        epoch, skipped = epoch + 1, 0
