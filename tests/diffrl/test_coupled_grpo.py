"""The method by hand: which tokens are hidden, how much they count, advantages, the clipped loss and its gradient."""

import math
from typing import Any

import pytest
import torch

from diffrl.coupled_grpo import (
    ADVANTAGES,
    coupled_grpo_loss,
    coupled_views,
    group_mean_advantages,
    leave_one_out_advantages,
    scale_by_std,
    usable_samples,
)
from diffrl.estimators import decoupled_views, draw_views
from diffrl.types import MaskViews
from diffrl.views import ViewOptions, draw_hidden, draw_t

LN2 = math.log(2)
CLIP: dict[str, Any] = {"clip_low": 0.5, "clip_high": 0.5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def t_of(views: MaskViews, pair: int = 0) -> torch.Tensor:
    """The mask ratio of every row, read back from the weights of a pair (the part's; without one, the rest's): [G]."""
    scale = (views.weight_SBC.shape[0] - 1) / 2 + 1
    part_GC, rest_GC = views.weight_SBC[1 + 2 * pair] * scale, views.weight_SBC[2 + 2 * pair] * scale
    part_G, rest_G = part_GC.amax(1), rest_GC.amax(1)
    return torch.where(part_G > 0, 1 / part_G, 1 - 1 / rest_G)


# Views


@pytest.mark.parametrize("share_masks", [False, True])
@pytest.mark.parametrize("share_t", ["row", "group"])
@pytest.mark.parametrize("num_pairs", [1, 3])
def test_every_token_is_hidden_once_in_every_pair(num_pairs, share_t, share_masks):
    options = ViewOptions(num_pairs=num_pairs, share_t=share_t, share_masks=share_masks)
    views = coupled_views(generator(3), 6, 201, options)
    assert views.hidden_SBC.dtype == torch.bool and views.hidden_SBC.shape == (1 + 2 * num_pairs, 6, 201)
    assert views.hidden_SBC[0].all()
    for pair in range(num_pairs):
        part_GC, rest_GC = views.hidden_SBC[1 + 2 * pair], views.hidden_SBC[2 + 2 * pair]
        assert torch.equal(part_GC, ~rest_GC)
        assert part_GC.any() and rest_GC.any()
    if num_pairs > 1:
        assert not torch.equal(views.hidden_SBC[1], views.hidden_SBC[3])


def test_ties_are_in_exactly_one_view(monkeypatch):
    """The release compares with < and >: a draw equal to t is then hidden in neither."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    views = coupled_views(generator(), 2, 5, ViewOptions())  # t = 0.5 and every draw = 0.5
    assert torch.equal(views.hidden_SBC.sum(0), torch.full((2, 5), 2))


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_weights_of_eq_13(num_pairs):
    options = ViewOptions(num_pairs=num_pairs, share_t="row")
    views = coupled_views(generator(5), 4, 64, options)
    first = generator(5)
    for pair in range(num_pairs):
        t_G1 = 0.2 + 0.6 * torch.rand(4, 1, generator=first)
        part_GC = torch.rand(4, 64, generator=first) < t_G1
        assert torch.equal(views.hidden_SBC[1 + 2 * pair], part_GC)
        zero = torch.zeros(4, 64)
        expected = torch.where(part_GC, 1 / ((num_pairs + 1) * t_G1), zero)
        assert torch.allclose(views.weight_SBC[1 + 2 * pair], expected, rtol=1e-6)
        expected = torch.where(~part_GC, 1 / ((num_pairs + 1) * (1 - t_G1)), zero)
        assert torch.allclose(views.weight_SBC[2 + 2 * pair], expected, rtol=1e-6)
    assert torch.equal(views.weight_SBC[0], torch.full((4, 64), 1 / (num_pairs + 1)))


def test_a_million_pairs_cover_every_token_exactly_once():
    views = coupled_views(generator(12), 1_000_000, 8, ViewOptions(share_t="row"))
    everything, part, rest = views.hidden_SBC
    assert everything.all() and bool((part ^ rest).all())
    assert torch.equal(views.weight_SBC > 0, views.hidden_SBC)


def test_weights_at_a_known_t():
    """t = 1/4: {1/2, 1/(2t) = 2, 1/(2(1-t)) = 2/3}."""
    views = coupled_views(generator(1), 1, 100, ViewOptions(t_min=0.25, t_max=0.25))
    part = views.hidden_SBC[1]
    assert 10 < part.sum() < 40
    assert set(views.weight_SBC[0].flatten().tolist()) == {0.5}
    assert torch.allclose(views.weight_SBC[1], part * 2.0) and torch.allclose(views.weight_SBC[2], ~part * (2 / 3))


def test_coverage_of_the_pair_against_the_decoupled_one():
    """Sums of weights per token, the fully hidden view left out. Exact values: with t ~ U[0.2, 0.8],
    E[1/(4t(1-t))] - 1 = 2 ln 4 / 0.6 / 4 - 1 = 0.1552 coupled; (E[1/t] - 1) / 2 = 0.6552 decoupled;
    E[t(1-t)] = 0.22 of the tokens in neither decoupled view."""
    options = ViewOptions(share_t="row")
    coupled = coupled_views(generator(11), 20_000, 32, options).weight_SBC[1:].sum(0)
    assert coupled.mean().item() == pytest.approx(1.0, abs=0.003)
    assert coupled.var().item() == pytest.approx(0.155, abs=0.004)
    assert coupled.var().item() == pytest.approx(2 * math.log(4) / 0.6 / 4 - 1, abs=0.004)
    assert 2.49 < coupled.max().item() <= 2.5 + 1e-6
    assert coupled.min().item() >= 1 / 1.6 - 1e-6  # 1/(2 * 0.8): no token is silent
    decoupled = decoupled_views(generator(11), 20_000, 32, options).weight_SBC[1:].sum(0)
    assert decoupled.mean().item() == pytest.approx(1.0, abs=0.005)
    assert decoupled.var().item() == pytest.approx(0.654, abs=0.01)
    assert (decoupled == 0).float().mean().item() == pytest.approx(0.22, abs=0.003)


def test_share_t():
    shared = coupled_views(generator(2), 8, 300, ViewOptions(share_t="group"))
    assert torch.allclose(t_of(shared), t_of(shared)[0].expand(8), atol=1e-6)
    assert len({tuple(row.tolist()) for row in shared.hidden_SBC[1]}) == 8  # masks are still private
    private = coupled_views(generator(2), 8, 300, ViewOptions(share_t="row"))
    assert len({round(t, 5) for t in t_of(private).tolist()}) == 8
    assert ((t_of(private) >= 0.2) & (t_of(private) <= 0.8)).all()


def test_every_pair_draws_its_own_t():
    views = coupled_views(generator(2), 2, 300, ViewOptions(num_pairs=2))
    assert abs(t_of(views, 0)[0] - t_of(views, 1)[0]) > 1e-3


def test_share_masks():
    views = coupled_views(generator(4), 8, 300, ViewOptions(share_masks=True))
    assert (views.hidden_SBC == views.hidden_SBC[:, :1]).all() and (views.weight_SBC == views.weight_SBC[:, :1]).all()
    mixed = coupled_views(generator(4), 8, 300, ViewOptions(share_masks=True, share_t="row"))
    order = t_of(mixed).argsort()
    nested = mixed.hidden_SBC[1][order]  # one random row for all: a larger t hides a superset
    assert (nested[1:] | ~nested[:-1]).all() and nested[-1].sum() > nested[0].sum()


def test_t_is_uniform_and_hiding_follows_it():
    options = ViewOptions(share_t="row")
    t = draw_t(generator(6), 50_000, options)
    assert t.shape == (50_000, 1)
    assert t.mean().item() == pytest.approx(0.5, abs=0.003)
    assert t.var().item() == pytest.approx(0.6**2 / 12, abs=0.0005)
    assert t.min() >= 0.2 and t.max() <= 0.8
    hidden = draw_hidden(generator(7), torch.tensor([[0.2], [0.7]]), 50_000, options)
    assert hidden.float().mean(1).tolist() == pytest.approx([0.2, 0.7], abs=0.008)


def test_same_seed_same_views_and_no_global_generator():
    state = torch.get_rng_state()
    first = coupled_views(generator(9), 4, 50, ViewOptions(num_pairs=2))
    torch.rand(7)  # whatever others draw
    second = coupled_views(generator(9), 4, 50, ViewOptions(num_pairs=2))
    assert torch.equal(first.hidden_SBC, second.hidden_SBC) and torch.equal(first.weight_SBC, second.weight_SBC)
    other = coupled_views(generator(10), 4, 50, ViewOptions(num_pairs=2))
    assert not torch.equal(first.hidden_SBC, other.hidden_SBC)
    torch.set_rng_state(state)
    coupled_views(generator(9), 4, 50, ViewOptions())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_groups_views_do_not_depend_on_its_neighbours():
    def draw(*seeds: int) -> MaskViews:
        return draw_views(coupled_views, seeds=list(seeds), group_size=3, num_tokens=40, options=ViewOptions())

    together, alone = draw(5, 71, 9), draw(71)
    assert together.hidden_SBC.shape == (3, 9, 40)
    assert torch.equal(together.hidden_SBC[:, 3:6], alone.hidden_SBC)
    assert torch.equal(together.weight_SBC[:, 3:6], alone.weight_SBC)
    swapped = draw(9, 71, 5)
    assert torch.equal(together.hidden_SBC[:, :3], swapped.hidden_SBC[:, 6:])
    assert not torch.equal(together.hidden_SBC[:, :3], together.hidden_SBC[:, 6:])


# Advantages


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    valid = torch.ones(8, dtype=torch.bool)
    assert group_mean_advantages(rewards, valid, 4).tolist() == [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    # 1 - (2+3+6)/3, 2 - (1+3+6)/3, 3 - (1+2+6)/3, 6 - (1+2+3)/3
    expected = [-8 / 3, -4 / 3, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    assert leave_one_out_advantages(rewards, valid, 4).tolist() == pytest.approx(expected, abs=1e-6)
    assert set(ADVANTAGES) == {"group_mean", "leave_one_out"}


@pytest.mark.parametrize("unjudged", [0.0, 99.0, math.nan])
def test_unjudged_samples_leave_the_baseline(unjudged):
    rewards = torch.tensor([1.0, unjudged, 3.0, 5.0])
    valid = torch.tensor([True, False, True, True])
    assert group_mean_advantages(rewards, valid, 4).tolist() == [-2.0, 0.0, 0.0, 2.0]
    assert leave_one_out_advantages(rewards, valid, 4).tolist() == [-3.0, 0.0, 0.0, 3.0]


def test_groups_with_fewer_than_two_valid_samples_have_no_advantage():
    rewards = torch.tensor([4.0, 1.0, 4.0, 1.0, 4.0, 1.0])
    valid = torch.tensor([True, False, False, False, True, True])
    for advantage in ADVANTAGES.values():
        assert advantage(rewards, valid, 2)[:4].tolist() == [0.0] * 4
    assert group_mean_advantages(rewards, valid, 2)[4:].tolist() == [1.5, -1.5]
    assert leave_one_out_advantages(rewards, valid, 2)[4:].tolist() == [3.0, -3.0]


def test_advantages_sum_to_zero_and_do_not_see_other_groups():
    rewards = torch.rand(12, generator=generator(1))
    valid = torch.rand(12, generator=generator(2)) < 0.8
    for advantage in ADVANTAGES.values():
        whole = advantage(rewards, valid, 4)
        assert whole.reshape(3, 4).sum(1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
        parts = [advantage(rewards[i : i + 4], valid[i : i + 4], 4) for i in (0, 4, 8)]
        assert torch.equal(whole, torch.cat(parts))


def test_scaling_by_the_standard_deviation():
    """1, 2, 3, 6: mean 3, deviation sqrt((4 + 1 + 0 + 9) / 3); the unjudged one leaves 2 and 6, deviation sqrt(8)."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 2.0, 6.0, math.nan, 9.0, 5.0, 5.0, 5.0, 5.0])
    valid = torch.tensor([True] * 6 + [False] * 2 + [True] * 4)
    scaled = scale_by_std(group_mean_advantages(rewards, valid, 4), rewards, valid, 4)
    first, second = math.sqrt(14 / 3) + 1e-4, math.sqrt(8) + 1e-4
    expected = [-2 / first, -1 / first, 0.0, 3 / first, -2 / second, 2 / second, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scaled.tolist() == pytest.approx(expected, rel=1e-6)


def test_usable_samples():
    #                       one equal pair  one valid  differs       differs only by the unjudged one
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 3.0, 0.0, 2.0, 4.0, 2.0, 2.0, math.nan])
    valid = torch.tensor([True, True, True, True, False, False, True, True, True, True, True, False])
    keep = usable_samples(rewards, valid, 3, drop_equal_groups=False)
    assert keep.tolist() == [True, True, True, False, False, False, True, True, True, True, True, False]
    drop = usable_samples(rewards, valid, 3, drop_equal_groups=True)
    assert drop.tolist() == [False, False, False, False, False, False, True, True, True, False, False, False]


