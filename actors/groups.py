"""Groups on their way: the pipeline sample -> judge on two pools of workers, and the buffer in front of the learner.

A sampled group goes on to the judge as an object reference, from node to node; the driver reads it too, to draw its
views. Whether a group is given up is the pools' business; then it leaves the pipeline on all of its ways.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from actors.calls import GivenUp
from actors.pool import WorkerPool, next_outcome
from actors.weights import Weights
from diffrl.errors import RunStoppedError
from diffrl.sampler import SamplingParams
from diffrl.types import Problem, RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One group to sample and judge. Request(ordinal=17, problem=Problem(...), seeds=(1, 2), params=..., weights=...)"""

    ordinal: int
    problem: Problem
    seeds: tuple[int, ...]
    params: SamplingParams
    weights: Weights
    guarded: tuple[int, ...] = ()  # indices of samples to take once more, exactly


def stop(request: Request, reason: str) -> None:
    raise RunStoppedError(f"{request.problem.id} broke the workers that it was given to: {reason}")


class Pipeline:
    """Requests in, scored groups out, in whatever order they finish. Judging starts while later groups are sampled."""

    def __init__(self, rollouts: WorkerPool, judges: WorkerPool, *, judge_attempts: int):
        self.rollouts = rollouts
        self.judges = judges
        self.judge_attempts = judge_attempts

    def run(
        self,
        requests: Iterable[Request],
        on_sampled: Callable[[RolloutGroup], None] = lambda group: None,
        also: WorkerPool | None = None,
        on_also: Callable[[int, Any], None] = lambda key, value: None,
        on_given_up: Callable[[Request, str], None] = stop,
    ) -> Iterator[ScoredGroup]:
        """Sample and judge. `on_sampled` sees each group as soon as it exists, and may submit work about it to the
        pool `also`, whose results have all gone to `on_also` when the iteration ends. `on_given_up` hears of groups that
        broke their workers, and why; it may be one that has been handed out already, when `also` broke on it.
        """
        asked = {request.ordinal: request for request in requests}
        for request in asked.values():
            self.rollouts.submit(
                request.ordinal,
                "generate",
                request.problem,
                request.ordinal,
                request.seeds,
                request.params,
                request.weights,
                request.guarded,
            )
        groups: dict[int, tuple[RolloutGroup, ray.ObjectRef]] = {}
        attempts: dict[int, int] = {}
        pools = [self.rollouts, self.judges, *([also] if also else [])]
        while (found := next_outcome(pools)) is not None:
            pool, outcome = found
            ordinal = outcome.call.key
            assert ordinal is not None
            if isinstance(outcome, GivenUp):
                for other in pools:
                    other.forget(ordinal)
                groups.pop(ordinal, None)
                on_given_up(asked[ordinal], outcome.reason)
            elif pool is self.rollouts:
                groups[ordinal] = (outcome.value, outcome.ref)
                self.judges.submit(ordinal, "score", outcome.ref, None)
                on_sampled(outcome.value)
            elif pool is self.judges:
                group, ref = groups[ordinal]
                attempts[ordinal] = attempts.get(ordinal, 0) + 1
                if all(j.valid for j in outcome.value) or attempts[ordinal] >= self.judge_attempts:
                    del groups[ordinal]
                    own = len(group.rollouts)
                    judgements, twins = outcome.value[:own], outcome.value[own:]
                    yield ScoredGroup(group=group, judgements=judgements, twin_judgements=twins)
                else:
                    self.judges.submit(ordinal, "score", ref, outcome.value, avoid=outcome.slot)
            else:
                on_also(ordinal, outcome.value)


class GroupBuffer:
    """Whole groups between sampling and learning: reserve a slot per ordinal, commit what arrives in any order, take in
    order of ordinals. What the learner sees therefore does not depend on who finished first.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.slots: dict[int, ScoredGroup | None] = {}

    def reserve(self, ordinal: int) -> None:
        assert len(self.slots) < self.capacity, "reserved more groups than the staleness bound allows"
        assert ordinal not in self.slots
        self.slots[ordinal] = None

    def commit(self, scored: ScoredGroup) -> None:
        ordinal = scored.group.ordinal
        assert self.slots[ordinal] is None, "a group is committed once"
        self.slots[ordinal] = scored

    def drop(self, ordinal: int) -> None:
        """Free the slot of a group that was given up, whether it had been committed or not."""
        del self.slots[ordinal]

    def take(self, count: int) -> list[ScoredGroup]:
        """The `count` lowest ordinals; all must have been committed."""
        ordinals = sorted(self.slots)[:count]
        taken = [self.slots.pop(o) for o in ordinals]
        groups = [group for group in taken if group is not None]
        assert len(groups) == count, "took a group that was never committed"
        return groups
