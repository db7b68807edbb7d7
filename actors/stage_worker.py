"""One worker of a supervised stage: a rank of the DeepSpeed engine inside a Ray Train worker.

Every worker reads the whole stream of rows, draws the noise of the whole batch from (seed, step) and takes its own
share: what a step computes depends neither on the number of workers nor on where the stage was stopped. The loss of a
share is divided by the loss weight of the whole batch, so gradients and metrics are sums over workers and micro-batches.

A worker that dies takes its group along. Ray Train starts a new one, which goes on from the newest committed checkpoint
(diffrl/checkpoint.py). What another try would not mend (a disk that is full, losses that are not finite) is no exception but
the result of the job, so that nothing is tried again.
"""

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from transformers import PreTrainedTokenizerFast

from actors.engine import Agreement, JointOptimizer, PolicyEngine, start_deepspeed
from actors.row_stream import stream_rows
from actors.watchdog import Watchdog
from actors.weights import Bucket, PackedState
from diffrl.checkpoint import Progress, checkpoint_path, last_step, prune
from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.shards import (
    Manifest,
    Row,
    SupervisedRows,
    collate,
    held_out_rows,
    open_shards,
    rows_of,
)
from diffrl.diffusion import NoisedRows, batch_loss
from diffrl.errors import RunStoppedError
from diffrl.models.folders import save_folder
from diffrl.models.loading import load_policy
from diffrl.models.lora import save_adapter
from diffrl.run_folder import Attempt, MetricsFile, require_newest
from diffrl.schedule import cosine_lr
from diffrl.seeds import derive_seed
from diffrl.supervised import make_optimizers, noised_batch, validation_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """What a worker needs to know. StageJob(config=..., tokenizer=..., folder=Path("/shared/runs/sft"),
    shards=Path("/shared/runs/sft/data"), num_steps=1000, attempt=Attempt(...))"""

    config: PretrainConfig | SftConfig
    tokenizer: PreTrainedTokenizerFast
    folder: Path  # of the run; all nodes see it
    shards: Path
    num_steps: int
    attempt: Attempt


def run_stage(settings: dict[str, StageJob]) -> str | None:
    """What Ray Train calls in every worker. None, or why the run had to stop."""
    job = settings["job"]
    who = f"worker {ray.train.get_context().get_world_rank()}"
    try:
        with Watchdog(job.folder, job.config.workers.stall_s, who=who, key="workers.stall_s", grace_s=0.0) as watchdog:
            StageWorker(job, watchdog).run()
    except RunStoppedError as error:  # on all workers at once
        return str(error)
    return None


