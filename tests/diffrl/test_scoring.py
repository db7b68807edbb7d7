"""Scoring against a slow and obvious implementation: whole logits, no padding, one row and one view at a time."""

import pytest
import torch
from transformers import Qwen2Config

from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models.dream import DreamModel
from diffrl.scoring import completion_logprobs, concat_batches, slice_rows, to_device
from diffrl.types import MaskViews, ScoringBatch
from diffrl.views import ViewOptions

MASK_ID, PAD_ID = 63, 62
PROMPT, COMPLETION = 7, 11
PADS = (4, 0, 2)  # on the left, of each group's prompt
TOLERANCE = 1e-5


def tiny_dream(seed: int = 0) -> DreamModel:
    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # attention that is far from uniform
    )
    config._attn_implementation = "sdpa"
    return DreamModel.from_config(config, mask_token_id=MASK_ID, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> DreamModel:
    return tiny_dream()


def make_batch(
    group_size: int = 2, pads: tuple[int, ...] = PADS, num_iterations: int = 2, seed: int = 0
) -> ScoringBatch:
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 60, (len(pads), PROMPT), generator=g)
    mask = torch.arange(PROMPT) >= torch.tensor(pads)[:, None]
    prompts = prompts.masked_fill(~mask, PAD_ID)
    return ScoringBatch(
        prompt_ids_BP=prompts.repeat_interleave(group_size, 0),
        prompt_mask_BP=mask.repeat_interleave(group_size, 0),
        completion_ids_BC=torch.randint(0, 60, (len(pads) * group_size, COMPLETION), generator=g),
        scored_BC=torch.ones(len(pads) * group_size, COMPLETION, dtype=torch.bool),
        views=tuple(
            draw_views(
                ESTIMATORS["coupled"],
                seeds=[100 * i + n for n in range(len(pads))],
                group_size=group_size,
                num_tokens=COMPLETION,
                options=ViewOptions(num_pairs=2),
            )
            for i in range(num_iterations)
        ),
        group_size=group_size,
    )


def replaced(batch: ScoringBatch, **fields) -> ScoringBatch:
    names = ("prompt_ids_BP", "prompt_mask_BP", "completion_ids_BC", "scored_BC", "views", "group_size")
    return ScoringBatch(**{name: getattr(batch, name) for name in names} | fields)


def naive_logprobs(model: DreamModel, batch: ScoringBatch, views: MaskViews) -> torch.Tensor:
    """Stock backbone on the unpadded row, full additive mask, full log-softmax; the logits at i - 1 are about i."""
    total = torch.zeros(batch.completion_ids_BC.shape)
    for row, completion in enumerate(batch.completion_ids_BC):
        prompt = batch.prompt_ids_BP[row][batch.prompt_mask_BP[row]]
        for hidden, weight in zip(views.hidden_SBC[:, row], views.weight_SBC[:, row], strict=True):
            noised = torch.where(hidden, torch.tensor(MASK_ID), completion)
            ids = torch.cat([prompt, noised])[None]
            full = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
            logprobs = model.backbone(input_ids=ids, attention_mask=full, use_cache=False).logits[0].log_softmax(-1)
            for k in range(COMPLETION):
                if hidden[k]:
                    total[row, k] += weight[k] * logprobs[len(prompt) + k - 1, completion[k]]
    return total


def score(model: DreamModel, batch: ScoringBatch, iteration: int = 0, **options) -> torch.Tensor:
    return completion_logprobs(model, batch, batch.views[iteration], mask_token_id=MASK_ID, **options)


def gradients(model: DreamModel, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).reshape(logprobs.shape)).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_equals_the_naive_implementation(model):
    batch = make_batch()
    for iteration, views in enumerate(batch.views):
        with torch.no_grad():
            got, expected = score(model, batch, iteration), naive_logprobs(model, batch, views)
        assert got.dtype == torch.float32
        assert torch.allclose(got, expected, atol=TOLERANCE)
        assert expected.std() > 0.5  # the model is no uniform one


def test_gradients_equal_those_of_the_naive_implementation(model):
    batch = make_batch()
    got = gradients(model, score(model, batch))
    expected = gradients(model, naive_logprobs(model, batch, batch.views[0]))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item())), name


