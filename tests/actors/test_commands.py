"""The commands that a user types, as processes of their own, on the test run's Ray cluster."""

import contextlib
import gzip
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from diffrl.data.microcode import microcode_problems
from diffrl.data.sft import fenced
from diffrl.data.shards import open_shards
from diffrl.prompts import build_prompt
from diffrl.rollout_store import read_all
from tests.actors.causal_folder import completion, served
from tests.actors.conftest import Called, one_line
from tests.conftest import RayCluster
from tests.diffrl.board_run import Shape, make_run
from tests.diffrl.test_added_tokens import qwen
from tests.diffrl.tiny_folder import tiny_folder
from tests.shared_files import shared_file

ROOT = Path(__file__).parents[2]
MAX_UPLOAD = 20 << 20
# README's commands by their first words; each is run below, as it stands there but for overrides that cut it short.
COMMANDS = (
    "diffrl pipeline configs/quickstart_pipeline.yaml",
    "diffrl pipeline configs/diffucoder_7b/pipeline.yaml",
    "diffrl pipeline configs/causal_pipeline.yaml",
    "diffrl train configs/quickstart_pretrain.yaml",
    "diffrl train configs/quickstart.yaml --dry-run",
    "diffrl train configs/quickstart.yaml --resume",
    "diffrl train configs/mbpp.yaml",
    "diffrl doctor",
    "diffrl status",
    "diffrl board",
    "diffrl report",
    "diffrl config",
    "diffrl data prepare",
    "diffrl data add-tokens",
    "diffrl data validate",
    "diffrl data clean",
    "diffrl curate",
    "diffrl analyze",
    "diffrl eval --benchmark humaneval --data",
    "diffrl eval --benchmark humaneval_infilling",
    "diffrl eval --benchmark humaneval_plus",
    "diffrl variance",
    "diffrl sweep",
    "diffrl judge --solution",
    "diffrl judge --corpus",
    "diffrl sandbox build",
    "diffrl generate runs",
    "diffrl generate --infill",
    "ray job submit",
    "diffrl submit",
)


