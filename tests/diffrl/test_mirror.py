"""A second place for checkpoints, on fsspec's file and memory systems."""

from pathlib import Path

import fsspec
import pytest

from diffrl.checkpoint import RunState, checkpoint_path, commit, committed_steps, part_path
from diffrl.errors import ConfigError
from diffrl.mirror import Mirror


def run_folder(path: Path, steps: int) -> Path:
    """With a checkpoint, two levels deep, and what stands beside it."""
    checkpoint = checkpoint_path(path, steps)
    part = part_path(checkpoint, 1)
    (part / "learner").mkdir(parents=True)
    (part / "learner" / "weights.pt").write_bytes(bytes([steps]) * 100)
    commit(part, checkpoint, RunState(step=steps).note())
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (path / name).write_text(f"{name} {steps}")
    (path / "rollouts").mkdir(exist_ok=True)
    (path / "rollouts" / "step_000000.parquet").write_text("stays")
    return path


@pytest.mark.parametrize("place", ["{tmp}/copy", "file://{tmp}/copy", "memory://{tmp}/copy/"])
def test_the_newest_copies_stay_and_come_back(tmp_path, place: str):
    mirror = Mirror(place.format(tmp=tmp_path))
    assert mirror.steps() == [] and not mirror.pull(tmp_path / "nothing")
    for steps in (2, 4, 6):
        mirror.push(run_folder(tmp_path / "run", steps), steps, keep=2)
    assert mirror.steps() == [4, 6]
    mirror.push(tmp_path / "run", 6, keep=2)  # again, by another start of the run
    assert mirror.steps() == [4, 6]
    assert mirror.pull(tmp_path / "back")
    back = tmp_path / "back"
    assert committed_steps(back) == [6]
    assert RunState.read(checkpoint_path(back, 6)) == RunState(step=6)
    assert (checkpoint_path(back, 6) / "learner" / "weights.pt").read_bytes() == bytes([6]) * 100
    names = {str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()}
    assert names == {
        *("config.yaml", "run.json", "metrics.jsonl"),
        *("checkpoints/step-000006/state.json", "checkpoints/step-000006/learner/weights.pt"),
    }
    if place.startswith("memory"):
        fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def test_half_a_copy_does_not_count(tmp_path):
    mirror = Mirror(str(tmp_path / "copy"))
    mirror.push(run_folder(tmp_path / "run", 2), 2, keep=2)
    run_folder(tmp_path / "run", 4)
    put, copied = mirror.files.put_file, []

    def fail_later(source: str, target: str) -> None:
        if len(copied) == 1:
            raise OSError("connection reset")
        copied.append(target)
        put(source, target)

    mirror.files.put_file = fail_later
    try:
        with pytest.raises(OSError, match="connection reset"):
            mirror.push(tmp_path / "run", 4, keep=2)
    finally:
        del mirror.files.put_file
    assert (tmp_path / "copy" / "checkpoints" / "step-000004").exists() and mirror.steps() == [2]
    mirror.push(tmp_path / "run", 4, keep=2)
    assert mirror.steps() == [2, 4]


@pytest.mark.parametrize("url", ["nowhere://bucket/run", "s3://bucket/run"])
def test_an_address_that_cannot_be_used_is_named(url: str):
    with pytest.raises(ConfigError, match=rf"^checkpoint.copy_to: '{url}' cannot be used \(.*credentials are there$"):
        Mirror(url)
