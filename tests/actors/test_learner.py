"""The DeepSpeed learner against the same update written out in plain torch."""

from pathlib import Path

import pytest
import ray
import torch

from actors.weights import fetch
from diffrl.coupled_grpo import coupled_grpo_loss
from diffrl.models.folders import state_dict_for_export
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.scoring import completion_logprobs
from tests.actors.learner_case import (
    GROUP_SIZE,
    GROUPS,
    STEPS,
    ZERO_3,
    config_of,
    plain_updates,
    random_batch,
    running,
)

CASES = {
    "one rank": {},
    "two ranks, ZeRO 1": {"num_ranks": 2, "zero_stage": 1},
    "two ranks, ZeRO 3": {"num_ranks": 2, "max_tokens_per_micro_batch": 1, **ZERO_3},
}
SLOW_CASES = {
    "two ranks": {"num_ranks": 2},
    "two ranks, ZeRO 2": {"num_ranks": 2, "zero_stage": 2},
    "three ranks, ZeRO 2": {"num_ranks": 3, "zero_stage": 2},
    "three ranks, ZeRO 3": {"num_ranks": 3, "max_tokens_per_micro_batch": 1, **ZERO_3},
    "micro-batches": {"max_tokens_per_micro_batch": 1},
    "micro-batches, ZeRO 1": {"max_tokens_per_micro_batch": 1, "zero_stage": 1},
    "micro-batches, ZeRO 2": {"num_ranks": 2, "max_tokens_per_micro_batch": 1, "zero_stage": 2},
    "one rank, ZeRO 3, recompute": {"recompute": True, **ZERO_3},
    "recompute": {"recompute": True},
    "recompute, ZeRO 3": {"num_ranks": 2, "recompute": True, "max_tokens_per_micro_batch": 1, **ZERO_3},
    "compile": {"compile": True},
    "compile and recompute, ZeRO 2": {"num_ranks": 2, "compile": True, "recompute": True, "zero_stage": 2},
    "offload, ZeRO 1": {"num_ranks": 2, "zero_stage": 1, "offload": "optimizer", "max_tokens_per_micro_batch": 1},
    "offload, ZeRO 2": {"num_ranks": 2, "zero_stage": 2, "offload": "optimizer", "max_tokens_per_micro_batch": 1},
    "offload, ZeRO 3": {"num_ranks": 2, "offload": "optimizer", "max_tokens_per_micro_batch": 1, **ZERO_3},
    "offload all, ZeRO 3": {"num_ranks": 2, "offload": "all", "max_tokens_per_micro_batch": 1, **ZERO_3},
    "parameters kept whole, ZeRO 3": {"num_ranks": 2, "zero_stage": 3},
}


@pytest.mark.parametrize(
    "learner",
    [pytest.param(learner, id=name) for name, learner in CASES.items()]
    + [pytest.param(learner, id=name, marks=pytest.mark.slow) for name, learner in SLOW_CASES.items()],
)
def test_updates_equal_plain_torch(ray_cluster, tuned_model: Path, tmp_path: Path, learner: dict):
    config = config_of(tuned_model, tmp_path, learner=learner)
    tokenizer = load_policy_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, seed=0)
    batches = [random_batch(config, model, seed) for seed in range(STEPS)]
    with running(config, tokenizer) as group:
        results = [group.update(ray.put(batch)) for batch in batches]
        weights = group.publish()
        trained = fetch(weights)
    expected = plain_updates(config, model, batches)
    assert [r.version for r in results] == [1, 2] and weights.version == 2
    for result, row in zip(results, expected, strict=True):
        for key, value in row.items():
            assert result.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, tensor in state_dict_for_export(model).items():
        # Adam divides by the root of the second moment: where a gradient is nearly 0, its rounding is what is left.
        gap = (trained[name] - tensor).abs()
        assert gap.max() < 5e-4 and gap.mean() < 2e-6, name
    assert weights.num_bytes == sum(tensor.nbytes for tensor in trained.values())


def test_compat_release_divides_by_local_token_counts(ray_cluster, tuned_model: Path, tmp_path: Path):
    """What the release computes: the mean over micro-batches of (sum over tokens / tokens of the micro-batch)."""
    method = {"compat": "release", "advantage": "leave_one_out", "num_iterations": 1}
    config = config_of(tuned_model, tmp_path, method=method, learner={"max_tokens_per_micro_batch": 1})
    tokenizer = load_policy_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, seed=0)
    batch = random_batch(config, model, 5)
    with running(config, tokenizer) as group:
        result = group.update(ray.put(batch))
    assert batch.ref_logprobs_IBC is not None
    with torch.no_grad():
        logprobs = completion_logprobs(
            model, batch.scoring, batch.scoring.views[0], mask_token_id=model.mask_token_id, attend_padding=True
        )
    losses = []
    for start in range(0, GROUPS * GROUP_SIZE, GROUP_SIZE):
        cut = slice(start, start + GROUP_SIZE)
        loss, _ = coupled_grpo_loss(
            logprobs[cut],
            logprobs[cut],
            batch.ref_logprobs_IBC[0, cut],
            batch.advantages_B[cut],
            batch.loss_mask_BC[cut],
            num_loss_tokens=int(batch.loss_mask_BC[cut].sum()),
            clip_low=config.method.clip_low,
            clip_high=config.method.clip_high,
            kl_coef=config.method.kl_coef,
        )
        losses.append(loss.item())
    assert result.metrics["loss/total"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
