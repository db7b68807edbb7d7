"""Objectives by hand, and that the parts of a step add up to it."""

import math
from typing import Any

import pytest
import torch

from diffrl.objectives import OBJECTIVES, sequence_objective

CLIP: dict[str, Any] = {"clip_low": 0.5, "clip_high": 0.5}


def test_sequence_objective_by_hand():
    """Lengths 2 and 4, mean log-ratios ln 2 and -ln 4: ratios 2 and 1/4, clipped at 1.5 and 0.5. Advantage +1 takes
    min(2, 1.5), -1 takes -max(1/4, 1/2): loss (-1.5 + 0.5) / 2. d = 3 and -2 nats: k2 9/4 and 4/8, mean 1.375."""
    new = torch.zeros(3, 4).requires_grad_()
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    log_ratio = torch.tensor([[0.0, 2 * math.log(2), 9.0, 9.0], [-math.log(4)] * 4, [math.nan] * 4])
    ref = torch.tensor([[-1.0, -2.0, 9.0, 9.0], [0.5] * 4, [math.nan] * 4])
    loss, metrics = sequence_objective(
        new,
        -log_ratio,
        ref,
        torch.tensor([1.0, -1.0, 5.0]),
        mask,
        num_loss_tokens=6,
        num_loss_rows=2,
        kl_coef=0.1,
        **CLIP,
    )
    assert loss.item() == pytest.approx(-0.5 + 0.1 * 1.375)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {
            "loss/total": -0.5 + 0.1375,
            "loss/policy": -0.5,
            "loss/kl": 1.375,
            "loss/ratio_mean": (2 + 0.25) / 2,
            "loss/clip_low_frac": 0.5,
            "loss/clip_high_frac": 0.5,
        }
    )
    (grad,) = torch.autograd.grad(loss, new)
    # Both ratios are clipped, so only the penalty pulls: kl_coef * d / length / rows on every token that counts.
    assert grad.tolist() == pytest.approx(torch.tensor([[0.075, 0.075, 0, 0], [-0.025] * 4, [0.0] * 4]), abs=1e-7)


def test_sequence_gradient_inside_the_clip_is_the_advantage_over_the_length():
    new = torch.zeros(2, 4).requires_grad_()
    mask = torch.arange(4) < torch.tensor([[2], [4]])
    loss, _ = sequence_objective(
        new,
        torch.zeros(2, 4),
        None,
        torch.tensor([1.0, -3.0]),
        mask,
        num_loss_tokens=6,
        num_loss_rows=2,
        kl_coef=0.1,
        **CLIP,
    )
    (grad,) = torch.autograd.grad(loss, new)
    assert torch.allclose(grad, torch.tensor([[-0.25, -0.25, 0, 0], [0.375] * 4]))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_micro_batches_add_up(name):
    generator = torch.Generator().manual_seed(3)
    new, old, ref = (-3 * torch.rand(6, 5, generator=generator) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 4, 1, 3])[:, None]
    advantages = torch.randn(6, generator=generator)

    def part(rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return OBJECTIVES[name](
            new[rows],
            old[rows],
            ref[rows],
            advantages[rows],
            mask[rows],
            num_loss_tokens=15,
            num_loss_rows=5,
            kl_coef=0.05,
            **CLIP,
        )

    loss, metrics = part(slice(0, 6))
    parts = [part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 6))]
    assert sum(p[0] for p in parts).item() == pytest.approx(loss.item(), rel=1e-5)
    for key, value in metrics.items():
        assert sum(p[1][key] for p in parts).item() == pytest.approx(value.item(), rel=1e-5), key
