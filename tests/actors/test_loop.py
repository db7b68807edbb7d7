"""The whole loop on real actors, judged by real verdicts; its numbers depend on nothing but seed and config."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors import elastic, staff, system
from actors.driver import Run, spread, train
from actors.processes import place_of
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker
from diffrl.config import ModelConfig, RLConfig
from diffrl.errors import RunStoppedError
from diffrl.metrics import METRICS, find, undefined, varies
from diffrl.models.folders import load_model, load_state_dict, save_model
from diffrl.models.loading import load_policy_tokenizer
from diffrl.rollout_store import read_all
from diffrl.saved_batch import load_batch
from diffrl.types import RolloutGroup
from tests.actors.conftest import opened, rl_config
from tests.actors.test_elastic import until


def metric_lines(run_dir: Path) -> list[str]:
    """metrics.jsonl without what may differ between equal runs."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if not varies(k)}) for row in rows]


@pytest.fixture(scope="module")
def plain_run(ray_cluster, tuned_model, problems_file, tmp_path_factory) -> Path:
    """Three steps with one worker of each kind."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    train(rl_config(tuned_model, problems_file, run_dir))
    return run_dir


def test_run_folder_holds_what_happened(plain_run: Path):
    rows = [json.loads(line) for line in metric_lines(plain_run)]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert any(0 < row["reward/pass_rate"] < 1 for row in rows), "the model is meant to solve some problems, not all"
    table = read_all(plain_run / "rollouts").to_pylist()
    assert len(table) == 3 * 4 * 4
    for step, row in enumerate(rows):
        stored = [r for r in table if r["step"] == step]
        assert row["reward/mean"] == pytest.approx(sum(r["reward"] for r in stored) / len(stored))
        assert {r["policy_version"] for r in stored} == {step}
        for ordinal in {r["ordinal"] for r in stored}:
            group = [r for r in stored if r["ordinal"] == ordinal]
            mean = sum(r["reward"] for r in group) / len(group)
            assert [r["advantage"] for r in group] == pytest.approx([r["reward"] - mean for r in group], abs=1e-6)
    assert [r["ordinal"] for r in table] == sorted(r["ordinal"] for r in table)
    run = json.loads((plain_run / "run.json").read_text())
    assert run["attempt"] == 1 and run["sandbox"] == {"backend": "process", "reason": ""}


def test_every_metric_of_a_step_is_defined_and_written(plain_run: Path):
    always = {metric.name for metric in METRICS if metric.stage != "supervised" and not metric.when}
    now_and_then = {metric.name for metric in METRICS if metric.when}
    for row in (json.loads(line) for line in (plain_run / "metrics.jsonl").read_text().splitlines()):
        assert undefined(row) == []
        names = {found[0].name for found in map(find, row.keys() - {"step"}) if found}
        assert names - now_and_then == always
        assert 0 <= row["idle/rollout_frac"] < 1 and row["calls/judge_max_s"] >= row["calls/judge_p50_s"] > 0
        parts = [value for key, value in row.items() if key.startswith("reward/part/")]
        assert sum(parts) == pytest.approx(row["reward/mean"]) and len(parts) == 2
        assert row["group/pass@1"] == pytest.approx(row["reward/solved_frac"]) and row["views/coverage"] == 1.0
    assert (plain_run / "curves.png").stat().st_size > 10_000
    assert len(list((plain_run / "tensorboard").iterdir())) == 1


def test_first_step_is_on_policy(plain_run: Path):
    """Before the first update new, old and reference policy are one: ratio 1, KL 0."""
    first = json.loads(metric_lines(plain_run)[0])
    assert first["first/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["first/kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["optim/grad_norm"] > 0


def test_exported_model_is_the_trained_one(plain_run: Path, tuned_model: Path):
    before, after = load_state_dict(tuned_model), load_state_dict(plain_run / "model")
    assert before.keys() == after.keys()
    changed = [k for k in before if not before[k].equal(after[k])]
    assert len(changed) > len(before) // 2
    load_model(plain_run / "model")


def test_number_of_workers_changes_nothing(plain_run: Path, tuned_model, problems_file, tmp_path):
    config = rl_config(
        tuned_model, problems_file, tmp_path / "two", rollout={"num_workers": 2}, judge={"num_workers": 3}
    )
    train(config)
    assert metric_lines(tmp_path / "two") == metric_lines(plain_run)


class OutOfOrder(Run):
    """Groups come in late, and backwards."""

    def advance(self, beside: Sequence[ray.ObjectRef] = ()) -> list[ray.ObjectRef]:
        ready = self.pipeline.advance(beside)
        if not self.pipeline.busy:
            for scored in reversed(self.pipeline.taken()):
                self.buffer.commit(scored)
        return ready


@pytest.mark.slow
def test_order_of_finishing_changes_nothing(plain_run: Path, tuned_model, problems_file, tmp_path):
    run_with(OutOfOrder, rl_config(tuned_model, problems_file, tmp_path / "order"))
    assert metric_lines(tmp_path / "order") == metric_lines(plain_run)


class Interrupted(Run):
    """Loses workers in the middle of a step."""

    def score_reference(self, group: RolloutGroup) -> None:
        if group.ordinal in (1, 6):
            ray.kill(self.system.rollouts.workers[group.ordinal % 2])
            ray.kill(self.system.judges.workers[0])
            ray.kill(self.system.reference.workers[0])
        super().score_reference(group)


def run_with(run_class: type[Run], config: RLConfig) -> Run:
    with opened(config, run_class) as run:
        run.train()
        return run


def test_lost_workers_change_nothing(plain_run: Path, tuned_model, problems_file, tmp_path):
    config = rl_config(tuned_model, problems_file, tmp_path / "lost", rollout={"num_workers": 2})
    run = run_with(Interrupted, config)
    restarts = {name: pool.num_restarts for name, pool in run.system.pools().items()}
    assert all(count >= 2 for count in restarts.values()), restarts
    assert metric_lines(tmp_path / "lost") == metric_lines(plain_run)


class Slow(RewardWorker):
    """So that others join in."""

    def score(self, *args: Any) -> Any:
        time.sleep(2)
        return super().score(*args)


class Elastic(Run):
    """Judged by as many as there may be, from the second step on until they are alone with nothing to do."""

    counts: tuple[int, ...] = ()

    def step(self, step: int) -> None:
        judges = self.system.judges
        if step == 1:
            self.advance_until(lambda: sum(worker.works for worker in judges.slots) == 3)
        super().step(step)
        if step == 1:
            self.advance_until(lambda: len(judges.slots) == 1)
        self.counts += (len(judges.slots),)

    def advance_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            self.advance()


@pytest.mark.slow
def test_reward_workers_that_come_and_go_change_nothing(
    plain_run: Path, tuned_model, problems_file, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(system, "RewardWorker", Slow)
    monkeypatch.setattr(elastic, "MOMENT_S", 0.5)
    config = rl_config(tuned_model, problems_file, tmp_path / "elastic", judge={"max_workers": 3, "idle_s": 15.0})
    run = run_with(Elastic, config)
    assert metric_lines(tmp_path / "elastic") == metric_lines(plain_run)
    rows = [json.loads(line) for line in (tmp_path / "elastic" / "metrics.jsonl").read_text().splitlines()]
    print([row["pool/workers"] for row in rows], run.counts)
    assert rows[1]["pool/workers"] == 3 and run.counts[1] == 1
    assert [row["restarts/judge"] for row in rows] == [0, 0, 0]


class Leaving(Run):
    """One of two rollout workers is lost inside the second step, and its place is another's until the third has begun."""

    taker: Any = None
    came_back = False

    def score_reference(self, group: RolloutGroup) -> None:
        rollouts = self.system.rollouts
        if group.ordinal == 4:
            ray.kill(rollouts.workers[1])
            self.taker = ray.remote(Taker).options(num_cpus=ROLLOUT_CPUS).remote()
        elif group.ordinal == 9:
            until(rollouts, lambda: rollouts.slots[1].waits)
            ray.kill(self.taker)
            until(rollouts, lambda: rollouts.slots[1].works)
            self.came_back = True
        super().score_reference(group)


