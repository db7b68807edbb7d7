"""Pools and pipeline on real actors that fail in the ways the pools are made for."""

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import ray

from actors.groups import GroupBuffer, Pipeline, Request
from actors.pool import Done, WorkerPool, WorkersKeepDyingError, next_outcome
from actors.reward import NOT_JUDGED
from actors.weights import Entry, Tensors, Weights, fetch
from diffrl.config import SupervisionConfig
from diffrl.sampler import SamplingParams
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

PROBLEM = Problem(id="p", prompt="", prompt_tests=(), reward_tests=("assert f(1) == 1",))
PASSED = Judgement(reward=2.5, format=1.0, pass_rate=1.0, statuses=("passed",), cpu_s=0.0)


def group_of(ordinal: int, num_rollouts: int = 2) -> RolloutGroup:
    ids = np.zeros(3, dtype=np.int32)
    rollouts = tuple(
        Rollout(sample_index=i, seed=i, completion_ids_C=ids, step_map_C=ids, probability_C=ids, num_tokens=3, text="")
        for i in range(num_rollouts)
    )
    return RolloutGroup(problem=PROBLEM, ordinal=ordinal, policy_version=0, prompt_ids_P=ids, rollouts=rollouts)


class Sampler:
    """Answers with an empty group of the ordinal that was asked for."""

    def generate(self, problem, ordinal, seeds, params, weights, guarded) -> RolloutGroup:
        return group_of(ordinal, len(seeds))


class Judge:
    """Fails on the second sample of every group; the second judge of a test does not."""

    def __init__(self, flaky: bool):
        self.flaky = flaky

    def score(self, group: RolloutGroup, previous: tuple[Judgement, ...] | None) -> tuple[Judgement, ...]:
        known = previous or (NOT_JUDGED,) * len(group.rollouts)
        failed = {1} if self.flaky else set()
        return tuple(j if j.valid else (NOT_JUDGED if i in failed else PASSED) for i, j in enumerate(known))


class Mortal:
    """Dies on its first call when told to."""

    def __init__(self, dies: bool):
        self.dies = dies

    def work(self, value: int) -> int:
        if self.dies:
            ray.actor.exit_actor()
        return value * value


def pool_of(actor_class: type, arguments: list[tuple], size: int | None = None, **settings: Any) -> WorkerPool:
    """Workers with these constructor arguments in turn, the last ones for every further worker."""
    remaining = list(arguments)
    remote = ray.remote(actor_class).options(num_cpus=0.1)

    def make():
        return remote.remote(*(remaining.pop(0) if len(remaining) > 1 else remaining[0]))

    return WorkerPool(make, size or len(arguments), config=SupervisionConfig(backoff_s=0.1, max_losses=3, **settings))


def results_of(pool: WorkerPool) -> dict[int | None, Any]:
    """By key, of all that is under way; nothing is given up."""
    results = {}
    while (found := next_outcome([pool])) is not None:
        assert isinstance(found[1], Done), found[1]
        results[found[1].call.key] = found[1].value
    return results


def requests(count: int) -> list[Request]:
    weights = Weights(
        version=0, hf_config={}, num_tokens=None, tensors=Tensors(entries=(), hashes=(), buckets=()), adapter=None
    )
    params = SamplingParams(algorithm="entropy", steps=1, temperature=0.0, top_p=None, top_k=None)
    return [Request(ordinal=o, problem=PROBLEM, seeds=(1, 2), params=params, weights=weights) for o in range(count)]


def run_pipeline(judges: list[tuple], attempts: int) -> list[ScoredGroup]:
    rollouts, judge_pool = pool_of(Sampler, [()]), pool_of(Judge, judges)
    try:
        pipeline = Pipeline(rollouts, judge_pool, judge_attempts=attempts)
        scored = sorted(pipeline.run(requests(4)), key=lambda scored: scored.group.ordinal)
        assert not any((pipeline.asked, pipeline.groups, pipeline.attempts, pipeline.ways_done))  # nor weights in them
        return scored
    finally:
        rollouts.close()
        judge_pool.close()


