"""From sampled and judged groups to what is scored and learned from. Pure functions; the driver calls them.

Shapes: G rollouts of one prompt, B rollouts of a step (siblings adjacent), P prompt, C completion, I inner iterations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffrl.config import RLConfig
from diffrl.coupled_grpo import ADVANTAGES, scale_by_std, usable_samples
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.scoring import concat_batches
from diffrl.seeds import derive_seed
from diffrl.types import RolloutGroup, ScoredGroup, ScoringBatch, TrainBatch
from diffrl.views import StepPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """One step's groups, in order of ordinals, with what is scored of them.

    StepRollouts(scored=(ScoredGroup(...), ...), scoring={17: ScoringBatch(...)}, ref_logprobs={17: tensor(...)})
    """

    scored: tuple[ScoredGroup, ...]
    scoring: Mapping[int, ScoringBatch]  # by ordinal
    ref_logprobs: Mapping[int, torch.Tensor]  # by ordinal, [I, G, C]
    replaced: tuple[ScoredGroup, ...] = ()  # sampled too, and left out for their equal rewards

    def without(self, groups: Sequence[ScoredGroup]) -> "StepRollouts":
        ordinals = {s.group.ordinal for s in groups}
        return replace(self, scored=tuple(s for s in self.scored if s.group.ordinal not in ordinals))

    def joined(self, later: "StepRollouts") -> "StepRollouts":
        return StepRollouts(
            scored=self.scored + later.scored,
            scoring={**self.scoring, **later.scoring},
            ref_logprobs={**self.ref_logprobs, **later.ref_logprobs},
        )


def pad_prompt(prompt_P: np.ndarray, rows: int, width: int, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One prompt, padded on the left to `width` and repeated: ids int64 [rows, width], mask bool (False on padding)."""
    assert len(prompt_P) <= width, "prompts that do not fit are left out before the run starts"
    ids = torch.full((rows, width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((rows, width), dtype=torch.bool)
    start = width - len(prompt_P)
    ids[:, start:] = torch.from_numpy(prompt_P.astype(np.int64))
    mask[:, start:] = True
    return ids, mask


def scoring_batch(group: RolloutGroup, config: RLConfig, pad_token_id: int) -> ScoringBatch:
    """What learner and reference score: the group's tokens, and one draw of views per inner iteration."""
    rows = len(group.rollouts)
    prompt_ids_BP, prompt_mask_BP = pad_prompt(group.prompt_ids_P, rows, config.data.max_prompt_tokens, pad_token_id)
    views = tuple(
        draw_views(
            ESTIMATORS[config.method.estimator],
            seeds=[derive_seed(config.seed, "views", group.ordinal, iteration)],
            group_size=rows,
            num_tokens=config.sampling.completion_tokens,
            options=replace(config.method.view_options(), place=place_of(group.ordinal, iteration, config)),
        )
        for iteration in range(config.method.num_iterations)
    )
    num_tokens_B = torch.tensor([r.num_tokens for r in group.rollouts])
    return ScoringBatch(
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        completion_ids_BC=torch.from_numpy(np.stack([r.completion_ids_C for r in group.rollouts])).long(),
        scored_BC=torch.arange(config.sampling.completion_tokens) < num_tokens_B[:, None],
        views=views,
        group_size=rows,
    )


def place_of(ordinal: int, iteration: int, config: RLConfig) -> StepPlace:
    """A group's place among `prompts_per_step` neighbours in the stream of prompts, which are a step unless groups are
    replaced; from the ordinal alone, so that it is the same in a run that is resumed."""
    size = config.train.prompts_per_step
    return StepPlace(seed=derive_seed(config.seed, "step", ordinal // size, iteration), index=ordinal % size, size=size)


def differs(group: ScoredGroup) -> bool:
    """Whether the judged samples of a group have different rewards, so that it has an advantage to learn from."""
    return len({j.reward for j in group.judgements if j.valid}) > 1


def train_batch(
    scored: Sequence[ScoredGroup],
    scoring: Mapping[int, ScoringBatch],
    ref_logprobs: Mapping[int, torch.Tensor],
    config: RLConfig,
) -> TrainBatch:
    """Rewards -> advantages and loss mask. Samples that were not judged get loss mask 0; shapes never change.

    `scoring` and `ref_logprobs` ([I, G, C] each; of no group when kl_coef is 0) by ordinal.
    """
    method = config.method
    ordinals = [s.group.ordinal for s in scored]
    rewards_B, valid_B = rewards_of(scored, config)
    usable_B = usable_samples(rewards_B, valid_B, method.group_size, drop_equal_groups=method.drop_equal_groups)
    batch = concat_batches([scoring[o] for o in ordinals])
    loss_mask_BC = batch.scored_BC & usable_B[:, None]
    advantages_B = ADVANTAGES[method.advantage](rewards_B, valid_B, method.group_size)
    if method.scale_by_std:
        advantages_B = scale_by_std(advantages_B, rewards_B, valid_B, method.group_size)
    return TrainBatch(
        scoring=batch,
        loss_mask_BC=loss_mask_BC,
        advantages_B=advantages_B,
        ref_logprobs_IBC=torch.cat([ref_logprobs[o] for o in ordinals], dim=1) if ref_logprobs else None,
        num_loss_tokens=max(int(loss_mask_BC.sum()), 1),
        num_loss_rows=max(int(loss_mask_BC.any(1).sum()), 1),
    )


def rewards_of(scored: Sequence[ScoredGroup], config: RLConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards float32 [B] and which are valid, bool [B]. In the control experiment (`reward.shuffle_within_group`)
    they are permuted within each group, so that they say nothing about their completions."""
    rewards, valid = [], []
    for group in scored:
        row = torch.tensor([j.reward for j in group.judgements], dtype=torch.float32)
        row_valid = torch.tensor([j.valid for j in group.judgements])
        if config.reward.shuffle_within_group:
            seed = derive_seed(config.seed, "shuffle", group.group.ordinal)
            order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
            row, row_valid = row[order], row_valid[order]
        rewards.append(row)
        valid.append(row_valid)
    return torch.cat(rewards), torch.cat(valid)


def rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """What a line of metrics.jsonl says about the rollouts of a step. Means are over judged samples."""
    judgements = [j for s in scored for j in s.judgements]
    judged = [j for j in judgements if j.valid]
    statuses = [status for j in judged for status in j.statuses or ()]
    counts = {f"verdicts/{name}": statuses.count(name) for name in sorted(set(statuses))}
    equal = [not differs(s) for s in scored]
    lengths = [r.num_tokens for s in scored for r in s.group.rollouts]
    num_judged = max(len(judged), 1)
    return {
        "reward/mean": sum(j.reward for j in judged) / num_judged,
        "reward/pass_rate": sum(j.pass_rate for j in judged) / num_judged,
        "reward/solved_frac": sum(j.pass_rate == 1.0 for j in judged) / num_judged,
        "reward/format": sum(j.format for j in judged) / num_judged,
        "reward/equal_groups_frac": sum(equal) / len(equal),
        "sandbox/infra_error_frac": 1 - len(judged) / len(judgements),
        "sandbox/low_trust_frac": sum(j.low_trust for j in judged) / num_judged,
        "rollout/completion_tokens": sum(lengths) / len(lengths),
        **counts,
    }
