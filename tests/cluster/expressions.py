"""What the dashboards and rules of cluster/monitoring ask Prometheus, and which metrics that needs."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import yaml

from actors.dashboards import DASHBOARDS, MONITORING
from tests.container_engine import unavailable

NO_METRICS = {"ray_io_cluster"}  # a label


def tool(name: str) -> str:
    """prometheus or promtool."""
    found = shutil.which(name)
    if found is None:
        unavailable(f"{name} is missing: `make prometheus`")
    return found


def committed(name: str) -> dict[str, Any]:
    return json.loads((MONITORING / "dashboards" / f"{name}.json").read_text())


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def of_panels() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for dashboard in DASHBOARDS:
        for panel in panels(committed(dashboard.name)):
            for target in panel["targets"]:
                yield f"{dashboard.name}: {panel['title']}: {target['refId']}", target["expr"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return group["rules"]


def metrics_in(expression: str) -> set[str]:
    plain = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:ray|autoscaler|diffrl)[_:][\w:]+", plain)) - NO_METRICS
