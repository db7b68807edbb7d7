"""Rollouts that run ahead of the updates: how far, with what weights, and that nothing else decides the numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.driver import Run, train
from diffrl.checkpoint import RunState, checkpoint_path, committed_steps
from diffrl.config import RLConfig
from diffrl.rollout_store import read_all
from tests.actors.conftest import opened, rl_config
from tests.actors.test_loop import metric_lines
from tests.actors.test_resume import assert_same, killed
from tests.actors.test_supervision import POISON, run_poisoned

STEPS = 5


def ahead(tuned_model: Path, problems_file: Path, run_dir: Path, staleness: int, **sections: dict) -> RLConfig:
    """With a reference that is refreshed while groups are on their way."""
    merged: dict[str, dict] = {
        "train": {"steps": STEPS, "prompts_per_step": 3},
        "method": {"reference_refresh_steps": 2, "kl_coef": 0.02},
        "checkpoint": {"every": 2},
        "sync": {"every": 3},
    }
    merged = {name: {**merged.get(name, {}), **sections.get(name, {})} for name in {**merged, **sections}}
    merged["rollout"] = {"max_staleness": staleness, **merged.get("rollout", {})}
    return rl_config(tuned_model, problems_file, run_dir, **merged)


class Overlapping(Run):
    """Hears the learner only once a group has come on beside its work, where one is being sampled, and counts those."""

    came_on = 0

    def __init__(self, *args: Any):
        super().__init__(*args)

        def wait(refs: Sequence[ray.ObjectRef]) -> list[ray.ObjectRef]:
            before = len(self.scoring)
            ready = self.advance(refs)
            while len(self.scoring) == before and self.pipeline.rollouts.busy:
                ready = self.advance(refs)
            self.came_on += len(self.scoring) - before
            return ready

        self.learner.wait = wait


@pytest.fixture(scope="module")
def one_behind(ray_cluster, tuned_model, problems_file, tmp_path_factory) -> Path:
    config = ahead(tuned_model, problems_file, tmp_path_factory.mktemp("ahead") / "run", 1)
    with opened(config, Overlapping) as run:
        run.train()
        assert isinstance(run, Overlapping) and run.came_on > 0
    return run.folder


def versions(run_dir: Path) -> list[set[int]]:
    """Of the policies that sampled each step."""
    table = read_all(run_dir / "rollouts").to_pylist()
    return [{row["policy_version"] for row in table if row["step"] == step} for step in range(STEPS)]


def test_every_step_is_as_far_behind_as_it_may(one_behind: Path):
    assert versions(one_behind) == [{max(0, step - 1)} for step in range(STEPS)]
    rows = [json.loads(line) for line in metric_lines(one_behind)]
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
    assert all(row["first/ratio_mean"] == pytest.approx(1.0, abs=1e-6) for row in rows)  # see learner_rank.py
    assert rows[2]["sync/logprob_absdiff_max"] < 1e-3
    state = RunState.read(checkpoint_path(one_behind, 4))
    assert state.asked == ((12, 13, 14),) and state.next_ordinal == 15
    assert RunState.read(checkpoint_path(one_behind, 5)).asked == ()


def test_who_is_fast_changes_nothing(one_behind: Path, tuned_model, problems_file, tmp_path):
    config = ahead(
        tuned_model, problems_file, tmp_path / "many", 1, rollout={"num_workers": 3}, reference={"num_workers": 2}
    )
    train(config)
    assert metric_lines(tmp_path / "many") == metric_lines(one_behind)


@pytest.mark.slow
def test_a_killed_driver_changes_nothing(one_behind: Path, ray_cluster, tuned_model, problems_file, tmp_path):
    """Groups that were waiting for their step come out of the checkpoint."""
    config = ahead(tuned_model, problems_file, tmp_path / "run", 1)
    killed(config, ray_cluster, "updating", 3)
    assert committed_steps(tmp_path / "run") == [2]
    train(config, resume="auto")
    assert_same(tmp_path / "run", one_behind)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sampled", "saving", "saved"])
def test_two_behind_and_replaced_groups_go_on_too(ray_cluster, tuned_model, problems_file, tmp_path, place: str):
    sections: dict = {"method": {"max_replacements": 2}, "sampling": {"steps": 40, "tokens_per_step": 4}}
    calm, run = (ahead(tuned_model, problems_file, tmp_path / name, 2, **sections) for name in ("calm", "run"))
    train(calm)
    assert all(max(0, step - 2) in found for step, found in enumerate(versions(tmp_path / "calm")))
    killed(run, ray_cluster, place, 2)
    train(run, resume="auto")
    assert_same(tmp_path / "run", tmp_path / "calm")


@pytest.mark.slow
def test_a_branch_samples_waiting_groups_anew(one_behind: Path, tuned_model, problems_file, tmp_path):
    config = ahead(tuned_model, problems_file, tmp_path / "other", 0)
    train(config, resume=str(checkpoint_path(one_behind, 4)))
    table = read_all(tmp_path / "other" / "rollouts").to_pylist()
    assert {row["ordinal"] for row in table} == {12, 13, 14} and {row["policy_version"] for row in table} == {4}
    assert metric_lines(tmp_path / "other")[:4] == metric_lines(one_behind)[:4]


@pytest.mark.slow
def test_problems_that_break_their_workers_leave_the_same_prompts(tuned_model, problems_file, problems, tmp_path):
    supervision = {"problem_attempts": 1, "backoff_s": 0.1}
    folders = [
        run_poisoned(
            ahead(tuned_model, problems_file, tmp_path / str(workers), 1, supervision=supervision, rollout=workers_of),
            problems[POISON].id,
        )
        for workers, workers_of in ((1, {"num_workers": 1}), (2, {"num_workers": 2}))
    ]
    assert metric_lines(folders[0]) == metric_lines(folders[1])
    ordinals = [[row["ordinal"] for row in read_all(folder / "rollouts").to_pylist()] for folder in folders]
    assert ordinals[0] == ordinals[1] and len(set(ordinals[0])) == STEPS * 3
