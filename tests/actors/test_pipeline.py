"""`diffrl pipeline` on tiny stages: what is run and what is not, and why; manifests; evaluation; plans."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from actors import reward
from actors.dry_run import dry_run
from actors.evaluate_folder import evaluate_folder
from actors.pipeline import PipelineRun, run_pipeline
from diffrl.config.pipeline import EvaluationConfig
from diffrl.config_file import load_config
from diffrl.data.problems import load_problems
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.manifests import inputs_file, read_manifest, write_inputs
from diffrl.pipeline_file import Pipeline, load_pipeline
from diffrl.types import Problem
from sandbox.types import SandboxError
from tests.actors.conftest import WINDOW, rl_config
from tests.conftest import RayCluster

ROOT = Path(__file__).parents[2]
SFT_LR = "stages.tuned.optim.lr=1e-3"
EVALUATION = {"num_samples": 2, "temperature": 1.0, "sampling": {"completion_tokens": 40, "steps": 10, "top_p": None}}


def write_pipeline(folder: Path, model: Path, problems_file: Path) -> Path:
    """text -> tuned -> rl, of two steps, two steps and one."""
    (folder / "text.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    pairs = [{"prompt": f"Add {n}.", "completion": f"```python\ndef f(x): return x + {n}\n```"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    short = {"train": {"steps": 2, "batch_size": 4}, "workers": {"threads": 1}}
    text = {"source": "text", "path": str(folder / "text.txt"), "sequence_length": 32}
    tuned = {"source": "files", "path": str(folder / "pairs.jsonl"), **WINDOW}
    rl = rl_config(model, problems_file, folder, train={"steps": 1}, method={"group_size": 2})
    stages = {
        "text": {"stage": "midtrain", "model": {"path": str(model)}, "data": text, **short},
        "tuned": {"stage": "sft", "data": tuned, **short},
        "rl": rl.model_dump(mode="json"),
    }
    for name, raw in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    pipeline = {"run_dir": str(folder / "run"), "stages": {name: {"config": f"{name}.yaml"} for name in stages}}
    problems = {"source": "problems", "path": str(problems_file), "num_prompt_tests": 0}
    pipeline["evaluation"] = {"problems": problems, **EVALUATION, "sandbox": {"backend": "process"}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return folder / "pipeline.yaml"


@pytest.fixture(scope="module")
def original(
    ray_cluster: RayCluster, tuned_model: Path, problems_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pipeline's file whose stages have all been run."""
    file = write_pipeline(tmp_path_factory.mktemp("pipeline"), tuned_model, problems_file)
    run_pipeline(load_pipeline(file))
    return file


@pytest.fixture
def file(original: Path, tmp_path: Path, tuned_model: Path, problems_file: Path) -> Path:
    """The same in a folder of the test's own."""
    file = write_pipeline(tmp_path, tuned_model, problems_file)
    shutil.copytree(original.parent / "run", tmp_path / "run")
    for manifest in (tmp_path / "run").glob("*/manifest.json"):  # where the data are is part of a stage's config
        manifest.write_text(manifest.read_text().replace(str(original.parent), str(tmp_path)))
    return file


