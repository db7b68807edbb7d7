"""The estimator laboratory: what an estimate of completion log-probs costs, how far it is off, and how much it scatters.

The truth, one for all estimators: per token the mean over t ~ U[t_min, t_max] of the ELBO integrand u(t) = E over masks of
(1/t) * [token hidden] * log p(token | shown), and its sum over a completion's scored tokens. It is what `monte_carlo` with
that t, and the pair of `coupled_normalized`, are unbiased for; neither the full ELBO nor log p. It is found from many masks
with evenly spread t as sum(w log p) / sum(w), w = 1/t where the token is hidden: the weights' noise cancels, and what is left
of bias goes down with the number of masks, as its own standard error does, which every bias is told with.

An estimate is divided by its estimator's declared mean weight (estimators.py), so that all are on the truth's scale; `raw`
biases are without that division. Biases are means over draws of sum_S w (log p - truth) / mean weight: of the same expectation
as estimate - truth, since w has that mean, and free of the noise that weights alone make. What is left of bias is the fully
hidden view's: u(1) weighs 1 in `full_mask`, 1/(2 lambda + 1) in `coupled` and `decoupled`, 1/(lambda + 1) in
`coupled_normalized`; and that of another range or distribution of t.

Cost is counted in forward passes per completion: rows that go through the backbone, of which a view that hides everything
needs one for all siblings. At equal compute: draws are averaged until a row has had so many passes, which divides the
variance and leaves the bias. The effective sample size is the number of independent masks of plain Monte-Carlo (`monte_carlo`,
K = 1, own masks) whose mean has the estimate's variance.

All variances are over draws of t and masks; completions and model stay. Intervals are 95% percentiles of a bootstrap over draws.

Shapes: D draws, B rows (siblings adjacent), G siblings, N = B / G groups, C completion tokens, S views, P parts of the truth.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffrl.batches import pad_prompt
from diffrl.errors import require
from diffrl.estimators import ESTIMATORS, check_estimator
from diffrl.models.base import PolicyModel
from diffrl.scoring import completion_logprobs, slice_rows
from diffrl.seeds import derive_seed
from diffrl.types import MaskViews, RolloutGroup, ScoringBatch
from diffrl.views import StepPlace, ViewOptions

EQUAL_PASSES = 16  # per completion, at which errors are compared
MAX_TOKENS = 1 << 15  # positions of a scoring call, unless one group has more
RESAMPLES = 1000
PARTS = 8  # of the truth's masks, for its standard error
MASKS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An estimator and its knobs. Variant(estimator="coupled", options=ViewOptions(num_pairs=2, share_masks=True))"""

    estimator: str
    options: ViewOptions

    @property
    def size(self) -> int:
        """lambda, or K of `monte_carlo`."""
        return self.options.num_samples if self.estimator == "monte_carlo" else self.options.num_pairs

    @property
    def masks(self) -> str:
        return "shared" if self.options.share_masks else "own"

    @property
    def t(self) -> str:
        o = self.options
        return f"{o.t_min:g}..{o.t_max:g} {o.t_distribution}{' stratified' if o.stratify_t else ''}"


UNIT = Variant(estimator="monte_carlo", options=ViewOptions(num_samples=1))


def variants(
    estimators: Sequence[str],
    *,
    pairs: Sequence[int] = (1, 2, 4),
    ranges: Sequence[tuple[float, float]] = ((0.2, 0.8),),
    distributions: Sequence[str] = ("uniform",),
    stratify: bool = True,
) -> tuple[list[Variant], list[str]]:
    """What is compared, and why which is not: first what effective samples are counted in. One thing at a time: every lambda
    (`monte_carlo`: K = 2 lambda, as many passes) with own and shared masks at the first range and distribution of t; the other
    ranges and distributions, and t stratified over the step, at the first lambda with own masks."""
    first = ViewOptions(t_min=ranges[0][0], t_max=ranges[0][1], t_distribution=distributions[0])
    grid = [
        replace(first, num_pairs=n, num_samples=2 * n, share_masks=shared) for n in pairs for shared in (False, True)
    ]
    small = replace(first, num_pairs=pairs[0], num_samples=2 * pairs[0])
    grid += [replace(small, t_min=low, t_max=high) for low, high in ranges[1:]]
    grid += [replace(small, t_distribution=name) for name in distributions[1:]]
    grid += [replace(small, stratify_t=True)] if stratify else []
    found, left_out = [replace_t(UNIT, first)], []
    for name in estimators:
        own: list[Variant] = []
        for options in grid:
            variant = Variant(estimator=name, options=options)
            try:
                check_estimator(name, options)
            except ValueError as error:
                left_out.append(f"{name}, t {variant.t}, lambda {options.num_pairs}, masks {variant.masks}: {error}")
                continue
            if own and not draws_anything(name, options):  # as full_mask: all its variants are one
                continue
            own.append(variant)
        found += own
    return found, left_out


