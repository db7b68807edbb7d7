"""Pipelines: their files and overrides, fingerprints, and what follows from manifests."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffrl.config_file import load_config, validate
from diffrl.errors import ConfigError
from diffrl.fingerprints import FileHashes, data_files, model_files
from diffrl.manifests import (
    Inputs,
    StageManifest,
    decide,
    differences,
    read_manifest,
    stage_config,
    write_inputs,
    write_manifest,
)
from diffrl.pipeline_file import load_pipeline

PIPELINE = """
run_dir: runs/p
stages:
  first: {config: sub/text.yaml, overrides: {optim.lr: 3e-4, train: {steps: 7}}}
  tuned: {config: sft.yaml}
"""
TEXT = "{stage: pretrain, run_dir: mine, data: {source: microcode}, optim: {lr: 1e-5, beta1: 0.8}}"
SFT = "{stage: sft, data: {path: rows.jsonl}, model: {path: elsewhere, dtype: float32}}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "text.yaml").write_text(TEXT)
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path / "p.yaml"


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stages_are_chained_in_order(file):
    stages = load_pipeline(file).stages
    assert [(name, c.run_dir, c.model.path) for name, c in stages.items()] == [
        ("first", "runs/p/first", None),
        ("tuned", "runs/p/tuned", "runs/p/first/model"),
    ]
    assert (stages["first"].optim.lr, stages["first"].optim.beta1, stages["first"].train.steps) == (3e-4, 0.8, 7)


def test_overrides_go_where_they_belong(file):
    pipeline = load_pipeline(
        file, ["run.dir=other", "stages.tuned.optim.lr=1e-3", "stages.first.train.steps=2", "ray.address=host:1"]
    )
    first, tuned = pipeline.stages.values()
    assert (tuned.optim.lr, first.optim.lr, first.train.steps) == (1e-3, 3e-4, 2)
    assert (tuned.run_dir, tuned.model.path) == ("other/tuned", "other/first/model")
    assert first.ray.address == tuned.ray.address == "host:1"
    assert load_pipeline(file, ["stages.tuned.config=sub/text.yaml"]).stages["tuned"].stage == "pretrain"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.tunde.optim.lr=1", ["'tunde'", "did you mean 'tuned'", "known: first, tuned"]),
        ("stages.tuned.optim.lrr=1", ["stages.tuned (", "optim.lrr: unknown key", "'lr'"]),
        ("stages.tuned.run_dir=x", ["stages.tuned.overrides.run_dir", "'x'", "leave it out"]),
        ("stages.tuned.model.path=x", ["stages.tuned.overrides.model.path", "'x'", "leave it out"]),
        ("stages.tuned.config=no.yaml", ["no.yaml does not exist"]),
        ("stages={}", ["stages"]),
        ("stage=3", ["stage: unknown key", "'stages'"]),
        ("run_dir=null", ["run_dir"]),
        ("evaluation.problems.source=microcodes", ["evaluation.problems.source", "'microcodes'"]),
        ("evaluation={problems: {source: microcode}, num_samples: 2}", ["evaluation.num_samples: 2", "temperature 0"]),
        ("evaluation={problems: {source: microcode}, stages: [x]}", ["evaluation.stages: 'x'", "first, tuned"]),
    ],
)
def test_bad_overrides_are_named(file, override, expected):
    message = refusal(file, override)
    for text in expected:
        assert text in message, message


def test_a_name_that_is_no_folder_is_refused(file):
    file.write_text(PIPELINE.replace("tuned:", "../tuned:"))
    assert "../tuned" in refusal(file)


def test_stage_and_pipeline_are_not_taken_for_each_other(file):
    assert "diffrl train" in refusal(file.parent / "sft.yaml")
    with pytest.raises(ConfigError, match="diffrl pipeline"):
        load_config(file)


# Fingerprints


def test_files_are_read_again_only_when_they_changed(tmp_path, monkeypatch):
    data = tmp_path / "a.txt"
    data.write_text("one")
    hashes = FileHashes(tmp_path / "hashes.json")
    assert hashes.of(data) == hashlib.sha256(b"one").hexdigest()
    hashes.save()
    again = FileHashes(tmp_path / "hashes.json")
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert again.of(data) == hashes.of(data)
    monkeypatch.undo()
    data.write_text("two!")
    assert again.of(data) == hashlib.sha256(b"two!").hexdigest()
    (tmp_path / "hashes.json").write_text("{cut")
    assert FileHashes(tmp_path / "hashes.json").of(data) == again.of(data)


def test_what_the_data_are(tmp_path):
    hashes = FileHashes(tmp_path / "hashes.json")
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def files(raw: dict) -> dict[str, str]:
        return data_files(validate(raw, "here"), hashes)

    sft = {"stage": "sft", "data": {"path": str(tmp_path / "rows.jsonl")}}
    assert files(sft) == {"data (rows.jsonl)": hashlib.sha256(b"{}\n").hexdigest()}
    text = {"stage": "midtrain", "data": {"source": "microcode", "max_stdlib_bytes": 1000}}
    assert files(text) == files(text) != files({**text, "data": {"source": "microcode", "max_stdlib_bytes": 90_000}})
    rl = {"stage": "rl", "data": {"source": "microcode"}, "report": {"problems": {"source": "microcode"}}}
    rl["report"]["problems"]["split"] = "held_out"
    made = files(rl)
    assert sorted(made) == ["data (microcode)", "report.problems (microcode)"] and len(set(made.values())) == 2
    with pytest.raises(ConfigError, match=r"data.path: .*gone.jsonl does not exist"):
        files({"stage": "sft", "data": {"path": str(tmp_path / "gone.jsonl")}})


# Manifests


def inputs(**config) -> Inputs:
    raw = {"stage": "sft", "data": {"path": "rows.jsonl"}, **config}
    return Inputs(config=stage_config(validate(raw, "here")), data={"data (rows.jsonl)": "aa"}, parent={"w": "bb"})


MODEL = {"model.safetensors": "cc"}
ASKED = {"num_samples": 2}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    folder.mkdir()
    manifest = StageManifest(
        name="sft", inputs=inputs(), model=MODEL, metrics={"steps": 3}, evaluation={"asked": ASKED}, facts={}
    )
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    return folder


def action(folder: Path, now: Inputs, *, model=MODEL, evaluation=ASKED) -> tuple[str, ...]:
    made = decide(folder, now, model=model, evaluation=evaluation)
    return (made.action, *made.reasons)


def test_a_finished_stage_is_run_again_only_for_a_reason(finished):
    assert action(finished, inputs()) == ("skip", "nothing changed")
    elsewhere = inputs(run_dir="other", model={"path": "x", "known_as": "y"}, ray={"address": "z"})
    assert action(finished, elsewhere) == ("skip", "nothing changed")
    changed = inputs(optim={"lr": 1e-3, "warmup_ratio": 0.1})
    assert action(finished, changed) == (
        "run",
        "optim.lr changed from 1e-05 to 0.001",
        "optim.warmup_ratio changed from None to 0.1",
    )
    assert action(finished, replace(inputs(), data={"data (rows.jsonl)": "ab", "more": "x"})) == (
        "run",
        "data: data (rows.jsonl) changed",
        "data: more is new",
    )
    assert action(finished, replace(inputs(), parent={})) == ("run", "parent: w is gone")
    assert action(finished, inputs(), model={}) == ("run", "its own model: model.safetensors is gone")
    assert action(finished, inputs(), evaluation={"num_samples": 3}) == ("evaluate", "evaluation changed")
    assert action(finished, inputs(), evaluation=None)[0] == "skip"


def test_a_key_that_is_new_counts_with_its_default(finished):
    raw = json.loads((finished / "manifest.json").read_text())
    del raw["inputs"]["config"]["optim"]["min_lr_ratio"]
    (finished / "manifest.json").write_text(json.dumps(raw))
    assert action(finished, inputs()) == ("skip", "nothing changed")
    assert action(finished, inputs(optim={"min_lr_ratio": 0.5}))[1] == "optim.min_lr_ratio changed from 0.1 to 0.5"
    raw["inputs"]["config"]["gone"] = 1
    (finished / "manifest.json").write_text(json.dumps(raw))
    assert "gone changed from 1 to None" in action(finished, inputs())


def test_an_unfinished_stage_goes_on_if_nothing_changed(tmp_path):
    folder = tmp_path / "sft"
    assert action(folder, inputs()) == ("run", "not run yet")
    write_inputs(folder, inputs())
    assert action(folder, inputs()) == ("run", "not run yet")
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert action(folder, inputs()) == ("resume", "unfinished")
    assert action(folder, inputs(seed=1)) == ("run", "unfinished", "seed changed from 0 to 1")
    (tmp_path / "sft.inputs.json").write_text("{cut")
    assert action(folder, inputs()) == ("run", "unfinished", "its inputs are not known")


def test_a_manifest_that_cannot_be_read_is_named(finished):
    for text in ("{cut", "{}", '{"schema_version": 99}'):
        (finished / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match=r"sft/manifest.json: cannot be read .*move .*sft away"):
            read_manifest(finished)


def test_differences_name_sections_key_by_key():
    old, new = inputs(data={"path": "rows.jsonl", "layout": "packed"}), inputs()
    assert list(differences(old, new)) == ["data.layout changed from 'packed' to 'window'"]


def test_a_folder_without_weights_has_no_model_files(tmp_path):
    hashes = FileHashes(tmp_path / "hashes.json")
    (tmp_path / "config.json").write_text("{}")
    assert model_files(tmp_path, hashes) == {}
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert model_files(tmp_path, hashes)["model.safetensors"] == hashlib.sha256(b"x").hexdigest()
    assert sorted(model_files(tmp_path, hashes)) == ["config.json", "model.safetensors"]
