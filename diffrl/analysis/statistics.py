"""pass@k, and gains with an interval: what is drawn anew is the problem, never the sample."""

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

_RESAMPLES_AT_ONCE = 1000  # bounds the memory of the bootstrap to 1000 rows of indices
_OF_AN_ESTIMATE = 2000  # resamples; an analysis makes hundreds


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
    means = resampled_means(gain_N, np.random.default_rng(seed), num_resamples)
    return float(gain_N.mean()), *percentiles(means, confidence)


def independent_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    seed: int,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(gain, low, high): mean of `after` less mean of `before`, where the two are scores of different problems: both are
    drawn anew, each by itself."""
    before_N, after_M = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_N.ndim != 1 or after_M.ndim != 1 or not (before_N.size and after_M.size):
        raise ValueError(f"before, after: shapes {before_N.shape} and {after_M.shape}: give at least one score in both")
    rng = np.random.default_rng(seed)
    means = resampled_means(after_M, rng, num_resamples) - resampled_means(before_N, rng, num_resamples)
    return float(after_M.mean() - before_N.mean()), *percentiles(means, confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems and its 95% interval. Estimate(mean=0.41, low=0.36, high=0.46, count=60)"""

    mean: float
    low: float
    high: float
    count: int  # problems with a value


def estimate(values: npt.ArrayLike, *, seed: int = 0) -> Estimate | None:
    """Of one value per problem, NaN where there is none; None when there is none at all."""
    value_N = np.asarray(values, dtype=np.float64)
    value_N = value_N[~np.isnan(value_N)]
    if value_N.size == 0:
        return None
    mean, low, high = paired_bootstrap(np.zeros_like(value_N), value_N, seed=seed, num_resamples=_OF_AN_ESTIMATE)
    return Estimate(mean=mean, low=low, high=high, count=value_N.size)


def resampled_means(value_N: np.ndarray, rng: np.random.Generator, num_resamples: int) -> np.ndarray:
    means: list[np.ndarray] = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        means.append(value_N[rng.integers(value_N.size, size=(rows, value_N.size))].mean(axis=1))
    return np.concatenate(means)


def percentiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)
