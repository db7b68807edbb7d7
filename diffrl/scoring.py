"""Views -> log-probs: the one function that learner, reference, old scores and evaluation call.

Only hidden tokens go through the vocabulary head. A view that hides everything is the same input for all siblings of
a prompt, so it is run once per group.

Shapes: B rows, P prompt, C completion, L = P + C, S views, N groups, G siblings, V vocabulary.
"""

import torch
from torch import Tensor, nn

from diffrl.types import MaskViews, ScoringBatch


def token_logprobs(logits_XV: Tensor, targets_X: Tensor) -> Tensor:
    """log softmax(logits) at the targets, in float32, without keeping the normalised matrix."""
    logits_XV = logits_XV.float()
    return logits_XV.gather(-1, targets_X[..., None]).squeeze(-1) - logits_XV.logsumexp(-1)


def completion_logprobs(
    model: nn.Module,
    batch: ScoringBatch,
    views: MaskViews,
    *,
    mask_token_id: int,
    attend_padding: bool = False,
) -> Tensor:
    """Estimated log-prob of every completion token, [B, C]: sum over views of weight * log p(token | what the view shows).

    The completion always fills its whole window of C positions; padding of the prompt is never attended
    (`attend_padding=True` is the release's behaviour, for parity tests).
    """
    mask_BP = torch.ones_like(batch.prompt_mask_BP) if attend_padding else batch.prompt_mask_BP
    targets_BC = batch.completion_ids_BC
    mask_BL = torch.cat([mask_BP, torch.ones_like(targets_BC, dtype=torch.bool)], dim=1)
    total_BC = torch.zeros(targets_BC.shape, dtype=torch.float32, device=targets_BC.device)
    for hidden_BC, weight_BC in zip(views.hidden_SBC, views.weight_SBC, strict=True):
        if batch.group_size > 1 and bool(hidden_BC.all()):
            logprobs_BC = shared_view_logprobs(model, batch, mask_BL, mask_token_id)
        else:
            noised_BC = targets_BC.masked_fill(hidden_BC, mask_token_id)
            select_BL = torch.cat([torch.zeros_like(batch.prompt_mask_BP), hidden_BC], dim=1)
            logits_XV = model(torch.cat([batch.prompt_ids_BP, noised_BC], dim=1), mask_BL, select_BL)
            logprobs_BC = torch.zeros_like(total_BC).masked_scatter(
                hidden_BC, token_logprobs(logits_XV, targets_BC[hidden_BC])
            )
        total_BC = total_BC + weight_BC * logprobs_BC
    return total_BC


def shared_view_logprobs(model: nn.Module, batch: ScoringBatch, mask_BL: Tensor, mask_token_id: int) -> Tensor:
    """Log-probs [B, C] with everything hidden: one forward pass per prompt instead of one per completion."""
    group_size = batch.group_size
    num_rows, num_tokens = batch.completion_ids_BC.shape
    prompt_NP = batch.prompt_ids_BP[::group_size]
    masked_NC = torch.full_like(batch.completion_ids_BC[::group_size], mask_token_id)
    select_NL = torch.cat(
        [torch.zeros_like(prompt_NP, dtype=torch.bool), torch.ones_like(masked_NC, dtype=torch.bool)], 1
    )
    logits_XV = model(torch.cat([prompt_NP, masked_NC], dim=1), mask_BL[::group_size], select_NL).float()
    logits_NCV = logits_XV.reshape(-1, num_tokens, logits_XV.shape[-1])
    targets_NCG = batch.completion_ids_BC.reshape(-1, group_size, num_tokens).transpose(1, 2)
    # One normaliser per position serves all siblings; only their target logits differ.
    logprobs_NCG = logits_NCV.gather(-1, targets_NCG) - logits_NCV.logsumexp(-1, keepdim=True)
    return logprobs_NCG.transpose(1, 2).reshape(num_rows, num_tokens)


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
        views=views,
        group_size=batch.group_size,
    )


def to_device(batch: ScoringBatch, device: str | torch.device) -> ScoringBatch:
    return ScoringBatch(
        prompt_ids_BP=batch.prompt_ids_BP.to(device),
        prompt_mask_BP=batch.prompt_mask_BP.to(device),
        completion_ids_BC=batch.completion_ids_BC.to(device),
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
        views=tuple(
            MaskViews(
                hidden_SBC=torch.cat([b.views[i].hidden_SBC for b in batches], dim=1),
                weight_SBC=torch.cat([b.views[i].weight_SBC for b in batches], dim=1),
            )
            for i in range(len(first.views))
        ),
        group_size=first.group_size,
    )
