"""What a step of RL says of itself beyond `rollout_metrics` (batches.py): rewards by part, groups, completions, orders, what
is learned from, and who was busy. Pure functions; every name is defined in metrics.py.

Shapes: B rollouts (siblings adjacent), C completion, S views, I inner iterations.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
import torch

from diffrl.analysis import pass_at_k
from diffrl.batches import StepRollouts
from diffrl.config import RLConfig
from diffrl.types import ScoredGroup, ScoringBatch, TrainBatch

SMALLEST = 2.0**-24  # above 0 in float16, in which probabilities are kept


def step_metrics(
    drawn: StepRollouts, batch: TrainBatch, config: RLConfig, end_ids: Collection[int]
) -> dict[str, float]:
    """All that depends on nothing but the rollouts of a step and its batch; the same in every equal run."""
    everything = (*drawn.scored, *drawn.replaced)
    return {
        **reward_metrics(drawn.scored, config.reward.weights),
        **group_metrics(drawn.scored, batch.loss_mask_BC),
        **completion_metrics(drawn.scored, end_ids),
        **order_metrics(drawn.scored),
        **batch_metrics(batch),
        **view_metrics(batch.scoring),
        "rollout/tokens": float(sum(r.num_tokens for s in everything for r in s.group.rollouts)),
    }


def reward_metrics(scored: Sequence[ScoredGroup], weights: Mapping[str, float]) -> dict[str, float]:
    """Means over judged samples of what each part gave, times its weight. Parts that a judgement does not keep are `other`."""
    judged = [j for s in scored for j in s.judgements if j.valid]
    num_judged = max(len(judged), 1)
    known = {"pass_rate": [j.pass_rate for j in judged], "format": [j.format for j in judged]}
    parts = {name: weights[name] * sum(values) / num_judged for name, values in known.items() if name in weights}
    if weights.keys() - known.keys():
        parts["other"] = sum(j.reward for j in judged) / num_judged - sum(parts.values())
    rewards = [[j.reward for j in s.judgements if j.valid] for s in scored]
    spread = fmean(pstdev(row) if row else 0.0 for row in rewards)
    return {**{f"reward/part/{name}": value for name, value in parts.items()}, "reward/group_std": spread}


def group_metrics(scored: Sequence[ScoredGroup], loss_mask_BC: torch.Tensor) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... over the groups with so many judged samples, and what became of the groups. One without a
    judged sample is neither all pass, all fail nor mixed."""
    solved = [[j.pass_rate == 1.0 for j in s.judgements if j.valid] for s in scored]
    metrics = {}
    k = 1
    while groups := [row for row in solved if len(row) >= k]:
        metrics[f"group/pass@{k}"] = fmean(pass_at_k(sum(row), len(row), k) for row in groups)
        k *= 2
    learned_N = loss_mask_BC.reshape(len(scored), -1).any(1)
    outcomes = {
        "group/all_pass_frac": sum(bool(row) and all(row) for row in solved),
        "group/all_fail_frac": sum(bool(row) and not any(row) for row in solved),
        "group/mixed_frac": sum(0 < sum(row) < len(row) for row in solved),
        "group/dropped_frac": int((~learned_N).sum()),
    }
    return metrics | {name: number / len(scored) for name, number in outcomes.items()}


def completion_metrics(scored: Sequence[ScoredGroup], end_ids: Collection[int]) -> dict[str, float]:
    rollouts = [r for s in scored for r in s.group.rollouts]
    lengths = [r.num_tokens for r in rollouts]
    ended = [int(r.completion_ids_C[r.num_tokens - 1]) in end_ids for r in rollouts]
    revealed = np.concatenate([r.probability_C[: r.num_tokens] for r in rollouts]).astype(np.float64)
    return {
        "rollout/completion_tokens_p50": float(np.percentile(lengths, 50)),
        "rollout/completion_tokens_p95": float(np.percentile(lengths, 95)),
        "rollout/completion_tokens_max": float(max(lengths)),
        "rollout/end_token_frac": fmean(ended),
        "rollout/surprisal": float(-np.log(np.maximum(revealed, SMALLEST)).mean()),
    }


