"""The learner: a group of DeepSpeed engines that turn a TrainBatch into `num_iterations` updates of the policy.

Old scores come first, for every inner iteration: nothing has been updated yet, so they are scores of the policy that
sampled. Those of the first iteration are its own forward pass. Each rank works on whole groups.

DeepSpeed averages gradients over ranks and micro-batches, while eq. 4 divides the sum over the whole batch by ONE
number of tokens: losses are multiplied by both counts before the backward pass.
"""

import os
import socket
from collections.abc import Iterator
from typing import Any, Self

import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.pool import kill
from actors.weights import Weights, publish
from diffrl.config import RLConfig
from diffrl.models.loading import load_policy
from diffrl.objectives import OBJECTIVES
from diffrl.schedule import cosine_lr
from diffrl.scoring import completion_logprobs, slice_rows, to_device
from diffrl.types import ScoringBatch, TrainBatch, UpdateResult


class LearnerRank:
    """One rank. `start` must be called on all ranks at once; so must `update` and `publish`."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerFast, *, rank: int, total_steps: int):
        torch.set_num_threads(config.learner.threads)
        self.config = config
        self.rank = rank
        self.total_updates = total_steps * config.method.num_iterations
        self.num_updates = 0
        self.version = 0
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
        world = self.config.learner.num_ranks
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",  # Ray shows each actor its own devices only
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        if self.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # only here: it looks at the environment, and takes seconds

        if self.device == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for minutes
        deepspeed.init_distributed("nccl" if self.device == "cuda" else "gloo", auto_mpi_discovery=False)
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2)
        )
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=self.engine_config())

    def engine_config(self) -> dict:
        config = self.config
        per_micro = config.learner.groups_per_micro_batch
        return {
            "train_micro_batch_size_per_gpu": per_micro * config.method.group_size,
            "gradient_accumulation_steps": config.train.prompts_per_step // config.learner.num_ranks // per_micro,
            "gradient_clipping": config.optim.grad_norm,
            "zero_optimization": {"stage": config.learner.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.model.dtype == "bfloat16"},
            "steps_per_print": 10**9,
        }

    @ray.method
    def update(self, batch: TrainBatch) -> UpdateResult:
        """`num_iterations` optimizer steps on this rank's share of the batch. Metrics are partial sums over ranks,
        except `optim/*`, which are the same on every rank."""
        micros = list(self.micro_batches(batch))
        old_IM = [[self.scores(micro.scoring, i) for micro in micros] for i in range(1, len(batch.scoring.views))]
        metrics: dict[str, float] = {}
        lr = grad_norm = 0.0
        for i in range(len(batch.scoring.views)):
            lr = cosine_lr(
                self.num_updates,
                total=self.total_updates,
                peak=self.config.optim.lr,
                warmup=self.config.optim.warmup_steps,
                min_ratio=self.config.optim.min_lr_ratio,
            )
            for group in self.optimizer.param_groups:  # shared with DeepSpeed's wrappers
                group["lr"] = lr
            sums: dict[str, float] = {}
            for number, micro in enumerate(micros):
                old_BC = old_IM[i - 1][number] if i else None
                for key, value in self.backward(micro, i, old_BC, num_micros=len(micros)).items():
                    sums[key] = sums.get(key, 0.0) + value
                if self.config.learner.zero_stage == 0 and number == len(micros) - 1:
                    # Averaged over ranks by now, and not clipped yet; ZeRO reports the same norm itself.
                    grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                    grad_norm = float(torch.nn.utils.get_total_norm(grads))
                self.engine.step()
            if self.config.learner.zero_stage > 0:
                grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
            self.num_updates += 1
            for key, value in sums.items():
                metrics[key] = metrics.get(key, 0.0) + value / len(batch.scoring.views)
            if i == 0:
                metrics |= {"first/ratio_mean": sums["loss/ratio_mean"], "first/kl": sums["loss/kl"]}
        metrics |= {"optim/grad_norm": grad_norm, "optim/lr": lr}
        self.version += 1
        return UpdateResult(version=self.version, metrics=metrics)

    def micro_batches(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """This rank's groups, `groups_per_micro_batch` at a time."""
        num_rows = batch.loss_mask_BC.shape[0]
        share = num_rows // self.config.learner.num_ranks
        rows = self.config.learner.groups_per_micro_batch * batch.scoring.group_size
        for start in range(self.rank * share, (self.rank + 1) * share, rows):
            cut = slice(start, start + rows)
            loss_mask_BC = batch.loss_mask_BC[cut].to(self.device)
            ref = batch.ref_logprobs_IBC
            local_count = max(int(loss_mask_BC.sum()), 1) * share // rows * self.config.learner.num_ranks
            yield TrainBatch(
                scoring=to_device(slice_rows(batch.scoring, cut.start, cut.stop), self.device),
                loss_mask_BC=loss_mask_BC,
                advantages_B=batch.advantages_B[cut].to(self.device),
                ref_logprobs_IBC=None if ref is None else ref[:, cut].to(self.device),
                num_loss_tokens=local_count if self.config.method.compat == "release" else batch.num_loss_tokens,
                num_loss_rows=batch.num_loss_rows,
            )

    def logprobs(self, batch: ScoringBatch, iteration: int) -> torch.Tensor:
        return completion_logprobs(
            self.engine,
            batch,
            batch.views[iteration],
            mask_token_id=self.model.mask_token_id,
            attend_padding=self.config.method.compat == "release",
        )

    def scores(self, batch: ScoringBatch, iteration: int) -> torch.Tensor:
        with torch.no_grad():
            return self.logprobs(batch, iteration)

    def backward(
        self, micro: TrainBatch, iteration: int, old_BC: torch.Tensor | None, *, num_micros: int
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
        self.engine.backward(loss * num_micros * self.config.learner.num_ranks)
        return {key: float(value) for key, value in metrics.items()}

    @ray.method
    def publish(self, store: Any, pinned: tuple[int, ...]) -> Weights:
        """Rank 0 hands the policy to the weight store."""
        assert self.rank == 0
        return publish(store, self.model, self.version, pinned)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """What is trained, with weight decay for matrices only, not for norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices, all of them


class Learner:
    """The driver's side of the group."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerFast, total_steps: int):
        options = {
            "num_cpus": config.learner.cpus_per_rank,
            "num_gpus": config.learner.gpus_per_rank,
            "max_restarts": 0,  # its state cannot be rebuilt by running the constructor again
        }
        Rank = ray.remote(LearnerRank).options(**options)
        self.ranks = [
            Rank.remote(config, tokenizer, rank=rank, total_steps=total_steps)
            for rank in range(config.learner.num_ranks)
        ]

    def start(self) -> None:
        """Build the engines; what a rank's constructor raised is raised here."""
        address, port = ray.get(self.ranks[0].rendezvous.remote())
        ray.get([rank.start.remote(address, port) for rank in self.ranks])

    def update(self, batch: "ray.ObjectRef[TrainBatch]") -> UpdateResult:
        """Sums of the ranks' partial metrics; `optim/*` as rank 0 saw them."""
        results = ray.get([rank.update.remote(batch) for rank in self.ranks])
        metrics = {
            key: value if key.startswith("optim/") else sum(r.metrics[key] for r in results)
            for key, value in results[0].metrics.items()
        }
        return UpdateResult(version=results[0].version, metrics=metrics)

    def publish(self, store, pinned: tuple[int, ...]) -> Weights:
        return ray.get(self.ranks[0].publish.remote(store, pinned))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for rank in self.ranks:
            kill(rank)
