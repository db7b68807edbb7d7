"""Estimators of completion log-probs. Each is a function of a few lines that says which tokens each view hides and
how much a hidden token's log-prob counts; nothing else in the system changes when one is swapped.

To add one: write the function, add its line to ESTIMATORS, name it in the config (`method.estimator`).

An estimator draws the views of ONE group: (generator, G, C, options) -> MaskViews of shape [S, G, C].

What they estimate. With u(t) = E over masks of (1/t) * sum over hidden k of log p(k | shown), the ELBO of log p is the
mean of u over t ~ U[0, 1]. Unbiased, per token and so per sequence:
  monte_carlo          for the mean of u over the configured distribution of t
  coupled_normalized   for (u(1) + that mean) / 2; its pair alone for that mean (refused where the complement 1 - t is
                       not distributed as t, because then it would not be)
Biased on purpose: `full_mask` is u(1), one step that sees nothing of the completion; `coupled` and `decoupled` weigh the
pair twice (u(1)/2 + mean), so that a token weighs 1.5 on average, as the paper prints eq. 13. None is unbiased for the
ELBO, whose t goes from 0 to 1, and none for log p. The ratio exp(new - old) of any of them is a biased estimate of the
ratio of probabilities, as the exponential of an unbiased exponent is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffrl.coupled_grpo import coupled_views
from diffrl.errors import require
from diffrl.types import MaskViews
from diffrl.views import T_DISTRIBUTIONS, StepPlace, ViewOptions, draw_hidden, draw_t

EstimatorFn = Callable[[torch.Generator, int, int, ViewOptions], MaskViews]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """What a line of ESTIMATORS says.

    Estimator(views=full_mask_views, mean_weight=lambda options: 1.0)
    """

    views: EstimatorFn
    mean_weight: Callable[[ViewOptions], float]  # of a token, summed over views, on average over draws
    family: Literal["diffusion", "causal"] = "diffusion"  # causal: scores what it does not hide, left to right

    def __call__(self, generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
        return self.views(generator, group_size, num_tokens, options)


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
    quantile = T_DISTRIBUTIONS[options.t_distribution](torch.linspace(0, 1, 101))
    require(
        torch.allclose(quantile + quantile.flip(0), torch.ones(()), atol=1e-5),
        "t_distribution",
        options.t_distribution,
        "be symmetric for coupled_normalized: a view and its complement need the same distribution of t",
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
    for number in range(options.num_samples):
        t_G1 = draw_t(generator, group_size, options, number=number)
        part_GC = draw_hidden(generator, t_G1, num_tokens, options)
        hidden.append(part_GC)
        weight.append(part_GC / t_G1 / options.num_samples)
    return MaskViews(hidden_SBC=torch.stack(hidden), weight_SBC=torch.stack(weight))


def decoupled_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """The paper's ablation: the same t and 1-t as `coupled`, but independent masks instead of complements."""
    everything_GC = torch.ones(group_size, num_tokens, dtype=torch.bool)
    hidden, weight = [everything_GC], [everything_GC.float()]
    for number in range(options.num_pairs):
        t_G1 = draw_t(generator, group_size, options, number=number)
        for ratio_G1 in (t_G1, 1 - t_G1):
            part_GC = draw_hidden(generator, ratio_G1, num_tokens, options)
            hidden.append(part_GC)
            weight.append(part_GC / ratio_G1)
    return MaskViews(hidden_SBC=torch.stack(hidden), weight_SBC=torch.stack(weight) / (options.num_pairs + 1))


def causal_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """One view, nothing hidden: the exact log-probs of an autoregressive model, which sees what is left of a token."""
    hidden_1GC = torch.zeros(1, group_size, num_tokens, dtype=torch.bool)
    return MaskViews(hidden_SBC=hidden_1GC, weight_SBC=torch.ones(hidden_1GC.shape))


def _of_pairs(options: ViewOptions) -> float:
    return (2 * options.num_pairs + 1) / (options.num_pairs + 1)


ESTIMATORS: Mapping[str, Estimator] = {
    "coupled": Estimator(views=coupled_views, mean_weight=_of_pairs),
    "coupled_normalized": Estimator(views=coupled_normalized_views, mean_weight=lambda options: 1.0),
    "full_mask": Estimator(views=full_mask_views, mean_weight=lambda options: 1.0),
    "monte_carlo": Estimator(views=monte_carlo_views, mean_weight=lambda options: 1.0),
    "decoupled": Estimator(views=decoupled_views, mean_weight=_of_pairs),
    "causal": Estimator(views=causal_views, mean_weight=lambda options: 1.0, family="causal"),
}


def check_estimator(name: str, options: ViewOptions) -> None:
    """ValueError when the estimator refuses the options, or its views are not what its line of ESTIMATORS declares."""
    estimator, rows, tokens, draws = ESTIMATORS[name], 8, 64, 32
    sums = []
    for draw in range(draws):
        place = StepPlace(seed=draw, index=0, size=1)
        views = estimator(torch.Generator().manual_seed(draw), rows, tokens, replace(options, place=place))
        require(
            estimator.family == "causal" or not bool(((views.weight_SBC != 0) & ~views.hidden_SBC).any()),
            "estimator",
            name,
            "score only tokens that its view hides: a diffusion model sees the others",
        )
        sums.append(views.weight_SBC.sum(0).mean())
    mean, declared = torch.stack(sums), estimator.mean_weight(options)
    error = float(mean.std()) / draws**0.5
    require(
        abs(float(mean.mean()) - declared) <= 6 * error + 1e-5,
        "estimator",
        name,
        f"give a token the mean weight {declared:g} that it declares, not {float(mean.mean()):.3g}",
    )


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
