"""The manifests of cluster/ as `kubectl kustomize` builds them, each once, and ways through them."""

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import operator_rules
from tests.cluster.schemas import schemas
from tests.container_engine import unavailable

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BUILT = sorted(str(path.parent.relative_to(CLUSTER)) for path in CLUSTER.rglob("kustomization.yaml"))
# Kinds of other projects, whose schemas are not among ours; of the last two: test_dashboards.py.
WITHOUT_SCHEMA = {"ClusterQueue", "LocalQueue", "ResourceFlavor", "ScaledObject", "PodMonitor", "PrometheusRule"}

GPU, TRAIN, TALK, NIGHTLY = "overlays/gpu-8xh100", "jobs/train", "jobs/interactive", "jobs/evaluate"

Manifest = dict[str, Any]


@functools.cache
def built(name: str) -> tuple[Manifest, ...]:
    if shutil.which("kubectl") is None:
        unavailable("kubectl is missing: `make kustomize`")
    made = subprocess.run(["kubectl", "kustomize", CLUSTER / name], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.load_all(made.stdout, Loader=yaml.CSafeLoader))


def the(kind: str, name: str) -> Manifest:
    """The only one of its kind."""
    (manifest,) = (m for m in built(name) if m["kind"] == kind)
    return copy.deepcopy(manifest)


def wrong_with(manifest: Manifest) -> list[str]:
    found = [] if manifest["kind"] in WITHOUT_SCHEMA else schemas().check(manifest)
    return found or operator_rules.refused(manifest)  # rules read fields that a schema has seen


def ray_clusters(name: str) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """What asks for Ray clusters, and the spec of each."""
    for manifest in built(name):
        spec = manifest.get("spec", {})
        if manifest["kind"] == "RayCluster":
            yield manifest, spec
        elif manifest["kind"] in ("RayJob", "RayCronJob"):
            yield manifest, spec.get("jobTemplate", spec)["rayClusterSpec"]


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, spec in ray_clusters(name):
        yield from ((group.get("groupName", "head"), group["template"]["spec"]) for group in groups(spec))
        if autoscaler := spec.get("autoscalerOptions"):  # a container that the operator adds
            yield "head", {**spec["headGroupSpec"]["template"]["spec"], "containers": [autoscaler]}
    yield from (("sandbox", m["spec"]["template"]["spec"]) for m in built(name) if m["kind"] == "Deployment")


def groups(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def quantity(text: str | int) -> float:
    """Of Kubernetes: 500m, 6Gi, 4."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()
    return float(number) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]
