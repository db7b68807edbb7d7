"""One rank of the learner group: a TrainBatch in, `num_iterations` optimizer steps on this rank's share of the groups.

Old scores come first, for every inner iteration: nothing has been updated yet, so without staleness they are scores of the
policy that sampled. Those of the first iteration are its own forward pass.

With `rollout.max_staleness` N they still are scores of the policy pi_k that the step begins with, and not of pi_(k-N), which
sampled: the ratio of eq. 4 is r = pi / pi_k, 1 at the first iteration. What eq. 4 then estimates is the gradient of
E_(k-N)[min(r A, clip(r) A)]. Unbiased on-policy would be E_(k-N)[w min(...)] with w = pi_k / pi_(k-N) of the whole completion
(the decoupled objective of AReaL, arXiv 2505.24298). It is left out: a diffusion model has no tractable w, and one made from
estimates l (each a noisy bound under a few masks) is exp(l_k - l_(k-N)), whose noise is exponential in the sum over tokens.
So the bias is that of N updates, each within the clip range; `make study-staleness` measures what it costs. And the clip range,
which bounds one step's move, is measured from where that step begins.

Gradients are sums over ranks and micro-batches, and eq. 4 divides the sum over the whole step by ONE number of tokens,
which every micro-batch carries: neither their cut nor the number of ranks enters the loss. (`method.compat: release`
divides by each micro-batch's own tokens instead, and averages.)

Weights are published after the last optimizer step and not during the backward pass before it: they do not exist
earlier, since the gradient norm that clips every one of them needs the whole gradient.
"""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.engine import PolicyEngine, decay_groups, join_group
from actors.weights import Contents, Part, sealed
from diffrl.config import RLConfig
from diffrl.micro_batches import crop_prompts, micro_batches, select_groups
from diffrl.models.loading import load_policy
from diffrl.models.lora import adapters_off
from diffrl.objectives import OBJECTIVES
from diffrl.schedule import cosine_lr
from diffrl.scoring import completion_logprobs, to_device
from diffrl.types import ScoringBatch, TrainBatch, UpdateResult


