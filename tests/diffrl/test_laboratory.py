"""The estimator laboratory against a model whose every log-prob is known, and against the facts of the method."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffrl.laboratory import (
    Measurement,
    Scorer,
    Truth,
    Variant,
    effective_samples,
    find_truth,
    measure,
    simulate_weights,
    variance,
    variants,
)
from diffrl.laboratory_report import Findings, as_json, as_text, draw, weights_by_variant
from diffrl.types import ScoringBatch
from diffrl.views import ViewOptions
from tests.diffrl.test_estimators import NUM_TOKENS, TABLE, integrand_mean

GROUPS, SIBLINGS = 2, 3
NAMES = ["coupled", "decoupled", "coupled_normalized", "monte_carlo", "full_mask"]


@pytest.mark.parametrize(
    ("name", "views", "mean", "spread", "largest", "silent"),
    [
        ("coupled", "bare", 2.00, 0.62, 5.0, 0.0),
        ("decoupled", "bare", 2.00, 2.62, 6.2, 0.22),
        ("coupled", "pairs", 1.00, 0.155, 2.5, 0.0),
        ("decoupled", "pairs", 1.00, 0.654, 3.1, 0.22),
    ],
)
def test_weights_are_those_of_the_method(name, views, mean, spread, largest, silent):
    """To two digits, as the paper's recipe has them (t ~ U[0.2, 0.8], one pair)."""
    found = simulate_weights(name, ViewOptions(), rows=100_000)[views]
    assert round(found.mean, 2) == mean
    assert found.variance == pytest.approx(spread, abs=0.005)
    assert found.largest == pytest.approx(largest, abs=0.06)
    assert found.silent == pytest.approx(silent, abs=0.005)


class TableModel(nn.Module):
    """log p of token k by what is hidden, from test_estimators' table; [MASK] is token 0."""

    mask_token_id = 0

    def forward(self, ids_BL: Tensor, attention_mask_BL, select_BL, position_N, token_N, **head_options) -> Tensor:
        hidden_BC = ids_BL[:, -NUM_TOKENS:] == 0
        logprobs_BC = TABLE[(hidden_BC * 2 ** torch.arange(NUM_TOKENS)).sum(1)]
        return logprobs_BC[select_BL[:, -NUM_TOKENS:]][position_N]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """Two prompts with three completions each; the last token of the first is not scored."""
    rows = GROUPS * SIBLINGS
    scored_BC = torch.ones(rows, NUM_TOKENS, dtype=torch.bool)
    scored_BC[0, -1] = False
    batch = ScoringBatch(
        prompt_ids_BP=torch.arange(1, rows + 1).div(SIBLINGS + 1, rounding_mode="floor")[:, None] + 3,
        prompt_mask_BP=torch.ones(rows, 1, dtype=torch.bool),
        completion_ids_BC=torch.randint(1, 50, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(0)),
        scored_BC=scored_BC,
        views=(),
        group_size=SIBLINGS,
    )
    return Scorer(TableModel(), batch)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def truth(scorer: Scorer) -> Truth:
    return find_truth(scorer, t_range=(0.2, 0.8), num_masks=8192, seed=5)


def exact(scorer: Scorer) -> Tensor:
    return integrand_mean() * scorer.batch.scored_BC


def test_the_truth_is_the_mean_of_the_integrand(scorer: Scorer, truth: Truth):
    off_BC = (truth.token_BC - exact(scorer)).abs()
    assert (off_BC <= 7 * truth.token_error_BC + 1e-9).all() and float(truth.token_error_BC.max()) < 0.03
    assert truth.num_masks == 8192 and float(truth.sequence_error_B.max()) < 0.06


@pytest.mark.parametrize(
    ("name", "pairs", "share_of_u1"),
    [
        ("full_mask", 1, 1.0),
        ("coupled", 1, 1 / 3),
        ("coupled", 4, 1 / 9),
        ("decoupled", 1, 1 / 3),
        ("coupled_normalized", 1, 1 / 2),
        ("monte_carlo", 1, 0.0),
    ],
)
def test_biases_are_those_that_can_be_computed(scorer: Scorer, truth: Truth, name, pairs, share_of_u1):
    """(u(1) - truth) times the weight of the fully hidden view, from the table and by enumeration."""
    options = ViewOptions(num_pairs=pairs)
    found = measure(scorer, truth, Variant(estimator=name, options=options), draws=400, seed=1)
    bias_BC = share_of_u1 * (TABLE[-1] - integrand_mean()) * scorer.batch.scored_BC
    assert abs(found.sequence_bias - float(bias_BC.sum(1).mean())) < 4 * found.sequence_bias_error + 1e-9
    assert found.sequence_bias_error < 0.2
    rms = float((bias_BC[scorer.batch.scored_BC] ** 2).mean().sqrt())
    assert found.token_bias_rms == pytest.approx(rms, abs=0.1)
    weight = found.mean_weight
    raw = weight * (exact(scorer) + bias_BC) - exact(scorer)
    assert found.raw_sequence_bias == pytest.approx(float(raw.sum(1).mean()), abs=weight * 0.3)


def test_passes_are_rows_of_the_backbone(scorer: Scorer, truth: Truth):
    """A view that hides everything is one row for all siblings."""
    for name, passes in {"full_mask": 1 / SIBLINGS, "coupled": 2 + 1 / SIBLINGS, "monte_carlo": 2.0}.items():
        options = ViewOptions(t_min=0.5, t_max=0.5)
        found = measure(scorer, truth, Variant(estimator=name, options=options), draws=50, seed=2)
        # Now and then a mask of six tokens hides all of them, or nothing.
        assert found.passes == pytest.approx(passes, abs=0.12)
        assert found.num_views == {"full_mask": 1, "coupled": 3, "monte_carlo": 2}[name]