# Loss


def by_hand() -> dict[str, Any]:
    """Two completions with ratios 2, 1/4 and 6/5, advantages +1 and -1; the loss mask leaves out their fourth token."""
    ratio = torch.tensor([[2.0, 0.25, 1.2, 50.0], [2.0, 0.25, 1.2, 50.0]])
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-0.3, -4.0, -2.5, -1.0]])
    new = old + ratio.log()
    ref = new + torch.tensor([[LN2], [-LN2]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    return {
        "logprobs_BC": new.requires_grad_(),
        "old_logprobs_BC": old,
        "ref_logprobs_BC": ref.detach(),
        "advantages_B": torch.tensor([1.0, -1.0]),
        "loss_mask_BC": mask,
    }


def test_loss_by_hand():
    """Surrogate, advantage +1: -(min(2, 1.5) + 0.25 + 1.2) = -2.95; advantage -1: 2 + max(0.25, 0.5) + 1.2 = 3.7; over
    six tokens 0.125. k3: e^d - d - 1 is 1 - ln 2 at d = ln 2 and ln 2 - 1/2 at d = -ln 2; their mean is 1/4."""
    loss, metrics = coupled_grpo_loss(**by_hand(), num_loss_tokens=6, **CLIP, kl_coef=0.01)
    assert loss.item() == pytest.approx(0.125 + 0.01 * 0.25, abs=1e-6)
    expected = {
        "loss/total": 0.1275,
        "loss/policy": 0.125,
        "loss/kl": 0.25,
        "loss/ratio_mean": (2 + 0.25 + 1.2) / 3,
        "loss/clip_low_frac": 1 / 6,
        "loss/clip_high_frac": 1 / 6,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert not any(v.requires_grad for v in metrics.values())


def test_gradient_by_hand():
    """d(-r A)/dnew = -r A where not clipped, 0 where clipped; d k3/dnew = 1 - e^d: -1 and 1/2."""
    data = by_hand()
    loss, _ = coupled_grpo_loss(**data, num_loss_tokens=6, **CLIP, kl_coef=0.01)
    loss.backward()
    policy = torch.tensor([[0.0, -0.25, -1.2, 0.0], [2.0, 0.0, 1.2, 0.0]])
    kl = torch.tensor([[-1.0, -1.0, -1.0, 0.0], [0.5, 0.5, 0.5, 0.0]])
    assert torch.allclose(data["logprobs_BC"].grad, (policy + 0.01 * kl) / 6, atol=1e-6)


def test_clip_bounds_are_two_numbers():
    data = by_hand()
    loss, metrics = coupled_grpo_loss(**data, num_loss_tokens=6, clip_low=0.1, clip_high=3.0, kl_coef=0.0)
    # nothing reaches 4 from below; 1/4 is raised to 0.9 for the negative advantage
    assert loss.item() == pytest.approx((-(2 + 0.25 + 1.2) + (2 + 0.9 + 1.2)) / 6, abs=1e-6)
    assert (metrics["loss/clip_low_frac"].item(), metrics["loss/clip_high_frac"].item()) == pytest.approx((1 / 6, 0.0))


def test_without_reference_there_is_no_kl():
    data = by_hand() | {"ref_logprobs_BC": None}
    loss, metrics = coupled_grpo_loss(**data, num_loss_tokens=6, **CLIP, kl_coef=0.5)
    assert loss.item() == pytest.approx(0.125, abs=1e-6) and metrics["loss/kl"].item() == 0.0


def test_masked_tokens_and_the_divisor():
    data = by_hand()
    expected, _ = coupled_grpo_loss(**data, num_loss_tokens=6, **CLIP, kl_coef=0.01)
    moved = data["logprobs_BC"].detach().clone()
    moved[:, 3] += 4.0
    loss, _ = coupled_grpo_loss(**data | {"logprobs_BC": moved}, num_loss_tokens=6, **CLIP, kl_coef=0.01)
    assert loss.item() == expected.item()
    halved, _ = coupled_grpo_loss(**data, num_loss_tokens=12, **CLIP, kl_coef=0.01)
    assert halved.item() == pytest.approx(expected.item() / 2)


def random_step(num_rows: int = 12, num_tokens: int = 9) -> dict[str, Any]:
    g = generator(8)
    lengths = torch.randint(1, num_tokens + 1, (num_rows, 1), generator=g)
    old = -3 * torch.rand(num_rows, num_tokens, generator=g)
    return {
        "logprobs_BC": old + torch.randn(num_rows, num_tokens, generator=g),
        "old_logprobs_BC": old,
        "ref_logprobs_BC": old + 0.3 * torch.randn(num_rows, num_tokens, generator=g),
        "advantages_B": torch.randn(num_rows, generator=g),
        "loss_mask_BC": torch.arange(num_tokens) < lengths,
    }


def test_micro_batches_add_up_to_the_step():
    """One divisor, the step's token count: loss, metrics and gradient of the parts sum to the whole's."""
    step = random_step()
    count = int(step["loss_mask_BC"].sum())
    whole_logprobs = step["logprobs_BC"].clone().requires_grad_()
    loss, metrics = coupled_grpo_loss(
        **step | {"logprobs_BC": whole_logprobs}, num_loss_tokens=count, **CLIP, kl_coef=0.01
    )
    loss.backward()
    parts_logprobs = step["logprobs_BC"].clone().requires_grad_()
    losses, part_metrics = [], []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 12)):  # of unequal size and unequal token counts
        part = {k: v[rows] for k, v in step.items()} | {"logprobs_BC": parts_logprobs[rows]}
        part_loss, m = coupled_grpo_loss(**part, num_loss_tokens=count, **CLIP, kl_coef=0.01)
        part_loss.backward()
        losses.append(part_loss.item())
        part_metrics.append(m)
    assert sum(losses) == pytest.approx(loss.item(), abs=1e-6)
    for key, value in metrics.items():
        assert sum(m[key].item() for m in part_metrics) == pytest.approx(value.item(), abs=1e-6), key
    assert whole_logprobs.grad is not None and parts_logprobs.grad is not None
    assert torch.allclose(parts_logprobs.grad, whole_logprobs.grad, atol=1e-8)


def test_loss_against_a_loop_over_tokens():
    step = random_step()
    total = 0.0
    for row in range(12):
        advantage = step["advantages_B"][row].item()
        for column in range(9):
            if not step["loss_mask_BC"][row, column]:
                continue
            new, old, ref = (step[f"{k}logprobs_BC"][row, column].item() for k in ("", "old_", "ref_"))
            ratio = math.exp(new - old)
            total -= min(ratio * advantage, min(max(ratio, 0.5), 1.5) * advantage)
            total += 0.04 * (math.exp(ref - new) - (ref - new) - 1)
    count = int(step["loss_mask_BC"].sum())
    loss, _ = coupled_grpo_loss(**step, num_loss_tokens=count, **CLIP, kl_coef=0.04)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_gradient_flows_through_the_new_logprobs_alone():
    data = by_hand()
    others = [data["old_logprobs_BC"], data["ref_logprobs_BC"], data["advantages_B"]]
    for tensor in others:
        tensor.requires_grad_()
    loss, _ = coupled_grpo_loss(**data, num_loss_tokens=6, **CLIP, kl_coef=0.01)
    loss.backward()
    assert data["logprobs_BC"].grad is not None
    assert all(tensor.grad is None for tensor in others)


def test_first_step():
    """New = old = reference: ratio 1, KL 0, loss = -mean advantage, yet a gradient of -advantage / count per token."""
    step = random_step()
    new = step["logprobs_BC"].requires_grad_()
    same = {"logprobs_BC": new, "old_logprobs_BC": new, "ref_logprobs_BC": new}  # not even detached
    count = int(step["loss_mask_BC"].sum())
    loss, metrics = coupled_grpo_loss(**step | same, num_loss_tokens=count, **CLIP, kl_coef=0.01)
    loss.backward()
    per_token = step["advantages_B"][:, None] * step["loss_mask_BC"] / count
    assert loss.item() == pytest.approx(-per_token.sum().item(), abs=1e-6)
    assert metrics["loss/ratio_mean"].item() == pytest.approx(1.0, abs=1e-6)
    assert metrics["loss/kl"].item() == 0.0
    assert metrics["loss/clip_low_frac"].item() == metrics["loss/clip_high_frac"].item() == 0.0
    assert new.grad is not None and torch.allclose(new.grad, -per_token, atol=1e-8)
