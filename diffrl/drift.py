"""Does approximate sampling still give what exact sampling would? A guard over a run.

In reinforcement learning confidence drifts upward, and what decodes by confidence reveals more and more at once, until the
completions fall apart. So some rollouts of every step are sampled exactly too, from the same prompt and seed: their twins,
which are judged and never learned from. What the pairs say are metrics of the step:

- guard/agreement: share of equal tokens, up to the first end token of either. Above temperature 0 two samplers that
  are equally good agree on few, for they draw at different positions first.
- guard/reward_difference: approximate - exact, mean over the pairs of which both were judged.
- guard/confidence_drift: approximate - exact, of the mean probability that a completion's tokens had when they were revealed.
- guard/rollouts: pairs.

Beyond a limit of `SamplingConfig` (means over its last `guard_window` steps, from when there are so many) the run goes on
exactly. C: completion.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from diffrl.config import SamplingConfig
from diffrl.seeds import derive_seed
from diffrl.types import Rollout, ScoredGroup


def guarded(seeds: Sequence[Sequence[int]], share: float) -> list[tuple[int, ...]]:
    """Indices of the rollouts of each group that get a twin, by their seeds alone: about `share` of them, at least one."""
    place = {
        (group, index): derive_seed(seed, "guard") / 2**63
        for group, row in enumerate(seeds)
        for index, seed in enumerate(row)
    }
    first = min(place, key=lambda key: place[key])
    chosen = {key for key, value in place.items() if value < share} | {first}
    return [tuple(i for i in range(len(row)) if (group, i) in chosen) for group, row in enumerate(seeds)]


def drift_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """What the twins of a step say; nothing when there are none."""
    pairs = [(s.group.rollouts[twin.sample_index], twin) for s in scored for twin in s.group.twins]
    if not pairs:
        return {}
    equal, compared = (sum(counts) for counts in zip(*(equal_tokens(*pair) for pair in pairs), strict=True))
    metrics = {
        "guard/rollouts": float(len(pairs)),
        "guard/agreement": equal / compared,
        "guard/confidence_drift": fmean(confidence(rollout) - confidence(twin) for rollout, twin in pairs),
    }
    differences = [
        s.judgements[twin.sample_index].reward - judgement.reward
        for s in scored
        for twin, judgement in zip(s.group.twins, s.twin_judgements, strict=True)
        if judgement.valid and s.judgements[twin.sample_index].valid
    ]
    if differences:
        metrics["guard/reward_difference"] = fmean(differences)
    return metrics


def equal_tokens(a: Rollout, b: Rollout) -> tuple[int, int]:
    """(equal, compared)"""
    length = min(a.num_tokens, b.num_tokens)
    return int((a.completion_ids_C[:length] == b.completion_ids_C[:length]).sum()), length


def confidence(rollout: Rollout) -> float:
    """Mean probability of the tokens up to the end."""
    return float(rollout.probability_C[: rollout.num_tokens].astype(np.float64).mean())


def beyond_limits(steps: Sequence[Mapping[str, float]], limits: SamplingConfig) -> list[str]:
    """Which limits the last `guard_window` steps' metrics are beyond, one clause each; none before there are so many."""
    if len(steps) < limits.guard_window:
        return []
    window = steps[-limits.guard_window :]

    def mean(name: str) -> float:
        """NaN, which is beyond no limit, when nothing was measured."""
        values = [step[f"guard/{name}"] for step in window if f"guard/{name}" in step]
        return fmean(values) if values else math.nan

    agreement, difference, drift = mean("agreement"), mean("reward_difference"), mean("confidence_drift")
    lowest, drop, most = limits.guard_min_agreement, limits.guard_max_reward_drop, limits.guard_max_confidence_drift
    checks = [
        (agreement < lowest, f"guard/agreement {agreement:.3f} is below guard_min_agreement {lowest:g}"),
        (
            -difference > drop,
            f"guard/reward_difference {difference:.3f} is a drop beyond guard_max_reward_drop {drop:g}",
        ),
        (abs(drift) > most, f"guard/confidence_drift {drift:.3f} is beyond guard_max_confidence_drift {most:g}"),
    ]
    return [clause for beyond, clause in checks if beyond]
