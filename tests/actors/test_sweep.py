"""`diffrl sweep`: what is refused before anything starts, what is not run again, and its jobs."""

from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from actors.submit import Submission
from tests.actors.conftest import Called, one_line
from tests.conftest import RayCluster

CONFIG = (
    "stage: rl\nrun_dir: {run_dir}\ndata: {{source: microcode}}\nsandbox: {{backend: process}}\ntrain: {{steps: 1}}\n"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rl.yaml").write_text(CONFIG.format(run_dir=tmp_path / "run"))
    monkeypatch.chdir(folder)
    return folder


BAD = {
    "no axis": ([], ["--over: not given"]),
    "no values": (["--over", "seed"], ["--over: 'seed' must be KEY=VALUE,VALUE"]),
    "no config": (["--over", "seed=0,1", "CONFIG"], ["config: nowhere.yaml does not exist"]),
    "an unknown key": (["--over", "sede=0,1"], ["sede: unknown key", "did you mean 'seed'"]),
    "a value of the grid's end": (
        ["--over", "method.estimator=coupled,full_msk"],
        ["'full_msk' is unknown", "full_mask"],
    ),
    "values that do not go together": (
        ["--over", "method.estimator=coupled,coupled_normalized", "--over", "method.t_max=0.8,0.9"],
        ["method.t_min: 0.2 must be 1 - t_max 0.9"],
    ),
    "a model that is not there": (
        ["--over", "model.path=/nowhere,/nowhere2"],
        ["model.path: /nowhere is not a folder"],
    ),
    "a metric": (["--over", "seed=0,1", "--metric", "rewards"], ["--metric: 'rewards' is unknown"]),
    "a folder that goes away": (
        ["--over", "seed=0,1", "--out", "runs/a", "--address", "http://127.0.0.1:1"],
        ["run_dir: runs/a/seed-0 would be in the job's copy"],
    ),
    "nobody there": (["--over", "seed=0,1", "--address", "http://127.0.0.1:1"], ["--address: nobody answers"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_starts_nothing(name: str, project: Path, tmp_path: Path, called: Called):
    arguments, expected = BAD[name]
    config = "nowhere.yaml" if "CONFIG" in arguments else "rl.yaml"
    status, _, stderr = called("sweep", config, *(a for a in arguments if a != "CONFIG"))
    one_line((status, "", stderr), expected)
    assert not (tmp_path / "run_sweep").exists() and not (project / "runs").exists()


def test_a_dry_run_lists_what_would_run(project: Path, tmp_path: Path, called: Called):
    status, stdout, stderr = called(
        "sweep", "rl.yaml", "--over", "method.num_pairs=2", "--over", "seed=0,1", "--dry-run"
    )
    assert status == 0, stderr
    names = [f"num_pairs-2_seed-{seed}" for seed in (0, 1)]
    assert stdout.split() == ["sweep:", "2", "runs", "in", f"{tmp_path}/run_sweep", *names, "nothing", "was", "started"]
    assert not (tmp_path / "run_sweep").exists()


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # what Ray gives aiohttp
def test_jobs_that_fail_are_named_and_hold_up_nobody(
    ray_cluster: RayCluster, project: Path, tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
):
    """What the jobs do instead: one fails, one leaves a finished run's record."""
    record = '{"step": 0, "reward/mean": 1.5}'

    def entrypoint(submission: Submission) -> str:
        assert submission.overrides[-1].startswith("run_dir=")
        folder = submission.overrides[-1].partition("=")[2]
        return "exit 3" if folder.endswith("seed-0") else f"mkdir -p {folder}; echo '{record}' > {folder}/metrics.jsonl"

    monkeypatch.setattr(Submission, "entrypoint", entrypoint)
    command = ("sweep", "rl.yaml", "--over", "seed=0,1", "--address", ray_cluster.dashboard, "--at-a-time", "2")
    status, stdout, stderr = called(*command)
    assert status == 1 and stderr.count("\n") == 1, (stdout, stderr)
    assert "1 of 2 runs failed: seed-0; the same command goes on with them" in stderr
    assert "sweep: seed-0: failed" in stdout and "sweep: seed-1: succeeded" in stdout
    assert "| all | 1 | - | 1.5 | 1.5 |" in stdout
    jobs = JobSubmissionClient(ray_cluster.dashboard).list_jobs()
    mine = {(job.metadata or {}).get("run_dir") for job in jobs}
    assert {f"{tmp_path}/run_sweep/seed-{seed}" for seed in (0, 1)} <= mine