def readme_commands() -> list[str]:
    """Every diffrl, ray and python command of README.md: lines of code blocks, and code in tables and text."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    commands = [line.partition("  #")[0].strip() for line in lines]
    ours = "train|sweep|submit|pipeline|data|curate|eval|generate|config|judge|sandbox|doctor|status|board|report"
    ours += "|analyze|variance"
    return [c for c in commands if re.match(rf"(diffrl ({ours})|ray|(\S+/)?python3?) [^A-Z]", c)]


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


def test_the_quickstart_is_a_pipeline(ray_cluster: RayCluster, tmp_path: Path):
    """The command of `make quickstart`, its stages cut short; every stage starts from the model before it."""
    assert "$(BIN)/diffrl pipeline configs/quickstart_pipeline.yaml\n" in (ROOT / "Makefile").read_text()
    text = [
        f"stages.{name}.{key}"
        for name in ("pretrain", "midtrain")
        for key in ("train.steps=2", "data.max_stdlib_bytes=20000")
    ]
    rl = ("train.steps=1", "method.group_size=2", "report.num_train_problems=3", "report.problems.limit=2")
    overrides = (
        *(f"run.dir={tmp_path}/run", *text, "stages.sft.train.steps=2", *(f"stages.rl.{key}" for key in rl)),
        *("evaluation.problems.limit=3", "evaluation.num_samples=2"),
    )
    command = readme("diffrl pipeline configs/quickstart_pipeline.yaml", *overrides)
    stdout = succeeds(command, RAY_ADDRESS=ray_cluster.address)
    percent, change = r"\d+\.\d%", r"\d+\.\d% -> \d+\.\d%"
    assert re.search(
        rf"^held-out pass@1 {change}, gain [+-]{percent[:-1]} \[95% -?\d+\.\d\.\.-?\d+\.\d\] at temperature 1.0 "
        rf"\(at 0.4: {change}; greedy: {change}; pass@8: {change}; training problems: {change}\), seed 0$",
        stdout,
        re.MULTILINE,
    ), stdout
    assert len(json.loads((tmp_path / "run/rl/report_after.json").read_text())["held_out/t1.0"]["num_correct"]) == 2
    rows = json.loads((tmp_path / "run/pipeline.json").read_text())["stages"]
    assert [(row["stage"], row["steps"], "pass@2" in row) for row in rows] == [
        *(("pretrain", 2, True), ("midtrain", 2, True), ("sft", 2, True), ("rl", 1, True))
    ]
    assert all(re.search(rf"│ {row['stage']} +│ run +│ {row['steps']} +│", stdout) for row in rows), stdout
    head, *stages = succeeds(readme("diffrl status", **{"runs/quickstart": f"{tmp_path}/run"})).splitlines()
    assert head == f"{tmp_path}/run: pipeline, finished"
    for row, line in zip(rows, stages, strict=True):
        assert line.split()[0] == row["stage"] and f"steps {row['steps']} of {row['steps']}; " in line
        assert re.search(r"attempt 1, finished in [\d.]+ (s|min)", line), line


def test_the_7b_pipeline_is_planned_where_its_models_are_not():
    stdout = succeeds(readme("diffrl pipeline configs/diffucoder_7b/pipeline.yaml"))
    assert stdout.splitlines()[-1] == "nothing was started" and stdout.count("GPU-days") == 4


def test_the_baseline_is_a_pipeline(ray_cluster: RayCluster, tmp_path: Path):
    rl = ("train.steps=1", "method.group_size=2", "report.num_train_problems=2", "report.problems.limit=2")
    overrides = ("stages.sft.train.steps=2", *(f"stages.rl.{key}" for key in rl), "evaluation.problems.limit=2")
    command = readme("diffrl pipeline configs/causal_pipeline.yaml", f"run_dir={tmp_path}/run", *overrides)
    assert "held-out pass@1" in succeeds(command, RAY_ADDRESS=ray_cluster.address)
    rows = json.loads((tmp_path / "run/pipeline.json").read_text())["stages"]
    assert [(row["stage"], row["steps"], "pass@2" in row) for row in rows] == [("sft", 2, True), ("rl", 1, True)]
    assert json.loads((tmp_path / "run/rl/model/config.json").read_text())["model_type"] == "qwen2"


def test_one_stage_alone(tmp_path: Path):
    overrides = (f"run_dir={tmp_path}/run", "train.steps=2", "data.max_stdlib_bytes=20000")
    succeeds(readme("diffrl train configs/quickstart_pretrain.yaml", *overrides))
    assert (tmp_path / "run/model/model.safetensors").is_file()


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
    command = readme("diffrl train configs/quickstart.yaml --resume", f"run_dir={tmp_path}/run", "--dry-run")
    assert "40 steps; nothing was started" in succeeds(command, RAY_ADDRESS="127.0.0.1:1")
    assert not (tmp_path / "run").exists()


def test_the_doctor_finds_nothing_bad_here(tmp_path: Path):
    command = readme("diffrl doctor", f"run_dir={tmp_path}/run")
    stdout = succeeds(command)
    assert re.search(r"^ok   config      ready: 3016 problems, 40 steps; nothing was started; ", stdout, re.MULTILINE)
    assert {line.split()[0] for line in stdout.splitlines()} <= {"ok", "warn"}
    assert not (tmp_path / "run").exists()


def test_estimators_are_compared(tmp_path: Path):
    """The command, cut short, with a model of random weights."""
    folder = tiny_folder(tmp_path / "model", max_positions=256)
    places = {
        "runs/quickstart/sft/model": str(folder),
        "variance.json": f"{tmp_path}/v.json",
        "runs/variance": f"{tmp_path}/out",
    }
    short = ("--problems", "2", "--samples", "2", "--tokens", "8", "--draws", "4", "--masks", "1024", "--lambdas", "1")
    stdout = succeeds(readme("diffrl variance", *short, **places))
    raw = json.loads((tmp_path / "v.json").read_text())
    assert {row["estimator"] for row in raw["estimators"]} == {
        *("coupled", "decoupled", "coupled_normalized", "monte_carlo", "full_mask")
    }
    assert stdout.startswith("truth: mean of the ELBO integrand over t in 0.2..0.8, from 1024 masks a completion: ")
    assert (tmp_path / "out/variance.svg").is_file() and stdout.rstrip().endswith(f"{tmp_path}/out/variance.png")


def test_a_sweep_runs_what_is_not_finished(ray_cluster: RayCluster, tmp_path: Path):
    """Two seeds of the grid, a step each; the same command again starts nothing and has the same numbers."""
    overrides = (
        *("train.steps=1", "train.prompts_per_step=2", "method.group_size=2", "report=null", "sampling.steps=2"),
        *("--out", f"{tmp_path}/sweep"),
    )
    command = readme("diffrl sweep", *overrides, **{"coupled,full_mask": "full_mask", "seed=0,1,2": "seed=0,1"})
    stdout = succeeds(command, RAY_ADDRESS=ray_cluster.address)
    assert f"sweep: 2 runs in {tmp_path}/sweep\n" in stdout
    row = stdout.rstrip().splitlines()[-1]
    assert row.startswith("| method.estimator full_mask | 2 | ")
    raw = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [run["name"] for run in raw["runs"]] == [f"estimator-full_mask_seed-{seed}" for seed in (0, 1)]
    for run in raw["runs"]:
        assert len((tmp_path / "sweep" / run["name"] / "metrics.jsonl").read_text().splitlines()) == 1
    assert "reward/mean" in raw["groups"][0]["metrics"] and (tmp_path / "sweep/curves.svg").is_file()
    again = succeeds(command, RAY_ADDRESS="127.0.0.1:1").splitlines()
    assert again[0].endswith("sweep, 2 finished already") and again[-1] == row


def test_data_are_prepared_once(ray_cluster: RayCluster, tmp_path: Path, called: Called):
    """The command as it stands, and once more: the second call finds the rows there."""
    overrides = ("data.max_stdlib_bytes=20000", "--workers", "1")
    command = readme("diffrl data prepare", *overrides, **{"data/text": f"{tmp_path}/text"})
    said = succeeds(command, RAY_ADDRESS=ray_cluster.address).splitlines()[-1]
    manifest = open_shards(tmp_path / "text")
    assert manifest.kind == "text" and manifest.num_rows > 1000
    told = rf"data: {manifest.num_rows} rows, {manifest.num_tokens} tokens, {len(manifest.files)} files in [\d.]+ s, "
    assert re.fullmatch(rf"{told}fingerprint {manifest.fingerprint[:16]} -> {tmp_path}/text", said)
    status, stdout, _ = called(*command[1:])
    assert status == 0 and stdout.endswith("(kept: made from the same inputs)\n")
    one_line(called("data", "prepare", "configs/quickstart.yaml", "--out", f"{tmp_path}/rl"), ["stage: 'rl'", "sft"])
    one_line(called(*command[1:], "data.sequence_length=65"), [f"{tmp_path}/text", "other inputs"])


def test_own_problems_are_checked_and_cleaned(tmp_path: Path):
    """Against real benchmarks: one problem is HumanEval's first, and there is one row that is none."""
    benchmark = shared_file("data/humaneval/HumanEval.jsonl.gz")
    with gzip.open(benchmark, "rt") as lines:
        taken = json.loads(next(lines))
    mine = {"id": "mine/1", "prompt": "Square x.", "prompt_tests": [], "reward_tests": ["assert f(3) == 9"]}
    rows = [
        mine | {"solution": "def f(x):\n    return x * x"},
        mine | {"id": "mine/2", "prompt": taken["prompt"], "solution": "def f(x):\n    return x ** 2"},
    ]
    file, clean = tmp_path / "mine.jsonl", tmp_path / "clean.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validate = readme("diffrl data validate", **{"mine.jsonl": str(file)})
    assert "2 problems" in succeeds(validate)
    command = readme(
        "diffrl data clean", "--backend", "process", **{"mine.jsonl": str(file), " clean.jsonl": f" {clean}"}
    )
    places = {"HumanEval.jsonl.gz": str(benchmark), "=mbpp.jsonl": f"={shared_file('data/mbpp/mbpp.jsonl')}"}
    for old, new in places.items():
        command = [word.replace(old, new) for word in command]
    assert "mine/2" in succeeds(command)
    assert [json.loads(line)["id"] for line in clean.read_text().splitlines()] == ["mine/1"]
    file.write_text(file.read_text() + "{}\n")
    assert "line 3" in run(*validate).stdout


