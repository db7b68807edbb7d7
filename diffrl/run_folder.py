"""The folder of a run: resolved config, run.json, metrics.jsonl, rollouts, models. Nothing in it is ever overwritten
by another run: a folder that holds one is moved aside first.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffrl.config import AnyConfig
from diffrl.config_file import dump_config, load_config
from diffrl.errors import ConfigError
from diffrl.files import write_json

SCHEMA_VERSION = 1  # of the folder; raised with every change that an older reader would misread


def create_run_folder(config: AnyConfig, **facts: Any) -> Path:
    """Make `config.run_dir` and write config.yaml and run.json, which takes `facts` of the run that no config says.

    Raises ConfigError for a folder we must not touch.
    """
    path = Path(config.run_dir)
    check_run_folder(path, config.model.path)
    if path.exists() and any(path.iterdir()):
        move_aside(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(dump_config(config))
    run = {"schema_version": SCHEMA_VERSION, "version": version("diffrl"), "git_commit": git_commit(), "attempt": 1}
    write_run(path, run | facts)
    return path


def read_run(path: Path) -> dict[str, Any]:
    """run.json. `attempt`: how often the run has been started; `finished`: its seconds, when it is."""
    return json.loads((path / "run.json").read_text())


def write_run(path: Path, run: Mapping[str, Any]) -> None:
    """Replace run.json, whole or not at all."""
    write_json(path / "run.json", run)


def unfinished_run(config: AnyConfig) -> dict[str, Any] | None:
    """run.json of the run that `config.run_dir` holds and this config may go on with, None where there is none.

    Raises ConfigError when that run has another config; only run_dir and ray may differ, which do not touch the result, and
    paths that moved along with run_dir.
    """
    path = Path(config.run_dir)
    check_run_folder(path, config.model.path)
    if not (path / "run.json").is_file():
        return None
    then, now = (resolved_fields(c) for c in (load_config(path / "config.yaml"), config))
    for field in {**then, **now}:
        (old, old_place), (new, new_place) = then.get(field, (None, None)), now.get(field, (None, None))
        if old != new and old_place != new_place and field.partition(".")[0] not in ("run_dir", "ray"):
            raise ConfigError(
                f"{field}: {new!r} must be {old!r}, with which the run in {path} was started, to "
                "resume it; change it back, choose another run_dir, or leave --resume out to start anew"
            )
    return read_run(path)


def resolved_fields(config: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """(value, of a path also the way to it from run_dir, else the value again) of every key."""
    fields = dict(fields_of(config.model_dump(mode="json")))
    return {
        field: (value, os.path.relpath(value, config.run_dir) if field.endswith(".path") and value else value)
        for field, value in fields.items()
    }


def fields_of(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key of a resolved config."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from fields_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_run_folder(path: Path, model_path: str | None = None) -> None:
    """Refuse a folder that is not a run's, a run's that this version cannot read, and one that holds the model to load."""
    if model_path is not None and Path(model_path).resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"run_dir: {path} holds model.path {model_path} and would be moved aside; choose another run_dir"
        )
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "run.json").is_file():
        raise ConfigError(f"run_dir: {path} exists and is not the folder of a run; choose another run_dir")
    try:
        schema = json.loads((path / "run.json").read_text())["schema_version"]
    except (ValueError, KeyError, TypeError):  # cut off by a crash, or written by something else
        schema = None
    if schema != SCHEMA_VERSION:
        raise ConfigError(
            f"run_dir: {path}/run.json has schema_version {schema!r}, this version of diffrl knows {SCHEMA_VERSION}; "
            "choose another run_dir, move the folder away, or use the version of diffrl that run.json names"
        )


def move_aside(path: Path) -> None:
    """Rename to the first free `path.N`."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)


def git_commit() -> str | None:
    """Commit of the source tree this package runs from; None outside a checkout (an installed wheel, a job's upload)."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


class MetricsFile:
    """metrics.jsonl: a line per step and per evaluation, keys sorted. Equal seeds and configs give equal lines, apart
    from `time/*`, `restarts/*`, `memory/*` and `pool/*`."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / "metrics.jsonl"

    def write(self, row: Mapping[str, float | int | str | None]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")

    def sync(self) -> int:
        """Bytes written so far, all of them on the disk by now."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size: int) -> None:
        """Back to what it was at a `sync`."""
        self.path.touch()
        assert self.path.stat().st_size >= size, f"{self.path} has lost lines that were there before"
        os.truncate(self.path, size)
