"""Caches, reveal rules and early end: each against what it must equal, and by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.llada import LladaModel
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams
from diffrl.sampler.approximate import after_end, certainties, how_many
from tests.diffrl.test_sampler import MASK, Table, table

END = 5


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"steps": 12, "temperature": 0.0, "top_p": None, "top_k": None, **changes})


def model_of(layers: int, family: type[PolicyModel] = DreamModel) -> PolicyModel:
    raw = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    if family is LladaModel:
        from transformers import LlamaConfig

        config: Any = LlamaConfig(**raw)
    else:
        config = Qwen2Config(**raw)
    config._attn_implementation = "sdpa"
    return family.from_config(config, mask_token_id=MASK, generator=torch.Generator().manual_seed(0)).eval()


def canvases(shapes: list[tuple[int, int]]) -> list[Canvas]:
    """Rows of (prompt, completion) tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        Canvas(
            ids_L=torch.randint(10, 50, (prompt + completion,), generator=generator),
            hidden_L=torch.arange(prompt + completion) >= prompt,
            seed=number,
        )
        for number, (prompt, completion) in enumerate(shapes)
    ]


def fill(model: Any, rows: list[Canvas], sampling: SamplingParams, max_tokens: int = 1 << 40) -> list[Filled]:
    engine = Engine(model, sampling, max_tokens=max_tokens, end_ids=[END])
    for row in rows:
        engine.add(row)
    return engine.run()


def assert_same(ours: list[Filled], expected: list[Filled]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.ids_L, b.ids_L) and torch.equal(a.step_map_L, b.step_map_L)
        torch.testing.assert_close(a.probability_L, b.probability_L, atol=1e-5, rtol=0, equal_nan=True)


def mixed() -> list[Canvas]:
    """Several lengths, and a row whose hole is its beginning."""
    rows = canvases([(5, 12), (9, 12), (3, 7), (5, 12), (0, 14)])
    return [*rows[:-1], replace(rows[-1], hidden_L=torch.arange(14) < 9)]


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_caches_are_exact_where_keys_cannot_change(family, cache, temperature):
    """In one layer keys and values are those of the token itself, so windows must equal whole passes to the last token."""
    model = model_of(1, family)
    rows = mixed()
    blocks = params(block_size=4, temperature=temperature)
    expected = fill(model, rows, blocks)
    for max_tokens in (1 << 40, 60):  # with rows that come and go
        ours = fill(model, rows, replace(blocks, cache=cache), max_tokens)
        assert_same(ours, expected)
        assert sum(row.passes for row in ours) < 0.75 * sum(row.passes for row in expected)


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_always_fresh_is_exact(family, cache):
    model = model_of(3, family)
    rows = mixed()
    blocks = params(block_size=4)
    assert_same(fill(model, rows, replace(blocks, cache=cache, refresh_every=1)), fill(model, rows, blocks))


def test_stale_caches_are_not_exact():
    """Or the tests above could not fail."""
    model, rows = model_of(3), mixed()
    exact = fill(model, rows, params(block_size=4))
    stale = fill(model, rows, params(block_size=4, cache="dual"))
    assert any(not torch.equal(a.probability_L, b.probability_L) for a, b in zip(exact, stale, strict=True))


def test_cached_rows_do_not_depend_on_their_company():
    model, rows = model_of(3), mixed()
    sampling = params(block_size=4, cache="prefix", refresh_every=3, temperature=1.0)
    assert_same(fill(model, rows, sampling, 70), [fill(model, [row], sampling)[0] for row in rows])


def test_blocks_are_filled_from_the_left():
    model, rows = model_of(2), canvases([(4, 12)])
    step_map = fill(model, rows, params(block_size=4))[0].step_map_L[4:]
    blocks = step_map.view(3, 4)
    assert bool((blocks[0].max() < blocks[1].min()) and (blocks[1].max() < blocks[2].min()))
    assert bool((step_map < 12).all())
    assert not torch.equal(step_map.sort().values, step_map)  # within a block by confidence


def test_a_window_counts_as_its_share_of_a_pass():
    """4 blocks of 4 in a row of 20, a step each position but the first: per block one whole pass, then windows of 5."""
    row = fill(model_of(2), canvases([(4, 16)]), params(steps=16, block_size=4, cache="dual"))[0]
    windows = 4 * (sum(count > 0 for count in (0, 1, 1, 2)) - 1)
    assert row.passes == pytest.approx(4 + windows * 5 / 20)
    assert row.exact_passes == 15


def probabilities(rows: list[list[float]]) -> torch.Tensor:
    """[R, W] of certainties as score_N and select_RW."""
    return torch.tensor(rows)


def test_confidence_threshold_by_hand():
    scores = probabilities([[0.95, 0.5, 0.9], [0.1, 0.2, 0.3]])
    select = torch.ones(2, 3, dtype=torch.bool)
    assert how_many(scores.flatten(), select, params(confidence_threshold=0.9)).tolist() == [2, 1]
    select[0, 0] = False
    assert how_many(scores[select], select, params(confidence_threshold=0.9)).tolist() == [1, 1]


