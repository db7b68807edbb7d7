"""From a config's `data` section to problems, and their order. Errors are ConfigErrors of one line."""

import random
from collections.abc import Iterator, Sequence

from diffrl.config import ProblemsConfig
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.seeds import derive_seed
from diffrl.types import Problem


def problems_of(config: ProblemsConfig) -> list[Problem]:
    if config.source == "microcode":
        problems = microcode_problems(config.split, num_prompt_tests=config.num_prompt_tests)
        return problems[: config.limit]
    assert config.path is not None
    return load_problems(config.source, config.path, num_prompt_tests=config.num_prompt_tests, limit=config.limit)


def prompt_stream(problems: Sequence[Problem], seed: int, first: int = 0) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) from ordinal `first` on, without end: every epoch is a permutation of its own."""
    epoch, skipped = divmod(first, len(problems))
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        for place in range(skipped, len(order)):
            yield epoch * len(order) + place, problems[order[place]]
        epoch, skipped = epoch + 1, 0
