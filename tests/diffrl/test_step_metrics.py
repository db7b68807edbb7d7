"""Metrics of a step against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from diffrl.analysis import global_ar_ness, local_ar_ness, reveal_order
from diffrl.step_metrics import (
    RoleUse,
    batch_metrics,
    completion_metrics,
    group_metrics,
    learner_metrics,
    order_metrics,
    reward_metrics,
    role_metrics,
    view_metrics,
)
from diffrl.types import Judgement, MaskViews, Problem, Rollout, RolloutGroup, ScoredGroup, ScoringBatch, TrainBatch

PROBLEM = Problem(id="p", prompt="f", prompt_tests=(), reward_tests=("assert f(1)", "assert f(2)"))
END, WINDOW = 9, 4


def judgement(pass_rate: float | None, *, reward: float | None = None) -> Judgement:
    """With the recipe's reward; None: not judged."""
    if pass_rate is None:
        return Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0)
    paid = 2 * pass_rate + 0.5 if reward is None else reward
    return Judgement(reward=paid, format=1.0, pass_rate=pass_rate, statuses=("passed", "failed"), cpu_s=0.0)


def rollout(ids: list[int], step_map: list[int] | None = None, probability: list[float] | None = None) -> Rollout:
    length = ids.index(END) + 1 if END in ids else len(ids)
    return Rollout(
        sample_index=0,
        seed=0,
        completion_ids_C=np.array(ids, dtype=np.int32),
        step_map_C=np.array(range(len(ids)) if step_map is None else step_map, dtype=np.int32),
        probability_C=np.array([0.5] * len(ids) if probability is None else probability, dtype=np.float16),
        num_tokens=length,
        text="",
    )


def group(judgements: list[Judgement], rollouts: list[Rollout] | None = None) -> ScoredGroup:
    made = rollouts or [rollout([1, 2, END, 0])] * len(judgements)
    ids = np.array([1], dtype=np.int32)
    sampled = RolloutGroup(problem=PROBLEM, ordinal=0, policy_version=0, prompt_ids_P=ids, rollouts=tuple(made))
    return ScoredGroup(group=sampled, judgements=tuple(judgements))


MIXED = group([judgement(1.0), judgement(0.5), judgement(0.0), judgement(1.0)])
UNSOLVED = group([judgement(0.5), judgement(0.5), judgement(None), judgement(None)])
SOLVED = group([judgement(1.0), judgement(1.0), judgement(1.0), judgement(None)])
LOST = group([judgement(None)] * 4)


def test_rewards_by_part():
    found = reward_metrics([MIXED, UNSOLVED], {"pass_rate": 2.0, "format": 0.5})
    assert found["reward/part/pass_rate"] == pytest.approx(2 * (1 + 0.5 + 0 + 1 + 0.5 + 0.5) / 6)
    assert found["reward/part/format"] == 0.5 and "reward/part/other" not in found
    rewards = [2.5, 1.5, 0.5, 2.5]  # mean 1.75, squares 0.5625 * 3 + 0.0625 + 1.5625 - 0.5625
    assert found["reward/group_std"] == pytest.approx(np.std(rewards) / 2)  # the other group's rewards are equal


def test_what_no_judgement_keeps_is_the_rest_of_the_reward():
    paid = group([judgement(1.0, reward=3.0), judgement(0.0, reward=0.5)])
    found = reward_metrics([paid], {"pass_rate": 2.0, "short": 1.0})
    assert found["reward/part/pass_rate"] == 1.0 and found["reward/part/other"] == pytest.approx(0.75)
    assert "reward/part/format" not in found
    assert reward_metrics([LOST], {"pass_rate": 2.0}) == {"reward/part/pass_rate": 0.0, "reward/group_std": 0.0}


def test_groups():
    mask_BC = torch.ones(16, WINDOW, dtype=torch.bool)
    mask_BC[12:] = False  # the lost group's
    found = group_metrics([MIXED, UNSOLVED, SOLVED, LOST], mask_BC)
    # Of four with two right, of two with none, of three with three; the lost group says nothing.
    assert found["group/pass@1"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["group/pass@2"] == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)
    assert found["group/pass@4"] == 1.0  # of the one group that has four judged samples
    assert "group/pass@8" not in found
    outcomes = [found[f"group/{name}_frac"] for name in ("mixed", "all_fail", "all_pass", "dropped")]
    assert outcomes == [0.25, 0.25, 0.25, 0.25]
    nothing = group_metrics([LOST], torch.zeros(4, WINDOW, dtype=torch.bool))
    assert nothing == dict.fromkeys(found.keys() - {"group/pass@1", "group/pass@2", "group/pass@4"}, 0.0) | {
        "group/dropped_frac": 1.0
    }


def test_completions():
    made = [rollout([1, 2, END, 0]), rollout([1, 2, 3, 4]), rollout([END, 0, 0, 0]), rollout([1, 2, 3, END])]
    made[1] = rollout([1, 2, 3, 4], probability=[1.0, 1.0, 0.25, 0.0])
    found = completion_metrics([group([judgement(1.0)] * 4, made)], {END})
    assert found["rollout/completion_tokens_p50"] == 3.5 and found["rollout/completion_tokens_max"] == 4
    assert found["rollout/completion_tokens_p95"] == pytest.approx(4.0)
    assert found["rollout/end_token_frac"] == 0.75
    nats = 8 * math.log(2) + math.log(4) + 24 * math.log(2)  # three of one half, then one quarter, then 0 as 2^-24
    assert found["rollout/surprisal"] == pytest.approx(nats / 12, rel=1e-6)


