"""The forward process and the loss, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from diffrl.diffusion import NoisedBatch, diffusion_loss, draw_mask_ratios, forward_process

MASK = 3


class FixedLogits(nn.Module):
    """Gives every position the same distribution and records what it was shown."""

    def __init__(self, probs: list[float]):
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(probs).log())

    def forward(self, ids_BL, attention_mask_BL, select_BL):
        self.seen = ids_BL
        return self.logits_V.expand(int(select_BL.sum()), -1)


def test_loss_by_hand():
    ids = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    hidden = torch.tensor([[False, True, True, False], [False, False, True, True]])
    weight = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.5]])
    noised = NoisedBatch(noised_ids_BL=ids.masked_fill(hidden, MASK), hidden_BL=hidden, t_B=torch.tensor([0.5, 0.25]))
    model = FixedLogits([0.5, 0.25, 0.125, 0.125])
    loss, metrics = diffusion_loss(model, ids, torch.ones_like(hidden), weight, noised)
    # row 0: tokens 1 and 2 (2 + 3 bits) at 1/t = 2; row 1: two tokens 0 (1 bit), weights 1 and 0.5, at 1/t = 4
    bits = 2 * (2 + 3) + 4 * (1 + 0.5 * 1)
    assert loss.item() == pytest.approx(bits * math.log(2) / 5.5, rel=1e-6)
    assert metrics["loss/nll"] == pytest.approx((2 + 3 + 1.5) * math.log(2) / 3.5, rel=1e-6)
    assert metrics["loss/accuracy"] == pytest.approx(1.5 / 3.5)
    assert torch.equal(model.seen, torch.tensor([[0, 3, 3, 1], [2, 2, 3, 3]]))
    loss.backward()
    assert model.logits_V.grad is not None and model.logits_V.grad.abs().sum() > 0


def test_the_expected_loss_is_the_mean_nll_whatever_the_ratio():
    """1/t undoes that only a share t of the tokens is hidden."""
    ids = torch.zeros(20_000, 4, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    t = draw_mask_ratios(len(ids), generator, t_min=0.05)
    noised = forward_process(ids, torch.ones_like(ids, dtype=torch.bool), t, mask_token_id=MASK, generator=generator)
    loss, _ = diffusion_loss(
        FixedLogits([0.25, 0.25, 0.25, 0.25]), ids, torch.ones_like(ids), torch.ones(ids.shape), noised
    )
    assert loss.item() == pytest.approx(math.log(4), rel=0.02)


def test_forward_process_hides_a_share_t_of_what_may_be_hidden_and_nothing_else():
    ids = torch.arange(3).repeat(4, 4000)
    maskable = torch.arange(12_000).expand(4, -1) >= 2000
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    noised = forward_process(ids, maskable, t, mask_token_id=9, generator=torch.Generator().manual_seed(1))
    assert not noised.hidden_BL[:, :2000].any()
    assert noised.hidden_BL[:, 2000:].float().mean(1) == pytest.approx(t, abs=0.015)
    assert noised.hidden_BL[3, 2000:].all()
    assert torch.equal(noised.noised_ids_BL == 9, noised.hidden_BL)
    assert torch.equal(noised.noised_ids_BL[~noised.hidden_BL], ids[~noised.hidden_BL])


def test_ratios_are_spread_evenly_and_repeat_with_the_generator():
    t = draw_mask_ratios(8, torch.Generator().manual_seed(4), t_min=0.2)
    assert torch.equal(t, draw_mask_ratios(8, torch.Generator().manual_seed(4), t_min=0.2))
    assert t.min() >= 0.2 and t.max() <= 1.0
    gaps = t.sort().values.diff()
    assert gaps == pytest.approx(torch.full((7,), 0.1), abs=1e-5)  # (1 - 0.2) / 8
    assert not torch.equal(t, t.sort(descending=True).values)
