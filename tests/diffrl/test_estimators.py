"""Estimators: what they hide, weigh and are unbiased for; and that a new one is a function and a line."""

import math

import pytest
import torch
from torch import nn

from diffrl.config import RLConfig
from diffrl.config_file import validate
from diffrl.errors import ConfigError
from diffrl.estimators import ESTIMATORS, Estimator, check_estimator, coupled_normalized_views, draw_views
from diffrl.scoring import completion_logprobs
from diffrl.types import MaskViews, ScoringBatch
from diffrl.views import ViewOptions

PER_ROW = ViewOptions(share_t="row")
DIFFUSION = sorted(name for name, estimator in ESTIMATORS.items() if estimator.family == "diffusion")


def views_of(name: str, rows: int, tokens: int, options: ViewOptions = PER_ROW, seed: int = 0) -> MaskViews:
    return ESTIMATORS[name](torch.Generator().manual_seed(seed), rows, tokens, options)


@pytest.mark.parametrize("options", [ViewOptions(), ViewOptions(num_pairs=3, num_samples=5, share_t="row")])
@pytest.mark.parametrize("name", DIFFUSION)
def test_only_hidden_tokens_weigh_and_all_of_them_do(name, options):
    views = views_of(name, 6, 50, options)
    assert views.hidden_SBC.dtype == torch.bool and views.weight_SBC.dtype == torch.float32
    assert torch.equal(views.weight_SBC > 0, views.hidden_SBC)
    again = views_of(name, 6, 50, options)
    assert torch.equal(views.weight_SBC, again.weight_SBC)
    num_views = {"full_mask": 1, "monte_carlo": options.num_samples}.get(name, 1 + 2 * options.num_pairs)
    assert views.hidden_SBC.shape == (num_views, 6, 50)


@pytest.mark.parametrize(
    ("name", "mean", "tolerance"),
    [
        ("coupled", 1.5, 0.005),
        ("coupled_normalized", 1.0, 0.005),
        ("decoupled", 1.5, 0.01),
        ("monte_carlo", 1.0, 0.01),
        ("full_mask", 1.0, 1e-7),
    ],
)
def test_expected_weight(name, mean, tolerance):
    weight_BC = views_of(name, 10_000, 30).weight_SBC.sum(0)
    assert weight_BC.mean().item() == pytest.approx(mean, abs=tolerance)
    assert ESTIMATORS[name].mean_weight(PER_ROW) == mean


@pytest.mark.parametrize(("num_pairs", "mean"), [(1, 1.5), (2, 5 / 3), (4, 1.8)])
def test_expected_weight_with_several_pairs(num_pairs, mean):
    """(2 lambda + 1) / (lambda + 1): not 1, as eq. 13 is printed."""
    weight_BC = views_of("coupled", 5_000, 30, ViewOptions(num_pairs=num_pairs, share_t="row")).weight_SBC.sum(0)
    assert weight_BC.mean().item() == pytest.approx(mean, abs=0.01)
    normalized = views_of("coupled_normalized", 5_000, 30, ViewOptions(num_pairs=num_pairs, share_t="row"))
    assert normalized.weight_SBC.sum(0).mean().item() == pytest.approx(1.0, abs=0.01)


def test_normalized_weights_by_hand():
    """t = 1/2 for certain: {1/2, 1/(4t) = 1/2, 1/(4(1-t)) = 1/2}, so every token weighs exactly 1."""
    views = views_of("coupled_normalized", 3, 40, ViewOptions(t_min=0.5, t_max=0.5))
    assert torch.equal(views.weight_SBC, views.hidden_SBC * 0.5)
    assert torch.equal(views.weight_SBC.sum(0), torch.ones(3, 40))


def test_monte_carlo_masks_are_independent():
    hidden_SBC = views_of("monte_carlo", 20_000, 10, ViewOptions(num_samples=2, share_t="row")).hidden_SBC.float()
    assert (hidden_SBC[0] * hidden_SBC[1]).mean().item() == pytest.approx(0.25, abs=0.005)  # E[t] E[t']


NUM_TOKENS = 6
MASKS = torch.tensor([[bool(code >> k & 1) for k in range(NUM_TOKENS)] for code in range(1 << NUM_TOKENS)])
# A "model" whose log-prob of token k depends on everything that is hidden, in no systematic way: [mask, k].
TABLE = -3 * torch.rand(1 << NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(42), dtype=torch.float64)


