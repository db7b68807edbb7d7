"""From a section that names problems to problems, and their order."""

import random
from collections.abc import Iterator, Sequence

from diffrl.config import ProblemsConfig
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.errors import ConfigError
from diffrl.seeds import derive_seed
from diffrl.types import Problem


def problems_of(config: ProblemsConfig, field: str = "data") -> list[Problem]:
    """`field`: the section, as errors name it. Raises ConfigError."""
    if config.source == "microcode":
        problems = microcode_problems(config.split, num_prompt_tests=config.num_prompt_tests)
        return problems[: config.limit]
    assert config.path is not None
    try:
        problems = load_problems(
            config.source, config.path, num_prompt_tests=config.num_prompt_tests, limit=config.limit
        )
    except ValueError as error:
        raise ConfigError(f"{field}.path: {error}") from error
    if not problems:
        raise ConfigError(f"{field}.path: {config.path} holds no problems; give a file with one a line")
    return problems


def prompt_stream(problems: Sequence[Problem], seed: int, first: int = 0) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) from ordinal `first` on, without end: every epoch is a permutation of its own."""
    epoch, skipped = divmod(first, len(problems))
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        for place in range(skipped, len(order)):
            yield epoch * len(order) + place, problems[order[place]]
        epoch, skipped = epoch + 1, 0
