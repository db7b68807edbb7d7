"""The reward worker without Ray, on real sandboxes; and a run whose judge fails too often."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.pool import WorkerPool
from actors.reward import NOT_JUDGED, RewardWorker
from actors.system import System, spawner
from actors.telemetry import pool_metrics
from diffrl.config import RLConfig, SandboxConfig
from diffrl.data.sft import fenced
from diffrl.errors import RunStoppedError
from diffrl.models.folders import load_model
from diffrl.rollout_store import read_all
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup
from sandbox.pool import PoolStats, SandboxPool
from sandbox.process import ProcessSandbox
from sandbox.types import SandboxError
from tests.actors.conftest import opened, rl_config

WEIGHTS = {"pass_rate": 2.0, "format": 0.5}
TESTS = ("assert f(2) == 4", "assert f(3) == 9")


def group_of(*texts: str, tests: tuple[str, ...] = TESTS) -> RolloutGroup:
    problem = Problem(id="p", prompt="Square.", prompt_tests=(), reward_tests=tests)
    ids = np.zeros(3, dtype=np.int32)
    rollouts = tuple(
        Rollout(
            sample_index=i, seed=i, completion_ids_C=ids, step_map_C=ids, probability_C=ids, num_tokens=3, text=text
        )
        for i, text in enumerate(texts)
    )
    return RolloutGroup(problem=problem, ordinal=0, policy_version=0, prompt_ids_P=ids, rollouts=rollouts)


def worker(**config: object) -> RewardWorker:
    return RewardWorker(SandboxConfig.model_validate({"backend": "process", **config}), WEIGHTS)


@pytest.fixture(scope="module")
def shared_worker() -> Iterator[RewardWorker]:
    shared = worker()
    yield shared
    shared.close()


def test_judgements_stand_in_the_order_of_the_rollouts(shared_worker: RewardWorker) -> None:
    bodies = ["return x * x", "return 4", "return None", "while True: pass", "raise KeyError(x)"] * 2
    group = group_of(*[fenced(f"def f(x):\n    {body}\n") for body in bodies], "no code")
    judgements = shared_worker.score(group)
    passed, failed = ("passed",) * 2, ("failed",) * 2
    expected = [passed, ("passed", "failed"), failed, ("timeout",) * 2, ("error",) * 2] * 2 + [("error",) * 2]
    assert [judgement.statuses for judgement in judgements] == expected
    assert [judgement.reward for judgement in judgements] == [2.5, 1.5, 0.5, 0.5, 0.5] * 2 + [0.0]
    assert not any(judgement.low_trust for judgement in judgements)


def test_programs_of_a_group_are_judged_at_the_same_time(shared_worker: RewardWorker) -> None:
    """Two slots: programs that sleep take half the time; and the pool's clock says that both were busy."""
    shared_worker.score(group_of(*[fenced("def f(x): return x * x")] * 2))  # both sandboxes are warm
    sleeper = fenced("import time\ndef f(x):\n    time.sleep(0.5)\n    return x * x\n")
    before, started = shared_worker.stats(), time.monotonic()
    judgements = shared_worker.score(group_of(*[sleeper] * 4))
    seconds = time.monotonic() - started
    assert [judgement.pass_rate for judgement in judgements] == [1.0] * 4
    metrics = pool_metrics([before], [shared_worker.stats()], seconds)
    assert 2.0 <= seconds < 3.5  # one after another would be 4 s of sleep
    assert 1.0 < metrics["pool/0/busy_slots"] <= 2.01
    assert 0.5 < metrics["pool/0/queue_depth"] < 2.0  # two wait for half of the time, and nobody afterwards
    assert 0 < metrics["pool/cpu_ms"] < 1000


def test_only_what_another_worker_failed_on_is_judged_again(shared_worker: RewardWorker) -> None:
    known = Judgement(reward=-7.0, format=0.0, pass_rate=0.0, statuses=("failed", "failed"), cpu_s=0.0)
    group = group_of(*[fenced("def f(x): return x * x")] * 2)
    assert shared_worker.score(group, (known, NOT_JUDGED))[0] is known
    assert shared_worker.score(group, (known, NOT_JUDGED))[1].reward == 2.5


BOX = fenced("class Box:\n    def __init__(self, x):\n        self.x = x\n    def get(self):\n        return self.x\n")
DERIVED = "class Derived(Box): pass\nassert Derived(3).get() == 3"  # a class made of the solution's cannot be remote
BOX_TESTS = (DERIVED, "assert Box(3).get() == 3", "assert Box(3).get() == 4")


