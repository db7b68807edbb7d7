"""The folder of a run: resolved config, run.json, metrics.jsonl, rollouts, models. Nothing in it is ever overwritten
by another run: a folder that holds one is moved aside first.
"""

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffrl.config import AnyConfig
from diffrl.config_file import dump_config
from diffrl.errors import ConfigError

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
    (path / "run.json").write_text(json.dumps(run | facts, indent=2) + "\n")
    return path


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
    from `time/*`, `restarts/*` and `pool/*`."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / "metrics.jsonl"

    def write(self, row: Mapping[str, float | int | str | None]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
