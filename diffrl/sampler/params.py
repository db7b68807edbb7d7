"""How to denoise, and the schedule that follows from it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to denoise. Raises ValueError on values outside their range.

    SamplingParams(algorithm="entropy", steps=256, temperature=1.2, top_p=0.95, top_k=50)
    """

    algorithm: Algorithm = "entropy"  # how positions are chosen
    steps: int
    temperature: float  # 0: the most probable token
    top_p: float | None
    top_k: int | None
    alg_temp: float = 0.0  # above 0: positions drawn from softmax(confidence / alg_temp)
    eps: float = 1e-3  # the last timestep

    def __post_init__(self) -> None:
        checks = {
            "algorithm": (self.algorithm in get_args(Algorithm), f"one of {', '.join(get_args(Algorithm))}"),
            "steps": (self.steps >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "null or in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 1, "null or at least 1"),
            "alg_temp": (self.alg_temp >= 0, "at least 0"),
            "eps": (0 < self.eps < 1, "in (0, 1)"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"sampling.{name}: {getattr(self, name)!r} must be {wanted}")


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
