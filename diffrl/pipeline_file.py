"""From a pipeline's YAML file and overrides to its checked config and the checked config of every stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffrl.config import AnyConfig
from diffrl.config.pipeline import PipelineConfig
from diffrl.config_file import apply_override, describe, read_mapping, validate
from diffrl.errors import ConfigError, shown, suggestion

ENTRY_KEYS = ("config", "overrides")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Pipeline(config=PipelineConfig(...), stages={"pretrain": PretrainConfig(...), "sft": SftConfig(...)}): every stage
    with its own run_dir, and from the second on with the model of the one before as model.path."""

    config: PipelineConfig
    stages: Mapping[str, AnyConfig]


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read the pipeline and its stages, apply `key=value` overrides, validate. Raises ConfigError."""
    path = Path(path)
    raw = read_mapping(path)
    if "stages" not in raw and "stage" in raw:
        raise ConfigError(f"{path}: stage: this is one stage, not a pipeline; run it with `diffrl train {path}`")
    known = list(raw["stages"]) if isinstance(raw.get("stages"), dict) else []
    for override in overrides:
        apply_override(raw, placed(override, known))
    try:
        config = PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, PipelineConfig)}") from error
    stages: dict[str, AnyConfig] = {}
    before: str | None = None
    for name, entry in config.stages.items():
        file = path.parent / entry.config
        try:
            own = merged(read_mapping(file), entry.overrides)
        except ConfigError as error:
            raise ConfigError(f"stages.{name}.config: {shown(entry.config)}: {error}") from error
        for key in ("run_dir", "model.path") if before is not None else ("run_dir",):
            if at(entry.overrides, key) is not None:
                raise ConfigError(
                    f"stages.{name}.overrides.{key}: {at(entry.overrides, key)!r} is given and the pipeline sets it; leave it out"
                )
        own["run_dir"] = str(Path(config.run_dir) / name)
        if before is not None:
            own = merged(own, {"model": {"path": str(Path(config.run_dir) / before / "model")}})
        if config.ray.address is not None:
            own = merged(own, {"ray": {"address": config.ray.address}})
        stages[name] = validate(own, f"stages.{name} ({file})")
        before = name
    return Pipeline(config=config, stages=stages)


def placed(override: str, known: Sequence[str]) -> str:
    """An override of a stage's key (stages.sft.optim.lr=1e-3) as one of the stage's overrides. Raises ConfigError."""
    key, sep, value = override.partition("=")
    if key == "run.dir":
        return f"run_dir{sep}{value}"
    if not key.startswith("stages."):
        return override
    _, name, *rest = key.split(".")
    if name not in known:
        raise ConfigError(
            f"override: {override!r}: no stage {name!r}{suggestion(name, known)}; known: {', '.join(known)}"
        )
    if not rest or rest[0] in ENTRY_KEYS:
        return override
    return f"stages.{name}.overrides.{'.'.join(rest)}{sep}{value}"


def merged(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the keys of `overrides`, section by section; a key may reach into sections (optim.lr)."""
    result = dict(raw)
    for key, value in overrides.items():
        first, _, rest = key.partition(".") if isinstance(key, str) else (key, "", "")  # others are refused later
        if rest:
            first, value = first, {rest: value}
        old = result.get(first)
        if isinstance(value, Mapping) and (isinstance(old, Mapping) or rest):
            value = merged(old if isinstance(old, Mapping) else {}, value)
        result[first] = value
    return result


def at(raw: Mapping[str, Any], key: str) -> Any:
    """The value at a key that may be written as sections or with dots; None when there is none."""
    if key in raw:
        return raw[key]
    first, _, rest = key.partition(".")
    section = raw.get(first)
    return at(section, rest) if rest and isinstance(section, Mapping) else None
