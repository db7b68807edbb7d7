"""How left-to-right a decoding order is: AR-ness (arXiv 2506.20639, section 4.1).

An order is the sequence of positions as they were revealed, one per step: order[t] is the position of step t.

PARALLEL DECODING. Where a step reveals several tokens, the paper's definition does not apply. Here such a step counts as that
many steps, of one token each: the most confident token first, by the probability that the model gave it when it was revealed, and
of equally probable ones the left one first. So every token counts once, whatever the number of steps; with one token a step it is
the paper's own definition; and completions of equal length can be compared over numbers of steps. The order inside a step is a
reading of ours, since the model saw none of its tokens when it chose the others: at half the steps every second transition is of
that kind. A confidence in float16, as stored rollouts have it, makes ties, which count in favour of left to right.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt


def reveal_order(step_map: npt.ArrayLike, confidence: npt.ArrayLike | None = None) -> list[int]:
    """Positions in the order in which they were revealed, from the step of each position.

    Ties within a step go by falling confidence where it is known, then from left to right (which counts in
    favour of left-to-right: with several tokens a step and no confidence, AR-ness is an upper bound).
    """
    step_C = np.asarray(step_map)
    position_C = np.arange(step_C.size)
    doubt_C = np.zeros(step_C.size) if confidence is None else -np.asarray(confidence, dtype=np.float64)
    return [int(position) for position in np.lexsort((position_C, doubt_C, step_C))]


def local_ar_ness(order: Sequence[int], k: int) -> float | None:
    """Local AR-ness@k: of the steps t >= k, the share with order[t - i] == order[t] - i for every i = 1..k.

    1.0 for left to right; None when there are no more than k steps. Source: arXiv 2506.20639, section 4.1 and
    figure 3 (its A.2 writes an equality of sets, which would also count other orders of the same k + 1
    positions).
    """
    _check_order(order, k)
    if len(order) <= k:
        return None
    run, hits = 0, 0  # run: how many times in a row the next position was the right-hand neighbour
    for previous, position in pairwise(order):
        run = run + 1 if position == previous + 1 else 0
        hits += run >= k
    return hits / (len(order) - k)


def global_ar_ness(order: Sequence[int], k: int) -> float | None:
    """Global AR-ness@k: share of steps whose position is among the k smallest that are still masked.

    k is capped at the number still masked. 1.0 for left to right; None for an empty order. Source: as
    `local_ar_ness`.
    """
    _check_order(order, k)
    if not order:
        return None
    masked, hits = sorted(order), 0
    for position in order:
        rank = bisect_left(masked, position)
        hits += rank < k
        masked.pop(rank)
    return hits / len(order)


def _check_order(order: Sequence[int], k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: must be at least 1")
    if len(set(order)) != len(order):
        raise ValueError("order reveals a position twice: give each position once, one per step")
