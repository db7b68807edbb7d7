"""Parts of a run by themselves give the numbers of the whole."""

import json
import sys
from pathlib import Path

import pytest

from actors.cli import main
from actors.debug import learn_from, replay, sample
from actors.driver import train
from actors.profiling import train_profiled
from diffrl.config import RLConfig
from diffrl.errors import ConfigError
from diffrl.models.folders import load_state_dict
from diffrl.rollout_store import read_all
from tests.actors.conftest import rl_config

STEPS = 3


def config_of(tuned_model: Path, problems_file: Path, run_dir: Path, **sections: dict) -> RLConfig:
    """A reference that moves, so that its scores come from another model than the policy."""
    defaults: dict = {
        "train": {"steps": STEPS, "prompts_per_step": 2},
        "method": {"reference_refresh_steps": 2, "max_replacements": 1},
        "checkpoint": {"every": 1},
        "learner": {"keep_batches": 2},
    }
    return rl_config(tuned_model, problems_file, run_dir, **{**defaults, **sections})


@pytest.fixture(scope="module")
def whole(ray_cluster, tuned_model, problems_file, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("debug") / "whole"
    train(config_of(tuned_model, problems_file, run_dir))
    return run_dir


def learned(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("loss/", "first/", "optim/", "reward/"))} for row in rows]


def test_stored_rollouts_are_learned_from_as_when_they_were_sampled(whole, tuned_model, problems_file, tmp_path):
    learn_from(config_of(tuned_model, problems_file, tmp_path / "again"), whole)
    assert learned(tmp_path / "again") == learned(whole)
    left, right = load_state_dict(tmp_path / "again" / "model"), load_state_dict(whole / "model")
    assert all(tensor.equal(right[name]) for name, tensor in left.items())


def test_what_stored_rollouts_must_fit(whole, tuned_model, problems_file, tmp_path):
    more, smaller = (
        config_of(tuned_model, problems_file, tmp_path / "no", **sections)
        for sections in ({"train": {"steps": STEPS + 1, "prompts_per_step": 2}}, {"method": {"group_size": 3}})
    )
    with pytest.raises(ConfigError, match=rf"^--rollouts-from: {whole}/rollouts/step_000003.parquet cannot be read"):
        learn_from(more, whole)
    with pytest.raises(ConfigError, match=r"^method.group_size: 3 must be 4, as in .*step_000000.parquet$"):
        learn_from(smaller, whole)
    assert not (tmp_path / "no").exists()


def test_rollouts_alone(whole, tuned_model, problems_file, tmp_path):
    sample(config_of(tuned_model, problems_file, tmp_path / "only"))
    mine, theirs = (read_all(folder / "rollouts").to_pylist() for folder in (tmp_path / "only", whole))
    assert {row["policy_version"] for row in mine} == {0} and {row["step"] for row in mine} == set(range(STEPS))
    first = [[row | {"cpu_s": 0, "advantage": 0} for row in rows if row["step"] == 0] for rows in (mine, theirs)]
    assert first[0] == first[1]
    assert not (tmp_path / "only" / "model").exists()


def test_a_batch_replayed_has_the_same_losses(whole, capsys, monkeypatch):
    assert sorted(file.name for file in (whole / "batches").glob("*.json")) == ["step-000001.json", "step-000002.json"]
    before = sorted(whole.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["diffrl", "replay", str(whole / "batches" / "step-000002")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "loss/total" in said and "optim/grad_norm" in said and "differs" not in said
    assert sorted(whole.rglob("*")) == before
    with pytest.raises(
        ConfigError, match=r"no checkpoint of \[2, 3\] leads to step 1 through the batches of \[1, 2\]; keep"
    ):
        replay(whole / "batches" / "step-000001")


def test_a_batch_that_was_changed_is_noticed(whole, capsys):
    note = whole / "batches" / "step-000002.json"
    text = note.read_text()
    facts = json.loads(text)
    note.write_text(json.dumps(facts | {"num_loss_tokens": facts["num_loss_tokens"] + 1}))
    try:
        assert not replay(whole / "batches" / "step-000002")
    finally:
        note.write_text(text)
    assert "differs" in capsys.readouterr().out


def test_traces_of_a_step(ray_cluster, tuned_model, problems_file, tmp_path):
    config = config_of(tuned_model, problems_file, tmp_path / "run", learner={"num_ranks": 2})
    train_profiled(config, 2)
    folder = tmp_path / "run" / "profile"
    names = {"rollout-0", "reference-0", "learner-0", "learner-1"}
    assert {file.stem for file in folder.iterdir()} == {*names, "ray"}
    for name in names:
        events = json.loads((folder / f"{name}.json").read_text())["traceEvents"]
        assert any(event["name"] in ("aten::mm", "aten::addmm", "aten::linear") for event in events), name
    assert any("generate" in event["name"] for event in json.loads((folder / "ray.json").read_text()))
    with pytest.raises(ConfigError, match=r"^--profile: 4 must be one of the run's steps, 1 to 3"):
        train_profiled(config, 4)