def test_sharing_the_fully_hidden_view_changes_nothing(model):
    shared = make_batch(group_size=3)
    private = replaced(shared, group_size=1)
    lone, together = score(model, private), score(model, shared)
    assert torch.allclose(together, lone, atol=TOLERANCE)
    expected, got = gradients(model, lone), gradients(model, together)
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item())), name


def inputs_of(model: DreamModel, batch: ScoringBatch, views: MaskViews, **options) -> list[torch.Tensor]:
    """The ids of each call that scoring makes of the model."""
    calls: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    with torch.no_grad():
        completion_logprobs(model, batch, views, mask_token_id=MASK_ID, **options)
    hook.remove()
    return calls


def halves(num_rows: int) -> MaskViews:
    """Everything hidden, the first half, the second half."""
    first = (torch.arange(COMPLETION) < 5).expand(num_rows, COMPLETION)
    hidden = torch.stack([torch.ones_like(first), first, ~first])
    return MaskViews(hidden_SBC=hidden, weight_SBC=hidden * 0.5)


def test_equal_inputs_run_once_and_all_in_one_call(model):
    batch = make_batch(group_size=3)
    views = halves(9)
    (ids,) = inputs_of(model, batch, views)
    assert len(ids) == 3 + 9 + 9  # the fully hidden view once for each of three prompts
    (ids,) = inputs_of(model, batch, views, share=False)
    assert len(ids) == 3 * 9
    copies = batch.completion_ids_BC.clone()
    copies[1] = copies[0]  # a sibling that wrote the same
    copies[2, :5] = copies[0, :5]  # and one that wrote the same first half, which the third view shows
    (ids,) = inputs_of(model, replaced(batch, completion_ids_BC=copies), views)
    assert len(ids) == 3 + 8 + 7


def test_inputs_without_a_scored_token_do_not_run(model):
    batch, views = make_batch(group_size=2), halves(6)
    short = batch.scored_BC.clone()
    short[3], short[5, 5:] = False, False
    (ids,) = inputs_of(model, replaced(batch, scored_BC=short), views)
    assert len(ids) == 3 + 5 + 4
    (ids,) = inputs_of(model, replaced(batch, scored_BC=torch.zeros_like(short)), views)
    assert len(ids) == 1  # all ranks must call a sharded model


def test_scores_beyond_the_end_are_zero_and_the_others_unchanged(model):
    batch = make_batch()
    scored = torch.arange(COMPLETION) < torch.tensor([11, 3, 1, 0, 7, 9])[:, None]
    everything = score(model, batch)
    some = score(model, replaced(batch, scored_BC=scored))
    assert torch.allclose(some, everything * scored, atol=TOLERANCE)
    expected = gradients(model, everything * scored)
    got = gradients(model, some)
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item())), name


def test_padding_is_invisible(model):
    batch = make_batch(pads=(4,), group_size=2)
    unpadded = replaced(
        batch, prompt_ids_BP=batch.prompt_ids_BP[:, 4:], prompt_mask_BP=torch.ones(2, PROMPT - 4, dtype=torch.bool)
    )
    garbage = replaced(batch, prompt_ids_BP=torch.where(batch.prompt_mask_BP, batch.prompt_ids_BP, 17))
    with torch.no_grad():
        expected = score(model, unpadded)
        assert torch.allclose(score(model, batch), expected, atol=TOLERANCE)
        assert torch.allclose(score(model, garbage), expected, atol=TOLERANCE)
        release = score(model, batch, attend_padding=True)
    assert (release - expected).abs().max() > 0.1


def test_attend_padding_changes_padded_rows_only(model):
    batch = make_batch()
    with torch.no_grad():
        gap = (score(model, batch) - score(model, batch, attend_padding=True)).abs().amax(1)
    padded = ~batch.prompt_mask_BP.all(1)
    assert padded.tolist() == [True, True, False, False, True, True]
    assert (gap[padded] > 1e-2).all() and (gap[~padded] < TOLERANCE).all()


