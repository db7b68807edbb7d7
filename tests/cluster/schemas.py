"""What an API server would say of a manifest: unknown fields, missing ones, wrong types, twice the same key in a list.

The schemas are KubeRay's CRDs (crd/*.yaml) and Kubernetes' own swagger.json (k8s/), in the folder DIFFRL_SCHEMAS or
`schemas` of the shared files.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator, ValidationError
from jsonschema.validators import extend

from tests.shared_files import shared_file

_ANYTHING = "x-kubernetes-preserve-unknown-fields"
_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_LOOSE: dict[str, Any] = {  # swagger gives these as strings, an API server takes numbers too
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["integer", "string"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["number", "string"]},
}


class Schemas:
    """check(manifest) -> what is wrong with it, one line each. KeyError for a kind without a schema."""

    def __init__(self, folder: Path):
        swagger = json.loads((folder / "k8s" / "swagger.json").read_text())["definitions"]
        self.definitions = {name: strict(schema) for name, schema in swagger.items()} | _LOOSE
        self.validator = _Validator({"definitions": self.definitions})  # evolved, so that references are looked up once
        self.kinds: dict[tuple[str, str], dict] = {}
        for name, schema in swagger.items():
            for kind in schema.get("x-kubernetes-group-version-kind", ()):
                api_version = "/".join(filter(None, (kind["group"], kind["version"])))
                self.kinds[api_version, kind["kind"]] = {"$ref": f"#/definitions/{name}"}
        for path in sorted((folder / "crd").glob("*.yaml")):
            crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
            for version in crd["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"$ref": f"#/definitions/{_META}"}
                self.kinds[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = schema

    def check(self, manifest: Mapping[str, Any]) -> list[str]:
        schema = self.kinds[manifest["apiVersion"], manifest["kind"]]
        found = self.validator.evolve(schema=schema).iter_errors(self.complete(manifest, schema))
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]

    def complete(self, value: Any, schema: Mapping[str, Any]) -> Any:
        """With defaults, without nulls."""
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].removeprefix("#/definitions/")]
        if isinstance(value, list):
            return [self.complete(item, schema.get("items", {})) for item in value]
        if not isinstance(value, dict):
            return value
        fields, others = schema.get("properties", {}), schema.get("additionalProperties") or {}
        defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
        given = {name: self.complete(v, fields.get(name, others)) for name, v in value.items() if v is not None}
        return defaults | given


@functools.cache
def schemas() -> Schemas:
    """Skips the test where there are none, see shared_file."""
    return Schemas(Path(os.environ.get("DIFFRL_SCHEMAS") or shared_file("schemas")))


def strict(schema: Any) -> Any:
    """OpenAPI to JSON Schema that forbids what it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "properties" in schema:
        made["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get(_ANYTHING):
            made["additionalProperties"] = False
    return made


def _no_key_twice(validator: Any, keys: list[str], items: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(items, list):
        seen = [tuple(item.get(key) for key in keys) for item in items if isinstance(item, dict)]
        for key in {key for key in seen if seen.count(key) > 1}:
            yield ValidationError(f"{key} is there twice")


_Validator = extend(Draft4Validator, {"x-kubernetes-list-map-keys": _no_key_twice})
