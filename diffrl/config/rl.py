"""The config of an RL run: coupled-GRPO, its actors and its judge."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffrl.config.base import (
    PLAIN,
    CheckpointConfig,
    EngineConfig,
    Fraction,
    ModelConfig,
    Positive,
    ProblemsConfig,
    RayConfig,
    Seconds,
    Section,
)
from diffrl.config.supervision import SupervisionConfig
from diffrl.config.telemetry import TelemetryConfig
from diffrl.coupled_grpo import ADVANTAGES
from diffrl.errors import is_port, one_of, require
from diffrl.estimators import ESTIMATORS, check_estimator
from diffrl.objectives import OBJECTIVES
from diffrl.rewards import REWARDS
from diffrl.sampler import SamplingParams
from diffrl.sampler.engine import aligned
from diffrl.sampler.params import APPROXIMATIONS
from diffrl.views import T_DISTRIBUTIONS, ViewOptions


class RLData(ProblemsConfig):
    max_prompt_tokens: Positive = 200


class SamplingConfig(Section):
    """Denoising of rollouts; Dream's names."""

    algorithm: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    completion_tokens: Positive = 256
    steps: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 1.2
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    top_k: Positive | None = 50
    alg_temp: Annotated[float, Field(ge=0)] = 0.0
    # Approximations, see diffrl/sampler/approximate.py; of rollouts alone, evaluation is exact.
    block_size: Positive | None = None
    cache: Literal["none", "prefix", "dual"] = "none"
    refresh_every: Positive | None = None
    confidence_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    confidence_factor: Annotated[float, Field(gt=0)] | None = None
    entropy_budget: Annotated[float, Field(gt=0)] | None = None
    tokens_per_step: Positive | None = None
    early_end: bool = False
    # The guard over them, see diffrl/drift.py. The limits are for means over the window of steps.
    guard_share: Fraction = 0.05  # of the rollouts of a step, at least one, sampled exactly too
    guard_window: Positive = 10  # steps: 40 pairs with the defaults, so the reward's mean is known to about 0.15
    guard_min_agreement: Fraction = 0.1  # as low as draws at temperature 1.2 need it; at 0, 0.9 is reasonable
    guard_max_reward_drop: Annotated[float, Field(ge=0)] = 0.5  # a fifth of what the default rewards can give
    guard_max_confidence_drift: Fraction = 0.1  # up or down

    @model_validator(mode="after")
    def check(self):
        try:
            self.params()
        except ValueError as error:
            raise ValueError(str(error).removeprefix("sampling.")) from None  # the section's name is added
        return self

    def params(self, temperature: float | None = None) -> SamplingParams:
        names = {field.name for field in fields(SamplingParams)} & set(type(self).model_fields)
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if temperature is not None:
            options["temperature"] = temperature
        return SamplingParams(**options)


class MethodConfig(Section):
    """coupled-GRPO (section 5 of the paper)."""

    estimator: str = "coupled"
    group_size: Positive = 10
    num_iterations: Positive = 2  # mu
    kl_coef: Annotated[float, Field(ge=0)] = 0.01  # beta
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clip_high: Annotated[float, Field(gt=0)] = 0.5
    objective: str = "token"
    advantage: str = "group_mean"
    scale_by_std: bool = False
    drop_equal_groups: bool = False
    max_replacements: Annotated[int, Field(ge=0)] = 0  # per step: prompts drawn anew for groups with equal rewards
    num_pairs: Annotated[int, Field(ge=1, le=64)] = 1  # lambda of eq. 13
    num_samples: Annotated[int, Field(ge=1, le=64)] = 2  # of monte_carlo
    t_min: Annotated[float, Field(gt=0, lt=1)] = 0.2
    t_max: Annotated[float, Field(gt=0, lt=1)] = 0.8
    t_distribution: str = "uniform"
    share_t: Literal["row", "group", "batch"] = "group"
    stratify_t: bool = False
    share_masks: bool = False
    reference_refresh_steps: Positive | None = 64
    reference_mix: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # share of the policy in a refresh; 1: a copy, release: 0.6
    )
    compat: Literal["release"] | None = None  # padding attended, local token count: for parity tests only

    @model_validator(mode="after")
    def check(self):
        require(
            self.reference_mix == 1.0 or self.reference_refresh_steps is not None,
            "reference_refresh_steps",
            None,
            f"be set with reference_mix {self.reference_mix:g}",
        )
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "be 2 or more: the baseline is the mean reward of the group, so a completion alone has advantage 0",
        )
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("advantage", self.advantage, ADVANTAGES)
        require(self.t_min <= self.t_max, "t_min", self.t_min, f"be at most t_max {self.t_max}")
        one_of("objective", self.objective, OBJECTIVES)
        one_of("t_distribution", self.t_distribution, T_DISTRIBUTIONS)
        require(
            not (self.stratify_t and self.share_t == "batch"),
            "stratify_t",
            self.stratify_t,
            "be false when share_t is batch: one t has nothing to lie evenly among",
        )
        check_estimator(self.estimator, self.view_options())  # here, not in the middle of a run
        return self

    def view_options(self) -> ViewOptions:
        return ViewOptions(
            num_pairs=self.num_pairs,
            num_samples=self.num_samples,
            t_min=self.t_min,
            t_max=self.t_max,
            t_distribution=self.t_distribution,
            share_t=self.share_t,
            stratify_t=self.stratify_t,
            share_masks=self.share_masks,
        )