def replace_t(variant: Variant, like: ViewOptions) -> Variant:
    """With the same distribution of t."""
    t = {"t_min": like.t_min, "t_max": like.t_max, "t_distribution": like.t_distribution}
    return replace(variant, options=replace(variant.options, **t))


def draws_anything(name: str, options: ViewOptions) -> bool:
    first, second = (ESTIMATORS[name](torch.Generator().manual_seed(seed), 2, 64, options) for seed in (0, 1))
    return not torch.equal(first.hidden_SBC, second.hidden_SBC)


# Weights alone: no model


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Of a token, over draws. Weights(mean=1.0, variance=0.155, largest=2.5, silent=0.0)"""

    mean: float
    variance: float
    largest: float
    silent: float  # share of tokens with weight 0


def weights_of(weight_SBC: Tensor) -> Weights:
    total_BC = weight_SBC.sum(0).double()
    return Weights(
        mean=float(total_BC.mean()),
        variance=float(total_BC.var()),
        largest=float(total_BC.max()),
        silent=float((total_BC == 0).double().mean()),
    )


def simulate_weights(
    name: str, options: ViewOptions, *, rows: int = 20_000, tokens: int = 32, seed: int = 0
) -> dict[str, Weights]:
    """By simulation, t drawn per row: `all` views; `pairs`, the random views by themselves as the loss weighs them; and
    `bare`, these before the factor of eq. 13, which is the weight of the fully hidden view."""
    generator = torch.Generator().manual_seed(seed)
    views = ESTIMATORS[name](generator, rows, tokens, replace(options, share_t="row", share_masks=False))
    full_S = views.hidden_SBC.flatten(1).all(1)
    found = {"all": weights_of(views.weight_SBC)}
    if bool(full_S.any()) and not bool(full_S.all()):
        pairs_SBC = views.weight_SBC[~full_S]
        factor = float(views.weight_SBC[full_S].sum(0).mean())
        found |= {"pairs": weights_of(pairs_SBC), "bare": weights_of(pairs_SBC / factor)}
    return found


# What is scored


def batch_of(groups: Sequence[RolloutGroup], pad_token_id: int) -> ScoringBatch:
    """Completions of equal windows, as many of each prompt; without views, which are drawn again and again."""
    sizes = {(len(g.rollouts), len(r.completion_ids_C)) for g in groups for r in g.rollouts}
    assert len(sizes) == 1, sizes
    ((group_size, num_tokens),) = sizes
    width = max(len(g.prompt_ids_P) for g in groups)
    prompts = [pad_prompt(g.prompt_ids_P, group_size, width, pad_token_id) for g in groups]
    rollouts = [r for g in groups for r in g.rollouts]
    length_B = torch.tensor([r.num_tokens for r in rollouts])
    return ScoringBatch(
        prompt_ids_BP=torch.cat([ids for ids, _ in prompts]),
        prompt_mask_BP=torch.cat([mask for _, mask in prompts]),
        completion_ids_BC=torch.from_numpy(np.stack([r.completion_ids_C for r in rollouts])).long(),
        scored_BC=torch.arange(num_tokens) < length_B[:, None],
        views=(),
        group_size=group_size,
    )


class Scorer:
    """Scores a batch under views and counts the rows that go through the backbone."""

    def __init__(self, model: PolicyModel, batch: ScoringBatch):
        self.counting, self.batch, self.mask_token_id = Counting(model), batch, model.mask_token_id

    @property
    def num_passes(self) -> int:
        return self.counting.num_rows

    def __call__(self, views: MaskViews) -> Tensor:
        """[B, C] in float64, on the CPU; 0 where nothing is scored."""
        batch = replace(self.batch, views=(views,))
        rows, width = batch.completion_ids_BC.shape
        positions = len(views.hidden_SBC) * batch.group_size * (batch.prompt_ids_BP.shape[1] + width)
        step = batch.group_size * max(1, MAX_TOKENS // positions)
        parts = [slice_rows(batch, start, min(start + step, rows)) for start in range(0, rows, step)]
        with torch.inference_mode():
            found = [
                completion_logprobs(self.counting, part, part.views[0], mask_token_id=self.mask_token_id)
                for part in parts
            ]
        return torch.cat(found).cpu().double()


class Counting(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.num_rows = model, 0

    def forward(self, ids_BL: Tensor, *args: Any, **options: Any) -> Tensor:
        self.num_rows += len(ids_BL)
        return self.model(ids_BL, *args, **options)


def draw_step(
    name: str, options: ViewOptions, batch: ScoringBatch, *, seed: int, place: StepPlace | None = None
) -> MaskViews:
    """Views of all groups, as the groups of one step draw them; with `place`, as if each stood there."""
    size, device = len(batch.completion_ids_BC) // batch.group_size, batch.completion_ids_BC.device
    groups = [
        ESTIMATORS[name](
            torch.Generator().manual_seed(derive_seed(seed, "masks", index)),
            batch.group_size,
            batch.completion_ids_BC.shape[1],
            replace(options, place=place or StepPlace(seed=derive_seed(seed, "t"), index=index, size=size)),
        )
        for index in range(size)
    ]
    return MaskViews(
        hidden_SBC=torch.cat([g.hidden_SBC for g in groups], dim=1).to(device),
        weight_SBC=torch.cat([g.weight_SBC for g in groups], dim=1).to(device),
    )


# The truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Truth(t_range=(0.2, 0.8), num_masks=2048, token_BC=tensor(...), parts_PBC=tensor(...))"""

    t_range: tuple[float, float]
    num_masks: int
    token_BC: Tensor  # float64
    parts_PBC: Tensor  # from each part of the masks by itself

    @property
    def token_error_BC(self) -> Tensor:
        return self.parts_PBC.std(0) / PARTS**0.5

    @property
    def sequence_B(self) -> Tensor:
        return self.token_BC.sum(1)

    @property
    def sequence_error_B(self) -> Tensor:
        return self.parts_PBC.sum(2).std(0) / PARTS**0.5

    @property
    def mean_error(self) -> float:
        """Of the mean over rows of sequences."""
        return float(self.parts_PBC.sum(2).mean(1).std()) / PARTS**0.5