def test_variances(scorer: Scorer, truth: Truth):
    """Of one mask and of the mean of four, as many times less; siblings by the definition; nothing where nothing is drawn."""
    one, four = (
        measure(scorer, truth, Variant(estimator="monte_carlo", options=options), draws=600, seed=3)
        for options in (ViewOptions(num_samples=1, share_t="row"), ViewOptions(num_samples=4, share_t="row"))
    )
    assert one.sequence_variance.low < one.sequence_variance.value < one.sequence_variance.high
    assert effective_samples(four, one) == pytest.approx(4, rel=0.25)
    assert one.token_variance / four.token_variance == pytest.approx(4, rel=0.2)
    # With t and masks of their own, rows are independent: the difference has both variances, the mean of B a Bth of one.
    assert one.sibling_variance.value == pytest.approx(2 * one.sequence_variance.value, rel=0.1)
    assert one.step_variance.value == pytest.approx(one.sequence_variance.value / (GROUPS * SIBLINGS), rel=0.2)
    flat = measure(scorer, truth, Variant(estimator="full_mask", options=ViewOptions()), draws=5, seed=3)
    assert flat.sequence_variance.value == flat.sibling_variance.value == 0 and effective_samples(flat, one) is None


def test_siblings_that_share_masks_differ_by_nothing_here(scorer: Scorer, truth: Truth):
    """The table does not look at tokens, so siblings whose masks are the same have the same noise."""
    shared = Variant(estimator="coupled", options=ViewOptions(share_masks=True))
    found = measure(scorer, truth, shared, draws=30, seed=4)
    whole = replace(scorer.batch, scored_BC=torch.ones_like(scorer.batch.scored_BC))
    same = measure(Scorer(scorer.counting.model, whole), truth, shared, draws=30, seed=4)  # pyright: ignore[reportArgumentType]
    assert same.sibling_variance.value < 1e-12 < found.sibling_variance.value < found.sequence_variance.value
    own = measure(scorer, truth, Variant(estimator="coupled", options=ViewOptions()), draws=30, seed=4)
    assert own.sibling_variance.value > 2 * found.sibling_variance.value


def test_coverage_of_an_interval():
    """Of 200 samples of a known variance, the intervals of nearly all hold it."""
    hits = 0
    for seed in range(200):
        values_DX = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = variance(values_DX, scale=3.0, seed=seed)
        assert found.value == pytest.approx(3 * float(values_DX.var(0).mean()))
        hits += found.low <= 3.0 <= found.high
    assert 175 <= hits <= 200


def test_what_is_compared():
    found, left_out = variants(
        NAMES, pairs=(1, 2), ranges=((0.2, 0.8), (0.1, 0.9)), distributions=("uniform", "cosine")
    )
    assert len(set(found)) == len(found)
    by_name = {name: [v for v in found if v.estimator == name] for name in NAMES}
    assert [(v.size, v.masks) for v in by_name["coupled"]][:4] == [(1, "own"), (1, "shared"), (2, "own"), (2, "shared")]
    assert [v.t for v in by_name["coupled"]][4:] == [
        "0.1..0.9 uniform",
        "0.2..0.8 cosine",
        "0.2..0.8 uniform stratified",
    ]
    assert [v.size for v in by_name["monte_carlo"]][:5] == [1, 2, 2, 4, 4] and len(by_name["full_mask"]) == 1
    assert len(left_out) == 1 and left_out[0].startswith("coupled_normalized, t 0.2..0.8 cosine")


def test_words_and_pictures(scorer: Scorer, truth: Truth, tmp_path):
    compared, left_out = variants(NAMES, pairs=(1,), stratify=False)
    found: list[Measurement] = [measure(scorer, truth, variant, draws=8, seed=6) for variant in compared]
    findings = Findings(model="m", settings={"draws": 8}, truth=truth, found=found, left_out=left_out)
    weights = weights_by_variant(findings)
    text, raw = as_text(findings, weights), json.loads(json.dumps(as_json(findings, weights)))
    assert [row["estimator"] for row in raw["estimators"]] == [v.estimator for v in compared]
    assert raw["estimators"][0]["effective_samples"] == 1.0 and raw["estimators"][-1]["effective_samples"] is None
    coupled = next(row for row in raw["weights"] if (row["estimator"], row["size"]) == ("coupled", 1))
    assert coupled["bare"]["variance"] == pytest.approx(0.62, abs=0.02) and coupled["all"]["mean"] == pytest.approx(
        1.5, abs=0.01
    )
    assert all(text.count(f"\n{name} ") >= 3 for name in NAMES) and max(map(len, text.splitlines())) <= 160
    svg, png = draw(findings, tmp_path)
    assert png.read_bytes()[:4] == b"\x89PNG" and "Bias of a completion" in svg.read_text()


def test_too_few_masks_are_refused(scorer: Scorer, truth: Truth):
    with pytest.raises(ValueError, match="masks: 100 must be at least 1024"):
        find_truth(scorer, t_range=(0.2, 0.8), num_masks=100, seed=0)
    with pytest.raises(ValueError, match="draws: 1 must be at least 2"):
        measure(scorer, truth, Variant(estimator="coupled", options=ViewOptions()), draws=1, seed=0)