class RewardConfig(Section):
    weights: Mapping[str, float] = {"pass_rate": 2.0, "format": 0.5}
    # Control experiment: rewards permuted within each group, so that they say nothing about their completions.
    shuffle_within_group: bool = False

    @model_validator(mode="after")
    def check(self):
        require(bool(self.weights), "weights", dict(self.weights), f"name at least one of {sorted(REWARDS)}")
        for name in self.weights:
            one_of("weights", name, REWARDS)
        return self


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_norm: Annotated[float, Field(gt=0)] = 0.2
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # optimizer steps, of which a step of RL has num_iterations
    min_lr_ratio: Fraction = 0.1  # cosine down to this share of lr


class RLTrain(Section):
    steps: Positive | None = None  # None: as many as `epochs` passes over the problems take
    epochs: Positive = 1
    prompts_per_step: Positive = 8


class RolloutConfig(Section):
    num_workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: rollout}
    threads: Positive = 1  # of torch, in each worker
    max_tokens_per_batch: Positive = 16_384  # rows x width of a forward pass; at least one group
    dtype: Literal["float32", "bfloat16"] | None = None  # None: of the published weights
    compile: bool = False  # torch.compile of all layers but the last, on a GPU: a CPU's passes are not of a fixed shape
    # Updates that the policy of a rollout is behind the one that learns from it. 0: sample, then learn; with more of them
    # the rollouts of a step begin before the steps before it are learned from.
    max_staleness: Annotated[int, Field(ge=0, le=16)] = 0


class SyncConfig(Section):
    """Do the workers that sample have the learner's policy? Log-probs of the same tokens under the same masks are compared."""

    every: Positive | None = 20  # steps; None: never
    max_logprob_absdiff: Annotated[float, Field(gt=0)] | None = (
        None  # of one token; beyond it the run stops. None: 1e-3 where everything is float32, else 1.0
    )


class WorkerConfig(Section):
    num_workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: reward}


class JudgeConfig(WorkerConfig):
    # While groups wait to be judged there are more workers, up to so many, where the cluster has places; None: never.
    max_workers: Positive | None = None
    idle_s: Seconds = 60.0  # without work; then one that is more than num_workers leaves

    @model_validator(mode="after")
    def check(self):
        require(
            self.max_workers is None or self.max_workers >= self.num_workers,
            "max_workers",
            self.max_workers,
            f"be at least num_workers {self.num_workers}; null: always that many",
        )
        return self

    @property
    def most(self) -> int:
        return self.max_workers or self.num_workers


class ReferenceConfig(Section):
    mode: Literal["actor", "adapter_off"] = "actor"  # adapter_off: the learner without its adapters, no actor
    num_workers: Positive = 1  # each scores whole groups
    cpus: Annotated[float, Field(ge=0)] = 1.0  # of each
    gpus: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: rollout}
    threads: Positive = 1


class LearnerConfig(EngineConfig):
    """The DeepSpeed engine group."""

    num_ranks: Positive = 1
    max_tokens_per_micro_batch: Positive = 16_384  # rows of distinct inputs x padded length; at least one group
    max_bad_steps: Positive = 4  # optimizer steps in a row with a NaN or infinite loss or gradient; then the run stops
    keep_batches: Annotated[int, Field(ge=0)] = 0  # of the last steps, in run_dir/batches, for `diffrl replay`
    cpus_per_rank: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: learner}
    placement: Literal["PACK", "STRICT_PACK"] = "PACK"  # on as few nodes as possible; all ranks on one
    threads: Positive = 1


