"""Advice from numbers: each is given where it should be, and not where it should not."""

from collections.abc import Mapping

import pytest

from actors.advice import WINDOW, advise
from diffrl.metrics import undefined

TIMES = {"time/rollouts": 6.0, "time/record": 0.1, "time/learner": 2.0, "time/publish": 0.2, "time/pull": 0.2}
IDLE = {"idle/rollout_frac": 0.2, "idle/judge_frac": 0.3, "idle/reference_frac": 0.4}
CALM = {**TIMES, **IDLE, "rollout/end_token_frac": 0.98, "reward/equal_groups_frac": 0.3}


def said(changes: Mapping[str, float], *, rows: int = WINDOW) -> dict[str, str]:
    return {advice.about: advice.text for advice in advise([{**CALM, **changes}] * rows)}


def test_a_calm_run_is_left_alone():
    assert said({}) == {}
    assert undefined(CALM) == []


def test_nothing_is_said_before_a_window_is_full_or_of_lines_without_these_keys():
    slow = {"idle/judge_frac": 0.0, "idle/rollout_frac": 0.9}
    assert said(slow, rows=WINDOW - 1) == {} and said(slow, rows=WINDOW) != {}
    assert advise([{"reward/mean": 1.0}] * WINDOW) == []


@pytest.mark.parametrize(
    ("about", "slowest", "expected"),
    [
        (
            "judge",
            "judge",
            "judging is the bottleneck (idle: rollout workers 60%, judge workers 3%, reference workers 60%)",
        ),
        ("rollout", "rollout", "sampling is the bottleneck (idle: rollout workers 3%, judge workers 60%,"),
        ("reference", "reference", "the reference is the bottleneck (idle: rollout workers 60%, judge workers 60%,"),
    ],
)
def test_the_only_role_that_is_never_idle_is_the_bottleneck(about: str, slowest: str, expected: str):
    idle = {key: 0.03 if slowest in key else 0.6 for key in IDLE}
    found = said(idle)
    assert list(found) == [about] and found[about].startswith(expected)
    keys = {"judge": "judge.num_workers", "rollout": "rollout.num_workers", "reference": "reference.num_workers"}
    assert keys[about] in found[about]
    assert said(dict.fromkeys(IDLE, 0.05)) == {}, "all are busy: nobody holds the others up"
    assert said({**idle, "time/rollouts": 1.5, "time/pull": 0.9, "time/record": 2.2}) == {}, "nobody waits for rollouts"


def test_a_window_counts_not_a_step():
    calm, slow = dict(CALM), {**CALM, "idle/judge_frac": 0.0, "idle/rollout_frac": 0.9}
    assert advise([calm] * (WINDOW - 1) + [slow]) == []
    assert [advice.about for advice in advise([calm] * 3 + [slow] * WINDOW)] == ["judge"]


def test_a_run_without_a_reference():
    rows = [
        {k: v for k, v in CALM.items() if "reference" not in k} | {"idle/judge_frac": 0.01, "idle/rollout_frac": 0.8}
    ]
    assert [advice.about for advice in advise(rows * WINDOW)] == ["judge"]


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"time/learner": 8.0}, "learner", "55% of a step): add ranks (learner.num_ranks)"),
        ({"time/learner": 5.0, "rollout/staleness_max": 0.0}, "overlap", "(52% of a step) and updates (43%)"),
        ({"time/publish": 5.0}, "weights", "moving weights takes 39% of a step"),
        ({"sandbox/infra_error_frac": 0.05}, "infrastructure", "5.0% of the samples could not be judged"),
        ({"sandbox/low_trust_frac": 0.2}, "trust", "20% of the samples had a test that their program could forge"),
        (
            {"reward/equal_groups_frac": 0.9, "group/all_pass_frac": 0.7, "group/all_fail_frac": 0.2},
            "groups",
            "90% of the groups teach nothing, for their rewards are equal (all pass 70%, all fail 20%): harder problems",
        ),
        ({"reward/equal_groups_frac": 0.9, "group/all_fail_frac": 0.9}, "groups", "easier problems"),
        (
            {"rollout/end_token_frac": 0.4},
            "length",
            "only 40% of the completions end within sampling.completion_tokens",
        ),
        ({"loss/clip_low_frac": 0.2, "loss/clip_high_frac": 0.2}, "clipping", "40% of the tokens"),
        ({"optim/bad_steps": 1.0}, "skipped", "5 optimizer steps of the last 5 steps were skipped"),
    ],
)
def test_each_advice(changes: dict[str, float], about: str, words: str):
    assert undefined(changes) == []
    found = said(changes)
    assert list(found) == [about] and words in found[about]


def test_updates_that_overlap_already_are_left_alone():
    assert said({"time/learner": 5.0, "rollout/staleness_max": 1.0}) == {}


def test_restarts_are_counted_by_their_growth():
    rows = [{**CALM, "restarts/judge": 10.0 + step} for step in range(WINDOW)]
    (found,) = advise(rows)
    assert found.about == "restarts of judge" and "4 restarts of judge in 5 steps" in found.text
    assert advise([{**CALM, "restarts/judge": 10.0}] * WINDOW) == []
