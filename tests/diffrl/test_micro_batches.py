"""Micro-batches by hand: budgets, buckets, and the same number of them on every rank."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffrl.micro_batches import crop_prompts, cut_finer, micro_batches, rows_of_groups, select_groups
from diffrl.saved_batch import load_batch, save_batch
from diffrl.types import MaskViews, ScoringBatch, TrainBatch

GROUP, PROMPT, COMPLETION = 3, 10, 5


def batch_of(lengths: Sequence[int]) -> ScoringBatch:
    """One group per prompt length; views: everything, and two halves. 1 + 3 + 3 = 7 rows of distinct inputs."""
    rows = len(lengths) * GROUP
    mask = torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths).repeat_interleave(GROUP)[:, None]
    half = torch.arange(COMPLETION) < 2
    hidden = torch.stack([torch.ones(COMPLETION, dtype=torch.bool), half, ~half])[:, None].expand(3, rows, COMPLETION)
    ids = torch.arange(len(lengths)).repeat_interleave(GROUP)[:, None]
    return ScoringBatch(
        prompt_ids_BP=ids.expand(rows, PROMPT).masked_fill(~mask, -1),
        prompt_mask_BP=mask,
        completion_ids_BC=ids.expand(rows, COMPLETION) * 100 + torch.arange(rows)[:, None],
        scored_BC=torch.arange(COMPLETION) <= torch.arange(rows)[:, None],
        views=(MaskViews(hidden_SBC=hidden, weight_SBC=hidden / 2),),
        group_size=GROUP,
    )


def test_rows_of_groups():
    batch = batch_of([4, 9])
    assert rows_of_groups(batch) == [7, 7]
    hidden = batch.views[0].hidden_SBC.clone()
    hidden[0, 4, 1] = False  # one sibling of the second group shows a token: nothing is shared there
    batch = replace(batch, views=(batch.views[0], MaskViews(hidden_SBC=hidden, weight_SBC=hidden / 2)))
    assert rows_of_groups(batch) == [7, 9]


def test_groups_of_similar_length_share_a_micro_batch():
    batch = batch_of([2, 9, 3, 8])
    # Two groups of up to 9 + 5 tokens: 2 * 7 * 14 = 196. Longest first: groups 1, 3, 2, 0.
    assert micro_batches(batch, num_ranks=1, max_tokens=196) == [[(1, 3), (2, 0)]]
    assert micro_batches(batch, num_ranks=1, max_tokens=195) == [[(1,), (3, 2), (0,)]]
    assert micro_batches(batch, num_ranks=1, max_tokens=10**6) == [[(1, 3, 2, 0)]]
    assert micro_batches(batch, num_ranks=1, max_tokens=1) == [[(1,), (3,), (2,), (0,)]]


def test_ranks_have_as_many_micro_batches():
    batch = batch_of([9, 1, 9, 1, 9, 1])
    assert micro_batches(batch, num_ranks=2, max_tokens=10**6) == [[(0, 4, 3)], [(2, 1, 5)]]
    # Rank 0 holds 9, 9, 1 and rank 1 holds 9, 1, 1; a budget of one long group lets only the short ones pair up.
    assert micro_batches(batch, num_ranks=2, max_tokens=7 * 14) == [[(0,), (4,), (3,)], [(2,), (1,), (5,)]]
    assert micro_batches(batch_of([9, 9, 1]), num_ranks=3, max_tokens=1) == [[(0,)], [(1,)], [(2,)]]


def test_without_buckets_groups_stay_in_order():
    batch = batch_of([2, 9, 3, 8])
    assert micro_batches(batch, num_ranks=2, max_tokens=10**6, bucket=False) == [[(0, 1)], [(2, 3)]]
    assert micro_batches(batch, num_ranks=2, max_tokens=2 * 7 * 15 - 1, bucket=False) == [[(0,), (1,)], [(2,), (3,)]]


def test_cut_finer_halves_the_largest():
    assert cut_finer([(0, 1, 2), (3,)], 4) == [(0,), (1,), (2,), (3,)]
    assert cut_finer([(0, 1, 2, 3)], 2) == [(0, 1), (2, 3)]
    assert cut_finer([(5,)], 1) == [(5,)]


def train_batch_of(lengths: Sequence[int]) -> TrainBatch:
    rows = len(lengths) * GROUP
    return TrainBatch(
        scoring=batch_of(lengths),
        loss_mask_BC=torch.arange(COMPLETION) < torch.arange(rows)[:, None],
        advantages_B=torch.arange(rows).float(),
        ref_logprobs_IBC=torch.arange(rows * COMPLETION).reshape(1, rows, COMPLETION).float(),
        num_loss_tokens=77,
        num_loss_rows=11,
    )


def test_select_and_crop():
    batch = select_groups(train_batch_of([2, 9, 3, 8]), (2, 0))
    assert batch.advantages_B.tolist() == [6, 7, 8, 0, 1, 2]
    assert batch.loss_mask_BC.sum(1).tolist() == [5, 5, 5, 0, 1, 2]
    assert batch.ref_logprobs_IBC is not None and batch.ref_logprobs_IBC[0, :, 0].tolist() == [30, 35, 40, 0, 5, 10]
    assert (batch.num_loss_tokens, batch.num_loss_rows) == (77, 11)
    assert batch.scoring.scored_BC.sum(1).tolist() == [5, 5, 5, 1, 2, 3]
    cropped = crop_prompts(batch.scoring)
    assert cropped.prompt_ids_BP.tolist() == [[2, 2, 2]] * 3 + [[-1, 0, 0]] * 3
    assert cropped.prompt_mask_BP.tolist() == [[True] * 3] * 3 + [[False, True, True]] * 3
    assert cropped.completion_ids_BC[:, 0].tolist() == [206, 207, 208, 0, 1, 2]
    assert cropped.views[0].weight_SBC.shape == (3, 6, COMPLETION)


def test_a_saved_batch_comes_back(tmp_path):
    batch = train_batch_of([2, 9])
    batch = replace(batch, loss_mask_BC=batch.scoring.scored_BC)  # one tensor in two places
    save_batch(tmp_path / "a" / "batch", batch, {"version": 3})
    back = load_batch(tmp_path / "a" / "batch")
    assert (
        (back.num_loss_tokens, back.num_loss_rows) == (77, 11)
        and back.scoring.group_size == GROUP
        and len(back.scoring.views) == 1
    )
    for name in ("loss_mask_BC", "advantages_B", "ref_logprobs_IBC"):
        assert torch.equal(getattr(back, name), getattr(batch, name)), name
    for name in ("prompt_ids_BP", "prompt_mask_BP", "completion_ids_BC", "scored_BC"):
        assert torch.equal(getattr(back.scoring, name), getattr(batch.scoring, name)), name
    assert torch.equal(back.scoring.views[0].hidden_SBC, batch.scoring.views[0].hidden_SBC)
    assert torch.equal(back.scoring.views[0].weight_SBC, batch.scoring.views[0].weight_SBC)