def test_a_row_does_not_depend_on_the_others(model):
    batch = make_batch()
    completions = (batch.completion_ids_BC + 1) % 60
    completions[2] = batch.completion_ids_BC[2]
    prompts = batch.prompt_ids_BP.clone()
    prompts[:2], prompts[4:] = 5, 6
    others = replaced(batch, completion_ids_BC=completions, prompt_ids_BP=prompts)
    with torch.no_grad():
        first, second = score(model, batch), score(model, others)
        assert torch.allclose(first[2], second[2], atol=TOLERANCE)
        assert (first[[0, 1, 3, 4, 5]] - second[[0, 1, 3, 4, 5]]).abs().amax(1).min() > 1e-2
        alone = slice_rows(batch, 2, 4)
        assert torch.allclose(score(model, alone), first[2:4], atol=TOLERANCE)


def test_a_tokens_score_depends_on_what_its_view_shows(model):
    """Changing a shown token changes the scores of the hidden ones; changing a hidden one only its own."""
    batch = make_batch(group_size=1, pads=(0,))
    hidden = torch.zeros(1, 1, COMPLETION, dtype=torch.bool)
    hidden[..., [1, 6]] = True
    views = MaskViews(hidden_SBC=hidden, weight_SBC=hidden.float())

    def scored(position: int | None = None) -> torch.Tensor:
        ids = batch.completion_ids_BC.clone()
        if position is not None:
            ids[0, position] = (ids[0, position] + 7) % 60
        changed = replaced(batch, completion_ids_BC=ids, views=(views,))
        with torch.no_grad():
            return score(model, changed)[0]

    base = scored()
    assert base.nonzero().flatten().tolist() == [1, 6]
    later = scored(9)  # to the right of both: attention is bidirectional
    assert abs(later[1] - base[1]) > 1e-3 and abs(later[6] - base[6]) > 1e-3
    own = scored(6)
    assert abs(own[6] - base[6]) > 1e-3 and own[1] == base[1]


def test_a_view_may_hide_nothing(model):
    batch = make_batch(group_size=2, pads=(3,))
    hidden = torch.zeros(2, 2, COMPLETION, dtype=torch.bool)
    hidden[0, 1, 4:] = True  # first view: nothing in row 0; second view: nothing at all
    views = MaskViews(hidden_SBC=hidden, weight_SBC=hidden * 1.5)
    with torch.no_grad():
        got = completion_logprobs(model, batch, views, mask_token_id=MASK_ID)
        assert torch.equal(got[0], torch.zeros(COMPLETION))
        assert torch.allclose(got, naive_logprobs(model, batch, views), atol=TOLERANCE)


def test_the_weighted_sum_is_linear_in_the_weights(model):
    batch = make_batch()
    views = batch.views[0]
    doubled = MaskViews(hidden_SBC=views.hidden_SBC, weight_SBC=2 * views.weight_SBC)
    with torch.no_grad():
        once = completion_logprobs(model, batch, views, mask_token_id=MASK_ID)
        twice = completion_logprobs(model, batch, doubled, mask_token_id=MASK_ID)
    assert torch.allclose(twice, 2 * once, atol=TOLERANCE)


def test_slicing_and_concatenation_are_inverse(model):
    batch = make_batch()
    parts = [slice_rows(batch, 0, 2), slice_rows(batch, 2, 6)]
    assert torch.equal(parts[1].completion_ids_BC, batch.completion_ids_BC[2:])
    assert torch.equal(parts[1].views[1].weight_SBC, batch.views[1].weight_SBC[:, 2:])
    for joined in (concat_batches(parts), to_device(batch, "cpu")):
        for name in ("prompt_ids_BP", "prompt_mask_BP", "completion_ids_BC"):
            assert torch.equal(getattr(joined, name), getattr(batch, name)), name
        assert joined.group_size == 2 and len(joined.views) == 2
        for got, expected in zip(joined.views, batch.views, strict=True):
            assert torch.equal(got.hidden_SBC, expected.hidden_SBC) and torch.equal(got.weight_SBC, expected.weight_SBC)
    with torch.no_grad():
        pieces = torch.cat([score(model, part) for part in parts])
        assert torch.allclose(pieces, score(model, batch), atol=TOLERANCE)


@pytest.mark.parametrize(("start", "stop"), [(1, 4), (0, 3)])
def test_siblings_are_never_parted(start, stop):
    with pytest.raises(AssertionError):
        slice_rows(make_batch(), start, stop)
