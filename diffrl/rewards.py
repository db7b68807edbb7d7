"""Rewards: (completion text, status of each graded test) -> component; the reward is their weighted sum.

To add one: write a function, add a line to `REWARDS`, give it a weight in the config. A reward knows nothing
of the sandbox: statuses are plain strings, of which only "passed" pays, and a completion that could not be
judged never gets here (a failure of ours is never a reward).
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType

from diffrl.prompts import format_score

RewardFn = Callable[[str, Sequence[str]], float]


def pass_rate(text: str, statuses: Sequence[str]) -> float:
    """Share of graded tests that passed, in [0, 1]; 0 unless the format is right (`format_score` is 1)."""
    if format_score(text) != 1.0:
        return 0.0
    assert statuses, "a judged completion has at least one status"
    return sum(status == "passed" for status in statuses) / len(statuses)


def format_reward(text: str, statuses: Sequence[str]) -> float:
    """`diffrl.prompts.format_score`: 0, 0.5 or 1, whatever the tests say."""
    return format_score(text)


REWARDS: dict[str, RewardFn] = {"pass_rate": pass_rate, "format": format_reward}

RECIPE_WEIGHTS: Mapping[str, float] = MappingProxyType({"pass_rate": 2.0, "format": 0.5})


def total_reward(text: str, statuses: Sequence[str], weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """(weighted sum, unweighted value of EVERY reward in `REWARDS`): one without a weight is only recorded.

    Raises ValueError for a weight of a reward that does not exist.
    """
    for name in weights:
        if name not in REWARDS:
            close = get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(REWARDS)}"
            raise ValueError(f"reward weights: {name!r} is not a reward: {hint}")
    components = {name: reward(text, statuses) for name, reward in REWARDS.items()}
    return sum(weight * components[name] for name, weight in weights.items()), components