def test_problems_are_curated(ray_cluster: RayCluster, tmp_path: Path):
    """Both models of the config: a server's, which solves all, and a policy, which solves nothing."""
    problems = microcode_problems("train", num_prompt_tests=0)[:2]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))
    solutions = {build_prompt(problem): fenced(problem.solution or "") for problem in problems}

    def answer(body: dict, number: int) -> tuple[int, dict]:
        return 200, completion(solutions[body["messages"][0]["content"]])

    tiny_folder(tmp_path / "policy", max_positions=512)
    with served(answer, models=("Qwen/Qwen2.5-Coder-7B-Instruct",)) as server:
        data = ("data.source=problems", f"data.path={file}", "data.difficulty=hard", "data.num_prompt_tests=0")
        policy = {"path": tmp_path / "policy", "gpus_per_worker": 0, "max_tokens": 16, "cpus_per_worker": 0.25}
        stdout = succeeds(
            readme(
                "diffrl curate",
                *(*data, f"out={tmp_path}/out", "sandbox.backend=process", f"models.qwen_coder.url={server.url}"),
                *(
                    "models.qwen_coder.num_samples=2",
                    *(f"models.policy.{key}={value}" for key, value in policy.items()),
                ),
            ),
            RAY_ADDRESS=ray_cluster.address,
        )
    assert stdout.splitlines()[0].startswith("qwen_coder: 2 problems, 4 completions")
    table = pq.read_table(tmp_path / "out/inferences.parquet").to_pylist()
    rates = {i["model_name"]: i["pass_rate"] for row in table for i in row["inferences"]}
    assert rates == {"qwen_coder": 1.0, "policy": 0.0} and all(len(row["inferences"]) == 6 for row in table)


