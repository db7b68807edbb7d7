"""What the tests of the learner share: a small batch, a group on it, and the same update written out in plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.engine import decay_groups
from actors.learner import Learner
from actors.pool import WORKER_LOST
from diffrl.config import RLConfig
from diffrl.coupled_grpo import coupled_grpo_loss
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models.base import PolicyModel
from diffrl.schedule import cosine_lr
from diffrl.scoring import completion_logprobs
from diffrl.types import ScoringBatch, TrainBatch
from tests.actors.conftest import rl_config

ZERO_3 = {"zero_stage": 3, "stage3_param_persistence_threshold": 0}  # so that small models are divided too
GROUPS, GROUP_SIZE, PROMPT, COMPLETION, STEPS = 6, 2, 6, 8, 2


def config_of(tuned_model: Path, run_dir: Path, **sections: dict) -> RLConfig:
    method = {"group_size": GROUP_SIZE, "kl_coef": 0.05} | sections.pop("method", {})
    return rl_config(
        tuned_model,
        Path("unused.jsonl"),
        run_dir,
        method=method,
        train={"steps": STEPS, "prompts_per_step": GROUPS},
        optim={"lr": 1e-3, "warmup_steps": 1, "grad_norm": 0.5},
        **sections,
    )


def random_batch(config: RLConfig, model: PolicyModel, seed: int) -> TrainBatch:
    """Random tokens, padding, advantages and loss mask; reference scores not far from the model's."""
    vocab_size = model.vocab_size
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
    with torch.no_grad():
        scores = [completion_logprobs(model, scoring, v, mask_token_id=model.mask_token_id) for v in views]
    ref = torch.stack(scores) + 0.5 * torch.randn(len(views), rows, COMPLETION, generator=generator)
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
            # Every row of every view by itself, with all its logits.
            return completion_logprobs(
                model,
                batch.scoring,
                batch.scoring.views[iteration],
                mask_token_id=model.mask_token_id,
                share=False,
                chunked=False,
            )

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


@contextmanager
def running(config: RLConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[Learner]:
    with Learner(config, tokenizer, STEPS) as group:
        group.start()
        yield group


def end(actor: Any) -> None:
    """Kill an actor and wait until Ray knows: before that, calls may still come through."""
    ray.kill(actor)
    with pytest.raises(WORKER_LOST):
        while True:
            ray.get(actor.__ray_ready__.remote())
