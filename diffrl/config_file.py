"""From a YAML file and overrides to a checked config, and back. `load_config` is the only way in; every error is a
ConfigError of one line.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from diffrl.config import STAGES, AnyConfig, Stage
from diffrl.errors import ConfigError, shown, suggestion


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads 1e-6 as a string."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as floats."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
        list("-+0123456789."),
    )


def parse_value(text: str) -> Any:
    """Raises YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, LookupError, AttributeError, RecursionError) as error:  # PyYAML lets them out: 2026-99-99, 0b_
        raise yaml.YAMLError(str(error)) from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a YAML config, apply `key.sub=value` overrides, validate. Raises ConfigError."""
    raw = read_mapping(path)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, str(path))


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def load_as(kind: type[AnyModel], path: str | Path | None, overrides: Sequence[str] = ()) -> AnyModel:
    """As `load_config`, of a config that is no stage; None: of the overrides alone. Raises ConfigError."""
    raw = {} if path is None else read_mapping(path)
    for override in overrides:
        apply_override(raw, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{'' if path is None else f'{path}: '}{describe(error, kind)}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file as it is. Raises ConfigError."""
    path = Path(path)
    name = str(path) if str(path).isprintable() else shown(str(path))
    try:
        if not path.is_file():
            raise ConfigError(
                f"config: {name} does not exist; give the path of a YAML file, such as configs/quickstart.yaml"
            )
        raw = parse_value(path.read_text())
    except OSError as error:  # a name that is too long, a file that may not be read
        raise ConfigError(f"config: {name} cannot be read ({error.strerror}); give a file that can") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not valid YAML ({' '.join(str(error).split())}); mend the file") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}: {shown(raw)} is not a mapping; write `stage: rl` and further keys")
    return raw


def apply_override(raw: dict, override: str) -> None:
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override: {override!r} is not key=value, such as train.steps=20")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override: {override!r}: {parent} is a value, not a section")
    try:
        node[last] = parse_value(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override: {override!r}: the value is not valid YAML; quote it") from error


def validate(raw: Mapping[str, Any], origin: str) -> AnyConfig:
    stage = raw.get("stage")
    if stage is None and "stages" in raw:
        raise ConfigError(f"{origin}: stages: this is a pipeline, not a stage; run it with `diffrl pipeline {origin}`")
    if not isinstance(stage, str) or stage not in STAGES:
        raise ConfigError(f"{origin}: stage: {shown(stage)} must be one of {', '.join(get_args(Stage))}")
    try:
        return STAGES[stage].model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error, STAGES[stage])}") from error


WORDS = {  # for rules that pydantic states without a way out
    "invalid_key": "must be a string, as every key; quote it",
    "string_type": "must be a valid string; quote it",
    "sequence_str": "must be a list, such as [a, b]",
    "is_instance_of": "must be a list, such as [a, b]",
}


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first error of a validation, in one line: field, value, way out."""
    first = error.errors(include_url=False)[0]
    loc = [str(part) for part in first["loc"] if part != "[key]"]
    field = ".".join(part if part.isprintable() and 0 < len(part) <= 100 else shown(part) for part in loc)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = fields_at(root, loc[:-1])
        return f"{field}: unknown key{suggestion(loc[-1], known)}; known: {', '.join(known)}{more}"
    if first["type"] == "missing":
        return f"{field}: missing; set it in the file or as an override {field}=...{more}"
    if first["type"] == "value_error":  # from our own checks: they name field, value and way out themselves
        own = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return f"{field}.{own}{more}" if field else f"{own}{more}"
    if first["type"] in ("model_type", "dict_type", "mapping_type"):
        known = fields_at(root, loc) or ["NAME"]
        return f"{field}: {shown(first['input'])} must be a section; set its keys, such as {field}.{known[0]}=...{more}"
    rule = WORDS.get(first["type"]) or re.sub(r"^\w+ should", "must", first["msg"])
    return f"{field}: {shown(first['input'])} {rule}{more}"


def fields_at(root: type[BaseModel], loc: Sequence[str]) -> list[str]:
    """Names of the keys of the section at `loc`."""
    model: type[BaseModel] | None = root
    parts = iter(loc)
    for part in parts:
        field = model.model_fields.get(part) if model is not None else None
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if get_origin(field.annotation) is Mapping and next(parts, None) is None:  # of sections, by their names
            return []
    return list(model.model_fields) if model is not None else []


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.dump(TypeAdapter(type(config)).dump_python(config, mode="json"), Dumper=_Dumper, sort_keys=False)
