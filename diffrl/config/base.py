"""What the configs of all stages share: strict sections, the model, the training engine, Ray.

Unknown key = error with a suggestion; defaults = the published recipe (DiffuCoder, arXiv 2506.20639v2, and the release's
files where the paper is silent); a config file says only what differs.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffrl.errors import require, shown

MAX_INT = 2**63 - 1  # of torch, Ray and Parquet


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def check_values(cls, raw: Any) -> Any:
        """What neither torch nor a file system takes."""
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            require_plain(key, value)
            require(not isinstance(value, int) or abs(value) <= MAX_INT, named(key), value, "have at most 64 bits")
        return raw


def named(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() else shown(key)


def require_plain(key: Any, value: Any) -> None:
    for text in (key, value):
        bad = isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
        require(not bad, named(key), text, "hold no null and no surrogate characters")


def plain(labels: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in labels.items():
        require_plain(key, value)
    return labels


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
PLAIN = AfterValidator(plain)  # labels of the nodes to run on, such as {diffrl/group: rollout}


class TinyModel(Section):
    """Sizes of the model that starts from random weights when `model.path` is not set."""

    hidden_size: Annotated[int, Field(ge=1, le=4096)] = 160
    intermediate_size: Annotated[int, Field(ge=1, le=16_384)] = 480
    num_layers: Annotated[int, Field(ge=1, le=64)] = 3
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    vocab_size: Annotated[int, Field(ge=1, le=131_072)] = 1024
    max_length: Annotated[int, Field(ge=1, le=131_072)] = 1024

    @model_validator(mode="after")
    def check(self):
        require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"be a multiple of num_heads {self.num_heads}",
        )
        require(
            self.hidden_size // self.num_heads % 2 == 0,
            "num_heads",
            self.num_heads,
            f"give heads of an even size, which their positions need, not hidden_size {self.hidden_size} / num_heads",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        return self


class LoraConfig(Section):
    """Low-rank adapters, trained instead of the weights: W + alpha / rank * B A (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=8192)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the adapters' input; 0 in RL
    # Linear layers of the blocks by the end of their name, such as q_proj or 0.mlp.up_proj; None: all of them.
    targets: Annotated[Sequence[str], Field(min_length=1)] | None = None
    publish: Literal["merged", "adapter"] = "merged"  # what goes to the workers after every update

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class ModelConfig(Section):
    path: str | None = None  # a Hugging Face folder; without it a tiny model starts from random weights
    known_as: str | None = None  # a name of diffrl/models/sizes.py: for the estimates of a dry run where path is not
    # causal: an autoregressive Qwen2, the baseline; of the stages sft and rl alone, in rl with estimator causal.
    family: Literal["diffusion", "causal"] = "diffusion"
    tiny: TinyModel = TinyModel()
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = None  # None: all weights are trained


class EngineConfig(Section):
    """What DeepSpeed makes of the model and its optimizer."""

    zero_stage: Literal[0, 1, 2, 3] = 0  # what the ranks share: 1 optimizer state, 2 and gradients, 3 and parameters
    offload: Literal["none", "optimizer", "all"] = "none"  # what lives in main memory; all: parameters too
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000  # elements; smaller ones stay whole
    recompute: bool = False  # activations of the layers, in the backward pass: less memory, a third more time
    compile: bool = False  # torch.compile of each layer

    @model_validator(mode="after")
    def check_engine(self):
        require(
            self.offload == "none" or self.zero_stage >= 1,
            "offload",
            self.offload,
            "be none with zero_stage 0: raise zero_stage",
        )
        require(
            self.offload != "all" or self.zero_stage == 3,
            "offload",
            self.offload,
            f"be optimizer or none with zero_stage {self.zero_stage}: parameters are offloaded by zero_stage 3 only",
        )
        require(
            not self.compile or self.zero_stage < 3,
            "compile",
            self.compile,
            "be false with zero_stage 3, whose hooks gather parameters around every layer",
        )
        return self


class CheckpointConfig(Section):
    every: Positive = 500  # steps; the last step always
    keep: Positive = 2  # the newest; of a supervised stage the best beside them


def require_path(source: str, path: str | None, what: str) -> None:
    """Everything but generated data lies somewhere."""
    require(source == "microcode" or path is not None, "path", path, f"name {what} for source {source}")


class ProblemsConfig(Section):
    """Where problems come from. `microcode` is generated; the others are files (diffrl/data/problems.py)."""

    source: Literal["microcode", "mbpp", "humaneval", "acecode", "p3", "stdin", "problems"] = "problems"
    path: str | None = None  # of acecode also a folder, or a data set's name on the hub
    split: Literal["train", "validation", "held_out"] = "train"  # of microcode
    difficulty: Literal["hard", "medium", "easy", "all"] = "hard"  # of acecode
    limit: Positive | None = None
    max_bad_rows: Annotated[int, Field(ge=0)] = 0  # that are left out and listed; with more of them nothing is read
    max_row_mb: Annotated[int, Field(ge=1, le=2048)] = 64  # a larger row is a bad one
    num_prompt_tests: Annotated[int, Field(ge=0, le=1)] = 1  # shown in the prompt and therefore not graded

    @model_validator(mode="after")
    def check(self):
        require_path(self.source, self.path, "a file")
        return self


class RayConfig(Section):
    address: str | None = None  # of a running cluster; None: the job's own, or a new local one
