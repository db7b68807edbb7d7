"""In which order completions were decoded, step by step of the training: AR-ness, and a map from position to time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffrl.analysis import global_ar_ness, local_ar_ness, reveal_order

SAMPLES_PER_STEP = 24  # evenly spaced over the step's rollouts
NUM_BINS = 24  # of the relative position
AR_NESS = (
    ("local AR-ness@1", local_ar_ness, 1),
    ("global AR-ness@1", global_ar_ness, 1),
    ("global AR-ness@4", global_ar_ness, 4),
)


@dataclass(frozen=True, slots=True)
class StepOrder:
    """StepOrder(step=12, num_samples=24, ar_ness=(0.41, 0.52, 0.9), when=(0.1, 0.15, ...))"""

    step: int
    num_samples: int
    ar_ness: tuple[float | None, ...]  # means, in the order of AR_NESS
    when: tuple[float | None, ...]  # per bin of relative position: mean of relative time, 0 first, 1 last


def step_order(step: int, step_maps: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]) -> StepOrder:
    """Of some rollouts, each cut at its end token."""
    values: list[list[float]] = [[] for _ in AR_NESS]
    total, count = np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    for step_map, probability in zip(step_maps, probabilities, strict=True):
        order = reveal_order(step_map, probability if len(probability) == len(step_map) else None)
        for kept, (_, measure, k) in zip(values, AR_NESS, strict=True):
            if (value := measure(order, k)) is not None:
                kept.append(value)
        if len(order) < 2:
            continue
        time = np.empty(len(order))
        time[order] = np.arange(len(order)) / (len(order) - 1)
        if len(order) < NUM_BINS:  # a position lies in several bins
            total, count = total + time[np.arange(NUM_BINS) * len(order) // NUM_BINS], count + 1
        else:
            bins = np.arange(len(order)) * NUM_BINS // len(order)
            total, count = total + np.bincount(bins, time, NUM_BINS), count + np.bincount(bins, minlength=NUM_BINS)
    means = tuple(float(np.mean(kept)) if kept else None for kept in values)
    when = tuple(float(t / c) if c else None for t, c in zip(total, count, strict=True))
    return StepOrder(step, len(step_maps), means, when)


def sampled_rows(steps: np.ndarray) -> dict[int, np.ndarray]:
    """Step -> rows of a file that stand for it."""
    chosen = {}
    for step in np.unique(steps):
        rows = np.flatnonzero(steps == step)
        picked = np.linspace(0, len(rows) - 1, min(SAMPLES_PER_STEP, len(rows))).astype(int)
        chosen[int(step)] = rows[picked]
    return chosen
