"""Measures of sampled completions, problem by problem, so that everything can be compared in pairs of problems.

Shapes: C positions of the window, K looks at them, N samples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diffrl.analysis.arness import global_ar_ness, local_ar_ness, reveal_order
from diffrl.analysis.statistics import pass_at_k

MAX_BINS = 64  # of a heat map, in each direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion. Its text is its first `num_tokens` positions, the first end token included.

    Sample(problem_id="microcode/affine-3-5", ids_C=array([412, 9, ...]), step_map_C=array([4, 0, ...]),
           probability_C=array([0.9, 0.4, ...]), num_tokens=23, passed=True)
    """

    problem_id: str
    ids_C: np.ndarray
    step_map_C: np.ndarray
    probability_C: np.ndarray  # of each token when it was revealed
    num_tokens: int
    passed: bool | None  # None: it was not judged

    def order(self) -> list[int]:
        """In which the text was revealed; see `diffrl.analysis.arness` on steps with several tokens."""
        return reveal_order(self.step_map_C[: self.num_tokens], self.probability_C[: self.num_tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What was measured of every problem, mean over its samples; NaN where nothing could be.

    Measures(problem_ids=("microcode/affine-3-5", ...), values={"global@1": array([0.41, ...]), "pass@1": ..., ...},
             num_samples=480)

    local@k, global@k: AR-ness. pass@k. order_diversity: of two samples, the share of pairs of positions that one reveals in
    this order and the other in that (0: the same order, 0.5: orders that have nothing to do with each other).
    token_diversity: of two samples, the share of positions that hold other tokens, up to the longer one's end.
    distinct: distinct texts per sample. passes: steps that revealed something, which are forward passes. tokens: of the text.
    """

    problem_ids: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    num_samples: int

    def column(self, name: str) -> dict[str, float]:
        """By problem, without those that have no value."""
        numbers = self.values.get(name, np.full(len(self.problem_ids), np.nan))
        return {id: float(v) for id, v in zip(self.problem_ids, numbers, strict=True) if not np.isnan(v)}


def measure(samples: Sequence[Sample], *, max_k: int, pass_ks: Sequence[int]) -> Measures:
    """AR-ness@1 to @max_k, pass@k and the rest. Problems stand in the order of their first samples. pass@k of a problem with
    fewer than k judged samples is NaN."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.problem_id].append(sample)
    rows = [measure_problem(group, max_k, pass_ks) for group in groups.values()]
    values = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return Measures(problem_ids=tuple(groups), values=values, num_samples=len(samples))


def measure_problem(group: Sequence[Sample], max_k: int, pass_ks: Sequence[int]) -> dict[str, float]:
    orders = [sample.order() for sample in group]
    judged = [sample.passed for sample in group if sample.passed is not None]
    row: dict[str, float] = {}
    for k in range(1, max_k + 1):
        row[f"local@{k}"] = mean_of([local_ar_ness(order, k) for order in orders])
        row[f"global@{k}"] = mean_of([global_ar_ness(order, k) for order in orders])
    for k in pass_ks:
        row[f"pass@{k}"] = pass_at_k(sum(judged), len(judged), k) if k <= len(judged) else np.nan
    pairs = list(combinations(range(len(group)), 2))
    row["order_diversity"] = mean_of([order_distance(orders[a], orders[b]) for a, b in pairs])
    row["token_diversity"] = mean_of([token_distance(group[a], group[b]) for a, b in pairs])
    row["distinct"] = len({sample.ids_C[: sample.num_tokens].tobytes() for sample in group}) / len(group)
    row["passes"] = float(np.mean([np.unique(sample.step_map_C).size for sample in group]))
    row["tokens"] = float(np.mean([sample.num_tokens for sample in group]))
    return row


def mean_of(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def order_distance(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Normalised Kendall distance over the positions that both have; None for fewer than two."""
    size = min(len(first), len(second))
    if size < 2:
        return None
    rank_a, rank_b = (np.argsort([position for position in order if position < size]) for order in (first, second))
    above = np.triu_indices(size, 1)
    rises_a, rises_b = (np.less.outer(rank, rank)[above] for rank in (rank_a, rank_b))
    return float((rises_a != rises_b).mean())


def token_distance(first: Sample, second: Sample) -> float:
    size = max(first.num_tokens, second.num_tokens)
    return float((first.ids_C[:size] != second.ids_C[:size]).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """How sure a model was of each position of a completion before the first K steps that revealed something; NaN where it is
    revealed by then.

    Looks(probability_KC=array([[0.97, 0.41, ...], [nan, 0.88, ...]]), entropy_KC=array([[0.1, 1.9, ...], ...]))
    """

    probability_KC: np.ndarray  # float32, of the most probable token
    entropy_KC: np.ndarray  # float32, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderMap:
    """When the positions of the window are revealed: share[p][s] of the tokens of position bin p come in step bin s, so a row
    sums to 1. Bins are equal in size but for rounding.

    OrderMap(num_positions=30, num_steps=30, text_tokens=21.5, share=((0.0, 0.4, ...), ...))
    """

    num_positions: int
    num_steps: int
    text_tokens: float  # mean length of the texts; behind them are end and padding tokens
    share: tuple[tuple[float, ...], ...]


def order_map(samples: Sequence[Sample]) -> OrderMap:
    """Of samples with windows of one size."""
    step_NC = np.stack([sample.step_map_C for sample in samples])
    num_positions, num_steps = step_NC.shape[1], int(step_NC.max()) + 1
    rows, columns = min(MAX_BINS, num_positions), min(MAX_BINS, num_steps)
    row_NC = np.broadcast_to(np.arange(num_positions) * rows // num_positions, step_NC.shape)
    count = np.zeros((rows, columns))
    np.add.at(count, (row_NC, step_NC * columns // num_steps), 1)
    share = count / count.sum(1, keepdims=True)
    return OrderMap(
        num_positions=num_positions,
        num_steps=num_steps,
        text_tokens=float(np.mean([sample.num_tokens for sample in samples])),
        share=tuple(tuple(float(v) for v in row) for row in share),
    )
