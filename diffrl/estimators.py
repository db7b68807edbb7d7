"""Estimators of completion log-probs. Each is a function of a few lines that says which tokens each view hides and
how much a hidden token's log-prob counts; nothing else in the system changes when one is swapped.

To add one: write the function, add its line to ESTIMATORS, name it in the config (`method.estimator`).

An estimator draws the views of ONE group: (generator, G, C, options) -> MaskViews of shape [S, G, C].
"""

from collections.abc import Callable, Mapping

import torch

from diffrl.coupled_grpo import ViewOptions, coupled_views, draw_hidden, draw_t
from diffrl.errors import require
from diffrl.types import MaskViews

EstimatorFn = Callable[[torch.Generator, int, int, ViewOptions], MaskViews]


def coupled_normalized_views(
    generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions
) -> MaskViews:
    """The coupled pair halved as in the paper's appendix A.4: {1/2, 1/(4t), 1/(4(1-t))} for one pair, expected weight 1.

    The pair is unbiased for the mean over t ~ U[t_min, t_max] of the ELBO integrand: not for the full ELBO, not for log p.
    """
    require(
        abs(options.t_min + options.t_max - 1) <= 1e-6,
        "t_min",
        options.t_min,
        f"be 1 - t_max {options.t_max} for coupled_normalized: "
        "a view and its complement need the same distribution of t",
    )
    views = coupled_views(generator, group_size, num_tokens, options)
    scale = torch.full_like(views.weight_SBC, 0.5)
    scale[0] = 1.0
    return MaskViews(hidden_SBC=views.hidden_SBC, weight_SBC=views.weight_SBC * scale)


def full_mask_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """One view, everything hidden (the one-step estimate of diffu-GRPO, arXiv 2504.12216). Draws nothing."""
    hidden_1GC = torch.ones(1, group_size, num_tokens, dtype=torch.bool)
    return MaskViews(hidden_SBC=hidden_1GC, weight_SBC=hidden_1GC.float())


def monte_carlo_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """K independent masks, each weighted 1/(K t): plain Monte-Carlo of the ELBO integrand. Some tokens stay unscored."""
    hidden, weight = [], []
    for _ in range(options.num_samples):
        t_G1 = draw_t(generator, group_size, options)
        part_GC = draw_hidden(generator, t_G1, num_tokens, options)
        hidden.append(part_GC)
        weight.append(part_GC / t_G1 / options.num_samples)
    return MaskViews(hidden_SBC=torch.stack(hidden), weight_SBC=torch.stack(weight))


def decoupled_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """The paper's ablation: the same t and 1-t as `coupled`, but independent masks instead of complements."""
    everything_GC = torch.ones(group_size, num_tokens, dtype=torch.bool)
    hidden, weight = [everything_GC], [everything_GC.float()]
    for _ in range(options.num_pairs):
        t_G1 = draw_t(generator, group_size, options)
        for ratio_G1 in (t_G1, 1 - t_G1):
            part_GC = draw_hidden(generator, ratio_G1, num_tokens, options)
            hidden.append(part_GC)
            weight.append(part_GC / ratio_G1)
    return MaskViews(hidden_SBC=torch.stack(hidden), weight_SBC=torch.stack(weight) / (options.num_pairs + 1))


ESTIMATORS: Mapping[str, EstimatorFn] = {
    "coupled": coupled_views,
    "coupled_normalized": coupled_normalized_views,
    "full_mask": full_mask_views,
    "monte_carlo": monte_carlo_views,
    "decoupled": decoupled_views,
}


def draw_views(
    estimator: EstimatorFn,
    *,
    seeds: list[int],
    group_size: int,
    num_tokens: int,
    options: ViewOptions,
) -> MaskViews:
    """Views of several groups side by side, [S, B, C]: one private generator per group, so that a group's views do not
    depend on the groups beside it."""
    groups = [estimator(torch.Generator().manual_seed(seed), group_size, num_tokens, options) for seed in seeds]
    return MaskViews(
        hidden_SBC=torch.cat([g.hidden_SBC for g in groups], dim=1),
        weight_SBC=torch.cat([g.weight_SBC for g in groups], dim=1),
    )
