"""Faster than exact: fewer passes, or passes over a part of the row. Off by default; `diffrl.drift` watches them.

`block_size`: positions are revealed block by block from the left, each block with its share of the steps.

`cache` (Fast-dLLM, arXiv 2505.22618): keys and values are those of an earlier pass outside a window, which alone is
computed. The window begins at the block; with `prefix` it reaches to the end of the row, with `dual` to the end of the
block. A whole pass is made when a block begins, and every `refresh_every` passes. See windows.py.

How many positions a pass reveals, at least one (the schedule and `steps` then play no part):
- `confidence_threshold`: those whose most probable token has this probability or more (Fast-dLLM).
- `confidence_factor` f: the n most confident, as long as (n + 1) (1 - confidence of the n-th) < f (Fast-dLLM, theorem 1).
- `entropy_budget`: the n of lowest entropy, as long as the entropies of all but the last of them sum to no more than this
  many nats (EB-Sampler, arXiv 2505.24857).
- `tokens_per_step`: so many, ranked by `algorithm`.
The first three rank positions by the model's own distribution, at temperature 1 and unfiltered, whatever `algorithm` says.

`early_end`: once an end token is revealed, everything behind it is filled with it and not computed; its probability is
NaN. Only for rows whose holes reach to the end.

Shapes: as in engine.py; K sorted positions of a row.
"""

import torch
from torch import Tensor

from diffrl.sampler.params import SamplingParams


def certainties(logits_nV: Tensor, params: SamplingParams) -> Tensor:
    """By which the rules but `tokens_per_step` rank: negative entropy, or the probability of the most probable token."""
    logprobs_nV = logits_nV.float().log_softmax(-1)
    if params.entropy_budget is not None:
        return (logprobs_nV.exp() * logprobs_nV).nansum(-1)
    return logprobs_nV.amax(-1).exp()


def how_many(score_N: Tensor, select_RW: Tensor, params: SamplingParams) -> Tensor:
    """count_R: the positions to reveal of each row, at least one, by the params' rule on `certainties`."""
    score_RW = torch.full(select_RW.shape, -torch.inf, device=score_N.device)
    score_RW[select_RW] = score_N
    sorted_RK = score_RW.sort(-1, descending=True).values
    selected_RK = sorted_RK > -torch.inf
    if params.confidence_threshold is not None:
        good_RK = sorted_RK >= params.confidence_threshold
    elif params.confidence_factor is not None:
        n_K = torch.arange(1, sorted_RK.shape[1] + 1, device=score_N.device)
        good_RK = (n_K + 1) * (1 - sorted_RK) < params.confidence_factor
    else:
        assert params.entropy_budget is not None
        entropy_RK = (-sorted_RK).masked_fill(~selected_RK, 0)
        good_RK = entropy_RK.cumsum(-1) - entropy_RK <= params.entropy_budget
    return (good_RK & selected_RK).long().cumprod(-1).sum(-1).clamp(min=1)


def after_end(
    ids_RW: Tensor, revealed_RW: Tensor, hidden_RW: Tensor, end_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(fill_RW, token_R): hidden positions behind the first revealed end token of each row, and that token."""
    is_end_RW = revealed_RW & torch.isin(ids_RW, torch.tensor(end_ids, device=ids_RW.device))
    behind_RW = is_end_RW.long().cumsum(1) > 0
    return hidden_RW & behind_RW, ids_RW.gather(1, is_end_RW.long().argmax(1, keepdim=True))[:, 0]
