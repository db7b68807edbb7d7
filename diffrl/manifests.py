"""The manifest of a finished stage, and what follows from it when a pipeline is run again.

run_dir/NAME/manifest.json is written last. Its inputs are all that the stage's result depends on, apart from the code: its
config (without what only says where, IGNORED below), its data and the model it started from. While a stage is not finished
its inputs are in run_dir/NAME.inputs.json. A stage whose inputs and model are those of its manifest is not run again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from diffrl.config import AnyConfig
from diffrl.config_file import validate
from diffrl.errors import ConfigError
from diffrl.files import write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
IGNORED = ("run_dir", "model.path", "model.known_as", "ray.address", "telemetry")  # say where, not what
Action = Literal["skip", "evaluate", "resume", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Inputs(config={"stage": "sft", "optim": {"lr": 1e-5, ...}, ...}, data={"data (rows.jsonl)": "9f2c..."},
    parent={"model.safetensors": "77ab...", "config.json": "..."}); parent is empty for random weights."""

    config: dict[str, Any]
    data: dict[str, str]
    parent: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageManifest:
    """StageManifest(name="sft", inputs=Inputs(...), model={"model.safetensors": "03de...", ...},
    metrics={"steps": 1000, "loss_first": 9.1, "loss_last": 2.3, "seconds": 131.0}, evaluation={"pass@1": 0.41, ...},
    facts={"version": "0.1.0", "git_commit": "..."})"""

    name: str
    inputs: Inputs
    model: dict[str, str]
    metrics: dict[str, float]
    evaluation: dict[str, Any] | None  # numbers, and what was asked
    facts: dict[str, Any]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Decision(action="run", reasons=("optim.lr changed from 1e-05 to 0.001",))"""

    action: Action
    reasons: tuple[str, ...]


def stage_config(config: AnyConfig) -> dict[str, Any]:
    """The resolved config as plain values, without what says where."""
    raw = TypeAdapter(type(config)).dump_python(config, mode="json")
    for key in IGNORED:
        *sections, last = key.split(".")
        section = raw
        for name in sections:
            section = section[name]
        del section[last]
    return raw


def write_manifest(folder: Path, manifest: StageManifest) -> None:
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> StageManifest | None:
    """None when the stage has not finished. Raises ConfigError for a file that this version cannot read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        if raw["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {raw['schema_version']!r}, this version of diffrl knows {SCHEMA_VERSION}")
        return StageManifest(**{**raw, "inputs": Inputs(**raw["inputs"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); move {folder} away, then the stage runs again") from None


def inputs_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.inputs.json")


def write_inputs(folder: Path, inputs: Inputs) -> None:
    write_json(inputs_file(folder), asdict(inputs))


def read_inputs(folder: Path) -> Inputs | None:
    """Of a stage that was begun. What cannot be read is as good as not there: the stage then starts again."""
    try:
        return Inputs(**json.loads(inputs_file(folder).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def decide(
    folder: Path,
    inputs: Inputs,
    *,
    model: Mapping[str, str],
    evaluation: Mapping[str, Any] | None,
) -> Decision:
    """What to do about a stage, and why.

    `model`: the files that are in its folder now. `evaluation`: what its evaluation depends on, None when it has none.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if not folder.exists() or not any(folder.iterdir()):
            return Decision(action="run", reasons=("not run yet",))
        begun = read_inputs(folder)
        changes = ("its inputs are not known",) if begun is None else tuple(differences(begun, inputs))
        return Decision(action="run" if changes else "resume", reasons=("unfinished", *changes))
    changes = [*differences(manifest.inputs, inputs)]
    changes += [f"its own model: {what}" for what in file_differences(manifest.model, model)]
    if changes:
        return Decision(action="run", reasons=tuple(changes))
    if evaluation is not None and (manifest.evaluation is None or manifest.evaluation["asked"] != evaluation):
        return Decision(
            action="evaluate", reasons=("not evaluated yet" if manifest.evaluation is None else "evaluation changed",)
        )
    return Decision(action="skip", reasons=("nothing changed",))


def differences(old: Inputs, new: Inputs) -> Iterator[str]:
    """Each in words."""
    yield from config_differences(with_defaults(old.config), new.config)
    yield from (f"data: {what}" for what in file_differences(old.data, new.data))
    yield from (f"parent: {what}" for what in file_differences(old.parent, new.parent))


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """An old config with the keys that have come since: their defaults keep to what was."""
    try:
        return stage_config(validate(config, "manifest"))
    except ConfigError:  # of a key that is gone, or of a rule that is new: told as a difference
        return config


def config_differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from config_differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key} changed from {old!r} to {new!r}"


def file_differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            yield f"{name} is gone"
        elif name not in old:
            yield f"{name} is new"
        elif old[name] != new[name]:
            yield f"{name} changed"