def test_tests_beside_the_solution_are_recorded_as_they_were_and_paid_only_if_the_config_says_so() -> None:
    group = group_of(BOX, tests=BOX_TESTS)
    paying, refusing = worker(), worker(pay_low_trust=False)
    try:
        (paid,), (refused,) = paying.score(group), refusing.score(group)
    finally:
        paying.close()
        refusing.close()
    assert paid.statuses == refused.statuses == ("passed", "passed", "failed")
    assert paid.low_trust and refused.low_trust
    assert paid.pass_rate == pytest.approx(2 / 3) and refused.pass_rate == pytest.approx(1 / 3)
    assert refused.reward == pytest.approx(2 / 3 + 0.5)


class FailsOn4(ProcessSandbox):
    """A judge that breaks on every program that mentions 4444."""

    def judge(self, submission):
        if "4444" in submission.code:
            raise SandboxError("broke")
        return super().judge(submission)


def test_a_program_that_the_judge_fails_on_is_not_judged_and_costs_the_others_nothing() -> None:
    reward = worker()
    reward.pool.close()
    reward.pool = SandboxPool(FailsOn4, 2)
    try:
        good, bad = fenced("def f(x): return x * x"), fenced("def f(x): return 4444")
        judgements = reward.score(group_of(good, bad, good, good))
        stats = reward.stats()
    finally:
        reward.close()
    assert [judgement.valid for judgement in judgements] == [True, False, True, True]
    assert [judgement.reward for judgement in judgements] == [2.5, 0.0, 2.5, 2.5]
    assert judgements[1].detail == "broke" and stats.errors == {"SandboxError": 2}


def test_pool_metrics_count_from_zero_for_a_new_worker() -> None:
    def stats(busy_s: float, restarts: int) -> PoolStats:
        return PoolStats(
            slots=2,
            busy=0,
            waiting=0,
            statuses={},
            errors={"SandboxError": restarts},
            cpu_ms=1000 * busy_s,
            restarts=restarts,
            canaries=0,
            busy_s=busy_s,
            waited_s=2 * busy_s,
        )

    metrics = pool_metrics([stats(10.0, 3), stats(50.0, 9)], [stats(14.0, 4), stats(2.0, 1)], 2.0)
    assert metrics == {
        "pool/workers": 2,
        "pool/cpu_ms": 6000.0,
        "pool/infra_errors": 2,
        "pool/errors/SandboxError": 2,
        "pool/restarts": 2,
        "pool/0/busy_slots": 2.0,
        "pool/0/queue_depth": 4.0,
        "pool/1/busy_slots": 1.0,
        "pool/1/queue_depth": 2.0,
    }
    joined = pool_metrics([stats(10.0, 3), None], [stats(14.0, 4), None, stats(2.0, 1)], 2.0)
    assert joined["pool/workers"] == 2 and joined["pool/cpu_ms"] == 6000.0 and joined["pool/2/busy_slots"] == 1.0
    left = pool_metrics([stats(10.0, 3), stats(2.0, 1)], [stats(14.0, 4)], 2.0)
    assert left["pool/workers"] == 1 and left["pool/cpu_ms"] == 4000.0


class FailingWorker(RewardWorker):
    """Cannot judge the first samples of every group."""

    def __init__(self, num_failed: int, *args):
        super().__init__(*args)
        self.num_failed = num_failed

    def judge(self, group: RolloutGroup, index: int) -> Judgement:
        if index < self.num_failed:
            return Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0, detail="engine gone")
        return super().judge(group, index)


def run_failing(config: RLConfig, num_failed: int) -> Path:
    def break_judges(system: System) -> None:
        system.judges.close()
        make = spawner(FailingWorker, {"num_cpus": 0.25}, num_failed, config.sandbox, WEIGHTS)
        system.judges = WorkerPool(make, 1)

    with opened(config, prepare_system=break_judges) as run:
        run.train()
    return run.folder


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_judge_fails_too_often_stops_and_loses_nothing(tuned_model, problems_file, tmp_path):
    config = rl_config(tuned_model, problems_file, tmp_path / "run", sandbox={"max_masked_share": 0.3})
    with pytest.raises(RunStoppedError) as stopped:
        run_failing(config, num_failed=2)
    message = str(stopped.value)
    assert message.startswith(
        "sandbox.max_masked_share: step 1 has 50.0% samples that could not be judged, more than 30%"
    )
    assert "engine gone" in message and str(tmp_path / "run" / "model") in message
    rows = read_all(tmp_path / "run" / "rollouts").to_pylist()
    assert [row["valid"] for row in rows] == [False, False, True, True] * 4
    assert all(row["advantage"] == 0.0 for row in rows if not row["valid"])
    load_model(tmp_path / "run" / "model")


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_when_few_samples_could_not_be_judged(tuned_model, problems_file, tmp_path):
    folder = run_failing(rl_config(tuned_model, problems_file, tmp_path / "run", train={"steps": 1}), num_failed=1)
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert row["sandbox/infra_error_frac"] == 0.25  # the default limit is that, and no more
    assert row["sandbox/low_trust_frac"] == 0.0 and row["pool/0/busy_slots"] > 0
