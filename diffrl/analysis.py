"""Numbers about finished rollouts: pass@k, gains with an interval, and how left-to-right a decoding order is.

An order is the sequence of positions as they were revealed, one per step: order[t] is the position of step t.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import comb

import numpy as np
import numpy.typing as npt

_RESAMPLES_AT_ONCE = 1000  # bounds the memory of the bootstrap to 1000 rows of indices


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, eq. 1; exact integers here, so no product is needed. One problem;
    average over problems. Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}: must be between 0 and num_samples ({num_samples})")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}: must be between 1 and num_samples ({num_samples}); draw more samples")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def paired_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    seed: int,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(gain, low, high): mean of after - before, and its percentile interval when PROBLEMS are drawn anew.

    `before` and `after` hold one score per problem in the same order (such as pass@1), so the difference
    between problems cancels. The interval covers the choice of problems, not the sampling seeds nor the
    training run.
    """
    before_N, after_N = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_N.ndim != 1 or before_N.shape != after_N.shape or before_N.size == 0:
        raise ValueError(
            f"before, after: shapes {before_N.shape} and {after_N.shape}: give one score per problem in both"
        )
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: must be at least 1")
    gain_N = after_N - before_N
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        means.append(gain_N[rng.integers(gain_N.size, size=(rows, gain_N.size))].mean(axis=1))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(gain_N.mean()), float(low), float(high)


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