class RLCheckpoint(CheckpointConfig):
    """The whole run's state: what `--resume` goes on from, and a learner group that lost a rank."""

    every: Positive = 20
    # Every checkpoint is copied there too: a folder or an address of fsspec (s3://...). Where run_dir is empty, --resume
    # begins with the newest copy. None: no copies.
    copy_to: str | None = None


class SandboxConfig(Section):
    """Where and within which limits programs are judged. Each reward worker has sandboxes of its own."""

    backend: Literal["auto", "docker", "process", "pod"] = "auto"  # auto: docker if it can be used, else process
    slots: Positive = 2  # programs that one reward worker judges at the same time
    slots_per_container: Positive = 1  # docker: several share a memory limit
    image: str = "diffrl-sandbox:base"  # docker
    runtime: str | None = None  # docker: an OCI runtime such as runsc; None: the engine's default
    addresses: Sequence[str] = []  # pod: host:port of each; a name may lead to many, as that of a headless Service
    token_file: str | None = (
        None  # pod: file with the pods' secret, on every node; None: environment DIFFRL_SANDBOX_TOKEN
    )
    allow_unisolated: bool = False  # process without bubblewrap; says yes to the danger in so many words
    cpu_s: Annotated[float, Field(gt=0)] = 2.0  # per test; decides
    wall_s: Annotated[float, Field(gt=0)] = 20.0  # per test; the backstop for programs that wait
    memory_mb: Annotated[int, Field(ge=64)] = 512
    attempts: Positive = 2  # tries in different sandboxes, then on different workers, before a sample is masked
    max_masked_share: Fraction = 0.25  # a run stops when a larger share of a step's samples could not be judged
    pay_low_trust: bool = True  # false: a test that ran beside the solution, which could forge it, earns nothing

    @model_validator(mode="after")
    def check(self):
        pod, docker = self.backend == "pod", self.backend == "docker"
        require(not pod or bool(self.addresses), "addresses", self.addresses, "name a host:port with backend pod")
        for address in self.addresses:
            host, _, port = address.rpartition(":")
            require(bool(host) and is_port(port), "addresses", address, "be host:port")
        require(pod or not self.addresses, "backend", self.backend, "be pod when addresses are given")
        require(pod or self.token_file is None, "backend", self.backend, "be pod when token_file is given")
        require(docker or self.runtime is None, "backend", self.backend, "be docker when runtime is given")
        require(self.wall_s >= self.cpu_s, "wall_s", self.wall_s, f"be at least cpu_s {self.cpu_s:g}")
        return self


class EvalConfig(Section):
    """Evaluation on held-out problems while RL runs; it chooses the best model, so it is not the reported split."""

    every: Positive | None = None  # steps; None: never
    problems: ProblemsConfig | None = None
    num_samples: Positive = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0


class ReportConfig(Section):
    """Held-out evaluation before and after the run, printed as its last line."""

    problems: ProblemsConfig
    num_samples: Annotated[int, Field(ge=8)] = 8  # pass@8 is part of the report
    num_problems: Positive | None = None  # so many of them, evenly spread; None: all
    num_train_problems: Positive = 100


class StopConfig(Section):
    patience: Positive | None = None  # evaluations without a better one before the run ends


