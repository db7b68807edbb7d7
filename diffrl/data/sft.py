"""Instruction data from the generated problems, as noisy as real instruction sets are.

A share of the bodies is wrong, with mistakes that are typical of the problem, and a share of the completions breaks
the format. A model tuned on it imitates both, so a policy before RL has something left to learn from unit tests.

No completion is a program that solves a validation or held-out problem. That needs care: a mistake or a slipped
constant turns a training solution into another problem's, which may be one of those. Such a row is drawn again.
"""

import random

from diffrl.data.microcode import FAMILIES, Exercise, microcode_exercises, solves_reserved

# Share of wrong bodies of a family, relative to the mean, family by family in turn: in some the mistake is the rule.
UNEVENNESS = (1.25, 1.0, 0.75)
FIRST_MISTAKE_SHARE = 0.75  # of the mistakes; the rest are the second kind
SLIP_SHARE = 0.1  # of the wrong bodies: a constant off by one


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def sft_rows(
    *, seed: int, num_copies: int = 4, wrong_share: float = 0.45, broken_share: float = 0.08, split_seed: int = 0
) -> list[tuple[str, str]]:
    """(prompt, completion) pairs: every training problem `num_copies` times, each copy with its own noise, shuffled."""
    share = {f.name: wrong_share * UNEVENNESS[i % len(UNEVENNESS)] for i, f in enumerate(FAMILIES)}
    rng = random.Random(f"sft/{seed}")
    rows = []
    for _ in range(num_copies):
        for exercise in microcode_exercises("train", split_seed):
            code = noisy_code(exercise, min(share[exercise.family], 1.0), rng, split_seed)
            rows.append((exercise.prompt, broken(code, rng) if rng.random() < broken_share else fenced(code)))
    rng.shuffle(rows)
    return rows


def noisy_code(exercise: Exercise, wrong_share: float, rng: random.Random, split_seed: int) -> str:
    """The solution, or with probability `wrong_share` a wrong program that solves no reserved problem either."""
    if rng.random() >= wrong_share:
        return exercise.solution
    while True:
        if rng.random() < SLIP_SHARE:
            code = rng.choice(exercise.slips)
        else:
            code = exercise.mistakes[0 if rng.random() < FIRST_MISTAKE_SHARE else 1]
        if not solves_reserved(code, exercise.argument, split_seed):
            return code


def broken(code: str, rng: random.Random) -> str:
    """`code` in a format that is worth nothing: no fence, an unclosed one, or one that is not Python's."""
    return rng.choice((code, f"```python\n{code}", f"```\n{code}\n```"))
