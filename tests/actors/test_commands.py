"""The commands that a user types, as processes of their own, on the test run's Ray cluster."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from diffrl.rollout_store import read_all
from tests.conftest import RayCluster
from tests.shared_files import shared_file

ROOT = Path(__file__).parents[2]
MAX_UPLOAD = 20 << 20
# README's commands by their first words; each is run below, as it stands there but for overrides that cut it short.
COMMANDS = (
    "diffrl train configs/quickstart_pretrain.yaml",
    "diffrl train configs/quickstart_sft.yaml",
    "diffrl train configs/quickstart.yaml model.path",
    "diffrl train configs/quickstart.yaml --dry-run",
    "diffrl train configs/mbpp.yaml",
    "diffrl config",
    "diffrl eval",
    "diffrl judge --solution",
    "diffrl judge --corpus",
    "diffrl sandbox build",
    "diffrl generate",
    "ray job submit",
)


def readme_commands() -> list[str]:
    """Every diffrl, ray and python command of README.md: lines of code blocks, and code in tables and text."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    commands = [line.partition("  #")[0].strip() for line in lines]
    return [
        c
        for c in commands
        if re.match(r"(diffrl (train|eval|generate|config|judge|sandbox)|ray|python3?|\S+/python3?) [^A-Z]", c)
    ]


def readme(start: str, *overrides: str, **replace: str) -> list[str]:
    """The one command of README.md that starts like this, as an argument list, with overrides."""
    assert start in COMMANDS
    (command,) = (c for c in readme_commands() if c.startswith(start))
    for old, new in replace.items():
        assert old in command
        command = command.replace(old, new)
    return [*shlex.split(command), *overrides]


