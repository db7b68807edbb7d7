"""Coupled-GRPO, the whole method: views -> advantages -> loss. Equation numbers are those of arXiv 2506.20639v2.

Reading order: `views.py` (t and masks), `coupled_views` (which tokens are hidden when a completion is scored, eq. 13),
`scoring.py` (views to log-probs), `ADVANTAGES` (eq. 2 and its leave-one-out form), `coupled_grpo_loss` (eq. 4).

Departures from the paper's text and from the released code:
- the minus that eq. 13's text leaves out is here: estimates are log-probs, not losses;
- masks are exact complements: the paper's strict inequalities leave ties in neither view;
- t is drawn per group (or per row), never once for everything a process happens to score;
- the loss is divided by the token count of the step's whole batch, not of the micro-batch;
- samples whose program could not be judged leave the baseline and the loss.
`method.compat: release` restores what the release computes, for parity tests only.

Shapes: G rollouts of one prompt, B rollouts (siblings adjacent), C completion tokens, S views.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffrl.types import MaskViews
from diffrl.views import ViewOptions, draw_hidden, draw_t


def coupled_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """Eq. 13: 1/(lambda+1) * [ sum over pairs (L_t + L_(1-t)) + L_T ], L_t = (1/t) * log-prob of what t hides.

    Views: everything hidden, then a random part and exactly the rest of it for every pair. Each token is hidden
    once in each pair, so no token is ever left without gradient.
    """
    everything_GC = torch.ones(group_size, num_tokens, dtype=torch.bool)
    hidden, weight = [everything_GC], [everything_GC.float()]
    for number in range(options.num_pairs):
        t_G1 = draw_t(generator, group_size, options, number=number)
        part_GC = draw_hidden(generator, t_G1, num_tokens, options)
        hidden += [part_GC, ~part_GC]
        weight += [part_GC / t_G1, ~part_GC / (1 - t_G1)]
    return MaskViews(hidden_SBC=torch.stack(hidden), weight_SBC=torch.stack(weight) / (options.num_pairs + 1))


def group_mean_advantages(rewards_B: Tensor, valid_B: Tensor, group_size: int) -> Tensor:
    """Advantage = reward - mean of the group (eq. 2 without the division by the standard deviation).

    Samples that could not be judged are not part of the mean and get 0; so does a group with fewer than two
    valid samples.
    """
    return _center(rewards_B, valid_B, group_size, leave_one_out=False)


def leave_one_out_advantages(rewards_B: Tensor, valid_B: Tensor, group_size: int) -> Tensor:
    """Advantage = reward - mean of the OTHER valid samples of the group (RLOO; the release's choice)."""
    return _center(rewards_B, valid_B, group_size, leave_one_out=True)


def _center(rewards_B: Tensor, valid_B: Tensor, group_size: int, *, leave_one_out: bool) -> Tensor:
    valid_NG = valid_B.reshape(-1, group_size)
    rewards_NG = rewards_B.reshape(-1, group_size).masked_fill(~valid_NG, 0.0)
    count_N1 = valid_NG.sum(1, keepdim=True)
    centered_NG = rewards_NG - rewards_NG.sum(1, keepdim=True) / count_N1.clamp(min=1)
    if leave_one_out:  # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
        centered_NG = centered_NG * count_N1 / (count_N1 - 1).clamp(min=1)
    return centered_NG.masked_fill(~valid_NG | (count_N1 < 2), 0.0).reshape(-1)


def scale_by_std(advantages_B: Tensor, rewards_B: Tensor, valid_B: Tensor, group_size: int) -> Tensor:
    """Advantage / (standard deviation of the group's valid rewards + 1e-4), as GRPO has it (arXiv 2402.03300, eq. 3; the
    deviation is that of a sample, n - 1 in the denominator). It makes hard and easy problems count more (Dr. GRPO, arXiv
    2503.20783), so the headline recipe is without it."""
    valid_NG = valid_B.reshape(-1, group_size)
    rewards_NG = rewards_B.reshape(-1, group_size)
    count_N1 = valid_NG.sum(1, keepdim=True)
    mean_N1 = rewards_NG.masked_fill(~valid_NG, 0.0).sum(1, keepdim=True) / count_N1.clamp(min=1)
    squares_NG = (rewards_NG - mean_N1).masked_fill(~valid_NG, 0.0) ** 2
    std_N1 = (squares_NG.sum(1, keepdim=True) / (count_N1 - 1).clamp(min=1)).sqrt()
    return (advantages_B.reshape(-1, group_size) / (std_N1 + 1e-4)).reshape(-1)


AdvantageFn = Callable[[Tensor, Tensor, int], Tensor]
ADVANTAGES: Mapping[str, AdvantageFn] = {"group_mean": group_mean_advantages, "leave_one_out": leave_one_out_advantages}


def usable_samples(rewards_B: Tensor, valid_B: Tensor, group_size: int, *, drop_equal_groups: bool) -> Tensor:
    """Which samples enter the loss, bool [B]: judged, in a group with at least two judged samples, and, when
    `drop_equal_groups`, in one whose rewards differ. The others get loss mask 0; no shape ever changes."""
    valid_NG = valid_B.reshape(-1, group_size)
    rewards_NG = rewards_B.reshape(-1, group_size)
    keep_N1 = valid_NG.sum(1, keepdim=True) >= 2
    if drop_equal_groups:
        low = rewards_NG.masked_fill(~valid_NG, torch.inf).amin(1, keepdim=True)
        high = rewards_NG.masked_fill(~valid_NG, -torch.inf).amax(1, keepdim=True)
        keep_N1 &= high > low
    return (valid_NG & keep_N1).reshape(-1)


def coupled_grpo_loss(
    logprobs_BC: Tensor,
    old_logprobs_BC: Tensor,
    ref_logprobs_BC: Tensor | None,
    advantages_B: Tensor,
    loss_mask_BC: Tensor,
    *,
    num_loss_tokens: int,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4: clipped surrogate on the token ratio, minus beta times the k3 KL to the reference.

    `num_loss_tokens` counts the step's whole batch; the losses (and metrics) of its micro-batches add up to the
    loss (and metrics) of the step. Gradient flows through `logprobs_BC` alone.
    """

    # Left-out tokens count as unchanged, so that whatever their log-probs are cannot reach a sum or a gradient.
    def kept(x_BC: Tensor) -> Tensor:
        return x_BC.masked_fill(~loss_mask_BC, 0.0)

    log_ratio_BC = kept(logprobs_BC - old_logprobs_BC.detach())
    if ref_logprobs_BC is None:
        kl_BC = torch.zeros_like(log_ratio_BC)
    else:  # k3 of Schulman, "Approximating KL divergence" (2020): exp(d) - d - 1 with d = ref - new
        delta_BC = kept(ref_logprobs_BC.detach() - logprobs_BC)
        kl_BC = torch.exp(delta_BC) - delta_BC - 1

    def mean(x_BC: Tensor) -> Tensor:
        return kept(x_BC).sum() / num_loss_tokens

    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped_surrogate(log_ratio_BC, kl_BC, advantages_B.detach()[:, None], mean, kl_coef=kl_coef, **clip)


def clipped_surrogate(
    log_ratio: Tensor,
    kl: Tensor,
    advantages: Tensor,
    mean: Callable[[Tensor], Tensor],
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -min(ratio * advantage, clipped ratio * advantage) + kl_coef * KL, and what is reported of it; of tokens or
    of whole completions, whatever `mean` takes."""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy, penalty = mean(-torch.minimum(ratio * advantages, clipped * advantages)), mean(kl)
    loss = policy + kl_coef * penalty
    with torch.no_grad():
        metrics = {
            "loss/total": loss.detach(),
            "loss/policy": policy.detach(),
            "loss/kl": penalty.detach(),
            "loss/ratio_mean": mean(ratio),
            "loss/clip_low_frac": mean(((ratio < 1 - clip_low) & (advantages < 0)).float()),
            "loss/clip_high_frac": mean(((ratio > 1 + clip_high) & (advantages > 0)).float()),
        }
    return loss, metrics