def test_two_models_are_analyzed(ray_cluster: RayCluster, tmp_path: Path):
    """With math beside code, as its file has it. Both models are one of random weights: what they differ in is 0 exactly."""
    before, after = (tiny_folder(tmp_path / name / "model", max_positions=512) for name in ("sft", "rl"))
    small = (
        "problems.limit=2",
        "num_samples=2",
        "pass_k=[1,2]",
        "max_k=4",
        "temperatures=[0.2,1]",
        "cpus_per_worker=0.25",
    )
    command = readme(
        "diffrl analyze",
        *(*small, f"math.path={shared_file('data/gsm8k/test.jsonl')}", "math.limit=1", f"out={tmp_path}/out"),
        **{"runs/quickstart/sft/model": str(before), "runs/quickstart/rl/model": str(after)},
    )
    stdout = succeeds(command, RAY_ADDRESS=ray_cluster.address)
    assert re.search(r"^not seen   RL lowers AR-ness: sft -> rl, global@1 \+0\.000 \[95% ", stdout, re.MULTILINE), (
        stdout
    )
    assert re.search(r"^not seen   RL lowers the loss of accuracy at half the steps: sft -> rl, ", stdout, re.MULTILINE)
    assert {f"{name}.svg" for name in ("steps", "pass_at_k", "math")} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_the_board_of_a_run_is_served(tmp_path: Path):
    run_dir = tmp_path / "run"
    make_run(run_dir, Shape(steps=2))
    command = readme("diffrl board", "--port", "0", **{"runs/quickstart/rl": str(run_dir)})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as board:
        try:
            assert board.stdout is not None
            with urllib.request.urlopen(board.stdout.readline().strip(), timeout=60) as page:
                assert page.status == 200 and b"<html" in page.read()
        finally:
            board.terminate()


def test_a_report_of_a_run_is_written(tmp_path: Path, called: Called):
    """And what is no run is said in a line."""
    run_dir, out = make_run(tmp_path / "run", Shape(steps=2)), tmp_path / "report.html"
    command = readme("diffrl report", **{"runs/quickstart/rl": str(run_dir), "report.html": str(out)})
    assert called(*command[1:]) == (0, f"{out}\n", "")
    assert out.read_text().startswith("<!doctype html>\n<html") and out.read_text().count("<article") == 4
    one_line(called("report", str(tmp_path / "x"), "--out", str(out)), [f"RUN: {tmp_path}/x is not there"])
    one_line(called("report", str(run_dir), "--out", str(tmp_path)), [f"--out: {tmp_path} is a folder"])


def test_an_autoregressive_folder_gets_its_tokens(tmp_path: Path):
    """What training refuses before, a dry run accepts afterwards."""
    qwen(tmp_path / "ar")
    config = ("train", "configs/quickstart_sft.yaml", "train.steps=1", "data.max_prompt_tokens=200")
    refused(
        [*config, f"model.path={tmp_path}/ar"], ["no mask token", f"diffrl data add-tokens {tmp_path}/ar"], tmp_path
    )
    names = {
        "models/Qwen2.5-Coder-7B models": f"{tmp_path}/ar models",
        "models/Qwen2.5-Coder-7B-masked": f"{tmp_path}/out",
    }
    assert f"{tmp_path}/out: added <|mask|> 8, <|dlm_pad|> 9" in succeeds(readme("diffrl data add-tokens", **names))
    command = ["diffrl", *config, f"model.path={tmp_path}/out", f"run_dir={tmp_path}/run", "--dry-run"]
    assert "nothing was started" in succeeds(command, RAY_ADDRESS="127.0.0.1:1")


