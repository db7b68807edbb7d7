"""How to denoise, and the schedule that follows from it."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from diffrl.errors import suggestion

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
Cache = Literal["none", "prefix", "dual"]
REVEAL_RULES = ("confidence_threshold", "confidence_factor", "entropy_budget", "tokens_per_step")
APPROXIMATIONS = ("block_size", "cache", "refresh_every", *REVEAL_RULES, "early_end")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to denoise. Raises ValueError on values outside their range.

    SamplingParams(algorithm="entropy", steps=256, temperature=1.2, top_p=0.95, top_k=50)

    The options from `block_size` on are approximations (approximate.py says what each one does); all are off by default.
    """

    algorithm: Algorithm = "entropy"  # how positions are chosen
    steps: int
    temperature: float  # 0: the most probable token
    top_p: float | None
    top_k: int | None
    alg_temp: float = 0.0  # above 0: positions drawn from softmax(confidence / alg_temp)
    eps: float = 1e-3  # the last timestep
    block_size: int | None = None  # positions are revealed block by block
    cache: Cache = "none"  # keys and values of other blocks are computed anew now and then only
    refresh_every: int | None = None  # passes after which a cache is computed anew inside a block
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    entropy_budget: float | None = None  # nats
    tokens_per_step: int | None = None
    early_end: bool = False

    def __post_init__(self) -> None:
        positive = "null or above 0"
        checks = {
            "algorithm": (
                self.algorithm in get_args(Algorithm),
                f"one of {', '.join(get_args(Algorithm))}{suggestion(str(self.algorithm), get_args(Algorithm))}",
            ),
            "steps": (self.steps >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "null or in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 1, "null or at least 1"),
            "alg_temp": (self.alg_temp >= 0, "at least 0"),
            "eps": (0 < self.eps < 1, "in (0, 1)"),
            "block_size": (self.block_size is None or self.block_size >= 1, "null or at least 1"),
            "cache": (self.cache in get_args(Cache), f"one of {', '.join(get_args(Cache))}"),
            "refresh_every": (self.refresh_every is None or self.refresh_every >= 1, "null or at least 1"),
            "confidence_threshold": (
                self.confidence_threshold is None or 0 < self.confidence_threshold <= 1,
                "null or in (0, 1]",
            ),
            "confidence_factor": (self.confidence_factor is None or self.confidence_factor > 0, positive),
            "entropy_budget": (self.entropy_budget is None or self.entropy_budget > 0, positive),
            "tokens_per_step": (self.tokens_per_step is None or self.tokens_per_step >= 1, "null or at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"sampling.{name}: {getattr(self, name)!r} must be {wanted}")
        if self.cache != "none" and self.block_size is None:
            raise ValueError(f"sampling.cache: {self.cache!r} needs sampling.block_size, such as 32")
        if self.refresh_every is not None and self.cache == "none":
            raise ValueError(f"sampling.refresh_every: {self.refresh_every} needs sampling.cache: prefix or dual")
        rules = [name for name in REVEAL_RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(
                f"sampling.{rules[1]}: {getattr(self, rules[1])!r} set together with sampling.{rules[0]}; give one of them"
            )
        if rules and self.algorithm == "origin":
            raise ValueError(
                f"sampling.{rules[0]}: {getattr(self, rules[0])!r} needs another algorithm than origin, which reveals at "
                "random; use entropy"
            )

    @property
    def rule(self) -> str | None:
        """The option that says how many positions a pass reveals; None: the schedule does."""
        return next((name for name in REVEAL_RULES if getattr(self, name) is not None), None)

    @property
    def is_exact(self) -> bool:
        return self == self.exactly()

    def exactly(self) -> "SamplingParams":
        """The same without approximations."""
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in APPROXIMATIONS})


def reveal_fractions(steps: int, eps: float) -> Tensor:
    """Share of the hidden positions that each step reveals: 1 - s/t in float32; 1 at the last step."""
    timesteps = torch.linspace(1, eps, steps + 1)
    fractions = 1 - timesteps[1:] / timesteps[:-1]
    fractions[-1] = 1
    return fractions


@lru_cache(maxsize=256)
def reveal_counts(num_tokens: int, steps: int, eps: float) -> tuple[int, ...]:
    """Positions of a row that each step reveals: floor(hidden * (1 - s/t)) in float32; at the last, all."""
    hidden, counts = num_tokens, []
    for fraction in reveal_fractions(steps, eps):
        counts.append(int(torch.tensor(float(hidden)) * fraction))
        hidden -= counts[-1]
    return tuple(counts)
