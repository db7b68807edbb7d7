"""From log-probs to a loss: what is a ratio of, and what is divided by. OBJECTIVES names them for `method.objective`.

To add one: write the function (an `ObjectiveFn`), add its line to OBJECTIVES. The learner calls it on each micro-batch;
the parts must add up to the loss of the step, so divide by the counts that are given, which are those of the whole step.

Shapes: B rollouts, C completion tokens.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrl.coupled_grpo import clipped_surrogate, coupled_grpo_loss


class ObjectiveFn(Protocol):
    """(loss, metrics) of a micro-batch. Gradient flows through `logprobs_BC` alone; metrics add up like the loss."""

    def __call__(
        self,
        logprobs_BC: Tensor,
        old_logprobs_BC: Tensor,
        ref_logprobs_BC: Tensor | None,
        advantages_B: Tensor,
        loss_mask_BC: Tensor,
        *,
        num_loss_tokens: int,
        num_loss_rows: int,
        clip_low: float,
        clip_high: float,
        kl_coef: float,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def token_objective(*scores: Any, num_loss_rows: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4 of DiffuCoder: a ratio for every token, the mean over tokens."""
    return coupled_grpo_loss(*scores, **options)


def sequence_objective(
    logprobs_BC: Tensor,
    old_logprobs_BC: Tensor,
    ref_logprobs_BC: Tensor | None,
    advantages_B: Tensor,
    loss_mask_BC: Tensor,
    *,
    num_loss_tokens: int,
    num_loss_rows: int,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A completion is one action: ratio exp((ELBO_new - ELBO_old) / its length), clipped, the mean over completions.

    ESPO (arXiv 2512.03759), which is GSPO (arXiv 2507.18071) with an ELBO in the place of the log-probability. The
    ELBO is the sum of the estimator's token log-probs, so `monte_carlo` and `coupled_normalized` are the natural ones.
    The penalty is k2 of Schulman (2020) on the whole sequence, d^2 / 2 with d = ELBO_new - ELBO_ref, divided by the
    length: that keeps `kl_coef` in the units of the token objective and is our choice. Ratios of means of many tokens
    stay near 1: GSPO clips at 3e-4 and 4e-4 where token ratios are clipped at 0.2.
    """

    def total(x_BC: Tensor) -> Tensor:
        return x_BC.masked_fill(~loss_mask_BC, 0.0).sum(1)

    length_B = loss_mask_BC.sum(1)
    used_B, length_B = length_B > 0, length_B.clamp(min=1)
    log_ratio_B = total(logprobs_BC - old_logprobs_BC.detach()) / length_B
    kl_B = torch.zeros_like(log_ratio_B)
    if ref_logprobs_BC is not None:
        kl_B = total(logprobs_BC - ref_logprobs_BC.detach()) ** 2 / (2 * length_B)

    def mean(x_B: Tensor) -> Tensor:
        return x_B.masked_fill(~used_B, 0.0).sum() / num_loss_rows

    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped_surrogate(log_ratio_B, kl_B, advantages_B.detach(), mean, kl_coef=kl_coef, **clip)


OBJECTIVES: Mapping[str, ObjectiveFn] = {"token": token_objective, "sequence": sequence_objective}