def integrand_mean() -> torch.Tensor:
    """Mean over t ~ U[0.2, 0.8] of E_mask[(1/t) * [k hidden] * log p_k(mask)], by enumerating the masks: [k]."""
    t = 0.2 + 0.6 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    size = MASKS.sum(1)
    mask_probs = torch.stack([(t**s * (1 - t) ** (NUM_TOKENS - s) / t).mean() for s in size.tolist()])
    return (mask_probs[:, None] * MASKS * TABLE).sum(0)


@pytest.mark.parametrize(
    ("name", "full_weight", "pair_weight"),
    [
        ("full_mask", 1.0, 0.0),
        ("monte_carlo", 0.0, 1.0),
        ("coupled_normalized", 0.5, 0.5),
        ("coupled", 0.5, 1.0),
        ("decoupled", 0.5, 1.0),
    ],
)
def test_what_the_estimate_is_unbiased_for(name, full_weight, pair_weight):
    rows = 200_000
    views = views_of(name, rows, NUM_TOKENS, seed=1)
    powers = 2 ** torch.arange(NUM_TOKENS)
    estimate_BC = torch.zeros(rows, NUM_TOKENS, dtype=torch.float64)
    for hidden_BC, weight_BC in zip(views.hidden_SBC, views.weight_SBC, strict=True):
        estimate_BC += weight_BC * TABLE[(hidden_BC * powers).sum(1)]
    expected = full_weight * TABLE[-1] + pair_weight * integrand_mean()
    error = (estimate_BC.mean(0) - expected).abs()
    spread = estimate_BC.std(0) / math.sqrt(rows)
    assert (error <= 4 * spread + 1e-6).all(), (error, spread)
    assert spread.max() < 0.01  # else the line above would say nothing


def test_complements_lower_the_variance_for_a_model_that_ignores_the_context():
    """log p = -1 everywhere: what is left is the variance of the weights, of which complements have less."""
    spread = {name: views_of(name, 20_000, 4).weight_SBC.sum(0).var().item() for name in ("coupled", "decoupled")}
    assert spread["coupled"] == pytest.approx(0.155, abs=0.01)
    assert spread["decoupled"] == pytest.approx(0.655, abs=0.02)


def test_coupled_normalized_refuses_an_asymmetric_t():
    with pytest.raises(ValueError, match=r"^t_min: 0\.2 must be 1 - t_max 0\.9 for coupled_normalized"):
        coupled_normalized_views(torch.Generator(), 2, 8, ViewOptions(t_max=0.9))
    raw = {"stage": "rl", "data": {"source": "microcode"}, "method": {"estimator": "coupled_normalized", "t_max": 0.9}}
    with pytest.raises(ConfigError, match=r"^here: method\.t_min: 0\.2 must be 1 - t_max 0\.9"):
        validate(raw, "here")
    raw["method"] |= {"estimator": "coupled"}  # the published estimator makes no such claim
    validate(raw, "here")


def test_coupled_normalized_refuses_an_asymmetric_distribution():
    with pytest.raises(ValueError, match=r"^t_distribution: 'cosine' must be symmetric for coupled_normalized"):
        check_estimator("coupled_normalized", ViewOptions(t_distribution="cosine"))
    check_estimator("coupled_normalized", ViewOptions(t_distribution="triangular"))
    check_estimator("coupled", ViewOptions(t_distribution="cosine"))


@pytest.mark.parametrize(
    "options",
    [
        ViewOptions(),
        ViewOptions(num_pairs=3, num_samples=4, share_t="row", share_masks=True),
        ViewOptions(t_min=0.05, t_max=0.95, stratify_t=True),
        ViewOptions(share_t="batch"),
    ],
)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_is_what_it_declares(name, options):
    check_estimator(name, options)


def test_a_view_that_scores_what_it_shows_is_refused(monkeypatch):
    def peeking_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
        views = ESTIMATORS["full_mask"](generator, group_size, num_tokens, options)
        return MaskViews(hidden_SBC=torch.zeros_like(views.hidden_SBC), weight_SBC=views.weight_SBC)

    monkeypatch.setitem(ESTIMATORS, "peeking", Estimator(views=peeking_views, mean_weight=lambda options: 1.0))
    raw = {"stage": "rl", "data": {"source": "microcode"}, "method": {"estimator": "peeking"}}
    with pytest.raises(ConfigError, match=r"method\.estimator: 'peeking' must score only tokens that its view hides"):
        validate(raw, "here")


def test_causal_scores_everything_once_and_hides_nothing():
    views = views_of("causal", 3, 7)
    assert not views.hidden_SBC.any() and torch.equal(views.weight_SBC, torch.ones(1, 3, 7))


# A new estimator


