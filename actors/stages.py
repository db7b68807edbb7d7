"""The three supervised stages, adaptation pre-training, mid-training and instruction tuning, as a Ray Train job.

What a user can get wrong is found before Ray starts. Then a group of workers (stage_worker.py) trains; the run folder, its
checkpoints and the shards must be on a file system that all nodes see. A worker that is lost costs the steps since the
newest checkpoint, and a job that was killed goes on from there with `resume="auto"`; the numbers are those of a run that
nothing happened to.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import (  # what its public errors carry
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from transformers import PreTrainedTokenizerFast

from actors.placement import asks_of, check_cluster, hosts, make_room, require_shared
from actors.prepare import absolute_model_path, check_devices, said_in_a_line
from actors.run_board import check_board
from actors.sinks import check_sinks
from actors.stage_worker import StageJob, run_stage
from actors.system import connect, num_cpus_needed
from actors.telemetry import SupervisedTelemetry
from diffrl.checkpoint import last_step
from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.rows import check_lengths, supervised_shards
from diffrl.data.shards import Manifest, open_shards
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.models.loading import check_policy, load_policy_tokenizer
from diffrl.run_folder import (
    check_run_folder,
    claim_attempt,
    create_run_folder,
    read_run,
    unfinished_run,
    write_run,
)

POLL_S = "0.5"  # how often Ray Train looks after its workers, and how long a finished stage may wait to be noticed


def train_supervised(config: PretrainConfig | SftConfig, *, dry_run: bool = False, resume: str | None = None) -> None:
    """One whole stage: rows, model, training, export as a Hugging Face folder `run_dir/model` (its adapters as
    `run_dir/adapter`, the best by validation as `run_dir/best`).

    `resume="auto"`: go on with the run that `run_dir` holds, if there is one; "last": there must be a checkpoint. Raises
    ConfigError, and RunStoppedError when the stage cannot go on.
    """
    started = time.perf_counter()
    if resume not in (None, "auto", "last"):
        raise ConfigError(
            f"--resume: {resume!r} must be auto or last in {config.stage}; start from a model by model.path"
        )
    if resume == "last" and not last_step(Path(config.run_dir)):
        raise ConfigError(
            f"--resume: last, but {config.run_dir} has no checkpoint; use auto to begin where there is none"
        )
    with ExitStack() as stack:
        run = unfinished_run(config) if resume else None
        if run is not None and "finished" in run:
            print(f"{config.stage}: {config.run_dir} is finished; nothing was started")
            return
        parent = Path(config.run_dir).parent
        if not dry_run:
            parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".diffrl-rows-", dir=None if dry_run else parent)
        rows = Path(stack.enter_context(scratch))  # a new run's, until it is known that all is well
        prepared = prepare_stage(config, rows if run is None or dry_run else Path(config.run_dir))
        if dry_run:
            print(f"ready: {prepared.summary()}; nothing was started")
            return
        folder = (create_run_folder(config) if run is None else Path(config.run_dir)).resolve()
        if prepared.shards.is_relative_to(rows):
            prepared.shards.rename(folder / "data")
        attempt = claim_attempt(folder)
    job = StageJob(
        config=absolute_model_path(config),
        tokenizer=prepared.tokenizer,
        folder=folder,
        shards=folder / "data" if (folder / "data").is_dir() else prepared.shards.resolve(),
        num_steps=prepared.num_steps,
        attempt=attempt,
    )
    with SupervisedTelemetry(folder, job.num_steps, config.stage, config.telemetry) as telemetry:
        telemetry.say(f"{config.stage}: {prepared.summary()}")
        if run is not None:
            telemetry.say(f"resumed after step {last_step(folder)} of {folder}")
        run_job(job)
    seconds = time.perf_counter() - started
    write_run(folder, read_run(folder) | {"finished": round(seconds, 1)})
    print(f"{config.stage}: {job.num_steps} steps in {seconds:.0f} s -> {Path(config.run_dir) / 'model'}", flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStage:
    """What a stage needs, checked and loaded."""

    config: PretrainConfig | SftConfig
    tokenizer: PreTrainedTokenizerFast
    shards: Path
    manifest: Manifest
    num_parameters: int  # that are trained

    @property
    def num_steps(self) -> int:
        train = self.config.train
        num_rows = self.manifest.num_rows - self.config.validation.rows
        return train.steps or max(1, train.epochs * num_rows // train.batch_size)

    def summary(self) -> str:
        manifest, workers = self.manifest, self.config.workers
        held_out = f" ({self.config.validation.rows} held out)" if self.config.validation.rows else ""
        return (
            f"{manifest.num_rows:,} rows{held_out} with {manifest.num_tokens:,} tokens, {self.num_parameters:,} "
            f"parameters, {self.num_steps:,} steps, {workers.num_workers} worker{'s' * (workers.num_workers > 1)} "
            f"(ZeRO {workers.zero_stage})"
        )


def prepare_stage(config: PretrainConfig | SftConfig, folder: Path) -> PreparedStage:
    """Check everything, write the rows into `folder/data` unless the config names shards. Raises ConfigError."""
    with said_in_a_line(config):
        check_run_folder(Path(config.run_dir), config.model.path)
        check_devices(config)
        check_sinks(config.telemetry)
        check_board(config.telemetry)
        tokenizer = load_policy_tokenizer(config.model)
        model = check_policy(config.model, tokenizer)
        check_lengths(config, model.config.max_position_embeddings)
        check_cluster(asks_of(config), config.ray.address)
        shards = supervised_shards(config, tokenizer, folder / "data")
        manifest = open_shards(shards)
    if config.validation.rows >= manifest.num_rows:
        raise ConfigError(
            f"validation.rows: {config.validation.rows} must be less than the {manifest.num_rows} rows of the data"
        )
    return PreparedStage(
        config=config,
        tokenizer=tokenizer,
        shards=shards,
        manifest=manifest,
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def run_job(job: StageJob) -> None:
    """Train in a group of workers until the model is exported. Raises RunStoppedError."""
    workers = job.config.workers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(workers.stall_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(workers.start_s / (1 + workers.max_failures))
    owns_ray = connect(job.config.ray.address, num_cpus_needed(job.config), log_to_driver=False)
    if not (job.config.ray.address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away with notice
    on_interrupt = signal.getsignal(signal.SIGINT)  # Ray Train puts its own in place, and leaves it there
    own_files = job.folder / "ray_train"  # Ray Train's own, of which nothing is needed: checkpoints are ours
    try:
        make_room(asks_of(job.config), workers.start_s, "workers.start_s")
        require_shared(job.folder, list(hosts(asks_of(job.config))))
        trainer = ray.train.torch.TorchTrainer(
            run_stage,
            train_loop_config={"job": job},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if workers.gpus_per_worker > 0 else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker={"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker},
                label_selector=dict(workers.labels) or None,
            ),
            run_config=ray.train.RunConfig(
                name=f"attempt-{job.attempt.number}",
                storage_path=str(own_files),
                failure_config=ray.train.FailureConfig(
                    max_failures=workers.max_failures, controller_failure_limit=workers.max_failures
                ),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        reason = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        rank, failure = next(iter(error.worker_failures.items()))
        raise RunStoppedError(
            f"workers.max_failures: more than {workers.max_failures} times a worker was lost or failed, the last time "
            f"worker {rank}: {last_line(failure)}; checkpoints are in {job.folder / 'checkpoints'}, go on with --resume auto"
        ) from error
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise RunStoppedError(
            f"workers.start_s: in {workers.start_s:g} seconds the cluster had no room for {workers.num_workers} workers "
            f"with {workers.cpus_per_worker:g} CPUs and {workers.gpus_per_worker:g} GPUs each (workers.labels: "
            f"{dict(workers.labels)}); add nodes, ask for less or wait longer, and go on with --resume auto"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        shutil.rmtree(own_files, ignore_errors=True)
        if owns_ray:
            ray.shutdown()
    if reason is not None:
        raise RunStoppedError(reason)


def last_line(error: Exception) -> str:
    if isinstance(error, WorkerHealthCheckTimeoutError):  # it ends with advice on a variable that the config sets
        return "it did not answer for workers.stall_s"
    return (str(error).strip() or repr(error)).splitlines()[-1]
