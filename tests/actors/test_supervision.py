"""Workers that freeze, hang, die of a problem or raise; and runs that get stuck."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.calls import WorkerRaisedError
from actors.groups import Pipeline, Request
from actors.pool import Done, GivenUp, WorkerPool, WorkersKeepDyingError, next_outcome
from actors.processes import in_actor, resident_mb
from actors.reward import RewardWorker
from actors.system import System, spawner
from actors.watchdog import Watchdog
from diffrl.config import RLConfig, SupervisionConfig
from diffrl.errors import RunStoppedError
from diffrl.rollout_store import read_all
from tests.actors.conftest import opened, rl_config
from tests.actors.failing_workers import Late, NoStart, Reference, Square
from tests.actors.learner_case import end
from tests.actors.test_pool import Judge, Sampler, pool_of, requests

LIMIT_S = 8.0  # of a call that takes milliseconds


def squares(folder: Path, size: int, *, threads: int = 1, watchdog: Watchdog | None = None, **settings) -> WorkerPool:
    config = SupervisionConfig(**{"generate_s": LIMIT_S, "backoff_s": 0.1, **settings})
    return WorkerPool(
        spawner(Square, {"num_cpus": 0.1, "max_concurrency": threads}, str(folder)),
        size,
        config=config,
        watchdog=watchdog,
        **({"in_flight": threads, "concurrency": threads} if threads > 1 else {}),
    )


def outcomes_of(pool: WorkerPool, method: str, values: range) -> dict[int | None, Any]:
    """By key: values, and reasons of what was given up."""
    for value in values:
        pool.submit(value, method, value)
    outcomes: dict[int | None, Any] = {}
    while (found := next_outcome([pool])) is not None:
        outcome = found[1]
        outcomes[outcome.call.key] = outcome.value if isinstance(outcome, Done) else outcome
    return outcomes


@pytest.fixture
def pool(request, ray_cluster, tmp_path):
    """Of the size, with the settings of the test's parameters."""
    made = squares(tmp_path, **request.param)
    made.wait_ready()
    yield made
    made.close()


def settings(size: int, **settings: Any):
    return pytest.mark.parametrize(
        "pool", [pytest.param({"size": size, **settings}, id=f"{size} workers")], indirect=True
    )