class Taker:
    """Takes a place."""


ROLLOUT_CPUS = 6.0


@pytest.mark.slow
def test_rollout_workers_that_come_and_go_change_nothing(
    plain_run: Path, tuned_model, problems_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(staff, "PLACE_S", 1.0)
    config = rl_config(
        tuned_model,
        problems_file,
        tmp_path / "leaving",
        rollout={"num_workers": 2, "cpus_per_worker": ROLLOUT_CPUS},
        supervision={"backoff_s": 5.0, "start_s": 300.0},
    )
    run = run_with(Leaving, config)
    assert isinstance(run, Leaving) and run.came_back and run.system.rollouts.num_restarts == 1
    assert metric_lines(tmp_path / "leaving") == metric_lines(plain_run)


FREEZES = [("rollout", "generate"), ("judge", "score"), ("reference", "logprobs"), ("learner", "update")]
FREEZE_S = 20.0  # deadline of calls that take two


class Frozen(Run):
    """Freezes one process after the other, of every role, before a step that needs it."""

    def step(self, step: int) -> None:
        for role, _ in FREEZES[2 * step : 2 * step + 2]:
            actors: list[Any] = self.learner.ranks if role == "learner" else self.system.pools()[role].workers
            pid = place_of(actors[0]).pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        super().step(step)


@pytest.mark.slow
def test_whoever_is_frozen_is_reported_within_its_deadline(
    plain_run: Path, tuned_model, problems_file, tmp_path, capfd
):
    limits = {f"{call}_s": FREEZE_S for call in ("generate", "score", "reference", "update", "pull")}
    run_with(Frozen, rl_config(tuned_model, problems_file, tmp_path / "frozen", supervision=limits))
    assert metric_lines(tmp_path / "frozen") == metric_lines(plain_run)
    rows = [json.loads(line) for line in (tmp_path / "frozen" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in capfd.readouterr().err.splitlines() if " lost: " in line]
    print(*told, sep="\n")
    assert len(told) == len(FREEZES)
    for line, (role, method) in zip(sorted(told), sorted(FREEZES), strict=True):
        assert re.match(
            rf"{role} (worker|group) lost: \w+ did not end within .*\b20\b.*; this was .*\(pid \d+", line
        ), line
        assert method in line or role == "learner"
    assert all(sum(v for k, v in row.items() if k.startswith("time/")) < 10 * FREEZE_S for row in rows)


@pytest.mark.slow
def test_workers_above_their_memory_limit_are_replaced_and_change_nothing(
    plain_run: Path, tuned_model, problems_file, tmp_path
):
    limits = {"rollout": 1, "judge": 1, "reference": 1}  # MB: whatever they do
    train(rl_config(tuned_model, problems_file, tmp_path / "small", supervision={"memory_mb": limits}))
    assert metric_lines(tmp_path / "small") == metric_lines(plain_run)
    rows = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    for role in limits:
        assert [row[f"restarts/{role}"] for row in rows] == [1, 2, 3]
        assert all(row[f"memory/{role}_mb"] > 50 for row in rows)


class Spoiled(Run):
    """Draws a view with an infinite weight in the third group of the second step and in all that follow."""

    def score_reference(self, group: RolloutGroup) -> None:
        super().score_reference(group)
        if group.ordinal >= 6:
            batch = self.scoring[group.ordinal]
            views = tuple(replace(v, weight_SBC=v.weight_SBC.clone()) for v in batch.views)
            for view in views:
                view.weight_SBC[0, 0, 0] = torch.inf
            self.scoring[group.ordinal] = replace(batch, views=views)


def test_a_run_stops_when_too_many_steps_are_skipped(plain_run: Path, tuned_model, problems_file, tmp_path):
    config = rl_config(tuned_model, problems_file, tmp_path / "bad", learner={"max_bad_steps": 3})
    with pytest.raises(RunStoppedError) as caught:
        run_with(Spoiled, config)
    message = str(caught.value)
    assert message.startswith("learner.max_bad_steps: by step 3 4 optimizer steps in a row had a NaN or infinite loss")
    assert "the limit is 3; lower optim.lr" in message and "\n" not in message
    rows = [json.loads(line) for line in metric_lines(tmp_path / "bad")]
    assert [row["optim/bad_steps"] for row in rows] == [0, 2, 2]
    assert rows[0] == json.loads(metric_lines(plain_run)[0])
    kept = load_batch(tmp_path / "bad" / "failed_batches" / "version-000001")
    assert torch.isinf(kept.scoring.views[0].weight_SBC).any()
    model = load_state_dict(tmp_path / "bad" / "model")
    assert all(torch.isfinite(tensor).all() for tensor in model.values())


class Deceived(Run):
    """From the second step on a rollout worker does not have the weights that it says it has."""

    def follow(self, step: int) -> None:
        super().follow(step)
        if step == 1:
            ray.get(self.system.rollouts.workers[-1].__ray_call__.remote(spoil))


def spoil(worker: RolloutWorker) -> None:
    model = worker.holder._model
    assert model is not None
    with torch.no_grad():
        model.backbone.model.norm.weight.mul_(1.05)


def test_workers_that_sample_have_the_learners_weights(ray_cluster, tuned_model, problems_file, tmp_path):
    config = rl_config(tuned_model, problems_file, tmp_path / "run", sync={"every": 1}, rollout={"num_workers": 2})
    with pytest.raises(
        RunStoppedError, match=r"^sync.max_logprob_absdiff: after step 2 .* the limit is 0.001; look at"
    ) as caught:
        run_with(Deceived, config)
    assert "\n" not in str(caught.value)
    (row,) = [json.loads(line) for line in metric_lines(tmp_path / "run")]
    assert row["sync/logprob_absdiff_max"] < 1e-4


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_learner_ranks_compute_the_same(plain_run: Path, tuned_model, problems_file, tmp_path, zero_stage):
    learner = {"num_ranks": 2, "zero_stage": zero_stage}
    train(rl_config(tuned_model, problems_file, tmp_path / "ranks", learner=learner))
    one = [json.loads(line) for line in metric_lines(plain_run)]
    two = [json.loads(line) for line in metric_lines(tmp_path / "ranks")]
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("reward/", "verdicts/", "rollout/")):
                assert a[key] == b[key], key
            elif key.startswith(("loss/", "first/")):
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=0), key
            else:
                assert a[key] == pytest.approx(b[key], rel=1e-3), key


