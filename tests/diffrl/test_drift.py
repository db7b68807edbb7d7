"""The guard over approximate sampling, by hand-computed numbers."""

import numpy as np
import pytest

from diffrl.config import SamplingConfig
from diffrl.drift import beyond_limits, drift_metrics, guarded
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

PROBLEM = Problem(id="p", prompt="", prompt_tests=(), reward_tests=("assert f()",))


def rollout(index: int, ids: list[int], num_tokens: int, probability: list[float]) -> Rollout:
    return Rollout(
        sample_index=index,
        seed=index,
        completion_ids_C=np.array(ids, dtype=np.int32),
        step_map_C=np.zeros(len(ids), dtype=np.int32),
        probability_C=np.array(probability, dtype=np.float16),
        num_tokens=num_tokens,
        text="",
    )


def judged(reward: float | None) -> Judgement:
    statuses = None if reward is None else ("passed",)
    return Judgement(reward=reward or 0.0, format=1.0, pass_rate=1.0, statuses=statuses, cpu_s=0.0)


def scored(rollouts, twins, rewards, twin_rewards) -> ScoredGroup:
    ids = np.zeros(2, dtype=np.int32)
    group = RolloutGroup(
        problem=PROBLEM, ordinal=0, policy_version=0, prompt_ids_P=ids, rollouts=tuple(rollouts), twins=tuple(twins)
    )
    return ScoredGroup(
        group=group, judgements=tuple(map(judged, rewards)), twin_judgements=tuple(map(judged, twin_rewards))
    )


def test_metrics():
    first = scored(
        [
            rollout(0, [9, 9, 9, 9], 4, [0.0] * 4),  # has no twin
            rollout(1, [5, 6, 7, 0], 4, [0.5, 0.75, 1.0, 0.75]),
            rollout(2, [5, 6, 0, 0], 3, [1.0, 1.0, 0.25, 0.0]),
        ],
        [
            rollout(1, [5, 8, 0, 0], 3, [0.25, 0.25, 0.25, 1.0]),  # 1 of 3 tokens equal
            rollout(2, [5, 6, 0, 4], 3, [0.5, 0.5, 0.5, np.nan]),  # 3 of 3
        ],
        [2.0, 0.5, 2.5],
        [2.5, 1.5],
    )
    second = scored([rollout(0, [1, 2, 3, 4], 4, [0.5] * 4)], [rollout(0, [4, 3, 2, 4], 4, [1.0] * 4)], [2.5], [None])
    without = scored([rollout(0, [1, 2, 3, 4], 4, [0.5] * 4)], [], [2.5], [])
    assert drift_metrics([first, without, second]) == {
        "guard/rollouts": 3.0,
        "guard/agreement": 5 / 10,
        "guard/confidence_drift": pytest.approx(((0.75 - 0.25) + (0.75 - 0.5) + (0.5 - 1.0)) / 3),
        "guard/reward_difference": pytest.approx((-2.0 + 1.0) / 2),  # the pair without a judgement does not count
    }
    assert drift_metrics([without]) == {}
    assert "guard/reward_difference" not in drift_metrics([second])


def step(agreement: float, difference: float | None, drift: float) -> dict[str, float]:
    rewards = {} if difference is None else {"guard/reward_difference": difference}
    return {"guard/agreement": agreement, "guard/confidence_drift": drift, "guard/rollouts": 1.0, **rewards}


LIMITS = SamplingConfig(
    guard_window=2, guard_min_agreement=0.5, guard_max_reward_drop=0.25, guard_max_confidence_drift=0.125
)


@pytest.mark.parametrize(
    ("steps", "clauses"),
    [
        ([step(0.0, -9.0, 1.0)], []),  # not so many steps yet
        ([step(0.25, -0.5, 0.25), step(0.75, 0.0, 0.0)], []),  # means just at the limits
        ([step(0.0, -9.0, 1.0), step(0.6, 0.0, 0.0), step(0.6, 0.0, 0.0)], []),  # outside the window
        ([step(0.25, 0.0, 0.0), step(0.5, 0.0, 0.0)], ["guard/agreement 0.375 is below guard_min_agreement 0.5"]),
        (
            [step(0.9, -1.0, 0.0), step(0.9, None, 0.0)],
            ["guard/reward_difference -1.000 is a drop beyond guard_max_reward_drop 0.25"],
        ),
        ([step(0.9, 9.0, 0.0), step(0.9, 9.0, 0.0)], []),  # a gain is no drop
        ([step(0.9, None, 0.0), step(0.9, None, 0.0)], []),
        (
            [step(0.9, 0.0, -0.5), step(0.9, 0.0, 0.0)],
            ["guard/confidence_drift -0.250 is beyond guard_max_confidence_drift 0.125"],
        ),
    ],
)
def test_limits(steps, clauses):
    assert beyond_limits(steps, LIMITS) == clauses


def test_all_limits_that_are_passed_are_named():
    assert [c.split()[0] for c in beyond_limits([step(0.0, -1.0, 0.5)] * 2, LIMITS)] == [
        "guard/agreement",
        "guard/reward_difference",
        "guard/confidence_drift",
    ]


def test_twins_go_by_seeds_alone_and_are_about_the_share():
    groups = [[100 * group + index for index in range(10)] for group in range(200)]
    chosen = guarded(groups, 0.1)
    assert 140 < sum(map(len, chosen)) < 260
    assert guarded(groups[50:], 0.1) == chosen[50:]
    assert guarded([list(reversed(row)) for row in groups], 0.1) == [
        tuple(sorted(9 - index for index in row)) for row in chosen
    ]
    assert sum(map(len, guarded(groups, 0.0))) == 1
    assert guarded(groups[:2], 1.0) == [tuple(range(10))] * 2