def order_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Local and global AR-ness@1 of the tokens up to the end token, as diffrl/analysis/arness.py has them, means over
    completions; without loops over tokens, for this is done in every step."""
    local, everywhere = [], []
    for rollout in (r for s in scored for r in s.group.rollouts):
        num_tokens = rollout.num_tokens
        doubt = -rollout.probability_C[:num_tokens].astype(np.float32)
        order = np.lexsort((np.arange(num_tokens), doubt, rollout.step_map_C[:num_tokens]))
        if num_tokens > 1:
            local.append(float((np.diff(order) == 1).mean()))
        leftmost = np.minimum.accumulate(order[::-1])[::-1]  # of the positions that are hidden at each step
        everywhere.append(float((order == leftmost).mean()))
    metrics = {"order/local_ar@1": fmean(local)} if local else {}
    return {**metrics, "order/global_ar@1": fmean(everywhere)}


def batch_metrics(batch: TrainBatch) -> dict[str, float]:
    advantages_B = batch.advantages_B
    return {
        "batch/prompt_tokens": float(batch.scoring.prompt_mask_BP.sum()),
        "batch/loss_tokens": float(batch.loss_mask_BC.sum()),
        "batch/loss_rows": float(batch.loss_mask_BC.any(1).sum()),
        "advantage/std": float(advantages_B.std(correction=0)),
        "advantage/max": float(advantages_B.abs().max()),
    }


def view_metrics(batch: ScoringBatch) -> dict[str, float]:
    """Of the views of all inner iterations: how much those that leave some of a completion visible hide of it, and which
    share of the tokens at least one of them hides."""
    num_B = batch.scored_BC.sum(1)
    ratios, covered = [], 0.0
    for views in batch.views:
        hidden_SBC = views.hidden_SBC & batch.scored_BC
        count_SB = hidden_SBC.sum(2)
        partial_SB = (count_SB > 0) & (count_SB < num_B)
        ratios.append((count_SB / num_B)[partial_SB])
        covered += float((hidden_SBC & partial_SB[..., None]).any(0).sum())
    ratio_N = torch.cat(ratios)
    return {
        "views/mask_ratio": float(ratio_N.mean()) if len(ratio_N) else 1.0,
        "views/mask_ratio_std": float(ratio_N.std(correction=0)) if len(ratio_N) else 0.0,
        "views/coverage": covered / (len(batch.views) * float(num_B.sum())),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleUse:
    """What the workers of a role were doing for a while.

    RoleUse(seconds=12.0, worker_s=24.0, busy_s=18.0, waiting_s=6.0, call_s=(2.5, 3.1))
    """

    seconds: float  # how long
    worker_s: float  # that long, times workers
    busy_s: float  # of these, with a call
    waiting_s: float  # over all calls, for a worker
    call_s: Sequence[float]  # of each call about a group that ended


def role_metrics(role: str, use: RoleUse) -> dict[str, float]:
    """Nothing for a role without workers; nothing of calls where none has ended."""
    if not use.worker_s:
        return {}
    metrics = {
        f"idle/{role}_frac": 1 - use.busy_s / use.worker_s,
        f"queue/{role}": use.waiting_s / use.seconds,
        f"throughput/{role}_per_s": len(use.call_s) / use.seconds,
    }
    if use.call_s:
        metrics |= {
            f"calls/{role}_p50_s": float(np.percentile(use.call_s, 50)),
            f"calls/{role}_p95_s": float(np.percentile(use.call_s, 95)),
            f"calls/{role}_max_s": max(use.call_s),
        }
    return {name: round(value, 4) for name, value in metrics.items()}


def learner_metrics(times: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """`times`: seconds of the phases of a step; `num_tokens`: in the loss, of all inner iterations."""
    return {
        "idle/learner_frac": round(1 - times["time/learner"] / sum(times.values()), 4),
        "throughput/learner_tokens_per_s": round(num_tokens / times["time/learner"], 1),
    }