def run(*command: str, cwd: Path = ROOT, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with the virtual environment's programs first on the path."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def succeeds(command: list[str], **environment: str) -> str:
    """What the command printed on stdout."""
    made = run(*command, **environment)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return made.stdout


def test_every_command_of_the_readme_is_run_here():
    commands = readme_commands()
    assert commands
    for command in commands:
        assert sum(command.startswith(start) for start in COMMANDS) == 1, f"no test runs {command!r}"
    source = Path(__file__).read_text()
    for start in COMMANDS:
        assert source.count(f'"{start}"') == 2, f"listed, but not run: {start!r}"


def test_quickstart_stages_follow_one_another(ray_cluster: RayCluster, tmp_path: Path):
    """The three commands of `make quickstart`, each cut short; every stage starts from the model before it."""
    pretrain, sft, rl = (tmp_path / name for name in ("pretrain", "sft", "rl"))
    short = ("train.steps=2", "data.max_stdlib_bytes=20000")
    succeeds(readme("diffrl train configs/quickstart_pretrain.yaml", f"run_dir={pretrain}", *short))
    sft_overrides = (f"run_dir={sft}", f"model.path={pretrain}/model", "train.steps=2")
    succeeds(readme("diffrl train configs/quickstart_sft.yaml", *sft_overrides))
    rl_overrides = (
        *(f"run_dir={rl}", f"model.path={sft}/model", "train.steps=1", "method.group_size=2"),
        *("report.num_train_problems=3", "report.problems.limit=2"),
    )
    command = readme("diffrl train configs/quickstart.yaml model.path", *rl_overrides)
    stdout = succeeds(command, RAY_ADDRESS=ray_cluster.address)
    percent, change = r"\d+\.\d%", r"\d+\.\d% -> \d+\.\d%"
    assert re.fullmatch(
        rf"held-out pass@1 {change}, gain [+-]{percent[:-1]} \[95% -?\d+\.\d\.\.-?\d+\.\d\] at temperature 1.0 "
        rf"\(at 0.4: {change}; greedy: {change}; pass@8: {change}; training problems: {change}\), seed 0",
        stdout.splitlines()[-1],
    ), stdout
    assert len(json.loads((rl / "report_after.json").read_text())["held_out/t1.0"]["num_correct"]) == 2


def test_mbpp_runs_with_real_verdicts(ray_cluster: RayCluster, tmp_path: Path):
    command = readme(
        "diffrl train configs/mbpp.yaml", f"run_dir={tmp_path}/mbpp", **{"../shared": str(shared_file(""))}
    )
    succeeds(command, RAY_ADDRESS=ray_cluster.address)
    rows = [json.loads(line) for line in (tmp_path / "mbpp/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    table = read_all(tmp_path / "mbpp/rollouts").to_pylist()
    assert len(table) == 3 * 4 * 4
    for step, row in enumerate(rows):
        statuses = [s for r in table if r["step"] == step for s in r["statuses"]]
        counted = {k.removeprefix("verdicts/"): v for k, v in row.items() if k.startswith("verdicts/")}
        assert counted == {name: statuses.count(name) for name in set(statuses)}
        assert sum(counted.values()) >= 16  # at least one graded test per rollout


def test_config_and_dry_run_start_nothing(tmp_path: Path):
    resolved = yaml.safe_load(succeeds(readme("diffrl config")))
    assert resolved["method"]["group_size"] == 10 and resolved["optim"]["lr"] == 1e-6
    command = readme("diffrl train configs/quickstart.yaml --dry-run", f"run_dir={tmp_path}/run")
    assert "nothing was started" in succeeds(command, RAY_ADDRESS="127.0.0.1:1")
    assert not (tmp_path / "run").exists()


def test_humaneval_canonical_solutions_all_pass():
    stdout = succeeds(readme("diffrl eval", **{"../shared": str(shared_file(""))}))
    assert stdout.splitlines()[-1] == "humaneval: 164 of 164 canonical solutions pass"


def test_humaneval_wrong_solutions_fail(tmp_path: Path):
    """The same command counts what fails: three problems, one of them with a broken solution."""
    with gzip.open(shared_file("data/humaneval/HumanEval.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file][:3]
    rows[1]["canonical_solution"] = "    return None\n"
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stdout = succeeds(["diffrl", "eval", "--benchmark", "humaneval", "--data", str(tmp_path / "few.jsonl")])
    assert stdout.splitlines()[-1] == "humaneval: 2 of 3 canonical solutions pass"
    assert rows[1]["task_id"] in stdout


@pytest.mark.docker
def test_judge_one_program_with_and_without_the_image(container_engine: str):
    """`--backend auto` takes docker as soon as the image is there; the verdicts are the same."""
    judge = readme("diffrl judge --solution")
    before = succeeds(judge, DOCKER_HOST="unix:///nowhere/docker.sock").splitlines()
    assert succeeds(readme("diffrl sandbox build"), DOCKER_HOST=container_engine).startswith("sha256:")
    after = succeeds(judge, DOCKER_HOST=container_engine).splitlines()
    assert [line.split()[0] for line in before] == [line.split()[0] for line in after] == ["passed"] * 3 + ["3"]
    assert before[3].startswith("3 of 3 tests passed, high trust, ") and before[3].endswith(", process backend")
    assert after[3].endswith(", docker backend")


def test_judge_a_corpus_of_hostile_programs():
    """Exit status 0: nothing was paid, lost or left behind that should not be."""
    stdout = succeeds(readme("diffrl judge --corpus", **{"../shared": str(shared_file(""))}))
    assert stdout.splitlines()[-1].startswith("programs 42, false_rewards 0, lost 0, wrong 0, hung 0, ")


def test_generate_prints_a_completion(tuned_model: Path):
    command = readme("diffrl generate", **{"runs/quickstart/model": str(tuned_model)})
    assert "```python" in succeeds([*command, "--tokens", "40"])


def test_job_submit(ray_cluster: RayCluster, tmp_path: Path):
    """`ray job submit` of the working directory: succeeds, and what is uploaded stays small."""
    overrides = ("report.problems.limit=2", "report.num_train_problems=2")
    command = readme(
        "ray job submit", f"run_dir={tmp_path}/job", *overrides, **{"http://127.0.0.1:8265": ray_cluster.dashboard}
    )
    stdout = succeeds(command)
    assert "succeeded" in stdout and "held-out pass@1" in stdout
    assert len((tmp_path / "job/metrics.jsonl").read_text().splitlines()) == 2
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
    "estimator of another family": (["method.estimator=causal"], ["method.estimator", "'causal'", "DreamModel"]),
    "missing file": (["data.source=mbpp", "data.path=/nowhere.jsonl"], ["path", "/nowhere.jsonl"]),
    "report on training data": (["report.problems.split=train"], ["report.problems", "train"]),
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


def test_a_model_that_does_not_fit_is_refused(tuned_model: Path, tmp_path: Path):
    """Its weights are not read for that: headers and config.json say enough."""
    for file in tuned_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    refused(["train", "configs/quickstart.yaml", f"model.path={tmp_path}"], ["model.path", "layers.2"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(["train", "configs/quickstart.yaml", f"model.path={tmp_path}"], ["model.path", "safetensors"], tmp_path)


def test_gpus_that_are_not_there_are_refused(tmp_path: Path):
    made = run("diffrl", "train", "configs/quickstart.yaml", "learner.gpus_per_rank=50", f"run_dir={tmp_path}/run")
    assert made.returncode == 2 and made.stderr.count("\n") == 1
    assert "100 GPUs are asked for" in made.stderr


def refused(args: list[str], expected: list[str], tmp_path: Path) -> None:
    """Exit status 2, one line on stderr, no run folder. RAY_ADDRESS leads nowhere: starting an actor would fail."""
    made = run("diffrl", *args, f"run_dir={tmp_path}/run", RAY_ADDRESS="127.0.0.1:1")
    assert made.returncode == 2, made.stderr
    assert made.stdout == ""
    assert len(made.stderr.splitlines()) == 1, made.stderr
    for text in expected:
        assert text in made.stderr
    assert not (tmp_path / "run").exists()
