"""The denoising loop: exact distributions, independence of rows, schedule, and no wasted forward passes."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from diffrl.models.dream import DreamModel
from diffrl.sampler import SampleResult, SamplingParams, sample
from diffrl.sampler.engine import highest, perturbed
from diffrl.sampler.filters import NUCLEUS_ROOMS, confidences, draw_tokens, filtered_distributions, largest
from diffrl.sampler.params import reveal_counts, reveal_fractions
from diffrl.sampler.rows import RowNoise

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
MASK = 7


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"steps": 4, "temperature": 1.0, "top_p": None, "top_k": None, **changes})


def tiny_dream(layers: int = 2, vocab_size: int = 50) -> DreamModel:
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return DreamModel.from_config(config, mask_token_id=MASK, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def tiny() -> DreamModel:
    return tiny_dream()


class Table:
    """A model whose logits depend on the completion position alone; counts its calls and the rows it was asked for."""

    mask_token_id = MASK

    def __init__(self, logits_CV: Tensor):
        self.logits_CV = logits_CV
        self.vocab_size = logits_CV.shape[1]
        self.rows: list[int] = []

    def logits(self, states_XD: Tensor) -> Tensor:
        return states_XD

    def selected_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, select_BL: Tensor, *, packed: bool) -> Tensor:
        assert select_BL[:, : -len(self.logits_CV)].sum() == 0, "a prompt position was selected"
        assert bool((ids_BL[select_BL] == MASK).all()), "a known position was selected"
        self.rows.append(int(select_BL.sum()))
        return self.logits_CV[select_BL[:, -len(self.logits_CV) :].nonzero()[:, 1]]


def table(num_tokens: int, vocabulary: int, scale: float = 2.0) -> Table:
    return Table(scale * torch.randn(num_tokens, vocabulary, generator=torch.Generator().manual_seed(1)))


def run(model, num_tokens: int, sampling: SamplingParams, rows: int = 1, **more) -> SampleResult:
    prompt = torch.arange(3)[None].expand(rows, -1)
    more = {"seeds": range(rows), **more}
    return sample(model, prompt, torch.ones_like(prompt), num_tokens=num_tokens, params=sampling, **more)


def dense(logits_NV: Tensor, sampling: SamplingParams) -> Tensor:
    out = torch.full(logits_NV.shape, torch.nan)
    for rows, probs, ids in filtered_distributions(logits_NV, sampling):
        assert out[rows].isnan().all(), "a row came twice"
        out[rows] = probs if ids is None else torch.zeros(len(probs), logits_NV.shape[1]).scatter_(1, ids, probs)
    return out


def by_definition(logits_NV: Tensor, sampling: SamplingParams) -> Tensor:
    """Temperature, then top_p by a full stable sort, then top_k, as the release orders them."""
    logits = logits_NV / (sampling.temperature or 1)
    if sampling.top_p is not None:
        values, order = logits.sort(descending=True, stable=True)
        before = torch.nn.functional.pad(values.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        before[:, 0] = -1
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before > sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits.softmax(-1)


def standardised_chi_square(drawn: Tensor, probs: Tensor) -> float:
    expected = probs.double() * len(drawn)
    observed = torch.bincount(drawn, minlength=len(probs)).double()
    assert not observed[expected == 0].any(), "drawn, but impossible"
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    keep = expected >= 1
    freedom = max(1, int(keep.sum()) - 1)
    chi_square = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 1.3])
def test_filters_equal_their_definition(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    flat = torch.randn(6, vocabulary, generator=generator)  # nuclei far beyond NUCLEUS_ROOMS at 3000
    peaked = 8 * torch.randn(6, vocabulary, generator=generator)
    logits = torch.cat([flat, peaked])
    for top_p, top_k in itertools.product([None, 0.05, 0.5, 0.95, 1.0], [None, 1, 5, 45, 5000]):
        sampling = params(temperature=temperature, top_p=top_p, top_k=top_k)
        expected = by_definition(logits, sampling)
        torch.testing.assert_close(dense(logits, sampling), expected, atol=1e-6, rtol=1e-4)
    assert (by_definition(flat, params(top_p=0.95)) > 0).sum(-1).min() > min(NUCLEUS_ROOMS[-1], 0.5 * vocabulary)


def test_ties_with_the_kth_candidate_stay():
    logits = torch.zeros(2, 300)  # 300 equal tokens, far more than the room for ties
    logits[0, :3] = 1.0
    kept = dense(logits, params(top_k=5)) > 0
    assert kept.sum(-1).tolist() == [300, 300]
    assert (dense(logits, params(top_k=2)) > 0).sum(-1).tolist() == [3, 300]
    assert (dense(logits, params(top_k=5, top_p=0.5)) > 0).sum(-1).tolist()[1] in (150, 151)


@pytest.mark.parametrize(
    ("width", "vocabulary"), [(1, 64), (9, 64), (60, 64), (64, 64), (1, 1030), (4, 1030), (7, 1800)]
)
def test_largest_equals_topk(width, vocabulary):
    logits = 3 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(2))
    logits[1, -3:] = 100.0  # where no whole block reaches
    logits[:, 5], logits[:, 6], logits[0, 7] = -torch.inf, 0.0, torch.inf
    values, ids = largest(logits, width)
    assert torch.equal(values, logits.topk(width).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == width for row in ids.tolist())


def test_confidences_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]]).log()
    entropy = torch.tensor([-1.0296530, -0.1119020])
    torch.testing.assert_close(confidences(logits, params(algorithm="entropy")), entropy, atol=1e-5, rtol=0)
    margin = confidences(logits, params(algorithm="topk_margin"))
    torch.testing.assert_close(margin, torch.tensor([0.2, 0.97]))
    halves = confidences(logits, params(algorithm="entropy", top_k=2))[:1]  # 5/8 and 3/8
    torch.testing.assert_close(halves, torch.tensor([-0.6615632]), atol=1e-5, rtol=0)
    everything = torch.ones(3, dtype=torch.bool)
    tokens, confidence = draw_tokens(logits, None, everything, params(algorithm="maskgit_plus", temperature=0))
    assert tokens.tolist() == [0, 0]
    torch.testing.assert_close(confidence, torch.tensor([0.5, 0.98]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 1.5, "top_p": 0.8},
        {"top_k": 5},
        {"temperature": 1.2, "top_p": 0.95, "top_k": 50},
        {"top_p": 0.7, "top_k": 4, "algorithm": "maskgit_plus"},
    ],
)
def test_drawn_tokens_follow_the_filtered_distribution_without_mask(changes):
    sampling = params(steps=1, **changes)
    model = table(num_tokens=3, vocabulary=60)
    drawn = run(model, 3, sampling, rows=4000).completion_ids_BC
    expected = by_definition(model.logits_CV, sampling)
    expected[:, MASK] = 0
    expected /= expected.sum(-1, keepdim=True)
    for position in range(3):
        assert standardised_chi_square(drawn[:, position], expected[position]) < 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_mask_and_banned_ids_are_never_drawn(algorithm, temperature, top_k):
    model = table(num_tokens=6, vocabulary=30)
    model.logits_CV[:, MASK] += 20  # nearly everything the model wants
    model.logits_CV[:, 25:] += 10
    model.logits_CV[:, 3] += 10
    sampling = params(algorithm=algorithm, temperature=temperature, top_k=top_k)
    drawn = run(model, 6, sampling, rows=50, banned_ids=[3], vocab_size=25).completion_ids_BC
    assert not torch.isin(drawn, torch.tensor([MASK, 3, *range(25, 30)])).any()
    if temperature == 0 or top_k == 1:  # what is left is the most probable allowed token
        allowed = model.logits_CV.clone()
        allowed[:, [MASK, 3, *range(25, 30)]] = -torch.inf
        assert torch.equal(drawn, allowed.argmax(-1).expand(50, -1))


def test_banned_tokens_count_in_confidences():
    """Positions are ranked by the model's own distribution, as the release ranks them."""
    logits = torch.zeros(4, 30)
    logits[[0, 2], MASK], logits[[1, 3], 4] = 9.0, 5.0
    for algorithm in ("entropy", "topk_margin"):
        result = run(Table(logits), 4, params(algorithm=algorithm, steps=3, temperature=0))
        assert reveal_counts(4, 3, 1e-3) == (1, 1, 2)
        assert sorted(result.step_map_BC[0, [0, 2]].tolist()) == [0, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("alg_temp", [0.0, 0.5])
def test_a_row_does_not_depend_on_its_batch_mates(tiny, algorithm, alg_temp):
    sampling = params(algorithm=algorithm, alg_temp=alg_temp, temperature=1.1, top_p=0.95, top_k=20, steps=5)
    generator = torch.Generator().manual_seed(3)
    prompt, other = (torch.randint(10, 50, (4, 6), generator=generator) for _ in range(2))
    mask = torch.arange(6)[None] >= torch.tensor([[0], [2], [4], [1]])
    seeds = [11, 22, 33, 2**63 + 44]

    def go(prompt, mask, seeds) -> SampleResult:
        return sample(tiny, prompt, mask, num_tokens=9, params=sampling, seeds=seeds)

    whole = go(prompt, mask, seeds)
    order = [2, 0, 3, 1]
    shuffled = go(prompt[order], mask[order], [seeds[i] for i in order])
    assert torch.equal(shuffled.completion_ids_BC, whole.completion_ids_BC[order])
    assert torch.equal(shuffled.step_map_BC, whole.step_map_BC[order])
    for row in range(4):
        mates = torch.arange(4) != row
        replaced = go(torch.where(mates[:, None], other, prompt), mask | mates[:, None], [
            seeds[i] if i == row else 1000 + i for i in range(4)
        ])  # fmt: skip
        assert torch.equal(replaced.completion_ids_BC[row], whole.completion_ids_BC[row])
        assert torch.equal(replaced.step_map_BC[row], whole.step_map_BC[row])
        assert not torch.equal(replaced.completion_ids_BC[mates], whole.completion_ids_BC[mates])


def test_padding_does_not_change_a_row(tiny):
    sampling = params(temperature=1.0, top_k=20, steps=9)
    prompt = torch.tensor([[12, 13, 14]])
    padded = torch.tensor([[9, 9, 12, 13, 14]])
    short = sample(tiny, prompt, torch.ones(1, 3), num_tokens=8, params=sampling, seeds=[5])
    long = sample(tiny, padded, torch.arange(5)[None] >= 2, num_tokens=8, params=sampling, seeds=[5])
    assert torch.equal(short.completion_ids_BC, long.completion_ids_BC)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_seeds_decide_everything(tiny, algorithm):
    sampling = params(algorithm=algorithm, steps=5)
    state = torch.get_rng_state()
    first = run(tiny, 12, sampling, rows=3, seeds=[1, 2, 1])
    again = run(tiny, 12, sampling, rows=3, seeds=[1, 2, 1])
    assert torch.equal(first.completion_ids_BC, again.completion_ids_BC)
    assert torch.equal(first.step_map_BC, again.step_map_BC)
    assert torch.equal(first.completion_ids_BC[0], first.completion_ids_BC[2])  # same prompt, same seed
    assert not torch.equal(first.completion_ids_BC[0], first.completion_ids_BC[1])
    high = run(tiny, 12, sampling, rows=3, seeds=[1 + 2**32, 2, 1]).completion_ids_BC  # all 64 bits count
    assert not torch.equal(high[0], high[2])
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
@pytest.mark.parametrize(("num_tokens", "steps"), [(6, 1), (6, 4), (6, 6), (6, 20)])
def test_steps_that_reveal_nothing_make_no_forward_pass(algorithm, num_tokens, steps):
    model = table(num_tokens, vocabulary=30)
    sampling = params(algorithm=algorithm, steps=steps)
    result = run(model, num_tokens, sampling, rows=3)
    counts = reveal_counts(num_tokens, steps, sampling.eps)
    assert sum(counts) == num_tokens
    hidden = [3 * sum(counts[step:]) for step, count in enumerate(counts) if count]
    assert model.rows == [num_tokens, *hidden[1:]]  # hidden positions alone; what is equal at first, once
    for steps_C in result.step_map_BC:
        assert torch.bincount(steps_C, minlength=steps).tolist() == list(counts)


def test_origin_asks_for_revealed_positions_alone():
    model = table(num_tokens=5, vocabulary=30)
    result = run(model, 5, params(algorithm="origin", steps=40), rows=2)
    revealed = torch.bincount(result.step_map_BC.flatten(), minlength=40)
    first, *later = revealed[revealed > 0].tolist()
    assert model.rows[0] <= first and model.rows[1:] == later and len(model.rows) < 40


def test_origin_reveals_with_probability_one_minus_s_over_t():
    rows, steps = 3000, 4
    result = run(table(5, 30), 5, params(algorithm="origin", steps=steps), rows=rows)
    fractions = reveal_fractions(steps, 1e-3)
    hidden = torch.cat([torch.ones(1), (1 - fractions[:-1]).cumprod(0)])
    assert standardised_chi_square(result.step_map_BC.flatten(), hidden * fractions) < 5


def test_schedule_reveals_none_first_and_two_last_with_a_step_per_token():
    assert reveal_counts(256, 256, 1e-3) == (0, *[1] * 254, 2)


def test_highest_confidence_goes_first():
    logits = torch.zeros(6, 30)
    logits[torch.arange(6), 10] = torch.tensor([3.0, 6.0, 1.0, 5.0, 2.0, 4.0])
    for algorithm in ALGORITHMS[1:]:
        result = run(Table(logits), 6, params(algorithm=algorithm, steps=6, temperature=0))
        assert result.step_map_BC.tolist() == [[4, 1, 5, 2, 5, 3]]
        assert result.completion_ids_BC.unique().tolist() == [10]


def test_alg_temp_draws_positions_without_replacement():
    rows, alg_temp = 20000, 0.7
    confidence_C = torch.tensor([0.1, 0.9, 0.4, 0.0])
    hidden = torch.ones(rows, 4, dtype=torch.bool)
    uniform = RowNoise().uniform(range(rows), range(rows), hidden)
    reveal = highest(perturbed(confidence_C.repeat(rows), uniform, alg_temp), hidden, torch.full((rows,), 2))
    assert reveal.sum(1).unique().tolist() == [2]
    p = (confidence_C / alg_temp).softmax(0)
    pairs = list(itertools.combinations(range(4), 2))
    exact = torch.stack([p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs])
    code = (reveal.long() * torch.tensor([1, 2, 4, 8])).sum(1)
    drawn = torch.tensor([[2**i + 2**j for i, j in pairs].index(c) for c in code.tolist()])
    assert standardised_chi_square(drawn, exact) < 5


def test_alg_temp_changes_the_order_of_positions(tiny):
    first = run(tiny, 12, params(steps=12, temperature=0), rows=4)
    drawn = run(tiny, 12, params(steps=12, temperature=0, alg_temp=1.0), rows=4)
    assert (first.step_map_BC == first.step_map_BC[:1]).all()  # no randomness: four equal rows
    assert not (drawn.step_map_BC == drawn.step_map_BC[:1]).all()


def test_low_precision_models_are_sampled_in_float32():
    model = table(num_tokens=4, vocabulary=40)
    model.logits_CV = model.logits_CV.bfloat16()
    sampling = params(top_p=0.9, top_k=10, steps=4)
    low = run(model, 4, sampling, rows=20)
    model.logits_CV = model.logits_CV.float()
    assert torch.equal(low.completion_ids_BC, run(model, 4, sampling, rows=20).completion_ids_BC)


@pytest.mark.parametrize(
    "wrong",
    [
        {"algorithm": "random"},
        {"steps": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": 0},
        {"alg_temp": -0.1},
        {"eps": 1.0},
    ],
)
def test_values_out_of_range_name_their_setting(wrong):
    with pytest.raises(ValueError, match=rf"sampling\.{next(iter(wrong))}"):
        params(**wrong)


def test_as_many_seeds_as_rows(tiny):
    with pytest.raises(ValueError, match="seeds"):
        run(tiny, 4, params(), rows=2, seeds=[1])