def test_confidence_factor_by_hand():
    """(n + 1)(1 - c_n) < 1: 2 * .1 and 3 * .2 are below it, 4 * .3 is not."""
    scores = probabilities([[0.7, 0.9, 0.8], [0.99, 0.99, 0.99]])
    select = torch.ones(2, 3, dtype=torch.bool)
    assert how_many(scores.flatten(), select, params(confidence_factor=1.0)).tolist() == [2, 3]


def test_entropy_budget_by_hand():
    """The entropies before the n-th sum to 0, .1, .3, .7: a budget of .3 allows three."""
    scores = -probabilities([[0.4, 0.1, 0.2, 0.8], [0.9, 0.9, 0.9, 0.9]])
    select = torch.ones(2, 4, dtype=torch.bool)
    assert how_many(scores.flatten(), select, params(entropy_budget=0.31)).tolist() == [3, 1]


def test_certainties_are_the_models_own():
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    sampling = params(confidence_threshold=0.5, temperature=3.0, top_k=1)
    assert certainties(logits, sampling).tolist() == pytest.approx([0.5])
    entropy = certainties(logits, params(entropy_budget=1.0, temperature=3.0, top_k=1))
    assert entropy.tolist() == pytest.approx([-1.5 * math.log(2)])


def test_a_threshold_that_nothing_reaches_reveals_one_position_a_pass():
    model = table(num_tokens=6, vocabulary=30, scale=0.1)
    row = fill(model, canvases([(0, 6)]), params(confidence_threshold=1.0, steps=1))[0]
    assert row.step_map_L.sort().values.tolist() == list(range(6)) and row.passes == 6


def test_sure_positions_go_together():
    logits = torch.zeros(6, 30)
    logits[[1, 4], 20] = 30.0
    for sampling in (params(confidence_threshold=0.99), params(confidence_factor=0.5)):
        row = fill(Table(logits), canvases([(0, 6)]), sampling)[0]
        assert (row.step_map_L == 0).nonzero().flatten().tolist() == [1, 4], sampling
        assert row.passes == 5
    row = fill(Table(logits), canvases([(0, 6)]), params(entropy_budget=1e-3))[0]
    first = (row.step_map_L == 0).nonzero().flatten().tolist()
    assert len(first) == 3 and {1, 4} < set(first)  # and one that is not sure: alone it can contradict nothing
    assert row.passes == 4


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
def test_several_tokens_a_step(algorithm):
    row = fill(model_of(2), canvases([(4, 12)]), params(tokens_per_step=5, algorithm=algorithm))[0]
    assert torch.bincount(row.step_map_L[4:]).tolist() == [5, 5, 2]


@pytest.mark.parametrize("end", [END, 0])  # 0 is what padded columns hold, too
def test_early_end_fills_what_is_behind(end):
    logits = torch.zeros(8, 30)
    logits[torch.arange(8), 20] = torch.tensor([5.0, 4, 3, 9, 2, 8, 1, 1])
    logits[3, 20], logits[3, end] = 0, 9.0  # the surest position ends the row
    model = Table(logits)
    engine = Engine(model, params(steps=8, early_end=True), max_tokens=100, end_ids=[end])
    engine.add(canvases([(2, 8)])[0])
    row = engine.run()[0]
    assert row.ids_L[2:].tolist() == [20] * 3 + [end] * 5
    assert row.step_map_L[5:].tolist() == [1] * 5 and row.probability_L[6:].isnan().all()
    assert row.passes == 4 and row.exact_passes == 7
    assert not row.probability_L[:6].isnan().any()


def test_end_tokens_of_the_prompt_end_nothing():
    ids = torch.tensor([[END, 1, END, 9, 9]])
    revealed = torch.tensor([[False, True, False, False, False]])
    fill_RW, _ = after_end(ids, revealed, torch.tensor([[False, False, False, True, True]]), (END,))
    assert not fill_RW.any()


def test_options_do_not_touch_an_exact_run():
    assert params().is_exact and params(temperature=1.0, top_k=3).is_exact
    for changes in ({"block_size": 4}, {"early_end": True}, {"tokens_per_step": 2}, {"confidence_threshold": 0.9}):
        assert not params(**changes).is_exact and params(**changes).exactly() == params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "dual"}, "cache: 'dual' needs sampling.block_size"),
        ({"cache": "both", "block_size": 4}, "cache: 'both' must be one of none, prefix, dual"),
        ({"refresh_every": 4}, "refresh_every: 4 needs sampling.cache"),
        ({"block_size": 0}, "block_size: 0 must be"),
        ({"confidence_threshold": 1.5}, r"confidence_threshold: 1.5 must be null or in \(0, 1\]"),
        ({"confidence_threshold": 0.9, "tokens_per_step": 2}, "tokens_per_step: 2 set together with"),
        ({"entropy_budget": 0.1, "algorithm": "origin"}, "entropy_budget: 0.1 needs another algorithm than origin"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(ValueError, match=message):
        params(**changes)


def test_early_end_needs_end_tokens_and_an_open_end():
    with pytest.raises(ValueError, match="early_end: needs the ids"):
        Engine(model_of(1), params(early_end=True), max_tokens=100)
    engine = Engine(model_of(1), params(early_end=True), max_tokens=100, end_ids=[END])
    with pytest.raises(ValueError, match="early_end: tokens are given behind a hole"):
        engine.add(Canvas(ids_L=torch.tensor([1, 2, 3]), hidden_L=torch.tensor([False, True, False]), seed=0))
