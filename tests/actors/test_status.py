"""`diffrl status` on folders that the project's own writers made: a real supervised run, RL runs line by line, pipelines."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from actors import pipeline
from actors.telemetry import Telemetry
from diffrl import run_folder, status
from diffrl.checkpoint import NOTE, checkpoint_path
from diffrl.config import RLConfig
from diffrl.config.pipeline import PipelineConfig
from diffrl.config_file import dump_config, validate
from diffrl.errors import ConfigError
from diffrl.files import write_json
from diffrl.manifests import Inputs, StageManifest, write_manifest
from diffrl.run_folder import MetricsFile, claim_attempt, create_run_folder, read_run, write_run
from diffrl.status import PipelineStatus, RunStatus, as_json, as_text, duration, status_of

ROOT = Path(__file__).parents[2]
LOSS = {"loss/kl": 0.001, "optim/grad_norm": 0.3}


def rl_run(path: Path, **train: int) -> Path:
    """The folder of an RL run of 2 prompts with 5 completions each, as the driver makes it."""
    train = {"steps": 30, "prompts_per_step": 2, **train}
    raw = {"stage": "rl", "run_dir": str(path), "data": {"source": "microcode"}, "train": train}
    config = validate({**raw, "method": {"group_size": 5}}, "test")
    assert isinstance(config, RLConfig)
    folder = create_run_folder(config, sandbox={"backend": "process", "reason": ""})
    claim_attempt(folder)
    return folder


def write_rl_steps(folder: Path, steps: range, restarts: Mapping[int, int], masked: Mapping[int, int]) -> None:
    """Lines of one start of the driver; `restarts` by then, and samples masked in a step."""
    count = 0
    with Telemetry(folder, 30) as telemetry:
        for step in steps:
            count = restarts.get(step, count)
            reward = {"reward/mean": step / 10, "reward/solved_frac": step / 100, "loss/total": -step / 10}
            times = {"time/rollouts": 1.0 + step, "time/learner": 0.5, "rollout/tokens_per_second": 1e6}
            times |= {"restarts/rollout": count, "restarts/judge": 0}
            telemetry.step(step, {**reward, **LOSS, "sandbox/infra_error_frac": masked.get(step, 0) / 10}, times)


def run_of(path: Path, now: float = 0.0) -> RunStatus:
    found = status_of(path, now)
    assert isinstance(found, RunStatus)
    return found


def test_the_names_of_files_are_their_writers():
    assert status.PIPELINE_MARK == pipeline.MARK
    assert status.SCHEMA_VERSION == run_folder.SCHEMA_VERSION


def test_a_finished_supervised_run(tuned_model: Path):
    """Which Ray Train workers really wrote."""
    folder = tuned_model.parent
    found = run_of(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (found.stage, found.attempt, found.steps, found.num_steps) == ("sft", 1, 200, 200)
    assert found.finished_s == read_run(folder)["finished"] and found.has_model
    assert found.metrics == {
        "loss/diffusion": rows[-1]["loss/diffusion"],
        "optim/grad_norm": rows[-1]["optim/grad_norm"],
    }
    expected = sum(row["time/rows"] + row["time/step"] for row in rows[-10:]) / 10
    assert found.seconds_per_step == pytest.approx(expected)
    assert found.checkpoint == "checkpoints/step-000200" and (folder / found.checkpoint / "state.json").is_file()
    assert (found.restarts, found.masked_samples, found.unreadable_lines) == (0, 0, 0)
    head, *lines = as_text(found).splitlines()
    assert head == f"{folder}: sft, attempt 1, finished in {duration(found.finished_s)}"
    assert lines[0] == "  steps       200 of 200"


def test_an_rl_run_that_goes_on(tmp_path: Path):
    folder = rl_run(tmp_path / "run")
    write_rl_steps(folder, range(12), restarts={3: 1, 7: 3}, masked={2: 4, 5: 1})
    with Telemetry(folder, 30) as telemetry:
        telemetry.evaluation(11, {"eval/pass@1": 0.25})
    modified = (folder / "metrics.jsonl").stat().st_mtime
    found = run_of(folder, modified + 90)
    assert (found.stage, found.steps, found.num_steps, found.finished_s) == ("rl", 12, 30, None)
    assert (found.restarts, found.masked_samples, found.written_s_ago) == (3, 5, 90)
    assert found.seconds_per_step == pytest.approx(1.5 + sum(range(2, 12)) / 10)  # of steps 2 to 11, rates left out
    assert found.metrics == {
        **{"reward/mean": 1.1, "reward/solved_frac": 0.11, "eval/pass@1": 0.25, "loss/total": -1.1},
        **LOSS,
    }
    text = as_text(found)
    assert "attempt 1, not recorded as finished\n" in text and "  steps       12 of 30\n" in text
    assert "3 workers restarted, 5 samples masked" in text and "1 min 30 s ago" in text
    (folder / "model").mkdir()
    assert "model/ is written" in as_text(run_of(folder))


def test_a_second_start_counts_its_restarts_from_zero(tmp_path: Path):
    folder = rl_run(tmp_path / "run")
    write_rl_steps(folder, range(4), restarts={1: 2}, masked={})
    write_run(folder, read_run(folder) | {"attempt": 2})
    write_rl_steps(folder, range(4, 8), restarts={5: 1}, masked={})
    found = run_of(folder)
    assert (found.attempt, found.steps, found.restarts) == (2, 8, 3)


def test_a_line_that_is_being_written(tmp_path: Path):
    folder = rl_run(tmp_path / "run")
    write_rl_steps(folder, range(3), restarts={}, masked={})
    whole = run_of(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"loss/total": 9.0, "step": 3')
    torn = run_of(folder)
    assert (torn.steps, torn.metrics, torn.unreadable_lines) == (3, whole.metrics, 0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")  # a crash, and a later start wrote on
    write_rl_steps(folder, range(3, 4), restarts={}, masked={})
    damaged = run_of(folder)
    assert (damaged.steps, damaged.unreadable_lines) == (4, 1) and "1 lines of metrics.jsonl" in as_text(damaged)


def test_a_run_without_a_step(tmp_path: Path):
    found = run_of(rl_run(tmp_path / "run"))
    assert (found.steps, found.seconds_per_step, found.written_s_ago, found.checkpoint) == (0, None, None, None)
    assert dict(found.metrics) == {} and "written     nothing yet" in as_text(found)


def test_steps_that_the_data_decide(tmp_path: Path):
    path = tmp_path / "run"
    raw = {"stage": "sft", "run_dir": str(path), "data": {"source": "microcode"}}
    create_run_folder(validate(raw, "test"))
    with closing(MetricsFile(path)) as metrics:
        metrics.write(
            {"step": 0, "loss/diffusion": None, "time/step": 2.0, "time/rows": 1.0, "time/tokens_per_second": 9.0}
        )
        metrics.write({"step": 0, "validation/diffusion": 1.5, "time/validation": 7.0})
    found = run_of(path)
    assert (found.steps, found.num_steps, found.seconds_per_step) == (1, None, 3.0)
    assert found.metrics == {"loss/diffusion": None, "validation/diffusion": 1.5}
    assert "1 of an unknown number" in as_text(found) and "loss/diffusion nan" in as_text(found)


def test_checkpoints_quarantine_and_stalls(tmp_path: Path):
    folder = rl_run(tmp_path / "run")
    for step, committed in ((999999, True), (1000000, True), (1000001, False)):
        checkpoint_path(folder, step).mkdir(parents=True)
        if committed:
            write_json(checkpoint_path(folder, step) / NOTE, {})
    rows = [{"problem_id": "mbpp/7", "reason": "the judge died 3 times"}, {"problem_id": "x/2", "reason": "timeout"}]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"problem_id": "tor')
    (folder / "stalls").mkdir()
    (folder / "stalls/step-000003.txt").write_text("rollout worker 1 is silent")
    found = run_of(folder)
    assert found.checkpoint == "checkpoints/step-1000000" and list(found.quarantined) == rows
    text = as_text(found)
    assert "mbpp/7 (the judge died 3 times), x/2 (timeout)" in text and "stalls/step-000003.txt" in text


def mark_pipeline(folder: Path, *names: str) -> None:
    stages = {name: {"config": f"{name}.yaml"} for name in names}
    config = PipelineConfig.model_validate({"run_dir": str(folder), "stages": stages})
    (folder / pipeline.MARK).write_text(dump_config(config))


def finish(folder: Path, seconds: float) -> None:
    inputs = Inputs(config={}, data={}, parent={})
    metrics = {"steps": 3, "seconds": seconds}
    manifest = StageManifest(name="rl", inputs=inputs, model={}, metrics=metrics, evaluation=None, facts={})
    write_manifest(folder, manifest)


def test_a_pipeline_in_the_middle_and_at_its_end(tmp_path: Path):
    """RL leaves its seconds in the manifest; stages stand in the pipeline's order."""
    mark_pipeline(tmp_path, "warm", "sft", "again")
    write_rl_steps(rl_run(tmp_path / "warm"), range(3), restarts={}, masked={})
    finish(tmp_path / "warm", 61.0)
    write_rl_steps(rl_run(tmp_path / "sft"), range(2), restarts={}, masked={})
    found = status_of(tmp_path, 0.0)
    assert isinstance(found, PipelineStatus) and not found.finished and list(found.stages) == ["warm", "sft", "again"]
    head, warm, sft, again = as_text(found).splitlines()
    assert head == f"{tmp_path}: pipeline, not finished" and again == "  again       not started"
    assert warm.startswith("  warm        attempt 1, finished in 1 min 1 s; steps 3 of 30; ")
    assert sft.startswith("  sft         attempt 1, not recorded as finished; steps 2 of 30; ")
    rl_run(tmp_path / "again")
    for name in ("sft", "again"):
        finish(tmp_path / name, 1.0)
    write_json(tmp_path / "pipeline.json", {"stages": [{"stage": name} for name in ("warm", "sft", "again")]})
    ended = status_of(tmp_path, 0.0)
    assert isinstance(ended, PipelineStatus) and ended.finished
    (tmp_path / pipeline.MARK).unlink()
    assert status_of(tmp_path, 0.0) == ended  # the summary names the stages too
    assert list(json.loads(as_json(ended))["stages"]) == ["warm", "sft", "again"]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        status_of(path, 0.0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path):
    assert f"{tmp_path}/nowhere is not there; give" in refusal(tmp_path / "nowhere")
    assert "no run.json" in refusal(tmp_path)
    folder = rl_run(tmp_path / "sft")
    assert refusal(tmp_path).endswith("it holds sft")
    write_run(folder, read_run(folder) | {"schema_version": 99})
    assert "schema_version 99, this version of diffrl knows 1" in refusal(folder)
    (folder / "run.json").write_text('{"schema')
    assert f"{folder}/run.json cannot be read" in refusal(folder)