def plan(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    run = PipelineRun(pipeline, first=None, until=None)
    return {name: (decision.action, *decision.reasons) for name, decision in run.plan()}


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("pipeline.json", "hashes.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_stage_starts_from_the_one_before_and_says_what_it_made(original: Path, tuned_model: Path):
    run = original.parent / "run"
    before = tuned_model
    for name, num_steps in (("text", 2), ("tuned", 2), ("rl", 1)):
        manifest = read_manifest(run / name)
        assert manifest is not None and not inputs_file(run / name).exists()
        for files, folder in ((manifest.inputs.parent, before), (manifest.model, run / name / "model")):
            weights = (folder / "model.safetensors").read_bytes()
            assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
        key = "loss/total" if name == "rl" else "loss/diffusion"
        rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row[key] for row in rows if key in row]
        metrics = manifest.metrics
        assert (metrics["steps"], metrics["loss_first"], metrics["loss_last"]) == (num_steps, losses[0], losses[-1])
        assert metrics["seconds"] > 0
        found = manifest.evaluation
        assert found is not None and 0 <= found["pass@1"] <= found["pass@2"] <= 1
        assert sum(found["num_correct"]) == pytest.approx(found["pass@1"] * 2 * found["num_problems"])
        before = run / name / "model"
    rows = json.loads((run / "pipeline.json").read_text())["stages"]
    assert [(row["stage"], row["action"], row["reasons"]) for row in rows] == [
        (name, "run", ["not run yet"]) for name in ("text", "tuned", "rl")
    ]
    assert sum(json.loads((run / "text" / "manifest.json").read_text())["evaluation"]["num_correct"]) > 0


def test_what_is_finished_is_left_alone(file: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(file.parent / "run")
    run_pipeline(load_pipeline(file))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(": not run again: nothing changed")] == [
        f"{name}: not run again: nothing changed" for name in ("text", "tuned", "rl")
    ]
    assert out.count("as it was") == 3
    assert contents(file.parent / "run") == before


def test_a_changed_learning_rate_runs_its_stage_and_those_behind_it(file: Path, capsys: pytest.CaptureFixture[str]):
    run, pipeline = file.parent / "run", load_pipeline(file, [SFT_LR])
    assert plan(pipeline) == {
        "text": ("skip", "nothing changed"),
        "tuned": ("run", "optim.lr changed from 1e-05 to 0.001"),
        "rl": ("run", "parent: tuned runs first"),
    }
    old, text = contents(run / "tuned"), contents(run / "text")
    run_pipeline(pipeline, until="tuned")
    assert "tuned: runs: optim.lr changed from 1e-05 to 0.001" in capsys.readouterr().out
    assert contents(run / "tuned.1") == old != contents(run / "tuned")
    assert contents(run / "text") == text
    changed = plan(pipeline)
    assert changed["tuned"] == ("skip", "nothing changed")
    assert changed["rl"] == ("run", "parent: model.safetensors changed")


def test_changed_data_and_a_lost_model_are_reasons(file: Path):
    run = file.parent / "run"
    (file.parent / "text.txt").write_text("def g(x):\n    return x - 1\n" * 40)
    (run / "rl" / "model" / "model.safetensors").unlink()
    assert plan(load_pipeline(file)) == {
        "text": ("run", "data: data (text.txt) changed"),
        "tuned": ("run", "parent: text runs first"),
        "rl": ("run", *plan(load_pipeline(file))["rl"][1:-1], "parent: tuned runs first"),
    }
    assert "its own model: model.safetensors is gone" in plan(load_pipeline(file))["rl"]


def test_unfinished_stages_go_on(file: Path, capsys: pytest.CaptureFixture[str]):
    run, pipeline = file.parent / "run", load_pipeline(file)
    for name in ("tuned", "rl"):
        manifest = read_manifest(run / name)
        assert manifest is not None
        write_inputs(run / name, manifest.inputs)
        (run / name / "manifest.json").unlink()
    found = PipelineRun(pipeline, first=None, until=None)
    assert found.decide("tuned").action == found.decide("rl").action == "resume"
    run_pipeline(pipeline)
    said = capsys.readouterr().out
    for name in ("tuned", "rl"):
        assert f"{name}: goes on: unfinished" in said
        assert read_manifest(run / name) is not None and not list(run.glob(f"{name}.[0-9]*"))
    assert load_pipeline(file, [SFT_LR]).stages["tuned"].optim.lr == 1e-3
    inputs = read_manifest(run / "tuned")
    assert inputs is not None
    write_inputs(run / "tuned", inputs.inputs)
    (run / "tuned" / "manifest.json").unlink()
    assert plan(load_pipeline(file, [SFT_LR]))["tuned"] == (
        "run",
        "unfinished",
        "optim.lr changed from 1e-05 to 0.001",
    )


def test_a_changed_evaluation_is_all_that_is_done(file: Path, ray_cluster: RayCluster):
    """And Ray tasks that share the problems count what one process counts."""
    run = file.parent / "run"
    before = contents(run / "tuned" / "model")
    first = read_manifest(run / "tuned")
    pipeline = load_pipeline(file, ["evaluation.num_samples=3", "evaluation.stages=[tuned]"])
    assert plan(pipeline) == {
        "text": ("skip", "nothing changed"),
        "tuned": ("evaluate", "evaluation changed"),
        "rl": ("skip", "nothing changed"),
    }
    run_pipeline(pipeline)
    second = read_manifest(run / "tuned")
    assert first is not None and second is not None and first.evaluation is not None and second.evaluation is not None
    assert contents(run / "tuned" / "model") == before and second.metrics == first.metrics
    assert "pass@3" in second.evaluation and plan(pipeline)["tuned"][0] == "skip"
    # Seeds depend on problem and sample alone, so two of the three samples are those of before.
    pairs = zip(first.evaluation["num_correct"], second.evaluation["num_correct"], strict=True)
    assert all(old <= new <= old + 1 for old, new in pairs)
    config = pipeline.config.evaluation
    assert config is not None and config.problems.path is not None
    problems = load_problems("problems", config.problems.path, num_prompt_tests=0)
    shared = config.model_copy(update={"num_workers": 2, "cpus_per_worker": 0.25})
    rates = evaluate_folder(run / "tuned" / "model", shared, problems)
    assert list(rates.num_correct) == second.evaluation["num_correct"]


def test_a_judge_that_fails_is_an_error(tuned_model: Path, problems: list[Problem], monkeypatch: pytest.MonkeyPatch):
    """The model is right now and then, and no program counts as wrong because it was not judged."""
    calls = []

    class Failing:
        def judge(self, submission: object) -> None:
            calls.append(submission)
            raise SandboxError("no room")

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setattr(reward, "open_sandbox", lambda *args, **kwargs: Failing())
    config = EvaluationConfig.model_validate(
        {"problems": {"source": "microcode"}, **EVALUATION, "sandbox": {"backend": "process", "attempts": 1}}
    )
    with pytest.raises(RunStoppedError, match="could not be judged: no room"):
        evaluate_folder(tuned_model, config, problems)
    assert calls[-1] == "closed" and len(calls) > 5


def test_refusals(file: Path, tmp_path: Path):
    pipeline = load_pipeline(file)

    def refused(**options: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run_pipeline(load_pipeline(file, options.pop("overrides", "").split()), **options)  # pyright: ignore
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(first="tunde") == "--from: no stage 'tunde', did you mean 'tuned'?; known: text, tuned, rl"
    assert "--until: text comes before --from rl" in refused(first="rl", until="text")
    assert "--from: tuned needs the model of text" in refused(first="tuned", overrides=f"run_dir={tmp_path}/new")
    assert f"run_dir: {tmp_path} exists and is not the folder of a pipeline" in refused(overrides=f"run_dir={tmp_path}")
    assert "evaluation.problems.path" in refused(overrides="evaluation.problems.path=/nowhere.jsonl")
    # A later stage's mistake is found before the first one runs.
    new = f"run_dir={tmp_path}/new"
    assert "stages.tuned.data.path: /nowhere" in refused(overrides=f"{new} stages.tuned.data.path=/nowhere.jsonl")
    assert not (tmp_path / "new" / "text").exists()
    assert plan(pipeline)["rl"][0] == "skip"


def test_a_dry_run_checks_every_stage_and_starts_nothing(file: Path, capsys: pytest.CaptureFixture[str]):
    new = file.parent / "new"
    run_pipeline(load_pipeline(file, [f"run_dir={new}"]), only_plan=True)
    out = capsys.readouterr().out
    assert out.count("nothing was started") == 4 and out.count("memory of a") >= 3 and not new.exists()
    assert "not run yet" in out and "tuned" in out
    with pytest.raises(ConfigError, match=r"/nowhere.jsonl"):
        run_pipeline(load_pipeline(file, [f"run_dir={new}", "stages.rl.data.path=/nowhere.jsonl"]), only_plan=True)


@pytest.mark.parametrize("name", ["pretrain", "midtrain", "sft", "rl"])
def test_the_7b_stages_pass_a_dry_run_where_nothing_of_them_is(name: str, capsys: pytest.CaptureFixture[str]):
    config = load_config(ROOT / "configs" / "diffucoder_7b" / f"{name}.yaml")
    assert config.stage == name
    dry_run(config)
    out = capsys.readouterr().out
    assert f"not checked: model.path {config.model.path} is not here" in out
    assert f"not checked: data.path {config.data.path} is not here" in out and "GPUs" in out
    assert "7,615,616,512 parameters" in out and "GPU-days" in out
    gigabytes = float(out.partition("memory of a ")[2].partition(": ")[2].partition(" GB")[0])
    assert 20 < gigabytes < 80  # of an H100


def test_the_7b_pipeline_passes_a_dry_run(capsys: pytest.CaptureFixture[str]):
    pipeline = load_pipeline(ROOT / "configs" / "diffucoder_7b" / "pipeline.yaml")
    run_pipeline(pipeline, only_plan=True)
    out = capsys.readouterr().out
    assert out.count("7,615,616,512 parameters") == 4
    assert "not checked: evaluation.problems.path: no file at data/HumanEval.jsonl.gz" in out
    assert list(pipeline.stages) == ["pretrain", "midtrain", "sft", "rl"]
    assert pipeline.stages["rl"].model.path == "runs/diffucoder_7b/sft/model"


def test_a_stage_that_is_not_the_known_model_must_be_there():
    config = load_config(
        ROOT / "configs" / "diffucoder_7b" / "sft.yaml", ["model.known_as=null", "workers.gpus_per_worker=0"]
    )
    with pytest.raises(ConfigError, match=r"model.path: runs/diffucoder_7b/midtrain/model is not a folder"):
        dry_run(config)
