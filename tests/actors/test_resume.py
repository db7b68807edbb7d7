"""A run whose driver is killed goes on as if nothing had happened; another start, another config, a branch."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import ray

from actors.driver import Run, train
from actors.run_start import begin, check_resume
from diffrl.checkpoint import (
    NOTE,
    RunState,
    checkpoint_path,
    commit,
    committed_steps,
    last_checkpoint,
    part_path,
    prune,
)
from diffrl.config import RLConfig
from diffrl.config_file import dump_config
from diffrl.data.sources import prompt_stream
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.mirror import Mirror
from diffrl.models.folders import load_state_dict
from diffrl.rollout_store import read_all
from diffrl.run_folder import MetricsFile, claim_attempt, read_run, require_newest
from tests.actors.conftest import opened, rl_config
from tests.actors.mortal_driver import PLACES
from tests.actors.test_loop import metric_lines
from tests.conftest import RayCluster

STEPS = 6


@pytest.fixture(scope="module")
def other_problems(problems_file: Path, tmp_path_factory) -> Path:
    """A folder with problems for evaluations (eval.jsonl) and for the report (report.jsonl)."""
    folder = tmp_path_factory.mktemp("held-out")
    for name in ("eval", "report"):
        shutil.copy(problems_file, folder / f"{name}.jsonl")
    return folder


def config_of(tuned_model: Path, problems_file: Path, run_dir: Path, held_out: Path, /, **sections: dict) -> RLConfig:
    """Epochs of a step and a half; a reference that is saved apart, evaluations, a report."""
    evaluated, reported = (
        {"source": "problems", "path": str(held_out / f"{name}.jsonl"), "num_prompt_tests": 0}
        for name in ("eval", "report")
    )
    defaults: dict = {
        "train": {"steps": STEPS},
        "method": {"reference_refresh_steps": 3},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "problems": evaluated, "num_samples": 1},
        "report": {"problems": reported, "num_train_problems": 1},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    return rl_config(tuned_model, problems_file, run_dir, **merged)


@pytest.fixture(scope="module")
def calm(ray_cluster, tuned_model, problems_file, other_problems, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("resume") / "calm"
    train(config_of(tuned_model, problems_file, run_dir, other_problems))
    return run_dir


ASIDE = {
    "failed_batches",
    "tensorboard",
    "curves.png",
}  # of a run's failures and of its sinks, which some tests leave out


def assert_same(run_dir: Path, calm: Path) -> None:
    """Metrics, rollouts and weights to the last bit; every problem is trained on as often."""
    assert metric_lines(run_dir) == metric_lines(calm)
    mine, theirs = (read_all(folder / "rollouts").to_pylist() for folder in (run_dir, calm))
    for row in (*mine, *theirs):
        del row["cpu_s"]
    assert mine == theirs
    left, right = load_state_dict(run_dir / "model"), load_state_dict(calm / "model")
    assert left.keys() == right.keys() and all(tensor.equal(right[name]) for name, tensor in left.items())
    mine, theirs = ({f.name for f in folder.iterdir()} - ASIDE for folder in (run_dir, calm))
    assert mine == theirs
    assert committed_steps(run_dir) == committed_steps(calm)
    for report in ("report_before.json", "report_after.json"):
        if (calm / report).exists():
            assert (run_dir / report).read_text() == (calm / report).read_text()


def killed(config: RLConfig, cluster: RayCluster, place: str, step: int) -> None:
    """Start or go on, until the driver kills itself."""
    folder = Path(config.run_dir)
    file = folder.with_suffix(".yaml")
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "tests.actors.mortal_driver", str(file), place, str(step)]
    with folder.with_suffix(".log").open("a") as log:
        driver = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log)
    assert driver.returncode == -signal.SIGKILL, folder.with_suffix(".log").read_text()[-3000:]


def test_checkpoints_of_a_run(calm: Path):
    assert committed_steps(calm) == [4, 6]
    state = RunState.read(checkpoint_path(calm, 4))
    assert (state.step, state.version, state.reference_version, state.next_ordinal) == (4, 4, 3, 16)
    assert state.best_step is not None and not state.ended and RunState.read(checkpoint_path(calm, 6)).ended
    kept = (calm / "metrics.jsonl").read_bytes()[: state.metrics_bytes].decode().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [0, 1, 1, 2, 3, 3]
    assert (checkpoint_path(calm, 4) / "reference").is_dir() and not (checkpoint_path(calm, 6) / "reference").exists()
    assert load_state_dict(checkpoint_path(calm, 6) / "model").keys() == load_state_dict(calm / "model").keys()
    assert read_run(calm)["finished"] > 0


def test_a_killed_driver_changes_nothing(
    calm, ray_cluster, tuned_model, problems_file, other_problems, tmp_path, capsys
):
    """Killed while a checkpoint is written, and in an update behind it; then it is let go on."""
    config = config_of(tuned_model, problems_file, tmp_path / "run", other_problems)
    for place, step in (("saving", 3), ("updating", 4)):
        killed(config, ray_cluster, place, step)
    assert committed_steps(tmp_path / "run") == [2, 4]
    train(config, resume="auto")
    assert_same(tmp_path / "run", calm)
    assert read_run(tmp_path / "run")["attempt"] == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("held-out pass@1 ") and "goes on after step 4" in said.err
    train(config, resume="auto")
    assert capsys.readouterr().out == f"rl: {tmp_path / 'run'} is finished; nothing was started\n"
    assert not list(tmp_path.glob("run.*/"))  # nothing was moved aside


@pytest.mark.slow
def test_a_checkpoint_begins_a_branch(calm, tuned_model, problems_file, other_problems, tmp_path, capsys):
    """Another config changes what follows and not what was before, and says so."""
    checkpoint = checkpoint_path(calm, 4)
    other = config_of(tuned_model, problems_file, tmp_path / "other", other_problems, optim={"lr": 1e-3})
    train(other, resume=str(checkpoint))
    mine, theirs = metric_lines(tmp_path / "other"), metric_lines(calm)
    assert mine[:6] == theirs[:6] and mine[6] != theirs[6] and len(mine) == len(theirs)
    assert "optim.lr: 0.001, was 0.0003: it changes what is computed from there on" in capsys.readouterr().err
    assert read_run(tmp_path / "other")["branch"] == {"checkpoint": str(checkpoint)}


@pytest.mark.parametrize(
    ("resume", "changes", "message"),
    [
        ("last", {"run": "new"}, "--resume: last, but {new} has no checkpoint; use auto"),
        ("auto", {"optim": {"lr": 1.0}}, "optim.lr: 1.0 must be 0.0003, with which the run in {calm} was started"),
        ("nowhere", {"run": "new"}, "--resume: nowhere is not a checkpoint of an RL run (FileNotFoundError"),
        ("{calm}/checkpoints/step-000004", {}, "run_dir: {calm} holds the checkpoint {calm}/checkpoints/step-000004"),
        (
            "{calm}/checkpoints/step-000004",
            {"run": "new", "learner": {"zero_stage": 1}},
            "learner.zero_stage: 1 must be 0, with which {calm}/checkpoints/step-000004 was made",
        ),
    ],
)
def test_what_cannot_be_resumed(calm, tuned_model, problems_file, other_problems, tmp_path, resume, changes, message):
    run_dir = tmp_path / "new" if changes.pop("run", None) else calm
    config = config_of(tuned_model, problems_file, run_dir, other_problems, **changes)
    names = {"calm": str(calm), "new": str(tmp_path / "new")}
    before = sorted(calm.rglob("*"))
    for call in (check_resume, begin):
        with pytest.raises(ConfigError) as caught:
            call(config, resume.format(**names))
        assert str(caught.value).startswith(message.format(**names)) and "\n" not in str(caught.value)
    assert sorted(calm.rglob("*")) == before and not (tmp_path / "new").exists()


def test_lines_of_metrics_that_are_lost_are_noticed(tuned_model, problems_file, other_problems, tmp_path):
    config = config_of(tuned_model, problems_file, tmp_path / "run", other_problems)
    start = begin(config, None)
    assert start is not None
    checkpoint = checkpoint_path(start.folder, 2)
    part_path(checkpoint, 1).mkdir(parents=True)
    commit(part_path(checkpoint, 1), checkpoint, RunState(step=2, metrics_bytes=100).note())
    (start.folder / "metrics.jsonl").write_text("{}\n" * 30)
    with pytest.raises(ConfigError, match=r"^--resume: .*/metrics.jsonl has 90 bytes, and had 100 when .* restore it"):
        check_resume(config, "auto")
    (start.folder / "metrics.jsonl").write_text("{}\n" * 40)
    assert check_resume(config, "auto") == checkpoint


class FullDisk(Run):
    """No file of the learner may grow beyond 64 KB when the second checkpoint is written."""

    def save(self, steps: int, *, ended: bool) -> None:
        if steps == 4:
            pid = ray.get(self.learner.ranks[0].__ray_call__.remote(lambda rank: os.getpid()))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
        super().save(steps, ended=ended)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    calm, tuned_model, problems_file, other_problems, tmp_path
):
    config = config_of(tuned_model, problems_file, tmp_path / "run", other_problems)
    with (
        pytest.raises(RunStoppedError, match=r"cannot be written \(rank 0: .*make room and go on") as caught,
        opened(config, FullDisk) as run,
    ):
        run.train()
    assert "\n" not in str(caught.value) and committed_steps(tmp_path / "run") == [2]
    train(config, resume="auto")
    assert_same(tmp_path / "run", calm)


def test_what_does_not_touch_the_result_may_differ(calm, tuned_model, problems_file, other_problems):
    config = config_of(
        tuned_model, problems_file, calm, other_problems, rollout={"num_workers": 3}, checkpoint={"every": 5}
    )
    assert check_resume(config, "auto") == checkpoint_path(calm, 6)


def test_the_last_start_alone_writes(tmp_path, tuned_model, problems_file, other_problems):
    config = config_of(tuned_model, problems_file, tmp_path / "run", other_problems)
    first = begin(config, None)
    assert first is not None
    with closing(MetricsFile(first.folder)) as old, closing(MetricsFile(first.folder)) as new:
        old.write({"step": 0})
        second = begin(config, "auto")
        assert second is not None and (first.attempt.number, second.attempt.number) == (1, 2)
        new.cut(0)
        old.write({"step": 1})  # too late: into a file that has no name any more
        new.write({"step": 0})
        assert new.path.read_text() == '{"step": 0}\n'
    require_newest(second.folder, second.attempt)
    with pytest.raises(RunStoppedError, match="the run has been started again elsewhere; this start of it ends here"):
        require_newest(first.folder, first.attempt)
    third = begin(config, None)  # another run in its place
    assert third is not None and third.attempt.number == 1
    with pytest.raises(RunStoppedError, match="started again elsewhere"):
        require_newest(second.folder, second.attempt)
    with pytest.raises(RunStoppedError, match="started again elsewhere"):  # its number is that of the third
        require_newest(first.folder, first.attempt)
    require_newest(third.folder, third.attempt)
    numbers = {claim_attempt(third.folder).number for _ in range(3)}
    assert numbers == {2, 3, 4}


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    checkpoint = checkpoint_path(tmp_path, 2)
    part = part_path(checkpoint, 1)
    (part / "learner").mkdir(parents=True)
    (part / "learner" / "weights.pt").write_bytes(b"1")
    assert committed_steps(tmp_path) == [] and last_checkpoint(tmp_path) is None
    commit(part, checkpoint, RunState(step=2, watched=({"guard/agreement": 0.5},)).note())
    assert last_checkpoint(tmp_path) == checkpoint and not part.exists()
    assert RunState.read(checkpoint) == RunState(step=2, watched=({"guard/agreement": 0.5},))
    part_path(checkpoint_path(tmp_path, 4), 1).mkdir()
    prune(tmp_path, keep=1)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    (checkpoint / NOTE).write_text('{"step": 2}')
    with pytest.raises(ValueError, match="is not a checkpoint of an RL run"):
        RunState.read(checkpoint)


def test_prompts_go_on_from_any_ordinal(problems):
    stream = prompt_stream(problems, 7)
    drawn = [next(stream) for _ in range(20)]
    for first in (0, 1, 5, 6, 13):
        later = prompt_stream(problems, 7, first)
        assert [next(later) for _ in range(20 - first)] == drawn[first:]


KINDS_OF_RUNS: dict[str, dict] = {
    "adapters, mixed reference": {
        "model": {"lora": {"rank": 4, "publish": "adapter"}},
        "method": {"reference_mix": 0.6, "reference_refresh_steps": 2},
    },
    "two ranks, ZeRO 3": {"learner": {"num_ranks": 2, "zero_stage": 3, "stage3_param_persistence_threshold": 0}},
    "approximate sampling that falls back": {
        "sampling": {"steps": 40, "tokens_per_step": 4, "guard_window": 2, "guard_min_agreement": 1.0}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_RUNS)
def test_every_kind_of_run_goes_on(ray_cluster, tuned_model, problems_file, other_problems, tmp_path, kind: str):
    calm, run = (
        config_of(tuned_model, problems_file, tmp_path / name, other_problems, **KINDS_OF_RUNS[kind])
        for name in ("calm", "run")
    )
    train(calm)
    killed(run, ray_cluster, "sampled", 3)
    assert committed_steps(tmp_path / "run") == [2]
    killed(run, ray_cluster, "saved", 3)
    train(run, resume="auto")
    assert_same(tmp_path / "run", tmp_path / "calm")


@pytest.mark.slow
def test_a_branch_with_the_same_config_is_the_same_run(calm, tuned_model, problems_file, other_problems, tmp_path):
    config = config_of(tuned_model, problems_file, tmp_path / "same", other_problems)
    train(config, resume=str(checkpoint_path(calm, 4)))
    assert metric_lines(tmp_path / "same") == metric_lines(calm)


@pytest.mark.slow
def test_a_lost_run_folder_comes_back_from_the_copy(
    calm, ray_cluster, tuned_model, problems_file, other_problems, tmp_path
):
    checkpoint = {"every": 2, "copy_to": f"file://{tmp_path}/copy"}
    config = config_of(tuned_model, problems_file, tmp_path / "run", other_problems, checkpoint=checkpoint)
    killed(config, ray_cluster, "updating", 4)
    shutil.rmtree(tmp_path / "run")
    train(config, resume="last")
    assert metric_lines(tmp_path / "run") == metric_lines(calm)
    left, right = load_state_dict(tmp_path / "run" / "model"), load_state_dict(calm / "model")
    assert all(tensor.equal(right[name]) for name, tensor in left.items())
    assert Mirror(str(tmp_path / "copy")).steps() == [4, 6]


@pytest.mark.slow
def test_twenty_kills_change_nothing(ray_cluster, tuned_model, problems_file, other_problems, tmp_path):
    """At every place of the loop, at the ends of epochs, and after random times; one run that is killed twenty times."""
    rng = random.Random(0)
    sections: dict = {"train": {"steps": 40}, "checkpoint": {"every": 3}, "report": {}}
    calm, run = (
        config_of(tuned_model, problems_file, tmp_path / name, other_problems, **sections) for name in ("calm", "run")
    )
    train(calm)
    table = []
    for number in range(20):
        place = PLACES[number % len(PLACES)] if number % 2 else f"{rng.uniform(0.2, 12):.2f}"
        done = max(committed_steps(tmp_path / "run"), default=0) if (tmp_path / "run").exists() else 0
        step = done + rng.randrange(3)
        killed(run, ray_cluster, place, step)
        table.append((number + 1, place, step, done))
    train(run, resume="auto")
    print("kill, place or seconds, step, last checkpoint before:", *table, sep="\n")
    assert_same(tmp_path / "run", tmp_path / "calm")
    assert read_run(tmp_path / "run")["attempt"] == 21
