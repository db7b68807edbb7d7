"""The commands that a user types, as processes of their own, on the test run's Ray cluster."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from diffrl.rollout_store import read_all
from tests.conftest import RayCluster, shared_dir

ROOT = Path(__file__).parents[2]
MAX_UPLOAD = 20 << 20


def run(*command: str, cwd: Path = ROOT, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with the virtual environment's programs first on the path."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def diffrl(*args: str, cluster: RayCluster | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run("diffrl", *args, cwd=cwd, **({"RAY_ADDRESS": cluster.address} if cluster else {}))


def test_quickstart_stages_follow_one_another(ray_cluster: RayCluster, tmp_path: Path):
    """The three commands of `make quickstart`, each cut short; every stage starts from the model before it."""
    pretrain, sft, rl = (tmp_path / name for name in ("pretrain", "sft", "rl"))
    made = diffrl(
        *("train", "configs/quickstart_pretrain.yaml", f"run_dir={pretrain}", "train.steps=2"),
        *("data.max_stdlib_bytes=20000", "train.threads=1"),
    )
    assert made.returncode == 0, made.stderr
    made = diffrl(
        *("train", "configs/quickstart_sft.yaml", f"run_dir={sft}", f"model.path={pretrain}/model"),
        *("train.steps=2", "train.threads=1"),
    )
    assert made.returncode == 0, made.stderr
    made = diffrl(
        *("train", "configs/quickstart.yaml", f"run_dir={rl}", f"model.path={sft}/model", "train.steps=1"),
        *("method.group_size=2", "report.num_samples=2", "report.num_train_problems=3", "report.problems.limit=4"),
        cluster=ray_cluster,
    )
    assert made.returncode == 0, made.stderr
    percent, change = r"\d+\.\d%", r"\d+\.\d% -> \d+\.\d%"
    assert re.fullmatch(
        rf"held-out pass@1 {change}, gain [+-]{percent[:-1]} \[95% -?\d+\.\d\.\.-?\d+\.\d\] at temperature 1.0 "
        rf"\(at 0.4: {change}; greedy: {change}; pass@8: {change}; training problems: {change}\), seed 0",
        made.stdout.splitlines()[-1],
    ), made.stdout
    assert len(json.loads((rl / "report_after.json").read_text())["held_out/t1.0"]["num_correct"]) == 4


def test_mbpp_runs_with_real_verdicts(ray_cluster: RayCluster, tmp_path: Path):
    path = shared_dir() / "data/mbpp/mbpp.jsonl"
    made = diffrl("train", "configs/mbpp.yaml", f"data.path={path}", f"run_dir={tmp_path}/mbpp", cluster=ray_cluster)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in (tmp_path / "mbpp/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    table = read_all(tmp_path / "mbpp/rollouts").to_pylist()
    assert len(table) == 3 * 4 * 4
    for step, row in enumerate(rows):
        statuses = [s for r in table if r["step"] == step for s in r["statuses"]]
        counted = {k.removeprefix("verdicts/"): v for k, v in row.items() if k.startswith("verdicts/")}
        assert counted == {name: statuses.count(name) for name in set(statuses)}
        assert sum(counted.values()) >= 16  # at least one graded test per rollout


def test_humaneval_canonical_solutions_all_pass():
    path = shared_dir() / "data/humaneval/HumanEval.jsonl.gz"
    made = diffrl("eval", "--benchmark", "humaneval", "--data", str(path), "--solutions", "canonical")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "humaneval: 164 of 164 canonical solutions pass"


def test_humaneval_wrong_solutions_fail(tmp_path: Path):
    """The same command counts what fails: three problems, one of them with a broken solution."""
    with gzip.open(shared_dir() / "data/humaneval/HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:3]
    rows[1]["canonical_solution"] = "    return None\n"
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = diffrl("eval", "--benchmark", "humaneval", "--data", str(tmp_path / "few.jsonl"))
    assert made.stdout.splitlines()[-1] == "humaneval: 2 of 3 canonical solutions pass"
    assert rows[1]["task_id"] in made.stdout


def test_generate_prints_a_completion(tuned_model: Path, problems):
    made = diffrl("generate", "--model", str(tuned_model), "--prompt", problems[0].prompt, "--tokens", "40")
    assert made.returncode == 0, made.stderr
    assert "```python" in made.stdout


def test_job_submit(ray_cluster: RayCluster, tmp_path: Path):
    """`ray job submit` of the working directory: succeeds, and what is uploaded stays small."""
    made = run(
        *("ray", "job", "submit", "--address", ray_cluster.dashboard, "--working-dir", ".", "--"),
        *("diffrl", "train", "configs/quickstart.yaml", "train.steps=2", f"run_dir={tmp_path}/job"),
        *("report.problems.limit=4", "report.num_samples=2", "report.num_train_problems=2"),
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    assert "succeeded" in made.stdout
    assert "held-out pass@1" in made.stdout
    rows = (tmp_path / "job/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert upload_size(tmp_path) < MAX_UPLOAD


def upload_size(tmp_path: Path) -> int:
    """Bytes of the package that Ray's own code makes of the working directory."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[])
    return package.stat().st_size


BAD_INPUT = {
    "unknown key": (["method.group_sise=4"], ["method.group_sise", "group_size"]),
    "wrong type": (["train.steps=many"], ["train.steps", "'many'"]),
    "group_size 1": (["method.group_size=1"], ["method.group_size", "1"]),
    "missing file": (["data.source=mbpp", "data.path=/nowhere.jsonl"], ["path", "/nowhere.jsonl"]),
    "does not divide": (["train.prompts_per_step=7", "learner.num_ranks=2"], ["train.prompts_per_step", "7"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_starts_nothing(name: str, tmp_path: Path):
    overrides, expected = BAD_INPUT[name]
    refused(["train", "configs/quickstart.yaml", *overrides], expected, tmp_path)


def test_bad_problem_row_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"task_id": 7, "text": "Add.", "code": "def f(): pass", "test_list": []}\n')
    refused(["train", "configs/mbpp.yaml", f"data.path={tmp_path}/rows.jsonl"], ["mbpp/7", "test"], tmp_path)


def test_tokenizer_without_mask_token_is_refused(tuned_model: Path, tmp_path: Path):
    for file in tuned_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(["train", "configs/quickstart.yaml", f"model.path={tmp_path}"], ["model.path", "mask token"], tmp_path)


def refused(args: list[str], expected: list[str], tmp_path: Path) -> None:
    """Exit status 2, one line on stderr, and no run folder. RAY_ADDRESS leads nowhere: starting an actor would hang or fail."""
    made = run("diffrl", *args, f"run_dir={tmp_path}/run", RAY_ADDRESS="127.0.0.1:1")
    assert made.returncode == 2, made.stderr
    assert made.stdout == ""
    assert len(made.stderr.splitlines()) == 1, made.stderr
    for text in expected:
        assert text in made.stderr
    assert not (tmp_path / "run").exists()
