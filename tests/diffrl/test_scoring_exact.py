"""No lever of scoring changes a number: in float64, over random shapes, paddings, lengths and groups.

Stock norms compute in float32 whatever the model's type; here they do not, or nothing below 1e-7 could be seen.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffrl.coupled_grpo import coupled_grpo_loss
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models import head
from diffrl.models.dream import DreamModel
from diffrl.scoring import completion_logprobs, concat_batches, slice_rows
from diffrl.types import MaskViews, ScoringBatch
from diffrl.views import ViewOptions
from tests.diffrl.test_scoring import MASK_ID, PAD_ID, replaced, tiny_dream

DIFFUSION = sorted(name for name, estimator in ESTIMATORS.items() if estimator.family == "diffusion")


class ExactNorm(nn.Module):
    def __init__(self, stock: Any):
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.fixture(scope="module")
def model() -> DreamModel:
    model = tiny_dream().double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, ExactNorm(child))
    return model


def random_batch(
    pads: list[int],
    *,
    group_size: int,
    prompt: int,
    completion: int,
    lengths: list[int],
    estimator: str = "coupled",
    options: ViewOptions | None = None,
    seed: int = 0,
) -> ScoringBatch:
    """`pads` on the left of each group's prompt; completion lengths taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(pads) * group_size
    mask = (torch.arange(prompt) >= torch.tensor(pads)[:, None]).repeat_interleave(group_size, 0)
    ids = torch.randint(60, (len(pads), prompt), generator=generator).repeat_interleave(group_size, 0)
    length_B1 = torch.tensor([min(lengths[row % len(lengths)], completion) for row in range(rows)])[:, None]
    views = draw_views(
        ESTIMATORS[estimator],
        seeds=[seed * 10 + group for group in range(len(pads))],
        group_size=group_size,
        num_tokens=completion,
        options=options or ViewOptions(),
    )
    return ScoringBatch(
        prompt_ids_BP=ids.masked_fill(~mask, PAD_ID),
        prompt_mask_BP=mask,
        completion_ids_BC=torch.randint(6, (rows, completion), generator=generator),  # few tokens: siblings repeat
        scored_BC=torch.arange(completion) < length_B1,
        views=(views,),
        group_size=group_size,
    )


def score(model: DreamModel, batch: ScoringBatch, **levers: bool) -> torch.Tensor:
    return completion_logprobs(model, batch, batch.views[0], mask_token_id=MASK_ID, **levers)


