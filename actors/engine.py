"""A DeepSpeed engine around the policy: ZeRO 0 to 3, offload to main memory, fp32 or bf16 with fp32 master weights.

What it asks of DeepSpeed, and why:
- the caller says which backward pass of an optimizer step is the last, so steps may differ in their micro-batches;
- DeepSpeed averages gradients over ranks and would divide by a fixed number of micro-batches: here it never does the
  latter, and `backward` undoes the former, so that gradients are sums;
- with bf16 gradients are summed in fp32 and the optimizer works on fp32 weights, of which bf16 ones are copies;
- an optimizer step whose gradient norm (over all ranks) is not finite changes nothing. ZeRO takes care of that itself;
- the optimizer is torch's AdamW everywhere: DeepSpeed's own are compiled at start-up.

Every rank loads the whole model before stage 3 divides it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.weights import BUCKET_BYTES, Bucket, Part, export_buckets
from diffrl.config import RLConfig
from diffrl.errors import RunStoppedError
from diffrl.models.base import PolicyModel

NOTE = "learner.json"  # written last, so a folder with it is complete


def join_group(*, rank: int, world: int, address: str, port: int, device: str) -> None:
    """Make this process one of the group. All ranks at once."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # Ray shows each actor its own devices only
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # only here: it looks at the environment, and takes seconds

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for minutes
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)


def engine_config(config: RLConfig) -> dict:
    """DeepSpeed's own settings for ours."""
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = learner.stage3_param_persistence_threshold
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if learner.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    bf16 = config.model.dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics
        # Not the true number, which varies; but with 1 some paths would overwrite gradients instead of adding to them.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": config.optim.grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """What is trained, with weight decay for matrices only, not for norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices, all of them


class PolicyEngine:
    """One rank's part of the model and its optimizer. All methods are called on all ranks at once."""

    def __init__(self, model: PolicyModel, config: RLConfig):
        import deepspeed

        self.model = model
        self.config = config
        learner, optim = config.learner, config.optim
        self.zero_stage = learner.zero_stage
        if learner.recompute:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if learner.compile:
            for layer in model.backbone.model.layers:
                layer.compile()  # in place: names in the state dict stay
        self.optimizer = torch.optim.AdamW(
            decay_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2)
        )
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=engine_config(config))
        self.engine.train()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, summed over ranks. `last`: `step` comes next. A loss that is not finite makes
        that step a skipped one, on all ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        if not torch.isfinite(loss):
            loss = loss * torch.nan  # its gradient may be finite all the same
        self.engine.backward(loss * self.config.learner.num_ranks, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        """One optimizer step; the norm of the gradient before clipping, or None when it was not finite: then neither
        weights nor optimizer have changed."""
        for group in self.optimizer.param_groups:  # shared with DeepSpeed's wrappers
            group["lr"] = lr
        if self.zero_stage == 0:
            # Averaged over ranks by now, and not clipped yet.
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not np.isfinite(norm):
                self.engine.zero_grad()
                return None
            self.engine.step()
            return norm
        self.engine.step()
        return None if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm() or 0.0)

    def export(self, part: Part, *, write: bool, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
        """A part of the policy, bucket by bucket. Stage 3 gathers one bucket at a time, for which all ranks must exhaust
        the iterator; only those that `write` get anything."""
        import deepspeed

        if self.zero_stage < 3:
            return export_buckets(self.model, part, bucket_bytes=bucket_bytes) if write else iter(())
        gather = deepspeed.zero.GatheredParameters
        return export_buckets(self.model, part, gather=gather, write=write, bucket_bytes=bucket_bytes)

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Weights, optimizer and `state` (plain values) into a folder that all ranks see."""
        self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            note = folder / f"{NOTE}.part"
            note.write_text(json.dumps({**self.layout(), **state}, indent=2) + "\n")
            note.rename(folder / NOTE)

    def load(self, folder: Path) -> dict[str, Any]:
        """What `save` was given. Raises RunStoppedError for a folder that is not complete or of another layout."""
        note = read_note(folder, self.layout())
        loaded, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None
        return note

    def layout(self) -> dict[str, Any]:
        """How the state is divided into files."""
        return {
            "learner.num_ranks": self.config.learner.num_ranks,
            "learner.zero_stage": self.zero_stage,
            "model.dtype": self.config.model.dtype,
        }


def read_note(folder: Path, layout: Mapping[str, Any]) -> dict[str, Any]:
    """The `state` that a save was given. Raises RunStoppedError when it is not complete or not of this layout."""
    if not (folder / NOTE).exists():
        raise RunStoppedError(f"{folder}: no complete state of a learner; name a folder with a {NOTE}")
    note = json.loads((folder / NOTE).read_text())
    for field, value in layout.items():
        saved = note.pop(field)
        if saved != value:
            raise RunStoppedError(
                f"{field}: {value!r} must be {saved!r}, with which {folder} was saved; to change it start from a "
                "model folder (model.path)"
            )
    return note
