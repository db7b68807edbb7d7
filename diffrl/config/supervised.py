"""The configs of the supervised stages: adaptation pre-training, mid-training, instruction tuning."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffrl.config.base import (
    PLAIN,
    CheckpointConfig,
    EngineConfig,
    Fraction,
    ModelConfig,
    Positive,
    RayConfig,
    Seconds,
    Section,
    require_path,
)
from diffrl.config.telemetry import TelemetryConfig
from diffrl.errors import require


class SupervisedOptim(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-5
    muon_lr: Annotated[float, Field(gt=0)] | None = None  # set: Muon for the blocks' matrices, AdamW for the rest
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_ratio: Fraction | None = None  # of all steps, instead of warmup_steps
    min_lr_ratio: Fraction = 0.1

    @model_validator(mode="after")
    def check(self):
        require(
            self.warmup_ratio is None or self.warmup_steps == 0,
            "warmup_steps",
            self.warmup_steps,
            "be left out when warmup_ratio is set",
        )
        return self


class SupervisedTrain(Section):
    steps: Positive | None = None  # None: as many as `epochs` passes over the rows take
    epochs: Positive = 1
    batch_size: Positive = 32  # rows of an optimizer step, over all workers
    rows_per_micro_batch: Positive | None = None  # of one worker; None: its whole share of the batch at once
    autocast_bf16: bool = False
    max_bad_steps: Positive = (
        4  # in a row with a NaN or infinite loss or gradient, which change nothing; then the run stops
    )


class TrainWorkers(EngineConfig):
    """The Ray Train worker group: each worker is a rank of one DeepSpeed engine."""

    num_workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: learner}
    threads: Positive = 2  # of torch, in each worker
    start_s: Seconds = 1800.0  # the wait for a place in the cluster; then the stage gives up
    stall_s: Seconds = 1800.0  # a worker that ends no step, check or save for so long writes its stacks and is lost
    max_failures: Annotated[int, Field(ge=0)] = 3  # lost workers before the stage gives up


class ValidationConfig(Section):
    every: Positive | None = None  # steps; None: after the last only
    rows: Annotated[int, Field(ge=0)] = 0  # taken from the end of the data, never trained on; 0: no validation


class AdaptationConfig(Section):
    """From an autoregressive parent to a diffusion model (the paper's stage 1)."""

    anneal_steps: Annotated[int, Field(ge=0)] = 10_000  # attention from causal to full; 0: full at once
    random_length_frac: Fraction = 0.01  # rows cut to a random length
    unnoised_prefix_frac: Fraction = 0.01  # rows with a random prefix that is never hidden


class CorpusData(Section):
    """Text: `microcode` text plus Python's standard library, files (*.txt, *.py, *.md, *.jsonl or *.parquet with `text`),
    or a folder of shards that `diffrl data prepare` wrote."""

    source: Literal["microcode", "text", "shards"] = "text"
    path: str | None = None
    sequence_length: Positive = 4096
    max_stdlib_bytes: Annotated[int, Field(ge=0)] = 4_000_000  # of microcode
    bad_files: Literal["error", "skip"] = "error"  # damaged files and lines that are not JSON

    @property
    def row_length(self) -> int:
        """Positions of a row, unless shards say otherwise."""
        return self.sequence_length

    @model_validator(mode="after")
    def check(self):
        require_path(self.source, self.path, "a file or folder")
        return self


class SftData(Section):
    """Instruction tuning: prompts with completions, only the completion is noised. Rows have `messages`, or `prompt` and
    `completion`."""

    source: Literal["microcode", "files", "hub", "shards"] = "files"
    path: str | None = None  # of files: *.jsonl or *.parquet; of hub: a data set's name
    hub_split: str = "train"
    # window: [prompt, padded on the left | completion window], exactly what the sampler fills. padded: prompt, completion,
    # padding up to sequence_length. packed: several such pairs without padding in one row.
    layout: Literal["window", "padded", "packed"] = "window"
    max_prompt_tokens: Positive = 512  # of window
    completion_tokens: Positive = 1536  # of window, with the end token
    sequence_length: Positive = 2048  # of padded and packed
    too_long: Literal["error", "drop"] = "error"  # rows that do not fit into the layout; nothing is ever cut
    bad_files: Literal["error", "skip"] = "error"  # damaged files and lines that are not JSON
    wrong_frac: Fraction = 0.0  # of microcode: share of rows whose program is wrong, as in real instruction sets
    broken_format_frac: Fraction = 0.0
    pad_weight: Fraction = 1.0  # loss weight of the padding behind the end token
    # Over so many steps prompts are phased in: at step s a row's prompts are noised and count like its completion with
    # probability 1 - s / condition_steps. None: the first epoch, as in the paper; 0: prompts are always clean.
    condition_steps: Annotated[int, Field(ge=0)] | None = None

    @property
    def row_length(self) -> int:
        """Positions of a row, unless shards say otherwise."""
        return self.max_prompt_tokens + self.completion_tokens if self.layout == "window" else self.sequence_length

    @model_validator(mode="after")
    def check(self):
        require_path(self.source, self.path, "a file, a folder or a data set")
        return self


class SupervisedConfig(Section):
    run_dir: str = "runs/supervised"
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    optim: SupervisedOptim = SupervisedOptim()
    train: SupervisedTrain = SupervisedTrain()
    workers: TrainWorkers = TrainWorkers()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def check(self):
        size, workers = self.train.batch_size, self.workers
        require(
            size % workers.num_workers == 0,
            "train.batch_size",
            size,
            f"be a multiple of workers.num_workers {workers.num_workers}",
        )
        require(
            self.optim.muon_lr is None or workers.zero_stage == 0,
            "optim.muon_lr",
            self.optim.muon_lr,
            f"be null with workers.zero_stage {workers.zero_stage}: Muon needs whole matrices, which ZeRO cuts",
        )
        require(
            self.model.dtype == "float32" or workers.zero_stage >= 1,
            "workers.zero_stage",
            workers.zero_stage,
            f"be 1, 2 or 3 with model.dtype {self.model.dtype}: stage 0 would sum gradients in {self.model.dtype}",
        )
        return self


class PretrainConfig(SupervisedConfig):
    """Adaptation pre-training; mid-training is the same with its own schedule and no adaptation."""

    stage: Literal["pretrain", "midtrain"]
    data: CorpusData
    adaptation: AdaptationConfig | None = None  # None: full attention, whole windows

    @model_validator(mode="after")
    def check_family(self):
        family = self.model.family
        require(family == "diffusion", "model.family", family, f"be diffusion in {self.stage}; causal is of sft and rl")
        return self


class SftConfig(SupervisedConfig):
    stage: Literal["sft"]
    data: SftData
