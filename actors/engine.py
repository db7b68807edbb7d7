"""A DeepSpeed engine around the policy, of the learner and of the supervised stages: ZeRO 0 to 3, offload to main memory,
fp32 or bf16 with fp32 master weights.

What it asks of DeepSpeed, and why:
- the caller says which backward pass of an optimizer step is the last, so steps may differ in their micro-batches;
- DeepSpeed averages gradients over ranks and would divide by a fixed number of micro-batches: here it never does the
  latter, and `backward` undoes the former, so that gradients are sums;
- with bf16 gradients are summed in fp32 and the optimizer works on fp32 weights, of which bf16 ones are copies;
- an optimizer step whose gradient norm (over all ranks) is not finite changes nothing. ZeRO takes care of that itself;
- the optimizer is the caller's, of torch (AdamW; with stage 0 also Muon beside it): DeepSpeed's own are compiled at
  start-up;
- when one rank cannot write its part of a save, all of them hear of it: none waits for the others.

Every rank loads the whole model before stage 3 divides it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.weights import BUCKET_BYTES, Bucket, Part, export_buckets
from diffrl.checkpoint import NOTE
from diffrl.config import EngineConfig
from diffrl.errors import RunStoppedError
from diffrl.files import write_json
from diffrl.models.base import PolicyModel


def join_group(*, rank: int, world: int, address: str, port: int, device: str) -> None:
    """Make this process one of the group. All ranks at once."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # Ray shows each actor its own devices only
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    start_deepspeed(device)


def start_deepspeed(device: str) -> None:
    """Let DeepSpeed use this process's group of torch.distributed, or join the one that the environment describes."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # only here: it looks at the environment, and takes seconds

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for minutes
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)


def engine_config(config: EngineConfig, *, grad_norm: float, dtype: str) -> dict:
    """DeepSpeed's own settings for ours."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.stage3_param_persistence_threshold
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    bf16 = dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics
        # Not the true number, which varies; but with 1 some paths would overwrite gradients instead of adding to them.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": grad_norm,
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


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one; its groups are theirs, in order."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # they are new ones


class PolicyEngine:
    """One rank's part of the model and its optimizer. All methods are called on all ranks at once."""

    def __init__(
        self,
        model: PolicyModel,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        grad_norm: float,
        dtype: str,
        layout: Mapping[str, Any],
    ):
        """`dtype` is the model's; `layout` names the config's fields that decide how a save is divided into files."""
        import deepspeed

        self.model = model
        self.optimizer = optimizer
        self.layout = dict(layout)
        self.zero_stage = config.zero_stage
        if config.recompute:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for layer in model.backbone.model.layers:
                layer.compile()  # in place: names in the state dict stay
        settings = engine_config(config, grad_norm=grad_norm, dtype=dtype)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.engine._copy_recovery_script = lambda folder: None  # a program of DeepSpeed's beside every save
        self.engine.train()
        self.num_ranks = torch.distributed.get_world_size()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, summed over ranks. `last`: `step` comes next. A loss that is not finite makes
        that step a skipped one, on all ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        if not torch.isfinite(loss):
            loss = loss * torch.nan  # its gradient may be finite all the same
        self.engine.backward(loss * self.num_ranks, scale_wrt_gas=False)

    def step(self, lr: float | Sequence[float]) -> float | None:
        """One optimizer step at a learning rate, or at one for each of the optimizer's groups; the norm of the gradient
        before clipping, or None when it was not finite: then neither weights nor optimizer have changed."""
        groups = self.optimizer.param_groups  # shared with DeepSpeed's wrappers
        for group, rate in zip(groups, lr if isinstance(lr, Sequence) else [lr] * len(groups), strict=True):
            group["lr"] = rate
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
        """Weights, optimizer and `state` (plain values) into a folder that all ranks see. Raises RunStoppedError on all
        ranks when one cannot write, as on a full disk; what has been written of this save is deleted then."""
        first = torch.distributed.get_rank() == 0
        with Agreement(folder) as agreement:
            if first:
                shutil.rmtree(folder, ignore_errors=True)  # what is left of a save that was cut off
                agreement.attempt(folder.mkdir, parents=True)
        with Agreement(folder) as agreement:
            # Between DeepSpeed's collectives an error of one rank would leave the others waiting.
            writer = self.engine.checkpoint_engine
            write = writer.save
            writer.save = lambda *args, **kwargs: agreement.attempt(write, *args, **kwargs)
            try:
                self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
            finally:
                writer.save = write
        with Agreement(folder) as agreement:
            if first:
                agreement.attempt(write_json, folder / NOTE, {**self.layout, **state})

    def load(self, folder: Path) -> dict[str, Any]:
        """What `save` was given. Raises RunStoppedError for a folder that is not complete or of another layout."""
        note = read_note(folder, self.layout)
        loaded, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None
        return note


class Agreement:
    """All ranks leave this block together, with RunStoppedError if one of them could not write into `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.error: str | None = None

    def attempt(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Do it if nothing has failed yet."""
        if self.error is None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into the latter
                self.error = " ".join(str(error).split())[:300]

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        errors: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, self.error)
        failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        if failed:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            free_mb = shutil.disk_usage(self.folder.parent).free >> 20
            raise RunStoppedError(
                f"{self.folder} cannot be written ({failed[0]}; {free_mb} MB are free there); earlier saves are whole: "
                "make room and go on from them"
            )


def read_note(folder: Path, layout: Mapping[str, Any]) -> dict[str, Any]:
    """The `state` that a save was given. Raises RunStoppedError when it is not complete or not of this layout."""
    if not (folder / NOTE).exists():
        raise RunStoppedError(f"{folder}: no complete save; name a folder with a {NOTE}")
    note = json.loads((folder / NOTE).read_text())
    for field, value in layout.items():
        saved = note.pop(field)
        if saved != value:
            raise RunStoppedError(
                f"{field}: {value!r} must be {saved!r}, with which {folder} was saved; to change it start from a "
                "model folder (model.path)"
            )
    return note
