"""The folder of a run: resolved config, run.json, metrics.jsonl, rollouts, checkpoints, models. Nothing in it is ever
overwritten by another run: a folder that holds one is moved aside first. Of several starts of one run the last alone writes.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from diffrl.config import AnyConfig
from diffrl.config_file import dump_config, load_config
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.files import write_json
from diffrl.resume import differences

METRICS = "metrics.jsonl"
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
    run = {"schema_version": SCHEMA_VERSION, "version": version("diffrl"), "git_commit": git_commit()}
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

    Raises ConfigError when that run has another config, in what touches its result (diffrl/resume.py).
    """
    path = Path(config.run_dir)
    check_run_folder(path, config.model.path)
    if not (path / "run.json").is_file():
        return None
    found = [d for d in differences(load_config(path / "config.yaml"), config) if d.kind != "free"]
    if found:
        first, others = found[0], "".join(f"; {other.field} differs too" for other in found[1:])
        raise ConfigError(
            f"{first.field}: {first.now!r} must be {first.then!r}, with which the run in {path} was started, to resume it "
            f"({first.meaning}){others}; change it back, choose another run_dir, or leave --resume out to start anew"
        )
    return read_run(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a run. Attempt(number=2, token="6f1c...")"""

    number: int
    token: str


def claim_attempt(path: Path) -> Attempt:
    """The next start of the run: from now on no earlier one may write. Two that claim at once get different numbers."""
    folder = path / "attempts"
    folder.mkdir(exist_ok=True)
    number, token = newest_attempt(path) + 1, uuid.uuid4().hex
    while True:
        try:
            with (folder / f"{number:06d}").open("x") as file:
                file.write(token)
            break
        except FileExistsError:
            number += 1
    write_run(path, read_run(path) | {"attempt": number})
    return Attempt(number=number, token=token)


def newest_attempt(path: Path) -> int:
    return max((int(file.name) for file in (path / "attempts").glob("*")), default=0)


def require_newest(path: Path, attempt: Attempt) -> None:
    """Raises RunStoppedError when the run, or another one in its folder, has been started since."""
    file = path / "attempts" / f"{attempt.number:06d}"
    if newest_attempt(path) != attempt.number or file.read_text() != attempt.token:
        raise RunStoppedError(f"{path}: the run has been started again elsewhere; this start of it ends here")


def check_run_folder(path: Path, model_path: str | None = None) -> None:
    """Refuse a folder that is not a run's, a run's that this version cannot read, and one that holds the model to load."""
    if model_path is not None and Path(model_path).resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"run_dir: {path} holds model.path {model_path} and would be moved aside; choose another run_dir"
        )
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if nearest != path and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"run_dir: {path} cannot be made in {nearest}; choose another run_dir")
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
    from the metrics that diffrl/metrics.py says vary.

    Cutting it makes a new file of that name, so an earlier start of the run that has it open writes where nobody reads.
    """

    def __init__(self, run_folder: Path):
        self.path = run_folder / METRICS
        self.file: TextIO | None = None

    def opened(self) -> TextIO:
        if self.file is None:
            self.file = self.path.open("a")
        return self.file

    def write(self, row: Mapping[str, float | int | str | None]) -> None:
        file = self.opened()
        file.write(json.dumps(row, sort_keys=True) + "\n")
        file.flush()

    def sync(self) -> int:
        """Bytes written so far, all of them on the disk by now."""
        file = self.opened()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Back to what it was at a `sync`."""
        self.close()
        kept = self.path.read_bytes()[:size] if self.path.exists() else b""
        assert len(kept) == size, f"{self.path} has lost lines that were there before"
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.path)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