@settings(2)
def test_a_frozen_worker_is_replaced_within_its_deadline(pool: WorkerPool):
    pid = ray.get(in_actor(pool.workers[0], lambda worker: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert outcomes_of(pool, "work", range(6)) == {value: value**2 for value in range(6)}
    assert pool.num_restarts == 1 and LIMIT_S <= time.monotonic() - began < 10 * LIMIT_S


@settings(1)
def test_a_frozen_worker_ends_even_when_ray_forgets_it(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch):
    frozen = psutil.Process(ray.get(in_actor(pool.workers[0], lambda worker: os.getpid())))
    frozen.suspend()
    with monkeypatch.context() as patched:
        patched.setattr("actors.pool.kill", lambda actor: None)
        assert outcomes_of(pool, "work", range(2)) == {0: 0, 1: 1}
    frozen.wait(10 * LIMIT_S)


@settings(1)
def test_a_call_that_hangs_is_made_again_elsewhere(pool: WorkerPool):
    assert outcomes_of(pool, "hang_once", range(3)) == {0: 0, 1: 1, 2: 4}
    assert pool.num_restarts == 1


@settings(1)
def test_broadcasts_have_deadlines_too(pool: WorkerPool):
    assert pool.broadcast("hang_once", 1) == [1]
    assert pool.num_restarts == 1


@settings(1, backoff_s=0.4, max_backoff_s=1.0, max_losses=4, problem_attempts=10)
def test_restarts_back_off(pool: WorkerPool):
    lost_at = []
    lose = pool.lose

    def note(*args: Any, **kwargs: Any) -> None:
        lost_at.append(time.monotonic())
        lose(*args, **kwargs)

    pool.lose = note
    with pytest.raises(WorkersKeepDyingError, match=r"workers keep dying, the last one: ") as caught:
        outcomes_of(pool, "kill", range(1, 2))
    waits = [restart - loss for loss, restart in zip(lost_at, pool.restarted_at, strict=False)]
    assert len(waits) == 4 and all(wait >= delay for wait, delay in zip(waits, [0.4, 0.8, 1.0, 1.0], strict=True))
    assert "Square 0 (pid " in str(caught.value) and "  | about to divide by zero" in str(caught.value)


@settings(2, backoff_s=1000.0, max_backoff_s=1000.0)
def test_nobody_waits_for_a_worker_that_is_not_restarted_yet(pool: WorkerPool):
    end(pool.workers[0])
    assert outcomes_of(pool, "work", range(6)) == {value: value**2 for value in range(6)}
    assert pool.restarted_at == [] and list(pool.restart_at) == [0]


@settings(1, threads=3)
def test_a_suspect_runs_alone(pool: WorkerPool):
    outcomes = outcomes_of(pool, "kill_once", range(6))
    assert {key: value for key, (value, _) in outcomes.items()} == {value: value**2 for value in range(6)}
    assert [outcomes[key][1] for key in (0, 1, 2)] == [1, 1, 1]
    assert max(outcomes[key][1] for key in (3, 4, 5)) > 1  # they were never suspected


@settings(1, problem_attempts=2)
def test_a_call_that_kills_every_worker_is_given_up(pool: WorkerPool):
    outcomes = outcomes_of(pool, "kill", range(4))
    given_up = outcomes.pop(1)
    assert outcomes == {0: 0, 2: 4, 3: 9}
    assert isinstance(given_up, GivenUp) and given_up.call.losses == 2 <= pool.num_restarts
    assert "Square 0 (pid " in given_up.reason and "about to divide by zero" in given_up.reason


@settings(1)
def test_what_a_worker_raises_names_it_and_its_last_words(pool: WorkerPool):
    with pytest.raises(WorkerRaisedError) as caught:
        outcomes_of(pool, "fail", range(7, 8))
    message = str(caught.value)
    node = ray.get_runtime_context().get_node_id()
    assert message.startswith("fail raised ValueError: cannot square 7; this was Square 0 (pid ")
    assert f"{node[:12]})" in message and message.endswith("  | looking at 7")
    assert isinstance(caught.value.__cause__, ValueError) and "in give_up" in str(caught.value.__cause__)
    assert pool.num_restarts == 0


def test_what_a_constructor_raises_is_raised_at_the_start(ray_cluster):
    pool = pool_of(NoStart, [()])
    with pytest.raises(
        WorkerRaisedError, match=r"its constructor raised KeyError: 'no such device'; this was NoStart 0"
    ):
        pool.wait_ready()


def test_a_constructor_has_a_deadline(ray_cluster):
    pool = pool_of(Late, [(1000.0,), (0.0,)], size=1, start_s=LIMIT_S)
    try:
        pool.wait_ready()
        assert pool.num_restarts == 1 and pool.call("work", 3) == 3
    finally:
        pool.close()


def test_a_group_that_breaks_the_reference_leaves_the_pipeline(ray_cluster):
    rollouts, judges = pool_of(Sampler, [()]), pool_of(Judge, [(False,)])
    reference = pool_of(Reference, [()], problem_attempts=2)
    scores: dict[int, Any] = {}
    given_up: list[tuple[int, str]] = []

    def on_given_up(request: Request, reason: str) -> None:
        given_up.append((request.ordinal, reason))

    def on_sampled(group: Any) -> None:
        reference.submit(group.ordinal, "logprobs", group.ordinal)

    try:
        pipeline = Pipeline(
            rollouts,
            judges,
            judge_attempts=1,
            also=reference,
            on_sampled=on_sampled,
            on_also=scores.__setitem__,
            on_given_up=on_given_up,
        )
        pipeline.run(requests(4))
        assert scores == {0: 0, 1: 1, 3: 3}
        assert [ordinal for ordinal, _ in given_up] == [2] and "Reference 0" in given_up[0][1]
        assert not any(pool.busy for pool in (rollouts, judges, reference))
        assert not any((pipeline.asked, pipeline.groups, pipeline.attempts, pipeline.ways_done))
    finally:
        for pool in (rollouts, judges, reference):
            pool.close()


def test_what_does_not_ring_is_found(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(WorkerPool, "listen_for", lambda pool, ref: None)
    pool = squares(tmp_path, 2)
    try:
        pool.wait_ready()
        assert outcomes_of(pool, "work", range(6)) == {value: value**2 for value in range(6)}
        assert pool.num_restarts == 0
    finally:
        pool.close()


# Memory


@settings(2)
def test_a_healthy_worker_is_renewed_without_a_loss(pool: WorkerPool):
    used = pool.broadcast("__ray_call__", resident_mb)
    assert all(10 < mb < 2000 for mb in used)
    old = pool.workers
    pool.renew(1)
    assert outcomes_of(pool, "work", range(6)) == {value: value**2 for value in range(6)}
    assert pool.workers[0] is old[0] and pool.workers[1] is not old[1]
    assert pool.num_restarts == 1 and pool.losses == 0


# The watchdog


def test_a_stuck_run_stops_with_the_stacks_of_its_workers(ray_cluster, tmp_path):
    with Watchdog(tmp_path, 3.0) as watchdog:
        pool = squares(tmp_path, 1, watchdog=watchdog, generate_s=1000.0)
        watchdog.watched.append(pool.states)
        try:
            pool.wait_ready()
            with pytest.raises(RunStoppedError) as caught:
                outcomes_of(pool, "hang_once", range(1, 2))
        finally:
            pool.close()
    (report,) = (tmp_path / "stalls").glob("*.json")
    message = str(caught.value)
    assert message.startswith("supervision.stall_s: nothing has ended for 3 seconds: see ") and str(report) in message
    assert "\n" not in message
    (actor,) = json.loads(report.read_text())["actors"]
    assert actor["role"] == "worker" and actor["place"]["class_name"] == "Square" and actor["place"]["state"] == "ALIVE"
    (call,) = actor["calls"]
    assert (call["method"], call["ordinal"]) == ("hang_once", 1) and call["seconds"] >= 1
    stacks = report.with_suffix(".txt").read_text()
    driver, _, worker = stacks.partition("worker 0, Square (pid ")
    assert "in outcomes_of" in driver and "in hang_once" in worker


STUCK = """
import re, sys, time
from pathlib import Path
from actors import watchdog

def stuck_in_a_call():
    time.sleep(1000)

def stuck_with_the_interpreter_in_hand():
    re.match("(a+)+$", "a" * 60 + "b")

watchdog.REPORT_S = 1.0
with watchdog.Watchdog(Path(sys.argv[1]), 1.0, grace_s=1.0):
    time.sleep(0.5)
    globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize("where", ["stuck_in_a_call", "stuck_with_the_interpreter_in_hand"])
def test_a_driver_that_is_stuck_itself_is_ended(tmp_path, where: str):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), where], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    if where == "stuck_in_a_call":
        assert "diffrl: supervision.stall_s: nothing has ended for 1 seconds" in done.stderr
        (report,) = (tmp_path / "stalls").glob("*.txt")
        assert where in report.read_text()
    else:
        assert where in done.stderr


# Runs

POISON = 2  # the problem that no reward worker survives


class Poisoned(RewardWorker):
    def __init__(self, victim: str, *args: Any):
        super().__init__(*args)
        self.victim = victim

    def score(self, group, previous=None):
        if group.problem.id == self.victim:
            os._exit(1)
        return super().score(group, previous)


def run_poisoned(config: RLConfig, victim: str) -> Path:
    def poison(system: System) -> None:
        system.judges.close()
        weights = dict(config.reward.weights)
        make = spawner(Poisoned, {"num_cpus": 0.25}, victim, config.sandbox, weights)
        system.judges = WorkerPool(make, 1, config=config.supervision, watchdog=system.watchdog)

    with opened(config, prepare_system=poison) as run:
        run.train()
    return run.folder


@pytest.mark.slow
def test_a_problem_that_kills_its_workers_is_left_out(tuned_model, problems_file, problems, tmp_path, capfd):
    victim = problems[POISON].id
    supervision = {"problem_attempts": 2, "backoff_s": 0.1}
    folder = run_poisoned(rl_config(tuned_model, problems_file, tmp_path / "run", supervision=supervision), victim)
    (entry,) = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert entry.keys() == {"problem_id", "ordinal", "since", "reason"} and entry["problem_id"] == victim
    assert entry["ordinal"] < 6 and "Poisoned 0 (pid " in entry["reason"]
    table = read_all(folder / "rollouts").to_pylist()
    assert len(table) == 3 * 4 * 4 and victim not in {row["problem_id"] for row in table}
    # Of three passes over six problems the first 14 prompts, without the two of the victim's.
    assert len({row["ordinal"] for row in table}) == 12 and max(row["ordinal"] for row in table) in (13, 14)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["data/quarantined"] for row in rows] == [float(max_of(table, row) > entry["ordinal"]) for row in rows]
    assert all(row["memory/rollout_mb"] > 50 and row["memory/learner_mb"] > 50 for row in rows)
    assert f"quarantine: {victim} (ordinal {entry['ordinal']}) left out: " in capfd.readouterr().err


def max_of(table: list[dict[str, Any]], row: dict[str, Any]) -> int:
    return max(r["ordinal"] for r in table if r["step"] == row["step"])


@pytest.mark.slow
def test_too_many_such_problems_stop_the_run(tuned_model, problems_file, problems, tmp_path):
    supervision = {"problem_attempts": 1, "backoff_s": 0.1, "max_quarantined": 0}
    config = rl_config(tuned_model, problems_file, tmp_path / "run", supervision=supervision, train={"steps": 2})
    with pytest.raises(RunStoppedError) as caught:
        run_poisoned(config, problems[POISON].id)
    message = str(caught.value)
    assert message.startswith(
        "supervision.max_quarantined: 1 problems broke the workers that they were given to, more "
    )
    assert str(tmp_path / "run" / "quarantine.jsonl") in message and "or raise the limit" in message
    assert "\n" not in message