def test_humaneval_canonical_solutions_all_pass():
    stdout = succeeds(readme("diffrl eval --benchmark humaneval --data", **{"../shared": str(shared_file(""))}))
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


def test_a_model_is_evaluated(tuned_model: Path, tmp_path: Path):
    names = {"models/DiffuCoder-7B-cpGRPO": str(tuned_model), "runs/eval": f"{tmp_path}/out"}
    names["HumanEvalPlus.jsonl.gz"] = str(shared_file("data/humanevalplus/HumanEvalPlus-Mini.jsonl.gz"))
    command = readme("diffrl eval --benchmark humaneval_plus", "--limit", "2", "--tokens", "8", **names)
    stdout = succeeds([*command, "--backend", "process"])
    assert "| 0 | 1 | 0.0 [0.0..0.0] | 0.0 [0.0..0.0] | 0.0% | 0 |" in stdout
    assert pq.read_table(tmp_path / "out/samples.parquet").num_rows == 2


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


def test_infilling_canonical_middles_all_pass():
    stdout = succeeds(readme("diffrl eval --benchmark humaneval_infilling", **{"../shared": str(shared_file(""))}))
    assert stdout.splitlines()[-1] == "humaneval_infilling: 164 of 164 canonical solutions pass"


def test_infilling_by_a_model_is_judged(tuned_model: Path, tmp_path: Path, called: Called):
    """A model that has never seen Python of this kind passes nothing; where any middle passes, its programs do."""
    with gzip.open(shared_file("data/humaneval_infilling/HumanEval-SingleLineInfilling.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file][:3]
    easy = {**rows[0], "task_id": "easy", "entry_point": "f"}
    easy |= {"prompt": 'def f(x):\n    """', "suffix": '"""\n    return 3\n'}
    easy["test"] = "def check(candidate):\n    assert candidate(0) == 3\n"
    data = tmp_path / "rows.jsonl"
    command = ["eval", "--benchmark", "humaneval_infilling", "--data", str(data), "--model", str(tuned_model)]
    options = ["--tokens", "4", "--limit", "3", "--backend", "process"]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, "not reached"]))
    status, stdout, _ = called(*command, *options)
    assert status == 0 and stdout.splitlines()[-1] == "humaneval_infilling: pass@1 0.0% (0 of 3)"
    assert all(row["task_id"] in stdout for row in rows)
    data.write_text("".join(json.dumps(row) + "\n" for row in [easy, rows[0]]))
    status, stdout, _ = called(*command, *options)
    assert status == 0 and stdout.splitlines()[-1] == "humaneval_infilling: pass@1 50.0% (1 of 2)"


FIGURES = r"\d+ tokens, \d+ forward passes, [\d.]+ s, [\d.]+ tokens/s"


def test_generate_prints_a_completion_and_draws_how_it_came(tuned_model: Path, tmp_path: Path):
    command = readme(
        "diffrl generate runs", **{"runs/quickstart/rl/model": str(tuned_model), "f.html": f"{tmp_path}/f.html"}
    )
    made = run(*command, "--tokens", "40", "--save-svg", f"{tmp_path}/f.svg", "--steps", "41")
    assert made.returncode == 0, made.stderr
    assert "```python" in made.stdout and "\x1b" not in made.stdout + made.stderr
    explained, figures = made.stderr.splitlines()
    assert explained == "diffrl: --steps: 41 for 40 tokens; steps that reveal nothing cost nothing"
    assert re.fullmatch(FIGURES, figures) and figures.startswith("40 tokens, ")
    page, picture = (tmp_path / "f.html").read_text(), ElementTree.parse(tmp_path / "f.svg").getroot()
    tips = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert len(tips) == page.count("data-frame=") == 40
    assert all(tip in page and tip.startswith("step ") for tip in tips)
    assert "Write f(x) that returns x plus 3." in page


