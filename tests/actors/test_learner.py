"""The DeepSpeed learner against the same update written out in plain torch."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.learner import Learner, decay_groups
from actors.weights import WeightStore, fetch
from diffrl.config import RLConfig
from diffrl.coupled_grpo import coupled_grpo_loss
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models.base import PolicyModel
from diffrl.models.folders import state_dict_for_export
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.schedule import cosine_lr
from diffrl.scoring import completion_logprobs
from diffrl.types import ScoringBatch, TrainBatch
from tests.actors.conftest import rl_config

GROUPS, GROUP_SIZE, PROMPT, COMPLETION, STEPS = 4, 2, 6, 8, 2


def config_of(tuned_model: Path, **sections: dict) -> RLConfig:
    method = {"group_size": GROUP_SIZE, "kl_coef": 0.05} | sections.pop("method", {})
    return rl_config(
        tuned_model,
        Path("unused.jsonl"),
        Path("unused"),
        method=method,
        train={"steps": STEPS, "prompts_per_step": GROUPS},
        optim={"lr": 1e-3, "warmup_steps": 1, "grad_norm": 0.5},
        **sections,
    )


def random_batch(config: RLConfig, vocab_size: int, seed: int) -> TrainBatch:
    """Random tokens, padding, advantages, loss mask and reference scores."""
    generator = torch.Generator().manual_seed(seed)
    rows = GROUPS * GROUP_SIZE
    prompt = torch.randint(10, vocab_size, (GROUPS, PROMPT), generator=generator).repeat_interleave(GROUP_SIZE, 0)
    pads = torch.randint(0, 3, (GROUPS, 1), generator=generator).repeat_interleave(GROUP_SIZE, 0)
    lengths = torch.randint(1, COMPLETION + 1, (rows, 1), generator=generator)
    loss_mask = torch.arange(COMPLETION) < lengths
    views = tuple(
        draw_views(
            ESTIMATORS["coupled"],
            seeds=[seed * 100 + iteration * 10 + g for g in range(GROUPS)],
            group_size=GROUP_SIZE,
            num_tokens=COMPLETION,
            options=config.method.view_options(),
        )
        for iteration in range(config.method.num_iterations)
    )
    scoring = ScoringBatch(
        prompt_ids_BP=prompt,
        prompt_mask_BP=torch.arange(PROMPT) >= pads,
        completion_ids_BC=torch.randint(10, vocab_size, (rows, COMPLETION), generator=generator),
        scored_BC=loss_mask,
        views=views,
        group_size=GROUP_SIZE,
    )
    ref = -5 * torch.rand(config.method.num_iterations, rows, COMPLETION, generator=generator)
    return TrainBatch(
        scoring=scoring,
        loss_mask_BC=loss_mask,
        advantages_B=torch.randn(rows, generator=generator),
        ref_logprobs_IBC=ref,
        num_loss_tokens=int(loss_mask.sum()),
        num_loss_rows=len(loss_mask),
    )


def plain_updates(config: RLConfig, model: PolicyModel, batches: list[TrainBatch]) -> list[dict[str, float]]:
    """The whole batch at once, without DeepSpeed, ranks or micro-batches."""
    method, optim = config.method, config.optim
    optimizer = torch.optim.AdamW(
        decay_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2)
    )
    rows, update = [], 0
    for batch in batches:
        assert batch.ref_logprobs_IBC is not None

        def scores(iteration: int, batch: TrainBatch = batch) -> torch.Tensor:
            private = replace(batch.scoring, group_size=1)  # no sharing between siblings
            return completion_logprobs(model, private, private.views[iteration], mask_token_id=model.mask_token_id)

        with torch.no_grad():
            old = [scores(i) for i in range(method.num_iterations)]
        losses, norms = [], []
        for i in range(method.num_iterations):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(
                    update,
                    total=STEPS * method.num_iterations,
                    peak=optim.lr,
                    warmup=optim.warmup_steps,
                    min_ratio=optim.min_lr_ratio,
                )
            optimizer.zero_grad()
            loss, _ = coupled_grpo_loss(
                scores(i),
                old[i],
                batch.ref_logprobs_IBC[i],
                batch.advantages_B,
                batch.loss_mask_BC,
                num_loss_tokens=batch.num_loss_tokens,
                clip_low=method.clip_low,
                clip_high=method.clip_high,
                kl_coef=method.kl_coef,
            )
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_norm)))
            optimizer.step()
            losses.append(loss.item())
            update += 1
        rows.append({"loss/total": sum(losses) / len(losses), "optim/grad_norm": norms[-1]})
    return rows


@pytest.mark.parametrize(
    "learner",
    [{}, {"groups_per_micro_batch": 2}, {"num_ranks": 2, "zero_stage": 1, "groups_per_micro_batch": 2}],
    ids=["one rank", "micro-batches of two", "two ranks, ZeRO 1"],
)
def test_updates_equal_plain_torch(ray_cluster, tuned_model: Path, learner: dict):
    config = config_of(tuned_model, learner=learner)
    tokenizer = load_policy_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, seed=0)
    batches = [random_batch(config, len(tokenizer), seed) for seed in range(STEPS)]
    store = ray.remote(WeightStore).options(num_cpus=0.1).remote()
    with Learner(config, tokenizer, STEPS) as group:
        group.start()
        results = [group.update(ray.put(batch)) for batch in batches]
        weights = group.publish(store, ())
        trained = fetch(weights)
    ray.kill(store)
    expected = plain_updates(config, model, batches)
    assert [r.version for r in results] == [1, 2] and weights.version == 2
    for result, row in zip(results, expected, strict=True):
        for key, value in row.items():
            assert result.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, tensor in state_dict_for_export(model).items():
        # Adam divides by the root of the second moment: where a gradient is nearly 0, its rounding is what is left.
        gap = (trained[name] - tensor).abs()
        assert gap.max() < 5e-4 and gap.mean() < 2e-6, name


def test_compat_release_divides_by_local_token_counts(ray_cluster, tuned_model: Path):
    """What the release computes: the mean over micro-batches of (sum over tokens / tokens of the micro-batch)."""
    method = {"compat": "release", "advantage": "leave_one_out", "num_iterations": 1}
    config = config_of(tuned_model, method=method)
    tokenizer = load_policy_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, seed=0)
    batch = random_batch(config, len(tokenizer), 5)
    with Learner(config, tokenizer, STEPS) as group:
        group.start()
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