class RLConfig(Section):
    stage: Literal["rl"]
    run_dir: str = "runs/coupled_grpo"
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    data: RLData
    sampling: SamplingConfig = SamplingConfig()
    method: MethodConfig = MethodConfig()
    reward: RewardConfig = RewardConfig()
    optim: OptimConfig = OptimConfig()
    train: RLTrain = RLTrain()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    judge: JudgeConfig = JudgeConfig()
    reference: ReferenceConfig = ReferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: RLCheckpoint = RLCheckpoint()
    sandbox: SandboxConfig = SandboxConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig | None = None
    stop: StopConfig = StopConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    ray: RayConfig = RayConfig()

    def check_family(self) -> None:
        """An estimator hides tokens, or not, as the model was trained to see them; denoising is of diffusion models alone."""
        family, estimators = (
            self.model.family,
            sorted(k for k, e in ESTIMATORS.items() if e.family == self.model.family),
        )
        require(
            self.method.estimator in estimators,
            "method.estimator",
            self.method.estimator,
            f"be one for a model of model.family {family}: {', '.join(estimators)}",
        )
        if family == "diffusion":
            return
        params, why = self.sampling.params(), "be left out with model.family causal: it is a short cut of denoising"
        for name in APPROXIMATIONS:
            value = getattr(params, name)
            require(value == getattr(params.exactly(), name), f"sampling.{name}", value, why)
        for field, value in (("method.compat", self.method.compat), ("rollout.compile", self.rollout.compile)):
            require(not value, field, value, "be left out with model.family causal")

    @property
    def tokens_per_group(self) -> int:
        """Positions that a group of the longest prompts has in a forward pass of the sampler."""
        return self.method.group_size * aligned(self.data.max_prompt_tokens + self.sampling.completion_tokens)

    @property
    def max_tokens_per_batch(self) -> int:
        """Of the sampler; a whole group always fits."""
        return max(self.rollout.max_tokens_per_batch, self.tokens_per_group)

    @property
    def groups_in_flight(self) -> int:
        """Per rollout worker: as many as fit into a batch, and one that takes the place of the first to finish."""
        return self.max_tokens_per_batch // self.tokens_per_group + 1

    @property
    def max_logprob_absdiff(self) -> float:
        """Of `sync`, with its default."""
        exact = self.model.dtype == "float32" and self.rollout.dtype in (None, "float32")
        return self.sync.max_logprob_absdiff or (1e-3 if exact else 1.0)

    @property
    def num_reference_workers(self) -> int:
        return self.reference.num_workers if self.method.kl_coef > 0 and self.reference.mode == "actor" else 0

    @property
    def num_gpus(self) -> float:
        return (
            self.rollout.num_workers * self.rollout.gpus_per_worker
            + self.num_reference_workers * self.reference.gpus
            + self.learner.num_ranks * self.learner.gpus_per_rank
        )

    @model_validator(mode="after")
    def check(self):
        prompts, ranks = self.train.prompts_per_step, self.learner.num_ranks
        require(prompts % ranks == 0, "train.prompts_per_step", prompts, f"be a multiple of learner.num_ranks {ranks}")
        require(
            self.model.dtype == "float32" or self.learner.zero_stage >= 1,
            "learner.zero_stage",
            self.learner.zero_stage,
            f"be 1, 2 or 3 with model.dtype {self.model.dtype}: stage 0 would sum gradients in {self.model.dtype}",
        )
        self.check_family()
        require(
            self.sampling.steps <= self.sampling.completion_tokens,
            "sampling.steps",
            self.sampling.steps,
            f"be at most sampling.completion_tokens {self.sampling.completion_tokens}: a step reveals at least one token",
        )
        require(
            self.eval.every is None or self.eval.problems is not None,
            "eval.problems",
            None,
            "be set when eval.every is",
        )
        require(
            self.stop.patience is None or self.eval.every is not None,
            "eval.every",
            None,
            "be set when stop.patience is",
        )
        if self.report is not None:
            reported = self.report.problems
            for field, used in (("data", self.data), ("eval.problems", self.eval.problems)):
                same = used is not None and (used.source, used.path, used.split) == (
                    reported.source,
                    reported.path,
                    reported.split,
                )
                require(
                    not same,
                    "report.problems",
                    reported.split if reported.path is None else reported.path,
                    f"differ from {field}: what is reported must not be trained on or chosen by",
                )
        if self.model.lora is not None:
            require(
                self.model.lora.dropout == 0,
                "model.lora.dropout",
                self.model.lora.dropout,
                "be 0 in RL: old and new scores of a completion would differ by what was dropped",
            )
        if self.reference.mode == "adapter_off":
            require(self.model.lora is not None, "reference.mode", self.reference.mode, "be actor without model.lora")
            require(
                self.method.reference_refresh_steps is None,
                "method.reference_refresh_steps",
                self.method.reference_refresh_steps,
                "be null with reference.mode adapter_off: the base is the reference, and adapters never change it",
            )
        if self.method.compat == "release":
            require(
                self.method.advantage == "leave_one_out",
                "method.advantage",
                self.method.advantage,
                "be leave_one_out with method.compat release",
            )
        return self