@pytest.mark.slow
def test_micro_batches_change_nothing(plain_run: Path, tuned_model, problems_file, tmp_path):
    """One token count divides the whole step, so cutting it into micro-batches gives the same update."""
    train(rl_config(tuned_model, problems_file, tmp_path / "micro", learner={"max_tokens_per_micro_batch": 1}))
    one = [json.loads(line) for line in metric_lines(plain_run)]
    four = [json.loads(line) for line in metric_lines(tmp_path / "micro")]
    for a, b in zip(one, four, strict=True):
        assert a["reward/mean"] == b["reward/mean"]
        assert a["loss/total"] == pytest.approx(b["loss/total"], abs=1e-5)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)


def test_groups_with_equal_rewards_give_way_to_the_next_prompts(ray_cluster, tuned_model, problems_file, tmp_path):
    budget = 3
    for name, workers in (("one", 1), ("two", 2)):
        config = rl_config(
            tuned_model,
            problems_file,
            tmp_path / name,
            method={"max_replacements": budget},
            rollout={"num_workers": workers},
            train={"steps": 2},
        )
        train(config)
    assert metric_lines(tmp_path / "one") == metric_lines(tmp_path / "two")
    table = read_all(tmp_path / "one" / "rollouts").to_pylist()
    rows = [json.loads(line) for line in metric_lines(tmp_path / "one")]
    assert {r["ordinal"] for r in table} == set(range(8 + int(sum(row["rollout/replaced_groups"] for row in rows))))
    assert any(row["rollout/replaced_groups"] > 0 for row in rows)
    for step, row in enumerate(rows):
        ordinals = list(dict.fromkeys(r["ordinal"] for r in table if r["step"] == step))
        rewards = {o: [r["reward"] for r in table if r["ordinal"] == o] for o in ordinals}
        kept, replaced = ordinals[:4], ordinals[4:]
        assert len(replaced) == row["rollout/replaced_groups"] <= budget
        assert all(len(set(rewards[o])) == 1 for o in replaced)
        assert kept == sorted(kept) and row["reward/mean"] == pytest.approx(sum(sum(rewards[o]) for o in kept) / 16)
        assert len(replaced) == budget or all(len(set(rewards[o])) > 1 for o in kept)
    assert all(
        r["advantage"] == 0 for r in table if len({s["reward"] for s in table if s["ordinal"] == r["ordinal"]}) == 1
    )


