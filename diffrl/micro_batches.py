"""Which groups a learner rank works on together: whole groups of similar prompt length, within a budget of tokens.

Padding that all prompts of a micro-batch have is cut off; scores do not depend on it. Completions keep their whole
window. The cut into micro-batches changes no sum: the loss is divided by ONE number of tokens, that of the step.

Shapes: N groups of the step, G siblings, B = N * G rows, P prompt, C completion, S views.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffrl.types import MaskViews, ScoringBatch, TrainBatch

Groups = tuple[int, ...]  # their numbers in the step's batch


def micro_batches(batch: ScoringBatch, *, num_ranks: int, max_tokens: int, bucket: bool = True) -> list[list[Groups]]:
    """For each rank its micro-batches. All ranks get as many groups and as many micro-batches, since they meet in
    collectives; a rank whose groups would fit into fewer cuts them finer.

    The tokens of a micro-batch are the rows of inputs of its groups (1 for a view that hides everything, which all
    siblings share, G for any other; equal siblings are counted each), times prompt (the longest of them) plus
    completion. It holds at least one group, however large. `bucket=False` leaves groups in their order and prompts as
    wide as they are.
    """
    num_groups = len(batch.completion_ids_BC) // batch.group_size
    assert num_groups % num_ranks == 0
    rows_N = rows_of_groups(batch)
    full = batch.prompt_mask_BP.shape[1]
    lengths_N = prompt_lengths(batch) if bucket else [full] * num_groups
    per_rank = num_groups // num_ranks
    order = sorted(range(num_groups), key=lambda n: -lengths_N[n]) if bucket else list(range(num_groups))
    shares = [order[r::num_ranks] if bucket else order[r * per_rank : (r + 1) * per_rank] for r in range(num_ranks)]

    plans: list[list[Groups]] = []
    for share in shares:
        plan: list[Groups] = []
        for group in share:  # longest first, so the first group of a micro-batch says how wide it is
            together = (*plan[-1], group) if plan else ()
            width = (lengths_N[together[0]] if together else 0) + batch.completion_ids_BC.shape[1]
            if together and sum(rows_N[n] for n in together) * width <= max_tokens:
                plan[-1] = together
            else:
                plan.append((group,))
        plans.append(plan)
    most = max(map(len, plans))
    return [cut_finer(plan, most) for plan in plans]


def cut_finer(plan: list[Groups], count: int) -> list[Groups]:
    """The same groups in the same order in `count` micro-batches: the largest is halved as often as needed."""
    plan = list(plan)
    while len(plan) < count:
        largest = max(range(len(plan)), key=lambda i: len(plan[i]))
        groups = plan[largest]
        plan[largest : largest + 1] = [groups[: len(groups) // 2], groups[len(groups) // 2 :]]
    return plan


def rows_of_groups(batch: ScoringBatch) -> list[int]:
    """Rows of inputs per group, of the inner iteration that has most of them."""
    size = batch.group_size
    rows_IN = []
    for views in batch.views:
        hidden_SN = views.hidden_SBC.unflatten(1, (-1, size)).flatten(2).all(2)
        rows_IN.append(torch.where(hidden_SN, 1, size).sum(0))
    return torch.stack(rows_IN).amax(0).tolist()


def prompt_lengths(batch: ScoringBatch) -> list[int]:
    return batch.prompt_mask_BP[:: batch.group_size].sum(1).tolist()


def select_groups(batch: TrainBatch, groups: Sequence[int]) -> TrainBatch:
    """These groups of a batch, in this order; `num_loss_tokens` and `num_loss_rows` stay those of the step."""
    size = batch.scoring.group_size
    rows = (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()
    scoring = batch.scoring
    return TrainBatch(
        scoring=ScoringBatch(
            prompt_ids_BP=scoring.prompt_ids_BP[rows],
            prompt_mask_BP=scoring.prompt_mask_BP[rows],
            completion_ids_BC=scoring.completion_ids_BC[rows],
            scored_BC=scoring.scored_BC[rows],
            views=tuple(
                MaskViews(hidden_SBC=v.hidden_SBC[:, rows], weight_SBC=v.weight_SBC[:, rows]) for v in scoring.views
            ),
            group_size=size,
        ),
        loss_mask_BC=batch.loss_mask_BC[rows],
        advantages_B=batch.advantages_B[rows],
        ref_logprobs_IBC=None if batch.ref_logprobs_IBC is None else batch.ref_logprobs_IBC[:, rows],
        num_loss_tokens=batch.num_loss_tokens,
        num_loss_rows=batch.num_loss_rows,
    )


def crop_prompts(batch: ScoringBatch) -> ScoringBatch:
    """Without the columns that are padding in every row."""
    width = int(batch.prompt_mask_BP.sum(1).max())
    start = batch.prompt_mask_BP.shape[1] - width
    return replace(batch, prompt_ids_BP=batch.prompt_ids_BP[:, start:], prompt_mask_BP=batch.prompt_mask_BP[:, start:])
