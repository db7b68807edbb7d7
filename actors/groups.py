"""Groups on their way: the pipeline sample -> judge on two pools of workers, and the buffer in front of the learner.

A sampled group goes on to the judge as an object reference, from node to node; the driver reads it too, to draw its
views. Whether a group is given up is the pools' business; then it leaves the pipeline on all of its ways.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.calls import Done, GivenUp
from actors.pool import WorkerPool, wait_for
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

    def __init__(
        self,
        rollouts: WorkerPool,
        judges: WorkerPool,
        *,
        judge_attempts: int,
        also: WorkerPool | None = None,
        on_sampled: Callable[[RolloutGroup], None] = lambda group: None,
        on_also: Callable[[int, Any], None] = lambda ordinal, value: None,
        on_given_up: Callable[[Request, str], None] = stop,
    ):
        """`on_sampled` sees each group as soon as it exists, and submits a call about it to the pool `also`, if there is one,
        whose result goes to `on_also`. `on_given_up` hears of groups that broke their workers, and why; it may be one that is
        judged already, when `also` broke on it."""
        self.rollouts = rollouts
        self.judges = judges
        self.pools = [rollouts, judges, *([also] if also else [])]
        self.judge_attempts = judge_attempts
        self.on_sampled, self.on_also, self.on_given_up = on_sampled, on_also, on_given_up
        self.asked: dict[int, Request] = {}  # until all about them is done
        self.ways = 1 if also is None else 2  # of a sampled group
        self.ways_done: dict[int, int] = {}
        self.groups: dict[int, tuple[RolloutGroup, ray.ObjectRef]] = {}  # sampled and not judged yet
        self.attempts: dict[int, int] = {}  # to judge them
        self.done: list[ScoredGroup] = []
        self.num_rejudged = 0  # times that a group went to a judge again

    @property
    def busy(self) -> bool:
        return any(pool.busy for pool in self.pools)

    def submit(self, request: Request) -> None:
        self.asked[request.ordinal] = request
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

    def run(self, requests: Iterable[Request]) -> list[ScoredGroup]:
        """All of these, one behind the other."""
        for request in requests:
            self.submit(request)
        while self.busy:
            self.advance()
        return self.taken()

    def taken(self) -> list[ScoredGroup]:
        """What is done since the last look."""
        done, self.done = self.done, []
        return done

    def advance(self, beside: "Sequence[ray.ObjectRef]" = ()) -> "list[ray.ObjectRef]":
        """Wait a moment for something to happen, here or to the references `beside`, and pass on what has; those of the
        references that are ready."""
        ready = wait_for(self.pools, beside)
        for pool in self.pools:
            while pool.outcomes:
                self.take_in(pool, pool.outcomes.popleft())
        return ready

    def take_in(self, pool: WorkerPool, outcome: Done | GivenUp) -> None:
        ordinal = outcome.call.key
        assert ordinal is not None
        if isinstance(outcome, GivenUp):
            for other in self.pools:
                other.forget(ordinal)
            for kept in (self.groups, self.attempts, self.ways_done):
                kept.pop(ordinal, None)
            self.on_given_up(self.asked.pop(ordinal), outcome.reason)
        elif pool is self.rollouts:
            self.groups[ordinal] = (outcome.value, outcome.ref)
            self.judges.submit(ordinal, "score", outcome.ref, None)
            self.on_sampled(outcome.value)
        elif pool is self.judges:
            group, ref = self.groups[ordinal]
            self.attempts[ordinal] = self.attempts.get(ordinal, 0) + 1
            if all(j.valid for j in outcome.value) or self.attempts[ordinal] >= self.judge_attempts:
                del self.groups[ordinal], self.attempts[ordinal]
                own = len(group.rollouts)
                judgements, twins = outcome.value[:own], outcome.value[own:]
                self.done.append(ScoredGroup(group=group, judgements=judgements, twin_judgements=twins))
                self.end_way(ordinal)
            else:
                self.num_rejudged += 1
                self.judges.submit(ordinal, "score", ref, outcome.value, avoid=outcome.slot)
        else:
            self.on_also(ordinal, outcome.value)
            self.end_way(ordinal)

    def end_way(self, ordinal: int) -> None:
        """A request holds its weights in the object store: it is let go with the last of what is done about it."""
        self.ways_done[ordinal] = self.ways_done.get(ordinal, 0) + 1
        if self.ways_done[ordinal] == self.ways:
            del self.asked[ordinal], self.ways_done[ordinal]


class GroupBuffer:
    """Whole groups between sampling and learning: reserve a slot per ordinal, commit what arrives in any order, take by
    ordinal. What the learner sees therefore does not depend on who finished first.

    Nobody ever waits for a slot: a run asks for the groups of a step and of the `max_staleness` steps after it, whose
    slots are the capacity, and asks for no more before it has taken those of a step.
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

    def holds(self, ordinal: int) -> bool:
        """Whether the group has been committed."""
        return self.slots.get(ordinal) is not None

    @property
    def num_committed(self) -> int:
        return sum(group is not None for group in self.slots.values())

    def drop(self, ordinal: int) -> None:
        """Free the slot of a group that was given up, whether it had been committed or not."""
        del self.slots[ordinal]

    def look(self, ordinals: Sequence[int]) -> list[ScoredGroup]:
        """These groups, all of which must have been committed."""
        groups = [group for ordinal in ordinals if (group := self.slots[ordinal]) is not None]
        assert len(groups) == len(ordinals), "a group that was never committed"
        return groups

    def take(self, ordinals: Sequence[int]) -> list[ScoredGroup]:
        """Look, and free their slots."""
        groups = self.look(ordinals)
        for ordinal in ordinals:
            del self.slots[ordinal]
        return groups