def gradient(model: DreamModel, *logprobs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Of a random weighted sum of all log-probs, as one vector. `logprobs`: all rows, or parts of them in order."""
    rows = [len(part) for part in logprobs]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(sum(rows), logprobs[0].shape[1], generator=generator, dtype=logprobs[0].dtype).split(rows)
    model.zero_grad()
    for part, weight in zip(logprobs, weights, strict=True):
        (part * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).norm() <= tolerance * max(1.0, b.norm().item()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pads=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    group_size=st.integers(1, 4),
    completion=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    estimator=st.sampled_from(DIFFUSION),
    share_masks=st.booleans(),
    chunk=st.sampled_from([1, 64, 200, 1 << 24]),
    kept=st.sampled_from([0, 300, 1 << 24]),
    seed=st.integers(0, 1000),
)
def test_levers_change_nothing(model, pads, group_size, completion, lengths, estimator, share_masks, chunk, kept, seed):
    batch = random_batch(
        pads,
        group_size=group_size,
        prompt=6,
        completion=completion,
        lengths=lengths,
        estimator=estimator,
        options=ViewOptions(share_masks=share_masks, share_t="row"),
        seed=seed,
    )
    plain = score(model, batch, share=False, chunked=False)
    expected = gradient(model, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.CHUNK_LOGITS, "cpu", chunk)
        patch.setitem(head.KEPT_LOGITS, "cpu", kept)
        for levers in ({"share": False}, {"chunked": False}, {}):
            lean = score(model, batch, **levers)
            assert lean.dtype == torch.float64 and close(lean.detach(), plain.detach()), levers
            assert close(gradient(model, lean), expected), levers


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    pads=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    group_size=st.integers(1, 3),
    cut=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_groups_may_be_cut_into_any_micro_batches(model, pads, group_size, cut, seed):
    batch = random_batch(pads, group_size=group_size, prompt=6, completion=5, lengths=[5, 2, 4], seed=seed)
    edges = [0, *range(cut, len(pads), cut), len(pads)]
    parts = [slice_rows(batch, a * group_size, b * group_size) for a, b in itertools.pairwise(edges)]
    whole = score(model, batch)
    expected = gradient(model, whole, seed=seed)
    pieces = [score(model, part) for part in parts]
    assert close(torch.cat(pieces).detach(), whole.detach())
    assert close(gradient(model, *pieces, seed=seed), expected)
    back = concat_batches(parts)
    assert close(score(model, back).detach(), whole.detach())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(pads=st.lists(st.integers(0, 7), min_size=1, max_size=4), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_last_layer_at_selected_positions_is_the_whole_one_there(model, pads, share, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(8) >= torch.tensor(pads)[:, None]
    ids = torch.randint(60, mask.shape, generator=generator)
    select = mask & (torch.rand(mask.shape, generator=generator) < share)
    whole = model(ids, mask)[select]
    lean = model(ids, mask, select)
    assert close(lean.detach(), whole.detach())
    if len(whole):
        assert close(gradient(model, lean), gradient(model, whole))


def test_a_row_is_the_same_alone_padded_and_in_any_company(model):
    """The proof in float64: 1e-12. In float32 the same within 1e-5 (test_scoring.py)."""
    alone = random_batch([0], group_size=1, prompt=5, completion=8, lengths=[8], seed=3)
    with torch.no_grad():
        expected = score(model, alone)
        for pads in range(0, 65, 4):
            padded = replaced(
                alone,
                prompt_ids_BP=torch.nn.functional.pad(alone.prompt_ids_BP, (pads, 0), value=PAD_ID),
                prompt_mask_BP=torch.nn.functional.pad(alone.prompt_mask_BP, (pads, 0), value=False),
            )
            assert (score(model, padded) - expected).abs().max() <= 1e-12, pads
            others = random_batch(
                [0, pads // 2], group_size=2, prompt=5 + pads, completion=8, lengths=[8, 1], seed=pads
            )
            company = concat_batches([replaced(others, group_size=1), replaced(padded, group_size=1)])
            assert (score(model, company)[4:] - expected).abs().max() <= 1e-12, pads


def test_gradient_of_the_loss_against_finite_differences(model):
    """Three tokens under the published estimator, the whole method: views, log-probs, ratio, clip, KL."""
    batch = random_batch([1, 0], group_size=2, prompt=3, completion=3, lengths=[3, 2, 3], seed=7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        now = score(model, batch)
        old, ref = (now + 0.3 * torch.randn(now.shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss() -> torch.Tensor:
        return coupled_grpo_loss(
            score(model, batch),
            old,
            ref,
            torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64),
            batch.scored_BC,
            num_loss_tokens=int(batch.scored_BC.sum()),
            clip_low=0.2,
            clip_high=0.3,
            kl_coef=0.1,
        )[0]

    model.zero_grad()
    loss().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(float(loss()))
                parameter -= sign * step * direction
        expected = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-8), name


def test_embeddings_beyond_the_tokenizer_have_no_probability(model):
    """Scores with `vocab_size` are those of a head that has only so many rows, and the others get no gradient."""
    hidden = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position, token = torch.tensor([0, 1, 1, 3]), torch.tensor([5, 0, 39, 7])
    small = head.VocabularyHead(nn.Parameter(model.backbone.lm_head.weight[:40].detach()))
    for chunked in (True, False):
        model.zero_grad()
        got = model.backbone.lm_head(hidden, position, token, vocab_size=40, chunked=chunked)
        assert close(got.detach(), small(hidden, position, token).detach())
        got.sum().backward()
        grad = model.backbone.lm_head.weight.grad
        assert grad is not None and grad[:40].abs().sum() > 0 and not grad[40:].any()


def test_bfloat16_autocast_changes_precision_only():
    model = tiny_dream()
    batch = random_batch([2, 0], group_size=2, prompt=6, completion=8, lengths=[8, 5])
    exact = score(model, batch)
    expected = gradient(model, exact)
    for chunked in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = score(model, batch, chunked=chunked)
        assert rounded.dtype == torch.float32
        assert 1e-5 < (rounded - exact).abs().max() < 0.3
        assert torch.nn.functional.cosine_similarity(gradient(model, rounded), expected, dim=0) > 0.98


def test_views_reach_the_model_as_they_are_drawn(model):
    """What the model is shown: the prompt, every token that the view does not hide, and [MASK]."""
    batch = random_batch([1], group_size=2, prompt=3, completion=4, lengths=[4], seed=2)
    hidden = torch.tensor([[[True, False, True, False], [False, False, False, True]]])
    shown: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    with torch.no_grad():
        views = MaskViews(hidden_SBC=hidden, weight_SBC=hidden.float())
        completion_logprobs(model, batch, views, mask_token_id=MASK_ID)
    hook.remove()
    expected = torch.cat([batch.prompt_ids_BP, batch.completion_ids_BC.masked_fill(hidden[0], MASK_ID)], 1)
    assert torch.equal(shown[0], expected)