def test_durations():
    told = [duration(seconds) for seconds in (0.0, 3.21, 59.9, 60, 3599, 3600, 86399, 200000)]
    assert told == ["0 s", "3.21 s", "59.9 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "23 h 59 min", "2 d 7 h"]


SCRIPT = """
import sys
from actors.cli import main
try:
    main()
except SystemExit as ended:
    loaded = {"torch", "ray", "transformers", "deepspeed", "diffrl.config"} & set(sys.modules)
    sys.exit(f"loaded {loaded}" if loaded else ended.code)
"""


def diffrl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "200"})


def test_the_command_brings_no_heavy_package(tmp_path: Path):
    folder = rl_run(tmp_path / "run")
    write_rl_steps(folder, range(3), restarts={}, masked={})
    made = diffrl("status", str(folder), "--json")
    assert made.returncode == 0 and made.stderr == "", made.stderr
    told = json.loads(made.stdout)
    assert (told["folder"], told["steps"], told["metrics"]["reward/mean"]) == (str(folder), 3, 0.2)
    made = diffrl("status", str(folder))
    assert made.stdout.startswith(f"{folder}: rl, attempt 1, not recorded as finished\n  steps       3 of 30\n")
    made = diffrl("status", str(tmp_path / "nowhere"))
    assert made.returncode == 2 and made.stdout == ""
    assert (
        made.stderr
        == f"diffrl: RUN: {tmp_path}/nowhere is not there; give the folder of a run, such as runs/quickstart/rl\n"
    )