def test_orders():
    forward, backward = rollout([1, 2, 3, 4], [0, 1, 2, 3]), rollout([1, 2, 3, 4], [3, 2, 1, 0])
    found = order_metrics([group([judgement(1.0)] * 2, [forward, backward])])
    # Backward only the last position is the leftmost hidden one.
    assert found == {"order/local_ar@1": 0.5, "order/global_ar@1": (1 + 0.25) / 2}
    assert order_metrics([group([judgement(1.0)], [rollout([END, 0, 0, 0])])]) == {"order/global_ar@1": 1.0}


def test_orders_are_those_of_the_analysis():
    generator = np.random.default_rng(0)
    for _ in range(50):
        length = int(generator.integers(2, 40))
        steps, confidence = generator.integers(0, 12, length), generator.integers(0, 4, length) / 4
        made = rollout([1] * length, steps.tolist(), confidence.tolist())
        order = reveal_order(steps, confidence)
        found = order_metrics([group([judgement(1.0)], [made])])
        assert found["order/local_ar@1"] == pytest.approx(local_ar_ness(order, 1))
        assert found["order/global_ar@1"] == pytest.approx(global_ar_ness(order, 1))


def scoring(hidden: list[list[list[list[int]]]], lengths: list[int]) -> ScoringBatch:
    """`hidden`: of each inner iteration, view, completion and token."""
    rows, width = len(lengths), WINDOW
    views = []
    for iteration in hidden:
        hidden_SBC = torch.tensor(iteration, dtype=torch.bool)
        views.append(MaskViews(hidden_SBC=hidden_SBC, weight_SBC=hidden_SBC.float()))
    return ScoringBatch(
        prompt_ids_BP=torch.ones(rows, 3, dtype=torch.long),
        prompt_mask_BP=torch.tensor([[False, True, True]] * rows),
        completion_ids_BC=torch.ones(rows, width, dtype=torch.long),
        scored_BC=torch.arange(width) < torch.tensor(lengths)[:, None],
        views=tuple(views),
        group_size=rows,
    )


EVERYTHING = [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_views():
    coupled = [[EVERYTHING, [[1, 0, 0, 0], [0, 1, 0, 1]], [[0, 1, 1, 1], [1, 0, 1, 0]]]]
    found = view_metrics(scoring(coupled, [4, 2]))  # of the second completion two tokens count
    assert found["views/mask_ratio"] == pytest.approx((1 / 4 + 1 / 2 + 3 / 4 + 1 / 2) / 4)
    assert found["views/mask_ratio_std"] == pytest.approx(math.sqrt((1 / 16 + 1 / 16) / 4))
    assert found["views/coverage"] == 1.0
    one = [[[[1, 0, 0, 0], [0, 0, 1, 1]]], [[[1, 1, 0, 0], [1, 0, 0, 0]]]]  # a view in each of two iterations
    found = view_metrics(scoring(one, [4, 2]))  # of the second completion the first view hides nothing that counts
    assert found["views/mask_ratio"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3)
    assert found["views/coverage"] == pytest.approx((1 + 2 + 1) / 12)
    nothing_visible = {"views/mask_ratio": 1.0, "views/mask_ratio_std": 0.0, "views/coverage": 0.0}
    assert view_metrics(scoring([[EVERYTHING]], [4, 4])) == nothing_visible


def test_batches():
    mask_BC = torch.tensor([[True, True, False, False], [False] * 4])
    batch = TrainBatch(
        scoring=scoring([[EVERYTHING]], [2, 4]),
        loss_mask_BC=mask_BC,
        advantages_B=torch.tensor([1.0, -3.0]),
        ref_logprobs_IBC=None,
        num_loss_tokens=2,
        num_loss_rows=1,
    )
    assert batch_metrics(batch) == {
        "batch/prompt_tokens": 4.0,
        "batch/loss_tokens": 2.0,
        "batch/loss_rows": 1.0,
        "advantage/std": 2.0,
        "advantage/max": 3.0,
    }


def test_who_was_busy():
    use = RoleUse(seconds=10.0, worker_s=20.0, busy_s=15.0, waiting_s=30.0, call_s=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert role_metrics("judge", use) == {
        "idle/judge_frac": 0.25,
        "queue/judge": 3.0,
        "throughput/judge_per_s": 0.5,
        "calls/judge_p50_s": 3.0,
        "calls/judge_p95_s": 4.8,
        "calls/judge_max_s": 5.0,
    }
    silent = RoleUse(seconds=10.0, worker_s=20.0, busy_s=20.0, waiting_s=0.0, call_s=[])
    assert role_metrics("rollout", silent) == {
        "idle/rollout_frac": 0,
        "queue/rollout": 0,
        "throughput/rollout_per_s": 0,
    }
    assert role_metrics("reference", RoleUse(seconds=10, worker_s=0, busy_s=0, waiting_s=0, call_s=[])) == {}
    times = {"time/rollouts": 6.0, "time/learner": 3.0, "time/publish": 1.0}
    assert learner_metrics(times, 600) == {"idle/learner_frac": 0.7, "throughput/learner_tokens_per_s": 200.0}