def test_a_ratio_for_each_completion(ray_cluster, tuned_model, problems_file, tmp_path):
    """The other objective, with the estimator that suits it, through the real loop."""
    method = {"objective": "sequence", "estimator": "monte_carlo", "stratify_t": True, "scale_by_std": True}
    train(rl_config(tuned_model, problems_file, tmp_path / "run", method=method, train={"steps": 1}))
    (row,) = [json.loads(line) for line in metric_lines(tmp_path / "run")]
    assert row["first/ratio_mean"] == pytest.approx(1.0, abs=1e-6) and row["first/kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["optim/grad_norm"] > 0 and row["loss/ratio_mean"] != 1.0
    table = read_all(tmp_path / "run" / "rollouts").to_pylist()
    for ordinal in range(4):
        group = [r for r in table if r["ordinal"] == ordinal]
        rewards = torch.tensor([r["reward"] for r in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert [r["advantage"] for r in group] == pytest.approx(expected.tolist(), abs=1e-5)


def test_evaluation_keeps_the_best_model_and_patience_ends_the_run(ray_cluster, tuned_model, problems_file, tmp_path):
    config = rl_config(
        tuned_model,
        problems_file,
        tmp_path / "eval",
        optim={"lr": 1e-12},  # nothing can improve, so the second evaluation is no better than the first
        train={"steps": 6},
        eval={
            "every": 1,
            "problems": {"source": "problems", "path": str(problems_file), "num_prompt_tests": 0},
            "num_samples": 2,
        },
        stop={"patience": 2},
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "eval" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    assert len(rates) == 3 and len(set(rates)) == 1
    load_model(tmp_path / "eval" / "best")
    load_model(tmp_path / "eval" / "model")


@pytest.mark.slow
def test_shuffled_rewards_are_a_permutation_within_groups(ray_cluster, tuned_model, problems_file, tmp_path, plain_run):
    train(
        rl_config(tuned_model, problems_file, tmp_path / "s", train={"steps": 1}, reward={"shuffle_within_group": True})
    )
    plain = [r for r in read_all(plain_run / "rollouts").to_pylist() if r["step"] == 0]
    shuffled = read_all(tmp_path / "s" / "rollouts").to_pylist()
    assert [r["reward"] for r in plain] == [r["reward"] for r in shuffled]
    for start in range(0, len(plain), 4):
        a = sorted(r["advantage"] for r in plain[start : start + 4])
        b = sorted(r["advantage"] for r in shuffled[start : start + 4])
        assert a == pytest.approx(b, abs=1e-6)
    assert [r["advantage"] for r in plain] != [r["advantage"] for r in shuffled]


# Approximate sampling and its guard


@pytest.fixture(scope="module")
def overconfident_model(tuned_model: Path, tmp_path_factory) -> Path:
    """The tuned model with logits a thousand times as large: every position is certain of a token, whatever it sees. At
    temperature 1000 it draws as the tuned one does at 1."""
    folder = tmp_path_factory.mktemp("overconfident")
    model = load_model(tuned_model)
    with torch.no_grad():
        model.backbone.model.norm.weight.mul_(1000)
    save_model(model, folder)
    load_policy_tokenizer(ModelConfig(path=str(tuned_model))).save_pretrained(folder)
    return folder


def test_the_guard_ends_approximations_that_go_wrong(
    ray_cluster, overconfident_model: Path, problems_file, tmp_path, capfd
):
    sampling = {"confidence_threshold": 0.9, "steps": 40, "temperature": 1000.0}
    limits = {"guard_share": 0.5, "guard_window": 2, "guard_max_reward_drop": 0.25}
    for name, workers in (("one", 1), ("two", 2)):
        config = rl_config(
            overconfident_model,
            problems_file,
            tmp_path / name,
            sampling=sampling | limits,
            train={"steps": 4},
            optim={"lr": 1e-9},
            rollout={"num_workers": workers},
        )
        train(config)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sampling: ")]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("sampling: exact from step 3 on: guard/") and "guard_max_reward_drop 0.25" in said[0]
    assert metric_lines(tmp_path / "one") == metric_lines(tmp_path / "two")
    rows = [json.loads(line) for line in metric_lines(tmp_path / "one")]
    assert [row["sampling/fallback"] for row in rows] == [0, 1, 1, 1]
    for row in rows[:2]:
        assert row["guard/agreement"] < 0.9 and row["guard/rollouts"] >= 1
    assert sum(row["guard/reward_difference"] for row in rows[:2]) / 2 < -0.25
    assert not any(key.startswith("guard/") for row in rows[2:] for key in row)
    table = read_all(tmp_path / "one" / "rollouts").to_pylist()
    assert len(table) == 4 * 16, "twins are in the record"
    num_steps = [len(set(row["step_map"])) for row in table]
    # Nearly everything at once: of two logits that are almost equal even this model is not certain.
    assert max(num_steps[:32]) <= 3 and set(num_steps[32:]) == {39}
    assert min(rows[2]["reward/mean"], rows[3]["reward/mean"]) > max(rows[0]["reward/mean"], rows[1]["reward/mean"])


@pytest.mark.slow
def test_the_guard_lets_good_approximations_pass(ray_cluster, tuned_model, problems_file, tmp_path):
    """One token after the other, as the schedule has it but for its first and last step."""
    sampling = {"tokens_per_step": 1, "steps": 40, "temperature": 0.0, "guard_window": 1, "guard_min_agreement": 0.9}
    train(rl_config(tuned_model, problems_file, tmp_path / "run", sampling=sampling, train={"steps": 2}))
    rows = [json.loads(line) for line in metric_lines(tmp_path / "run")]
    assert [row["sampling/fallback"] for row in rows] == [0, 0]
    assert all(row["guard/agreement"] > 0.9 and row["guard/rollouts"] >= 1 for row in rows)


def test_an_exact_run_has_no_guard(plain_run: Path):
    rows = [json.loads(line) for line in (plain_run / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith(("guard/", "sampling/")) for row in rows for key in row)
    for row in rows:
        assert row["rollout/forward_passes"] > 0 and row["rollout/tokens_per_second"] > 0
        assert 0.5 < row["rollout/useful_share"] <= 1


def test_a_part_of_the_problems_is_evenly_spread(problems):
    assert [problems.index(p) for p in spread(problems, 4)] == [0, 1, 3, 4] and len(problems) == 6
    assert spread(problems, None) == spread(problems, 6) == spread(problems, 100) == problems
