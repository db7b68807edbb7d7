"""Views -> log-probs: the one function that learner, reference, old scores and evaluation call.

The backbone runs once for every distinct input: a view that hides everything is the same row for all siblings of a
prompt, and so are two siblings that wrote the same tokens and are masked alike. Only tokens that a view scores, of those
that the loss can use, go through the vocabulary head, which keeps no logits (models/head.py). All views go through the
model in ONE call: with the coupled estimator 2G + 1 rows for a group of G.

Shapes: B rows, P prompt, C completion, L = P + C, S views, R = S * B rows of views, U distinct inputs, N scored tokens.
"""

import torch
from torch import Tensor, nn

from diffrl.types import MaskViews, ScoringBatch


def completion_logprobs(
    model: nn.Module,
    batch: ScoringBatch,
    views: MaskViews,
    *,
    mask_token_id: int,
    attend_padding: bool = False,
    share: bool = True,
    chunked: bool = True,
) -> Tensor:
    """Estimated log-prob of every completion token, [B, C] in float32 (float64 for a float64 model): sum over views of
    weight * log p(token | what the view shows). Tokens outside `batch.scored_BC` are 0.

    The completion always fills its whole window of C positions; padding of the prompt is never attended
    (`attend_padding=True` is the release's behaviour, for parity tests). `share` and `chunked` are the levers described
    above; without them every row of every view is computed by itself, and all logits exist at once.
    """
    attended_BP = torch.ones_like(batch.prompt_mask_BP) if attend_padding else batch.prompt_mask_BP
    targets_BC = batch.completion_ids_BC
    num_views, (num_rows, num_tokens) = len(views.hidden_SBC), targets_BC.shape
    noised_RC = targets_BC.masked_fill(views.hidden_SBC, mask_token_id).flatten(0, 1)
    scored_RC = ((views.weight_SBC != 0) & batch.scored_BC).flatten(0, 1)
    ids_RL = torch.cat([batch.prompt_ids_BP.repeat(num_views, 1), noised_RC], dim=1)
    attended_RL = torch.cat([attended_BP.repeat(num_views, 1), torch.ones_like(noised_RC, dtype=torch.bool)], dim=1)

    wanted_R = scored_RC.any(1)
    wanted_R[0] |= ~wanted_R.any()  # a model that is sharded over ranks must be called by all of them
    source_U, input_R = distinct_rows(ids_RL.masked_fill(~attended_RL, -1), wanted_R, share=share)
    scored_UC = torch.zeros(len(source_U), num_tokens, dtype=torch.bool, device=targets_BC.device)
    row_N, column_N = scored_RC.nonzero(as_tuple=True)
    scored_UC[input_R[row_N], column_N] = True
    # Where each scored token's hidden state comes among those that go through the head, which wants them in order.
    position_UC = scored_UC.flatten().cumsum(0).reshape(scored_UC.shape) - 1
    position_N, order_N = position_UC[input_R[row_N], column_N].sort(stable=True)
    row_N, column_N = row_N[order_N], column_N[order_N]
    prompt_UP = torch.zeros(len(source_U), batch.prompt_ids_BP.shape[1], dtype=torch.bool, device=targets_BC.device)
    logprobs_N = model(
        ids_RL[source_U],
        attended_RL[source_U],
        torch.cat([prompt_UP, scored_UC], dim=1),
        position_N,
        targets_BC[row_N % num_rows, column_N],
        chunked=chunked,
    )
    logprobs_RC = torch.zeros(scored_RC.shape, dtype=logprobs_N.dtype, device=logprobs_N.device)
    logprobs_RC = logprobs_RC.index_put((row_N, column_N), logprobs_N)
    return (views.weight_SBC * logprobs_RC.reshape(num_views, num_rows, num_tokens)).sum(0)


def distinct_rows(rows_RL: Tensor, wanted_R: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """(source_U, input_R): the first of each set of equal wanted rows, in their order, and for each wanted row the place
    of its equal among them (0 for rows that are not wanted). Without `share` every wanted row stands for itself."""
    wanted_W = wanted_R.nonzero().flatten()
    input_R = torch.zeros(len(rows_RL), dtype=torch.long, device=rows_RL.device)
    if not share:
        input_R[wanted_W] = torch.arange(len(wanted_W), device=rows_RL.device)
        return wanted_W, input_R
    equal_UL, class_W = torch.unique(rows_RL[wanted_W], dim=0, return_inverse=True)
    first_U = wanted_W.new_full((len(equal_UL),), len(rows_RL)).scatter_reduce_(0, class_W, wanted_W, "amin")
    source_U, order_U = first_U.sort()
    input_R[wanted_W] = order_U.argsort()[class_W]
    return source_U, input_R


def slice_rows(batch: ScoringBatch, start: int, stop: int) -> ScoringBatch:
    """Rows start..stop of a batch; both must lie between groups, so that siblings stay together."""
    assert start % batch.group_size == 0 and stop % batch.group_size == 0
    views = tuple(
        MaskViews(hidden_SBC=v.hidden_SBC[:, start:stop], weight_SBC=v.weight_SBC[:, start:stop]) for v in batch.views
    )
    return ScoringBatch(
        prompt_ids_BP=batch.prompt_ids_BP[start:stop],
        prompt_mask_BP=batch.prompt_mask_BP[start:stop],
        completion_ids_BC=batch.completion_ids_BC[start:stop],
        scored_BC=batch.scored_BC[start:stop],
        views=views,
        group_size=batch.group_size,
    )


def to_device(batch: ScoringBatch, device: str | torch.device) -> ScoringBatch:
    return ScoringBatch(
        prompt_ids_BP=batch.prompt_ids_BP.to(device),
        prompt_mask_BP=batch.prompt_mask_BP.to(device),
        completion_ids_BC=batch.completion_ids_BC.to(device),
        scored_BC=batch.scored_BC.to(device),
        views=tuple(
            MaskViews(hidden_SBC=v.hidden_SBC.to(device), weight_SBC=v.weight_SBC.to(device)) for v in batch.views
        ),
        group_size=batch.group_size,
    )


def concat_batches(batches: list[ScoringBatch]) -> ScoringBatch:
    """Groups of one step side by side. All have the same widths and number of inner iterations."""
    first = batches[0]
    return ScoringBatch(
        prompt_ids_BP=torch.cat([b.prompt_ids_BP for b in batches]),
        prompt_mask_BP=torch.cat([b.prompt_mask_BP for b in batches]),
        completion_ids_BC=torch.cat([b.completion_ids_BC for b in batches]),
        scored_BC=torch.cat([b.scored_BC for b in batches]),
        views=tuple(
            MaskViews(
                hidden_SBC=torch.cat([b.views[i].hidden_SBC for b in batches], dim=1),
                weight_SBC=torch.cat([b.views[i].weight_SBC for b in batches], dim=1),
            )
            for i in range(len(first.views))
        ),
        group_size=first.group_size,
    )