def test_generate_on_a_terminal_shows_tokens_as_they_come(tuned_model: Path):
    command = ("diffrl", "generate", str(tuned_model), "Write f(x) that returns x plus 3.", "--tokens", "12")
    plain = succeeds([*command])
    shown, stderr = on_a_terminal(command)
    frames = shown.split("\x1b[2K")
    masks = [frame.count("\x1b[2m[MASK]\x1b[0m") for frame in re.split(r"(?:\r(?:\x1b\[1A)?\x1b\[2K)+", shown)]
    assert len(frames) > 10 and masks[0] == 11 and max(masks) == 11
    assert [count for count in masks if count] == sorted((count for count in masks if count), reverse=True)
    assert shown.count("\x1b[1;30;42m") >= 10  # what is new
    assert shown.replace("\r\n", "\n").endswith("\x1b[2K" + plain)
    assert re.fullmatch(FIGURES + "\n", stderr)


def on_a_terminal(command: Sequence[str]) -> tuple[str, str]:
    """What a program writes to a terminal of its own, and to stderr."""
    master, terminal = pty.openpty()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    env.pop("NO_COLOR", None)
    written = b""
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=terminal, stderr=subprocess.PIPE, text=True) as program:
        os.close(terminal)
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while read := os.read(master, 1 << 16):
                written += read
        os.close(master)
        assert program.stderr is not None
        stderr = program.stderr.read()
    assert program.returncode == 0, stderr
    return written.decode(), stderr


def test_infill_keeps_what_is_given(tuned_model: Path, tmp_path: Path, called: Called):
    command = readme("diffrl generate --infill", **{"runs/quickstart/rl/model": str(tuned_model)})
    status, stdout, stderr = called(*command[1:])
    assert status == 0 and stdout.startswith("def f(x): return ") and stdout.count("\n") >= 1
    assert stderr.startswith("6 tokens, ")
    (tmp_path / "text").write_text("# é <\ndef f(x):\n    return <fill:3>\n\nassert f(<fill:2>) == 4\n")
    status, stdout, _ = called("generate", str(tuned_model), "--infill", "--file", str(tmp_path / "text"), "--samples", "2",
                               "--temperature", "1.5", "--top-k", "0")  # fmt: skip
    texts = re.findall(r"# é <\ndef f\(x\):\n    return (.*?)\n\nassert f\((.*?)\) == 4\n", stdout, re.DOTALL)
    assert status == 0 and len(set(texts)) == 2
    assert "fill" not in stdout and "im_end" not in stdout


BAD_GENERATION = {
    "steps": (["x", "--steps", "0"], ["--steps: 0", "at least 1"]),
    "temperature": (["x", "--temperature", "-0.5"], ["--temperature: -0.5", "at least 0"]),
    "top_p": (["x", "--top-p", "1.5"], ["--top-p: 1.5"]),
    "top_k": (["x", "--top-k", "-1"], ["--top-k: -1"]),
    "algorithm": (["x", "--algorithm", "entropie"], ["--algorithm: 'entropie'", "did you mean 'entropy'?"]),
    "tokens": (["x", "--tokens", "0"], ["--tokens: 0"]),
    "samples": (["x", "--samples", "0"], ["--samples: 0"]),
    "no hole": (["x", "--infill"], ["--infill", "none", "<fill:8>"]),
    "hole of nothing": (["x <fill:0>", "--infill"], ["<fill:0>", "at least 1"]),
    "hole of no number": (["x <fill:n>", "--infill"], ["'<fill:n>'", "<fill:8>"]),
    "tokens of holes": (["<fill:3>", "--infill", "--tokens", "3"], ["--tokens: 3", "--infill"]),
    "no prompt": ([], ["prompt", "--file"]),
    "two prompts": (["x", "--file", "README.md"], ["prompt", "--file"]),
    "no file": (["--file", "/nowhere"], ["--file: /nowhere", "No such file"]),
    "file that is no text": (["--file", sys.executable], ["--file", "UTF-8"]),
    "no folder to save to": (["x", "--save-html", "/nowhere/x.html"], ["--save-html: /nowhere/x.html"]),
    "folder as file": (["x", "--save-svg", "/tmp"], ["--save-svg: /tmp"]),
    "too long": (["x " * 70, "--tokens", "1000"], ["1000 to fill", "more than the 1024"]),
    "too long to fill": (["x <fill:123456789012>", "--infill"], ["123456789012 to fill", "more than the 1024"]),
    "no weights": (["x"], ["model.safetensors"]),  # what all others are found out before
}


