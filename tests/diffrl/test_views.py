"""How much is hidden: the distributions of t, and what a step shares."""

from dataclasses import replace

import pytest
import torch

from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.views import T_DISTRIBUTIONS, StepPlace, ViewOptions, draw_t


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ratios_of_a_step(options: ViewOptions, *, groups: int, rows: int, seed: int = 5, number: int = 0) -> torch.Tensor:
    """[groups, rows]: what draw_t gives to each group of a step."""
    places = [StepPlace(seed=seed, index=index, size=groups) for index in range(groups)]
    return torch.stack(
        [draw_t(generator(i), rows, replace(options, place=p), number=number)[:, 0] for i, p in enumerate(places)]
    )


@pytest.mark.parametrize(
    ("name", "mean", "below_half"),
    [("uniform", 0.5, 0.5), ("triangular", 0.5, 0.5), ("cosine", 2 / torch.pi, 1 / 3)],
)
def test_distributions_of_t(name, mean, below_half):
    """Means and shares by integration: the cosine is below 1/2 for u < 1/3, its mean is 2 / pi."""
    options = ViewOptions(t_min=1e-9, t_max=1 - 1e-9, t_distribution=name, share_t="row")
    t = draw_t(generator(1), 100_000, options)
    assert t.mean().item() == pytest.approx(mean, abs=0.005)
    assert (t < 0.5).float().mean().item() == pytest.approx(below_half, abs=0.006)
    if name == "triangular":  # variance 1/24, of the uniform one 1/12
        assert t.var().item() == pytest.approx(1 / 24, abs=0.001)


@pytest.mark.parametrize("name", sorted(T_DISTRIBUTIONS))
def test_t_stays_within_its_range(name):
    t = draw_t(generator(2), 10_000, ViewOptions(t_min=0.3, t_max=0.6, t_distribution=name, share_t="row"))
    assert t.min() >= 0.3 and t.max() <= 0.6 and t.std() > 0.05


def test_a_step_may_share_one_t():
    options = ViewOptions(share_t="batch")
    t = ratios_of_a_step(options, groups=4, rows=3)
    assert (t == t[0, 0]).all()
    assert not torch.equal(t, ratios_of_a_step(options, groups=4, rows=3, number=1))  # another pair, another t
    assert not torch.equal(t, ratios_of_a_step(options, groups=4, rows=3, seed=6))
    spread = torch.cat([ratios_of_a_step(options, groups=1, rows=1, seed=seed) for seed in range(4000)])
    assert spread.mean().item() == pytest.approx(0.5, abs=0.01)


def test_masks_differ_although_t_is_shared():
    options = [replace(ViewOptions(share_t="batch"), place=StepPlace(seed=1, index=i, size=2)) for i in range(2)]
    first, second = (
        draw_views(ESTIMATORS["coupled"], seeds=[i], group_size=2, num_tokens=50, options=o)
        for i, o in enumerate(options)
    )
    assert torch.equal(first.weight_SBC.amax((1, 2)), second.weight_SBC.amax((1, 2)))
    assert not torch.equal(first.hidden_SBC, second.hidden_SBC)


@pytest.mark.parametrize("share_t", ["group", "row"])
def test_stratified_ratios_lie_evenly(share_t):
    """One in each of the equal parts of the range, although every single one is uniform over all of it."""
    options = ViewOptions(share_t=share_t, stratify_t=True)
    t = ratios_of_a_step(options, groups=5, rows=4)
    values = t.unique()
    count = 20 if share_t == "row" else 5
    assert len(values) == count
    assert torch.allclose(values.diff(), torch.full((count - 1,), 0.6 / count), atol=1e-6)
    first = torch.stack([ratios_of_a_step(options, groups=5, rows=4, seed=seed)[0, 0] for seed in range(4000)])
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)
    assert first.var().item() == pytest.approx(0.6**2 / 12, abs=0.002)
