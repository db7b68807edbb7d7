"""The config of `diffrl curate`: which problems, which models solve them how often, and what becomes of that."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffrl.config.base import PLAIN, Fraction, Positive, ProblemsConfig, RayConfig, Seconds, Section
from diffrl.config.rl import SandboxConfig
from diffrl.errors import require
from diffrl.sampler import SamplingParams

ModelName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]  # a folder's name and `model_name` of samples
Percentile = Annotated[float, Field(ge=0, le=100)]
FOLDER, SERVER = ("diffusion", "transformers", "vllm"), ("openai",)
SAMPLED_BY = ("backend", "model", "temperature", "top_p", "top_k", "max_tokens", "algorithm", "steps", "dtype")


class CurateModel(Section):
    """One model and how it is sampled. Backends: `diffusion` (our sampler, in rollout workers), `transformers` (an
    autoregressive model in this process, for small ones), `vllm` (the same in Ray actors), `openai` (a server that speaks
    OpenAI's chat completions)."""

    backend: Literal["diffusion", "transformers", "openai", "vllm"]
    path: str | None = None  # a Hugging Face folder; not of openai
    url: str | None = None  # openai: such as http://localhost:8000/v1
    model: str | None = None  # openai: the name under which the server knows it
    api_key_env: str | None = None  # openai: the environment variable that holds the key
    num_samples: Positive = 16  # of each problem
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Positive | None = None
    max_tokens: Positive = 512  # of a completion; diffusion: the whole window
    algorithm: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"  # diffusion
    steps: Positive | None = None  # diffusion; None: as many as max_tokens
    dtype: Literal["float32", "bfloat16"] | None = None  # None: that of the weights
    # How fast. Nothing of this changes what is sampled.
    batch_size: Positive = 32  # transformers: rows
    concurrency: Positive = 8  # openai, vllm, diffusion: requests at a time, of each worker
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # openai; None: as fast as it answers
    max_retries: Annotated[int, Field(ge=0)] = 6  # openai: of a request that was refused for now, or had no answer
    timeout_s: Seconds = 600.0  # openai: of a request
    num_workers: Positive = 1  # diffusion, vllm: Ray actors
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[Mapping[str, str], PLAIN] = {}  # such as {diffrl/group: rollout}
    threads: Positive = 1  # of torch, in each process that samples
    max_tokens_per_batch: Positive = 16_384  # diffusion: rows x width of a forward pass
    tensor_parallel: Positive = 1  # vllm: GPUs of each worker that share the model

    @model_validator(mode="after")
    def check(self):
        server = self.backend in SERVER
        require(
            server or self.path is not None, "path", self.path, f"name a model's folder with backend {self.backend}"
        )
        require(not server or self.path is None, "path", self.path, "be left out with backend openai, which has a url")
        for field in ("url", "model"):
            value = getattr(self, field)
            require(not server or value is not None, field, value, "be given with backend openai")
            require(server or value is None, field, value, f"be left out with backend {self.backend}: it is of openai")
        require(
            self.url is None or self.url.startswith(("http://", "https://")),
            "url",
            self.url,
            "begin with http:// or https://",
        )
        require(
            self.temperature > 0 or self.num_samples == 1,
            "num_samples",
            self.num_samples,
            "be 1 with temperature 0, where all samples are the same",
        )
        steps = self.steps or 1
        require(steps <= self.max_tokens, "steps", self.steps, f"be at most max_tokens {self.max_tokens}")
        return self

    def params(self) -> SamplingParams:
        """Of diffusion."""
        return SamplingParams(
            algorithm=self.algorithm,
            steps=self.steps or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class CurateSplit(Section):
    """How problems become hard, medium and easy ones, by the pass rates of their samples.

    quantiles: of the set, as the release splits AceCode (diffrl/data/acecode.py); a problem may be in two splits.
    thresholds: hard from hard_min to hard_max, easy from easy_min on, medium between them.
    """

    by: Literal["quantiles", "thresholds"] = "quantiles"
    models: Sequence[str] | None = None  # whose samples count; None: all
    hard: Percentile = 20.0
    hard_std: Percentile = (
        40.0  # the standard deviation of a hard problem's samples is at least that of this percentile
    )
    medium_low: Percentile = 25.0
    easy: Percentile = 75.0
    hard_min: Fraction = 0.0  # above 0: what nobody solves is left out
    hard_max: Fraction = 0.25
    easy_min: Fraction = 0.75

    @model_validator(mode="after")
    def check(self):
        require(self.hard_min <= self.hard_max, "hard_min", self.hard_min, f"be at most hard_max {self.hard_max:g}")
        require(self.hard_max <= self.easy_min, "hard_max", self.hard_max, f"be at most easy_min {self.easy_min:g}")
        require(self.medium_low <= self.easy, "medium_low", self.medium_low, f"be at most easy {self.easy:g}")
        return self


class CurateSft(Section):
    """The best samples as instruction data."""

    min_pass_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    per_problem: Positive = 1  # at most; different ones, the best and of these the shortest first


class CurateConfig(Section):
    out: str  # folder
    seed: Annotated[int, Field(ge=0)] = 0
    data: ProblemsConfig
    models: Annotated[Mapping[ModelName, CurateModel], Field(min_length=1)]
    split: CurateSplit = CurateSplit()
    sft: CurateSft = CurateSft()
    sandbox: SandboxConfig = SandboxConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def check(self):
        for name in self.split.models or ():
            require(name in self.models, "split.models", name, f"be one of {', '.join(self.models)}")
        require(self.split.models != [], "split.models", [], "name at least one model; null: all")
        return self