def find_truth(scorer: Scorer, *, t_range: tuple[float, float], num_masks: int, seed: int) -> Truth:
    """From `num_masks` masks of each row, t spread evenly over its range. Raises ValueError for too few of them."""
    least = 16 * PARTS * MASKS_AT_ONCE
    require(num_masks >= least, "masks", num_masks, f"be at least {least}: each token is hidden in every part of them")
    draws, batch = num_masks // MASKS_AT_ONCE, scorer.batch
    shape = (PARTS, *batch.completion_ids_BC.shape)
    sum_PBC, weight_PBC = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    options = ViewOptions(num_samples=MASKS_AT_ONCE, t_min=t_range[0], t_max=t_range[1], stratify_t=True)
    for draw in range(draws):
        place = StepPlace(seed=derive_seed(seed, "truth"), index=draw, size=draws)  # among draws, not among groups
        views = draw_step("monte_carlo", options, batch, seed=derive_seed(seed, "truth", draw), place=place)
        sum_PBC[draw % PARTS] += scorer(views)
        weight_PBC[draw % PARTS] += views.weight_SBC.sum(0).cpu().double()
    return Truth(
        t_range=t_range,
        num_masks=draws * MASKS_AT_ONCE,
        token_BC=sum_PBC.sum(0) / weight_PBC.sum(0),
        parts_PBC=sum_PBC / weight_PBC,
    )


# Measurements


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Interval(value=4.1, low=3.6, high=4.7)"""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One variant against the truth, in nats. Estimates are divided by `mean_weight`, but for what is called raw.

    Measurement(variant=Variant(...), mean_weight=1.5, num_views=3, passes=2.25, seconds=0.0021, token_bias=-0.03, ...)
    """

    variant: Variant
    mean_weight: float  # as the estimator declares it
    num_views: int
    passes: float  # forward passes per completion and draw
    seconds: float  # per completion, of a draw; the median
    token_bias: float  # mean over tokens
    token_bias_rms: float  # over tokens, what noise adds taken off
    token_variance: float  # mean over tokens
    sequence_bias: float  # mean over completions
    sequence_bias_error: float  # its standard error, the truth's included
    sequence_bias_rms: float  # over completions, what noise adds taken off
    raw_sequence_bias: float
    sequence_variance: Interval  # mean over completions
    sibling_variance: Interval  # of the difference of two siblings' sequences: all that advantages, which sum to 0, see
    step_variance: Interval  # of the mean over all completions: what siblings and groups have in common stays in it

    @property
    def error(self) -> float:
        """Root mean square error of a sequence at EQUAL_PASSES passes per completion."""
        return (self.sequence_bias_rms**2 + self.sequence_variance.value * self.passes / EQUAL_PASSES) ** 0.5