class StageWorker:
    """The state of a stage in one of its workers."""

    def __init__(self, job: StageJob, watchdog: Watchdog):
        config = self.config = job.config
        self.job = job
        self.watchdog = watchdog
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(config.workers.threads)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda":  # of all that this node's workers see; DeepSpeed takes it from the environment
            torch.cuda.set_device(self.device)
            os.environ["LOCAL_RANK"] = str(self.device.index)
        start_deepspeed(self.device.type)
        self.model = load_policy(config.model, job.tokenizer, seed=config.seed).to(self.device)
        optimizers = make_optimizers(self.model, config.optim)
        optimizer = optimizers[0] if len(optimizers) == 1 else JointOptimizer(optimizers)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        layout = {
            "workers.num_workers": config.workers.num_workers,
            "workers.zero_stage": config.workers.zero_stage,
            "model.dtype": config.model.dtype,
        }
        self.engine = PolicyEngine(
            self.model,
            optimizer,
            config.workers,
            grad_norm=config.optim.grad_norm,
            dtype=config.model.dtype,
            layout=layout,
        )
        self.manifest: Manifest = open_shards(job.shards)
        self.metrics = MetricsFile(job.folder)
        self.epoch_steps = math.ceil((self.manifest.num_rows - config.validation.rows) / config.train.batch_size)
        ratio, optim = config.optim.warmup_ratio, config.optim
        self.warmup = optim.warmup_steps if ratio is None else round(ratio * job.num_steps)

    def run(self) -> None:
        """From the newest checkpoint to the exported model."""
        config, num_steps = self.config, self.job.num_steps
        self.progress = self.resumed()
        self.ready_at = time.perf_counter()
        for rows in self.batches():
            self.train_step(rows)
            step = self.progress.step
            last = step == num_steps
            improved = (last or step % (config.validation.every or num_steps) == 0) and self.validate()
            if last or improved or step % config.checkpoint.every == 0:
                self.save()
            self.ready_at = time.perf_counter()
        self.export("model")
        if self.progress.best_step not in (None, num_steps):
            self.engine.load(checkpoint_path(self.job.folder, self.progress.best_step))
        if self.progress.best_step is not None:
            self.export("best")

    def resumed(self) -> Progress:
        """State of the newest checkpoint, which rank 0 chooses for all."""
        chosen = [last_step(self.job.folder)]
        torch.distributed.broadcast_object_list(chosen)
        progress = Progress()
        if chosen[0]:
            progress = Progress.from_note(self.engine.load(checkpoint_path(self.job.folder, chosen[0])))
        if self.rank == 0:
            self.metrics.cut(progress.metrics_bytes)
        self.watchdog.progress()
        return progress

    def batches(self) -> Iterator[SupervisedRows]:
        """The whole batch of every step that is left."""
        config, size = self.config, self.config.train.batch_size
        tables = stream_rows(
            self.job.shards,
            self.manifest,
            seed=config.seed,
            first=self.progress.step * size,
            stop=self.job.num_steps * size,
            held_out=config.validation.rows,
            batch_size=size,
        )
        for table in tables:
            yield self.collated(rows_of(table))

    def collated(self, rows: list[Row]) -> SupervisedRows:
        pad_weight = self.config.data.pad_weight if isinstance(self.config, SftConfig) else 1.0
        length, pad = self.manifest.length, self.manifest.pad_token_id
        return collate(rows, length=length, pad_token_id=pad, pad_weight=pad_weight)

    def train_step(self, rows: SupervisedRows) -> None:
        started = time.perf_counter()
        step = self.progress.step
        batch = noised_batch(
            rows,
            self.config,
            step=step,
            mask_token_id=self.model.mask_token_id,
            epoch_steps=self.epoch_steps,
        )
        share = len(rows) // self.world
        size = min(self.config.train.rows_per_micro_batch or share, share)
        sums: dict[str, float] = {}
        starts = range(self.rank * share, (self.rank + 1) * share, size)
        for start in starts:
            piece = batch.take(slice(start, min(start + size, (self.rank + 1) * share)))
            loss, metrics = self.loss(piece, "dropout", step, start)
            self.engine.backward(loss, last=start == starts[-1])
            sums = added(sums, metrics)
        rates = [self.learning_rate(step, peak) for peak in self.peaks]
        norm = self.engine.step(rates)
        totals = self.summed(sums)
        num_bad = 0 if norm is not None else self.progress.num_bad + 1
        optim = {"optim/grad_norm": norm, "optim/lr": rates[0], "optim/bad_steps": int(norm is None)}
        seconds = time.perf_counter() - started
        tokens = totals["data/tokens"] or 0.0
        waited = started - self.ready_at  # for rows
        times = {"time/rows": waited, "time/step": seconds, "time/tokens_per_second": tokens / (waited + seconds)}
        self.write({"step": step, **totals, **optim, **times})
        self.progress = replace(self.progress, step=step + 1, num_bad=num_bad)
        if num_bad >= self.config.train.max_bad_steps:
            raise RunStoppedError(
                f"train.max_bad_steps: the loss or gradient of {num_bad} steps in a row, up to step {step + 1}, is not "
                "finite; lower optim.lr or look at the data; weights are as they were before them"
            )

    def loss(self, piece: NoisedRows, *purpose: int | str) -> tuple[torch.Tensor, dict[str, float]]:
        """Forward pass of a micro-batch: its part of the loss and of the metrics."""
        self.watchdog.progress()
        autocast = nullcontext()
        if self.config.train.autocast_bf16:
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with autocast, torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(self.config.seed, *purpose))  # dropout draws from the global generator
            return batch_loss(self.engine.engine, piece.to(self.device))

    def learning_rate(self, step: int, peak: float) -> float:
        ratio = self.config.optim.min_lr_ratio
        return cosine_lr(step, total=self.job.num_steps, peak=peak, warmup=self.warmup, min_ratio=ratio)

    def validate(self) -> bool:
        """Write the loss of the held-out rows; whether it is the best so far."""
        if self.config.validation.rows == 0:
            return False
        started = time.perf_counter()
        sums: dict[str, float] = {}
        self.engine.engine.eval()
        with torch.no_grad():
            for piece in self.validation_shares():
                sums = added(sums, self.loss(piece, "validation")[1])
        self.engine.engine.train()
        total = self.summed(sums)
        loss, step, best = total["loss/diffusion"], self.progress.step, self.progress.best_loss
        metrics = {"validation/diffusion": loss, "validation/nll": total["loss/nll"]}
        self.write({"step": step - 1, **metrics, "time/validation": time.perf_counter() - started})
        if loss is None or (best is not None and loss >= best):
            return False
        self.progress = replace(self.progress, best_step=step, best_loss=loss)
        return True

    def validation_shares(self) -> Iterator[NoisedRows]:
        """This worker's micro-batches of the held-out rows, as many as every other worker has: where there are not
        enough rows for all, some get one without weight."""
        held_out = self.collated(held_out_rows(self.job.shards, self.manifest, self.config.validation.rows))
        batch = validation_batch(held_out, self.config, mask_token_id=self.model.mask_token_id)
        size = self.config.train.rows_per_micro_batch or self.config.train.batch_size // self.world
        for start in range(self.rank * size, len(batch) + self.rank * size, size * self.world):
            piece = batch.take(slice(start, start + size))
            yield piece if len(piece) else without_weight(batch.take(slice(0, 1)))

    def summed(self, parts: dict[str, float]) -> dict[str, float | None]:
        """Sums over workers; None where they are not finite."""
        values = torch.tensor(list(parts.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return {k: v if math.isfinite(v) else None for k, v in zip(parts, values.tolist(), strict=True)}

    def write(self, row: dict[str, float | int | str | None]) -> None:
        if self.rank == 0:
            self.metrics.write(row)

    def save(self) -> None:
        """Commit a checkpoint, then delete those that are no longer kept."""
        job = self.job
        require_newest(job.folder, job.attempt)  # ours may be the last breath of a job that was ended
        self.progress = replace(self.progress, metrics_bytes=self.metrics.sync() if self.rank == 0 else 0)
        self.engine.save(checkpoint_path(job.folder, self.progress.step), self.progress.note())
        if self.rank == 0:
            prune(job.folder, keep=self.config.checkpoint.keep, best_step=self.progress.best_step)
        self.watchdog.progress()

    def export(self, name: str) -> None:
        """A Hugging Face folder `run_dir/NAME`, whole or not at all; with LoRA `run_dir/adapter` beside `run_dir/model`."""
        write = self.rank == 0
        with Agreement(self.job.folder / f"{name}.part") as agreement:
            policy = unpacked(self.engine.export("policy", write=write))
            if write:
                agreement.attempt(self.write_model, name, policy)
        if self.model.lora is not None and name == "model":
            with Agreement(self.job.folder / "adapter") as agreement:
                adapter = unpacked(self.engine.export("adapter", write=write))
                base = self.config.model.path
                if write:
                    agreement.attempt(
                        save_adapter, adapter, self.model.lora, self.job.folder / "adapter", base_path=base
                    )
        self.watchdog.progress()

    def write_model(self, name: str, policy: PackedState) -> None:
        path = self.job.folder / name
        part = path.with_name(f"{name}.part")
        save_folder(self.model.hf_config, policy, part)
        self.job.tokenizer.save_pretrained(part)
        shutil.rmtree(path, ignore_errors=True)  # of a start of this run that got no further
        part.rename(path)


def unpacked(buckets: Iterable[Bucket]) -> PackedState:
    """Tensors of buckets that are all here; on ranks that get none, none."""
    filled = list(buckets)
    return PackedState([entry for entries, _ in filled for entry in entries], [bucket for _, bucket in filled])


def without_weight(piece: NoisedRows) -> NoisedRows:
    return replace(piece, weight_BL=torch.zeros_like(piece.weight_BL), document_BL=torch.zeros_like(piece.document_BL))


def added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {key: left.get(key, 0.0) + float(value) for key, value in right.items()}
