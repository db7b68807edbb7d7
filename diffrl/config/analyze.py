"""The config of `diffrl analyze`: what is sampled of each model, and how. Every key has a default but `problems`, which a run's
stored rollouts do without."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from diffrl.config.base import PLAIN, Positive, ProblemsConfig, RayConfig, Section
from diffrl.config.pipeline import EvaluationConfig, ExactSampling
from diffrl.config.rl import SandboxConfig
from diffrl.errors import require

Temperature = Annotated[float, Field(gt=0)]  # at 0 all samples of a problem would be the same


class MathConfig(Section):
    """Questions with a number as answer, in GSM8K's format."""

    path: str
    limit: Positive | None = None


class AnalyzeConfig(Section):
    out: str = "runs/analysis"  # folder; one that holds an analysis is moved aside
    seed: Annotated[int, Field(ge=0)] = 0
    problems: ProblemsConfig | None = None  # for models
    math: MathConfig | None = None  # to compare code with; None: there is no such comparison
    num_samples: Annotated[int, Field(ge=2)] = 8  # of each problem, at each temperature and number of steps
    pass_k: Annotated[Sequence[Positive], Field(min_length=1)] = [1, 2, 4, 8]
    max_k: Positive = 8  # AR-ness@1 to @max_k
    sampling: ExactSampling = ExactSampling()  # steps: what "full" means
    temperature: Temperature = 0.2  # of all but the sweep
    temperatures: Annotated[Sequence[Temperature], Field(min_length=1)] = [0.2, 0.6, 1.2]
    speedups: Annotated[Sequence[Positive], Field(min_length=1)] = [2, 4]  # full steps are divided by these
    num_looks: Positive = 3  # first steps at which confidence is looked at
    groups_per_step: Positive = 16  # of a run's stored rollouts, evenly spaced
    num_workers: Annotated[int, Field(ge=0)] = 0  # Ray tasks that share the problems; 0: in the command's own process
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: rollout}
    threads: Positive = 1  # of torch, in each
    max_tokens_per_batch: Positive = 16_384  # rows x width of a forward pass
    sandbox: SandboxConfig = SandboxConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def check(self):
        steps, window = self.sampling.steps, self.sampling.completion_tokens
        require(
            max(self.pass_k) <= self.num_samples,
            "pass_k",
            max(self.pass_k),
            f"be at most num_samples {self.num_samples}",
        )
        require(steps <= window, "sampling.steps", steps, f"be at most sampling.completion_tokens {window}")
        require(self.max_k < window, "max_k", self.max_k, f"be below sampling.completion_tokens {window}")
        require(max(self.speedups) <= steps, "speedups", max(self.speedups), f"be at most sampling.steps {steps}")
        require(2 in self.speedups, "speedups", list(self.speedups), "hold 2: claims are about half the steps")
        return self

    def settings(self) -> list[tuple[float, int]]:
        """(temperature, steps) of all that is sampled of a model, full steps at the main temperature first."""
        full = self.sampling.steps
        speeds = [(self.temperature, full // divisor) for divisor in (1, *sorted(self.speedups))]
        return list(dict.fromkeys([*speeds, *((temperature, full) for temperature in sorted(self.temperatures))]))

    def at(self, temperature: float, steps: int) -> EvaluationConfig:
        """One of these settings, as an evaluation."""
        assert self.problems is not None
        return EvaluationConfig(
            problems=self.problems,
            num_samples=self.num_samples,
            temperature=temperature,
            sampling=self.sampling.model_copy(update={"steps": steps}),
            seed=self.seed,
            num_workers=self.num_workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            labels=self.labels,
            threads=self.threads,
            max_tokens_per_batch=self.max_tokens_per_batch,
            sandbox=self.sandbox,
        )
