"""The config of `diffrl pipeline`: the stages in their order, the folder they run in, how each one's model is evaluated."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffrl.config.base import PLAIN, Positive, ProblemsConfig, RayConfig, Section
from diffrl.config.rl import SandboxConfig
from diffrl.errors import require
from diffrl.sampler import SamplingParams

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # a folder's name and part of a key


class StageEntry(Section):
    config: str  # YAML file of the stage, relative to the pipeline's
    overrides: Mapping[
        str, Any
    ] = {}  # keys and sections of that file; the command line's stages.NAME.KEY=VALUE go here


class ExactSampling(Section):
    """Denoising without approximations; Dream's names."""

    algorithm: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    completion_tokens: Positive = 256
    steps: Positive = 256
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    top_k: Positive | None = None
    alg_temp: Annotated[float, Field(ge=0)] = 0.0


class EvaluationConfig(Section):
    """Held-out problems, sampled with the model that a stage exported and judged in the sandbox."""

    problems: ProblemsConfig
    num_samples: Positive = 1  # of each problem; pass@1 and pass@num_samples are told
    temperature: Annotated[float, Field(ge=0)] = 0.0
    sampling: ExactSampling = ExactSampling()
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Sequence[str] | None = None  # whose models are evaluated; None: all
    num_workers: Annotated[int, Field(ge=0)] = 0  # Ray tasks that share the problems; 0: in the pipeline's own process
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: rollout}
    threads: Positive = 1  # of torch, in each
    max_tokens_per_batch: Positive = 16_384  # rows x width of a forward pass
    sandbox: SandboxConfig = SandboxConfig()

    @model_validator(mode="after")
    def check(self):
        require(
            self.temperature > 0 or self.num_samples == 1,
            "num_samples",
            self.num_samples,
            "be 1 with temperature 0, where all samples are the same",
        )
        require(
            self.sampling.steps <= self.sampling.completion_tokens,
            "sampling.steps",
            self.sampling.steps,
            f"be at most sampling.completion_tokens {self.sampling.completion_tokens}: a step reveals at least one token",
        )
        return self

    def params(self) -> SamplingParams:
        options = self.sampling.model_dump(exclude={"completion_tokens"})
        return SamplingParams(**options, temperature=self.temperature)

    def result_keys(self) -> dict[str, Any]:
        """What the result depends on, beside the model and the problems' contents."""
        names = {"problems", "num_samples", "temperature", "sampling", "seed"}
        return self.model_dump(mode="json", include=names)


class PipelineConfig(Section):
    run_dir: str  # each stage runs in a folder of it, of the stage's name
    ray: RayConfig = RayConfig()
    stages: Annotated[Mapping[StageName, StageEntry], Field(min_length=1)]
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def check(self):
        for name in (self.evaluation and self.evaluation.stages) or ():
            require(name in self.stages, "evaluation.stages", name, f"be one of {', '.join(self.stages)}")
        return self
