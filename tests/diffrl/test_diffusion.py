"""The forward process and the loss, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from diffrl.diffusion import batch_loss, draw_mask_ratios, forward_process, noised_rows

MASK = 3


class FixedProbabilities(nn.Module):
    """Gives every position the same distribution and records what it was shown."""

    def __init__(self, probs: list[float]):
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(probs).log())

    def forward(self, ids_BL, document_BL, select_BL, position_N, token_N, *, opened_LL):
        self.seen, self.selected, self.opened = ids_BL, select_BL, opened_LL
        assert torch.equal(position_N, torch.arange(int(select_BL.sum())))
        return self.logits_V.log_softmax(-1)[token_N]


IDS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
HIDDEN = torch.tensor([[False, True, True, False], [False, False, True, True]])
WEIGHT = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.5]])


def by_hand():
    return noised_rows(
        IDS, torch.ones_like(IDS), WEIGHT, HIDDEN, torch.tensor([0.5, 0.25]), mask_token_id=MASK, opened_LL=None
    )


def test_loss_by_hand():
    model = FixedProbabilities([0.5, 0.25, 0.125, 0.125])
    loss, metrics = batch_loss(model, by_hand())
    # row 0: tokens 1 and 2 (2 + 3 bits) at 1/t = 2; row 1: two tokens 0 (1 bit), weights 1 and 0.5, at 1/t = 4
    bits = 2 * (2 + 3) + 4 * (1 + 0.5 * 1)
    assert loss.item() == pytest.approx(bits * math.log(2) / 5.5, rel=1e-6)
    assert metrics["loss/diffusion"] == pytest.approx(loss.item())
    assert metrics["loss/nll"] == pytest.approx((2 + 3 + 1.5) * math.log(2) / 3.5, rel=1e-6)
    assert metrics["loss/hidden_frac"] == pytest.approx(3.5 / 5.5)
    assert metrics["data/tokens"] == 8
    assert torch.equal(model.seen, torch.tensor([[0, 3, 3, 1], [2, 2, 3, 3]]))
    loss.backward()
    assert model.logits_V.grad is not None and model.logits_V.grad.abs().sum() > 0


def test_shares_keep_the_sums_of_the_whole():
    model = FixedProbabilities([0.5, 0.25, 0.125, 0.125])
    first, second = by_hand().take(slice(0, 1)), by_hand().take(slice(1, 2))
    assert first.num_weight == second.num_weight == 5.5 and first.hidden_weight == 3.5
    loss, metrics = batch_loss(model, first)
    assert loss.item() == pytest.approx(2 * 5 * math.log(2) / 5.5, rel=1e-6)
    assert metrics["loss/nll"] == pytest.approx(5 * math.log(2) / 3.5, rel=1e-6)
    loss, metrics = batch_loss(model, second)
    assert loss.item() == pytest.approx(4 * 1.5 * math.log(2) / 5.5, rel=1e-6)
    assert metrics["loss/hidden_frac"] == pytest.approx(1.5 / 5.5) and metrics["data/tokens"] == 4


def test_tokens_without_weight_do_not_go_through_the_head():
    weight = WEIGHT.clone()
    weight[1, 3] = 0.0
    model = FixedProbabilities([0.25] * 4)
    ones = torch.ones_like(IDS)
    loss, _ = batch_loss(model, noised_rows(IDS, ones, weight, HIDDEN, torch.tensor([0.5, 0.25]), mask_token_id=MASK))
    assert model.selected.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert model.seen[1, 3] == MASK  # hidden all the same
    assert loss.item() == pytest.approx((2 * 2 + 4 * 1) * math.log(4) / 5, rel=1e-6)


def test_the_expected_loss_is_the_mean_nll_whatever_the_ratio():
    """1/t undoes that only a share t of the tokens is hidden."""
    ids = torch.zeros(20_000, 4, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    t = draw_mask_ratios(len(ids), generator, t_min=0.05)
    hidden = forward_process(torch.ones_like(ids, dtype=torch.bool), t, generator)
    ones = torch.ones_like(ids)
    loss, _ = batch_loss(
        FixedProbabilities([0.25] * 4), noised_rows(ids, ones, ones.float(), hidden, t, mask_token_id=MASK)
    )
    assert loss.item() == pytest.approx(math.log(4), rel=0.02)


def test_forward_process_hides_a_share_t_of_what_may_be_hidden_and_nothing_else():
    ids = torch.arange(3).repeat(4, 4000)
    maskable = torch.arange(12_000).expand(4, -1) >= 2000
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    hidden = forward_process(maskable, t, torch.Generator().manual_seed(1))
    assert not hidden[:, :2000].any()
    assert hidden[:, 2000:].float().mean(1) == pytest.approx(t, abs=0.015)
    assert hidden[3, 2000:].all()
    noised = noised_rows(ids, torch.ones_like(ids), maskable.float(), hidden, t, mask_token_id=9)
    assert torch.equal(noised.noised_ids_BL == 9, hidden)
    assert torch.equal(noised.noised_ids_BL[~hidden], ids[~hidden])
    assert torch.equal(noised.weight_BL, hidden / t[:, None]) and noised.num_weight == 40_000


def test_ratios_are_spread_evenly_and_repeat_with_the_generator():
    t = draw_mask_ratios(8, torch.Generator().manual_seed(4), t_min=0.2)
    assert torch.equal(t, draw_mask_ratios(8, torch.Generator().manual_seed(4), t_min=0.2))
    assert t.min() >= 0.2 and t.max() <= 1.0
    gaps = t.sort().values.diff()
    assert gaps == pytest.approx(torch.full((7,), 0.1), abs=1e-5)  # (1 - 0.2) / 8
    assert not torch.equal(t, t.sort(descending=True).values)