class LearnerRank:
    """`start`, `update`, `export`, `save` and `load` must be called on all ranks at once."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerFast, *, rank: int, total_steps: int):
        torch.set_num_threads(config.learner.threads)
        self.config = config
        self.rank = rank
        self.total_updates = total_steps * config.method.num_iterations
        self.num_updates = 0  # optimizer steps, the skipped ones too: the place in the schedule
        self.num_bad = 0  # optimizer steps skipped in a row
        self.version = 0
        self.release = config.method.compat == "release"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_policy(config.model, tokenizer, seed=config.seed).to(self.device)

    @ray.method
    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port for the process group (asked of rank 0)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @ray.method
    def start(self, address: str, port: int) -> None:
        """Join the process group and build the engine."""
        learner, optim, dtype = self.config.learner, self.config.optim, self.config.model.dtype
        join_group(rank=self.rank, world=learner.num_ranks, address=address, port=port, device=self.device)
        groups = decay_groups(self.model, optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))
        layout = {
            "learner.num_ranks": learner.num_ranks,
            "learner.zero_stage": learner.zero_stage,
            "model.dtype": dtype,
        }
        self.engine = PolicyEngine(
            self.model, optimizer, learner, grad_norm=optim.grad_norm, dtype=dtype, layout=layout
        )

    @ray.method
    def update(self, batch: TrainBatch) -> UpdateResult:
        """`num_iterations` optimizer steps. `loss/*` and `first/*` are partial sums over ranks, of the steps that were
        not skipped (0 if all were); `optim/*` are the same on every rank."""
        iterations = range(len(batch.scoring.views))
        micros = self.micro_batches(batch)
        if self.config.method.kl_coef > 0 and self.config.reference.mode == "adapter_off":
            micros = [self.with_reference(micro) for micro in micros]
        old_IM = [None, *([self.scores(micro.scoring, i) for micro in micros] for i in iterations[1:])]
        applied: dict[int, dict[str, float]] = {}
        sums: dict[str, float] = {}
        optim = {"optim/grad_norm": 0.0}
        for i in iterations:
            sums = {}
            olds = old_IM[i]
            for number, micro in enumerate(micros):
                old_BC = None if olds is None else olds[number]
                for key, value in self.backward(micro, i, old_BC, last=number == len(micros) - 1).items():
                    sums[key] = sums.get(key, 0.0) + value
            optim["optim/lr"] = self.learning_rate()
            norm = self.engine.step(optim["optim/lr"])
            self.num_updates += 1
            if norm is None:
                self.num_bad += 1
            else:
                self.num_bad = 0
                optim["optim/grad_norm"] = norm
                applied[i] = sums
        keys = sorted(sums)
        metrics = {key: sum(s[key] for s in applied.values()) / max(len(applied), 1) for key in keys}
        first = applied.get(0, dict.fromkeys(keys, 0.0))
        metrics |= {"first/ratio_mean": first["loss/ratio_mean"], "first/kl": first["loss/kl"]}
        optim |= {"optim/bad_steps": len(iterations) - len(applied), "optim/bad_in_a_row": self.num_bad}
        self.version += 1
        return UpdateResult(version=self.version, metrics=metrics | optim)

    def learning_rate(self) -> float:
        return cosine_lr(
            self.num_updates,
            total=self.total_updates,
            peak=self.config.optim.lr,
            warmup=self.config.optim.warmup_steps,
            min_ratio=self.config.optim.min_lr_ratio,
        )

    def micro_batches(self, batch: TrainBatch) -> list[TrainBatch]:
        """This rank's share. The release's scores depend on padding, so there it stays."""
        learner = self.config.learner
        plan = micro_batches(
            batch.scoring,
            num_ranks=learner.num_ranks,
            max_tokens=learner.max_tokens_per_micro_batch,
            bucket=not self.release,
        )[self.rank]
        micros = []
        for groups in plan:
            micro = select_groups(batch, groups)
            num_loss_tokens = batch.num_loss_tokens
            if self.release:  # the mean over micro-batches and ranks of means over tokens
                num_loss_tokens = max(int(micro.loss_mask_BC.sum()), 1) * len(plan) * learner.num_ranks
            scoring = micro.scoring if self.release else crop_prompts(micro.scoring)
            ref = micro.ref_logprobs_IBC
            micros.append(
                TrainBatch(
                    scoring=to_device(scoring, self.device),
                    loss_mask_BC=micro.loss_mask_BC.to(self.device),
                    advantages_B=micro.advantages_B.to(self.device),
                    ref_logprobs_IBC=None if ref is None else ref.to(self.device),
                    num_loss_tokens=num_loss_tokens,
                    num_loss_rows=batch.num_loss_rows,
                )
            )
        return micros

    def logprobs(self, batch: ScoringBatch, iteration: int) -> torch.Tensor:
        return completion_logprobs(
            self.engine.engine,
            batch,
            batch.views[iteration],
            mask_token_id=self.model.mask_token_id,
            attend_padding=self.release,
        )

    def scores(self, batch: ScoringBatch, iteration: int) -> torch.Tensor:
        with torch.no_grad():
            return self.logprobs(batch, iteration)

    @ray.method
    def probe(self, batch: ScoringBatch) -> torch.Tensor:
        """float32 [I, B, C]: what the policy gives to a batch. All ranks compute the same."""
        batch = to_device(batch if self.release else crop_prompts(batch), self.device)
        return torch.stack([self.scores(batch, i) for i in range(len(batch.views))]).cpu()

    def with_reference(self, micro: TrainBatch) -> TrainBatch:
        """The micro-batch with the reference's scores, which are the model's own without its adapters."""
        with adapters_off(self.model):
            ref_I = [self.scores(micro.scoring, i) for i in range(len(micro.scoring.views))]
        return replace(micro, ref_logprobs_IBC=torch.stack(ref_I))

    def backward(
        self, micro: TrainBatch, iteration: int, old_BC: torch.Tensor | None, *, last: bool
    ) -> dict[str, float]:
        """Forward and backward of one micro-batch. Without old scores they are this very forward pass."""
        method = self.config.method
        logprobs_BC = self.logprobs(micro.scoring, iteration)
        loss, metrics = OBJECTIVES[method.objective](
            logprobs_BC,
            logprobs_BC.detach() if old_BC is None else old_BC,
            None if micro.ref_logprobs_IBC is None else micro.ref_logprobs_IBC[iteration],
            micro.advantages_B,
            micro.loss_mask_BC,
            num_loss_tokens=micro.num_loss_tokens,
            num_loss_rows=micro.num_loss_rows,
            clip_low=method.clip_low,
            clip_high=method.clip_high,
            kl_coef=method.kl_coef,
        )
        self.engine.backward(loss, last=last)
        return {key: float(value) for key, value in metrics.items()}

    @ray.method
    def identity(self) -> dict[str, Any]:
        """What `weights.publish` says of the policy beside its tensors."""
        return {"version": self.version, "hf_config": self.model.hf_config, "num_tokens": self.model.num_tokens}

    @ray.method(num_returns="streaming")
    def export(self, part: Part) -> Iterator[np.ndarray | Contents]:
        """Rank 0 yields a part of the policy, bucket by bucket, as `weights.sealed` says; the others nothing."""
        buckets = self.engine.export(part, write=self.rank == 0)
        if self.rank == 0:
            yield from sealed(buckets)
        else:
            assert not list(buckets)

    @ray.method
    def save(self, folder: Path) -> None:
        """Everything that the next update depends on, into a folder that all ranks see."""
        self.engine.save(folder, {"version": self.version, "num_updates": self.num_updates, "num_bad": self.num_bad})

    @ray.method
    def load(self, folder: Path) -> int:
        """Go on from a save; its version. Raises RunStoppedError for one of another number of ranks, stage or dtype."""
        state = self.engine.load(folder)
        self.version, self.num_updates, self.num_bad = state["version"], state["num_updates"], state["num_bad"]
        return self.version