def even_odd_views(generator: torch.Generator, group_size: int, num_tokens: int, options: ViewOptions) -> MaskViews:
    """The even tokens with weight 2, then the odd ones with weight 1/2."""
    even_GC = (torch.arange(num_tokens) % 2 == 0).expand(group_size, num_tokens)
    hidden_SGC = torch.stack([even_GC, ~even_GC])
    return MaskViews(hidden_SBC=hidden_SGC, weight_SBC=hidden_SGC * torch.tensor([2.0, 0.5])[:, None, None])


class CountingModel(nn.Module):
    """With n masks (token 0) in a row, p(token 1) = n / (n + 3) and 1 / (n + 3) for each of tokens 0, 2 and 3."""

    def forward(self, ids_BL, attention_mask_BL, select_BL, position_N, token_N, **head_options) -> torch.Tensor:
        num_masks_BL = (ids_BL == 0).sum(1, keepdim=True).expand(ids_BL.shape)
        logits_BLV = torch.zeros(*ids_BL.shape, 4)
        logits_BLV[..., 1] = num_masks_BL.float().log()
        return logits_BLV[select_BL].log_softmax(-1)[position_N, token_N]


def test_a_new_estimator_is_one_function_and_one_line(monkeypatch):
    raw = {"stage": "rl", "data": {"source": "microcode"}, "method": {"estimator": "even_odd", "group_size": 2}}
    with pytest.raises(ConfigError, match="'even_odd' is unknown"):
        validate(raw, "here")
    with pytest.raises(
        ValueError, match=r"estimator: 'even_odd' must give a token the mean weight 1 that it declares, not 1\.25"
    ):
        monkeypatch.setitem(ESTIMATORS, "even_odd", Estimator(views=even_odd_views, mean_weight=lambda options: 1.0))
        validate(raw, "here")
    monkeypatch.setitem(ESTIMATORS, "even_odd", Estimator(views=even_odd_views, mean_weight=lambda options: 1.25))
    config = validate(raw, "here")
    assert isinstance(config, RLConfig)
    views = draw_views(
        ESTIMATORS[config.method.estimator],
        seeds=[1, 2],
        group_size=config.method.group_size,
        num_tokens=5,
        options=config.method.view_options(),
    )
    batch = ScoringBatch(
        prompt_ids_BP=torch.tensor([[2, 3]] * 4),
        prompt_mask_BP=torch.ones(4, 2, dtype=torch.bool),
        completion_ids_BC=torch.tensor([[1, 1, 1, 1, 1], [2, 1, 3, 3, 1], [3, 2, 1, 2, 3], [1, 2, 2, 1, 1]]),
        scored_BC=torch.ones(4, 5, dtype=torch.bool),
        views=(views,),
        group_size=2,
    )
    got = completion_logprobs(CountingModel(), batch, views, mask_token_id=0)
    # Three tokens are even, two odd: n = 3, then n = 2.
    even = {1: 2 * math.log(3 / 6), 2: 2 * math.log(1 / 6), 3: 2 * math.log(1 / 6)}
    odd = {1: 0.5 * math.log(2 / 5), 2: 0.5 * math.log(1 / 5), 3: 0.5 * math.log(1 / 5)}
    expected = [[(odd if k % 2 else even)[t] for k, t in enumerate(row)] for row in batch.completion_ids_BC.tolist()]
    assert torch.allclose(got, torch.tensor(expected), atol=1e-6)


def test_coupled_with_known_logprobs():
    """One group of two, four tokens, the published estimator: every token is worth 1/2 log p(n = 4) plus 1/(2t) log p
    of the view of the pair that hides it."""
    views = draw_views(ESTIMATORS["coupled"], seeds=[3], group_size=2, num_tokens=4, options=ViewOptions())
    batch = ScoringBatch(
        prompt_ids_BP=torch.tensor([[3], [3]]),
        prompt_mask_BP=torch.ones(2, 1, dtype=torch.bool),
        completion_ids_BC=torch.ones(2, 4, dtype=torch.long),
        scored_BC=torch.ones(2, 4, dtype=torch.bool),
        views=(views,),
        group_size=2,
    )
    got = completion_logprobs(CountingModel(), batch, views, mask_token_id=0)
    generator = torch.Generator().manual_seed(3)
    t = 0.2 + 0.6 * torch.rand(1, 1, generator=generator).item()
    part_BC = torch.rand(2, 4, generator=generator) < t
    for row in range(2):
        n = int(part_BC[row].sum())
        for column in range(4):
            hidden, ratio = (n, t) if part_BC[row, column] else (4 - n, 1 - t)
            expected = 0.5 * math.log(4 / 7) + math.log(hidden / (hidden + 3)) / (2 * ratio)
            assert got[row, column].item() == pytest.approx(expected, abs=1e-5)
