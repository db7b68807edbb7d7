"""Random numbers of mask views: how much of a completion is hidden (t) and what. Estimators are made of these two draws.

Shapes: G rollouts of one prompt, C completion tokens, R = G, or 1 where a group shares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffrl.seeds import derive_seed

# Where t lies between t_min and t_max for a uniform u: the inverse of its distribution function.
T_DISTRIBUTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "triangular": lambda u: torch.where(u < 0.5, (u / 2).sqrt(), 1 - ((1 - u) / 2).sqrt()),  # most often in the middle
    "cosine": lambda u: torch.cos((1 - u) * torch.pi / 2),  # mostly hidden: MaskGIT's schedule, arXiv 2202.04200
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlace:
    """A group among those of its step, for what a whole step shares. StepPlace(seed=8812..., index=3, size=8)"""

    seed: int  # the same for all groups of the step
    index: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """Knobs of an estimator. The defaults are the published recipe."""

    num_pairs: int = 1  # lambda of eq. 13
    num_samples: int = 2  # K of `monte_carlo`
    t_min: float = 0.2
    t_max: float = 0.8
    t_distribution: str = "uniform"
    share_t: Literal["row", "group", "batch"] = "group"
    stratify_t: bool = False  # True: the t of a step lie evenly between t_min and t_max, shifted by one random number
    share_masks: bool = False  # True: all siblings of a group are masked alike (common random numbers)
    place: StepPlace = StepPlace(seed=0, index=0, size=1)


def draw_t(generator: torch.Generator, num_rows: int, options: ViewOptions, *, number: int = 0) -> Tensor:
    """Mask ratios t between t_min and t_max, shape [G, 1]; one value in all rows when shared. `number` counts the
    draws of an estimator, so that those of a whole step differ too."""
    rows, place = num_rows if options.share_t == "row" else 1, options.place
    if options.share_t == "batch" or options.stratify_t:
        u = torch.rand((), generator=torch.Generator().manual_seed(derive_seed(place.seed, number)))
        strata = place.index + torch.arange(rows) / rows if options.stratify_t else torch.zeros(rows)
        u_R1 = ((u + strata / place.size) % 1)[:, None]
    else:
        u_R1 = torch.rand(rows, 1, generator=generator)
    t_R1 = options.t_min + (options.t_max - options.t_min) * T_DISTRIBUTIONS[options.t_distribution](u_R1)
    return t_R1.expand(num_rows, 1)


def draw_hidden(generator: torch.Generator, t_G1: Tensor, num_tokens: int, options: ViewOptions) -> Tensor:
    """Forward process, eq. 1: every completion token is hidden independently with probability t. Bool [G, C]."""
    rows = 1 if options.share_masks else t_G1.shape[0]
    return torch.rand(rows, num_tokens, generator=generator) < t_G1