@pytest.mark.parametrize("name", BAD_GENERATION)
def test_bad_generation_is_one_line_before_weights_are_read(
    name: str, tuned_model: Path, tmp_path: Path, called: Called
):
    for file in tuned_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    args, expected = BAD_GENERATION[name]
    one_line(called("generate", str(tmp_path), *args), expected)


def test_what_is_no_model_folder_is_refused(tmp_path: Path, called: Called):
    for path in (tmp_path, tmp_path / "nowhere", ROOT / "README.md"):
        one_line(called("generate", str(path), "x"), ["MODEL", str(path), "config.json"])
    data = str(shared_file("data/humaneval_infilling/HumanEval-SingleLineInfilling.jsonl.gz"))
    for args, expected in (
        (["humaneval_infilling", "--model", str(tmp_path), "--tokens", "4"], ["MODEL", "config.json"]),
        (["humaneval_infilling", "--model", str(tmp_path)], ["--tokens"]),
        (["humaneval_infilling", "--model", str(tmp_path), "--tokens", "4", "--steps", "0"], ["--steps: 0"]),
        (["humaneval", "--model", str(tmp_path), "--tokens", "4"], ["--out"]),
        (["humaneval_infilling", "--model", str(tmp_path), "--tokens", "4", "--out", "x"], ["--out", "infilling"]),
        (["humaneval_infilling", "--model", "x", "--solutions", "canonical"], ["--solutions", "--model"]),
        (["humaneval_infilling", "--limit", "0"], ["limit is 0"]),
        (["humaneval_infiling"], ["'humaneval_infiling'", "humaneval_infilling"]),
    ):
        one_line(called("eval", "--data", data, "--benchmark", *args), expected)


def test_a_row_longer_than_the_context_is_named(tmp_path: Path, called: Called):
    data = str(shared_file("data/humaneval_infilling/HumanEval-SingleLineInfilling.jsonl.gz"))
    model = str(tiny_folder(tmp_path, max_positions=32))
    made = called("eval", "--data", data, "--benchmark", "humaneval_infilling", "--model", model, "--tokens", "4")
    one_line(made, ["SingleLineInfilling/HumanEval/0/L0", "4 to fill", "more than the 32"])


def test_job_submit(ray_cluster: RayCluster, tmp_path: Path):
    """`ray job submit` of the working directory: succeeds, and what is uploaded stays small. `diffrl submit` of the same run
    then finds that it is finished."""
    overrides = (f"run_dir={tmp_path}/job", "report.problems.limit=2", "report.num_train_problems=2")
    here = {"http://127.0.0.1:8265": ray_cluster.dashboard}
    stdout = succeeds(readme("ray job submit", *overrides, **here))
    assert "succeeded" in stdout and "held-out pass@1" in stdout
    assert len((tmp_path / "job/metrics.jsonl").read_text().splitlines()) == 2
    assert upload_size(tmp_path) < MAX_UPLOAD
    stdout = succeeds(readme("diffrl submit", *overrides, **here))
    assert f"rl: {tmp_path}/job is finished; nothing was started" in stdout


def upload_size(tmp_path: Path) -> int:
    """Bytes of the package that Ray's own code makes of the working directory."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[])
    return package.stat().st_size


BAD_INPUT = {
    "unknown key": (["method.group_sise=4"], ["method.group_sise", "group_size"]),
    "wrong type": (["train.steps=many"], ["train.steps", "'many'"]),
    "group_size 1": (["method.group_size=1"], ["method.group_size", "1"]),
    "estimator of another family": (
        ["method.estimator=causal"],
        ["method.estimator", "'causal'", "model.family diffusion"],
    ),
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
    assert "learner.gpus_per_rank: 50 ask for 100 GPUs and this machine has" in made.stderr


def refused(args: list[str], expected: list[str], tmp_path: Path) -> None:
    """Exit status 2, one line on stderr, no run folder. RAY_ADDRESS leads nowhere: starting an actor would fail."""
    made = run("diffrl", *args, f"run_dir={tmp_path}/run", RAY_ADDRESS="127.0.0.1:1")
    assert made.returncode == 2, made.stderr
    assert made.stdout == ""
    assert len(made.stderr.splitlines()) == 1, made.stderr
    for text in expected:
        assert text in made.stderr
    assert not (tmp_path / "run").exists()