def test_what_one_judge_could_not_judge_another_one_does(ray_cluster):
    scored = run_pipeline([(True,), (False,)], attempts=2)
    assert [s.judgements for s in scored] == [(PASSED, PASSED)] * 4


def test_what_no_judge_could_judge_comes_back_unjudged_and_unpaid(ray_cluster):
    scored = run_pipeline([(True,), (True,)], attempts=2)
    assert [s.judgements for s in scored] == [(PASSED, NOT_JUDGED)] * 4


def test_calls_of_dead_workers_are_made_again(ray_cluster):
    pool = pool_of(Mortal, [(True,), (True,), (False,)], size=2)  # those that replace the first two stay alive
    try:
        for value in range(6):
            pool.submit(value, "work", value)
        assert results_of(pool) == {value: value * value for value in range(6)}
        assert pool.num_restarts == 2
    finally:
        pool.close()


class Meeting:
    """Its first three calls answer when all of them are there; how the later ones spread over the workers is open."""

    def __init__(self):
        self.three = threading.Barrier(3)
        self.ordinals = itertools.count()

    def work(self, value: int) -> int:
        if next(self.ordinals) < 3:
            self.three.wait(timeout=30)
        return value


def test_a_worker_has_as_many_calls_at_a_time_as_it_may(ray_cluster):
    remote = ray.remote(Meeting).options(num_cpus=0.1, max_concurrency=3)
    pool = WorkerPool(remote.remote, 2, in_flight=3)
    try:
        pool.wait_ready()
        for value in range(12):
            pool.submit(value, "work", value)
            assert len(pool.running) == min(value + 1, 6)
        assert results_of(pool) == {value: value for value in range(12)}
    finally:
        pool.close()


def test_workers_that_always_die_end_the_run(ray_cluster):
    pool = pool_of(Mortal, [(True,)], problem_attempts=10)
    try:
        pool.submit(0, "work", 1)
        with pytest.raises(WorkersKeepDyingError, match="keep dying"):
            results_of(pool)
        assert pool.num_restarts == 3
    finally:
        pool.close()


def test_a_buffer_holds_as_many_groups_as_it_may():
    buffer = GroupBuffer(capacity=3)
    for ordinal in (4, 5, 6):
        buffer.reserve(ordinal)
    with pytest.raises(AssertionError):
        buffer.reserve(7)
    for ordinal in (6, 4):
        buffer.commit(ScoredGroup(group=group_of(ordinal), judgements=(PASSED, PASSED)))
    assert [buffer.holds(ordinal) for ordinal in (4, 5, 6, 7)] == [True, False, True, False]
    with pytest.raises(AssertionError):
        buffer.take([4, 5, 6])  # 5 is still on its way


def test_buffer_keeps_what_is_not_taken():
    buffer = GroupBuffer(capacity=3)
    for ordinal in (0, 1, 2):
        buffer.reserve(ordinal)
    for ordinal in (2, 0, 1):
        buffer.commit(ScoredGroup(group=group_of(ordinal), judgements=(PASSED, PASSED)))
    assert [s.group.ordinal for s in buffer.look([0, 1])] == [0, 1]
    assert [s.group.ordinal for s in buffer.take([0, 1])] == [0, 1]
    buffer.reserve(3)
    buffer.drop(3)
    assert [s.group.ordinal for s in buffer.take([2])] == [2] and not buffer.slots


def test_damaged_weights_are_refused(ray_cluster):
    bucket = np.zeros(8, dtype=np.uint8)
    entry = Entry(name="w", dtype="float32", shape=(2,), bucket=0, offset=0)
    tensors = Tensors(entries=(entry,), hashes=("not this",), buckets=(ray.put(bucket),))
    with pytest.raises(RuntimeError, match=r"version 7.*hash"):
        fetch(Weights(version=7, hf_config={}, num_tokens=None, tensors=tensors, adapter=None))
