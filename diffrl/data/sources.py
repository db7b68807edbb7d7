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


def prompt_stream(problems: Sequence[Problem], seed: int) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) without end: every epoch is a permutation of its own."""
    ordinal = 0
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", ordinal // len(problems))).shuffle(order)
        for index in order:
            yield ordinal, problems[index]
            ordinal += 1