def measure(scorer: Scorer, truth: Truth, variant: Variant, *, draws: int, seed: int) -> Measurement:
    """Score the batch under `draws` draws of the variant's views."""
    require(draws >= 2, "draws", draws, "be at least 2: a variance needs them")
    batch, estimator = scorer.batch, ESTIMATORS[variant.estimator]
    mean_weight = estimator.mean_weight(variant.options)
    before, seconds, found, residuals, num_views = scorer.num_passes, [], [], [], 0
    for draw in range(draws):
        views = draw_step(variant.estimator, variant.options, batch, seed=derive_seed(seed, "draw", draw))
        started = time.perf_counter()
        found.append(scorer(views))
        seconds.append(time.perf_counter() - started)
        residuals.append(found[-1] - views.weight_SBC.sum(0).cpu() * truth.token_BC)
        num_views = len(views.hidden_SBC)
    rows, group_size, scored_BC = len(batch.scored_BC), batch.group_size, batch.scored_BC.cpu()
    token_DBC = torch.stack(found) / mean_weight
    off_DBC = torch.stack(residuals) / mean_weight
    off_BC, off_DB = off_DBC.mean(0), off_DBC.sum(2)
    noise_BC = off_DBC.var(0) / draws + truth.token_error_BC**2
    noise_B = off_DB.var(0) / draws + truth.sequence_error_B**2
    bias = float(off_DB.mean())
    sequence_DB = token_DBC.sum(2)
    mean_D = sequence_DB.mean(1)
    siblings_DNG = sequence_DB.unflatten(1, (-1, group_size))
    centred_DB = (siblings_DNG - siblings_DNG.mean(2, keepdim=True)).flatten(1)
    pair_scale = 2 * group_size / (group_size - 1) if group_size > 1 else 0.0
    return Measurement(
        variant=variant,
        mean_weight=mean_weight,
        num_views=num_views,
        passes=(scorer.num_passes - before) / draws / rows,
        seconds=statistics.median(seconds) / rows,
        token_bias=float(off_BC[scored_BC].mean()),
        token_bias_rms=float((off_BC**2 - noise_BC)[scored_BC].mean().clamp(min=0).sqrt()),
        token_variance=float(token_DBC.var(0)[scored_BC].mean()),
        sequence_bias=bias,
        sequence_bias_error=float(off_DB.mean(1).var() / draws + truth.mean_error**2) ** 0.5,
        sequence_bias_rms=float((off_DB.mean(0) ** 2 - noise_B).mean().clamp(min=0).sqrt()),
        raw_sequence_bias=mean_weight * bias + (mean_weight - 1) * float(truth.sequence_B.mean()),
        sequence_variance=variance(sequence_DB, seed=seed),
        sibling_variance=variance(centred_DB, scale=pair_scale, seed=seed),
        step_variance=variance(mean_D[:, None], seed=seed),
    )


def variance(values_DX: Tensor, *, scale: float = 1.0, seed: int) -> Interval:
    """scale * mean over X of the variance over draws."""
    value_DX = values_DX.numpy()
    value_DX = value_DX - value_DX.mean(0)
    draws = len(value_DX)
    counts_RD = np.random.default_rng(seed).multinomial(draws, np.full(draws, 1 / draws), size=RESAMPLES) / draws
    # A resample's variance is short of the sample's by (D - 1) / D, as that is of the true one.
    spread_RX = (counts_RD @ value_DX**2 - (counts_RD @ value_DX) ** 2) * (draws / (draws - 1)) ** 2
    low, high = np.quantile(scale * spread_RX.mean(1), [0.025, 0.975])
    return Interval(value=float(scale * value_DX.var(0, ddof=1).mean()), low=float(low), high=float(high))


def effective_samples(found: Measurement, unit: Measurement) -> float | None:
    """Independent masks of plain Monte-Carlo whose mean has the sequence variance of `found`; None: it has none."""
    value = found.sequence_variance.value
    return unit.sequence_variance.value / value if value > 1e-12 else None
