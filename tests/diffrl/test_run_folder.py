"""Run folders: what is written, what is refused, and that nothing is ever lost."""

import json
from contextlib import closing

import pytest

from diffrl.config import RLConfig
from diffrl.config_file import load_config, validate
from diffrl.errors import ConfigError
from diffrl.run_folder import SCHEMA_VERSION, MetricsFile, check_run_folder, create_run_folder, git_commit


def config_for(path) -> RLConfig:
    config = validate({"stage": "rl", "run_dir": str(path), "seed": 7, "data": {"source": "microcode"}}, "here")
    assert isinstance(config, RLConfig)
    return config


def refusal(path) -> str:
    before = sorted(p.name for p in path.parent.iterdir())
    messages = []
    for call in (lambda: check_run_folder(path), lambda: create_run_folder(config_for(path))):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert messages[0].startswith(f"run_dir: {path}") and "choose another run_dir" in messages[0]
    assert sorted(p.name for p in path.parent.iterdir()) == before  # nothing was moved
    return messages[0]


def test_a_new_folder(tmp_path):
    config = config_for(tmp_path / "runs/a")
    folder = create_run_folder(config)
    assert folder == tmp_path / "runs/a"
    assert load_config(folder / "config.yaml") == config
    run = json.loads((folder / "run.json").read_text())
    assert run["schema_version"] == SCHEMA_VERSION == 1
    assert run["git_commit"] == git_commit() and run.keys() == {"schema_version", "version", "git_commit"}
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "run.json"]
    check_run_folder(folder)


def test_an_earlier_run_is_moved_aside(tmp_path):
    path = tmp_path / "run.v1"
    for number in range(3):
        folder = create_run_folder(config_for(path))
        (folder / "model").mkdir()
        (folder / "model/weights").write_text(f"weights of run {number}")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["run.v1", "run.v1.1", "run.v1.2"]
    kept = [(tmp_path / name / "model/weights").read_text() for name in names]
    assert kept == ["weights of run 2", "weights of run 0", "weights of run 1"]
    assert all((tmp_path / name / "config.yaml").is_file() for name in names)


def test_a_name_in_the_way_is_not_overwritten(tmp_path):
    create_run_folder(config_for(tmp_path / "run"))
    (tmp_path / "run.1").write_text("mine")
    create_run_folder(config_for(tmp_path / "run"))
    assert (tmp_path / "run.1").read_text() == "mine" and (tmp_path / "run.2/run.json").is_file()


def test_an_empty_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    check_run_folder(tmp_path / "run")
    create_run_folder(config_for(tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_foreign_folder_is_refused(tmp_path):
    path = tmp_path / "thesis"
    path.mkdir()
    (path / "chapter1.tex").write_text("precious")
    assert "is not the folder of a run" in refusal(path)
    assert (path / "chapter1.tex").read_text() == "precious"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("precious")
    assert "is not the folder of a run" in refusal(tmp_path / "notes")


@pytest.mark.parametrize(
    ("content", "found"),
    [('{"schema_version": 2}', "2"), ('{"schema_version": "1"}', "'1'"), ("{}", "None"), ("[1]", "None"), ("", "None")],
)
def test_an_unknown_schema_is_refused_with_a_way_out(tmp_path, content, found):
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text(content)
    message = refusal(path)
    assert f"has schema_version {found}, this version of diffrl knows 1" in message
    assert "use the version of diffrl that run.json names" in message
    assert (path / "run.json").read_text() == content


def test_metrics_are_one_line_per_step_with_sorted_keys(tmp_path):
    with closing(MetricsFile(tmp_path)) as metrics:
        metrics.write({"step": 1, "reward/mean": 0.5, "loss/kl": 1e-7})
        metrics.write({"step": 2, "eval/pass": None, "note": "a\nb"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"loss/kl": 1e-07, "reward/mean": 0.5, "step": 1}'
    assert [json.loads(line) for line in lines[1:]] == [{"step": 2, "eval/pass": None, "note": "a\nb"}]
    with closing(MetricsFile(tmp_path)) as metrics:  # another process goes on where this one stopped
        metrics.write({"step": 3})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_folder_that_holds_the_model_is_refused(tmp_path):
    """Continuing from the last result with the same run_dir would move the model away before it is read."""
    run = tmp_path / "run"
    create_run_folder(config_for(run))
    with pytest.raises(ConfigError, match=r"run_dir: .*model.path .*choose another run_dir"):
        check_run_folder(run, str(run / "model"))
    check_run_folder(run, str(tmp_path / "elsewhere" / "model"))
