"""Prometheus scrapes a real run by the file that Ray writes for it: every expression of every panel and rule has an answer, or
needs something that this machine or this run does not have.

DIFFRL_SCREENSHOT=docs/ray_dashboard.png makes a picture of the Ray dashboard's actors meanwhile, by chromium.
"""

import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util.state import list_actors

from diffrl.types import Problem
from tests.actors.conftest import opened, problems, problems_file, rl_config, tune
from tests.cluster.expressions import MONITORING, metrics_in, of_panels, rules, tool
from tests.conftest import RayCluster, free_ports

__all__ = ["problems", "problems_file"]  # fixtures
WAIT_S = 150.0
NEEDS = {
    "a GPU": {"ray_node_gpus_utilization", "ray_node_gram_used"},
    "Kubernetes": {
        *("diffrl_sandbox_busy", "diffrl_sandbox_waiting"),  # sandbox pods
        *("autoscaler_pending_nodes", "autoscaler_recently_failed_nodes"),  # nodes that come and go
    },
    "workers that are lost": {"ray_diffrl_restarts_total", "ray_diffrl_retries_total", "diffrl:restarts"},
    "a judge that fails": {
        *("ray_diffrl_rejudged_groups_total", "ray_diffrl_pool_infra_errors_total"),
        *("ray_diffrl_pool_errors_total", "ray_diffrl_pool_restarts_total"),
    },
    "gradients that are not finite": {"ray_diffrl_optim_bad_steps_total"},
    "equal rewards, and max_replacements": {"ray_diffrl_rollout_replaced_groups_total"},
    "a supervised stage with validation": {
        *("ray_diffrl_validation_diffusion", "ray_diffrl_validation_nll", "ray_diffrl_time_validation"),
    },
}


class Prometheus:
    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def __call__(self, expression: str) -> list[Any]:
        return self.get("query", query=expression)["result"]


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """Of our own: its port, its data."""
    described = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    described["groups"][0]["interval"] = "1s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(described))
    config = {
        "global": {"scrape_interval": "15s", "scrape_timeout": "10s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        *(tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(60)


def unanswered(ask: Prometheus, expressions: dict[str, str]) -> dict[str, str]:
    """Those that have had no answer since the runs began: what a run tells ends with it."""
    return {where: expression for where, expression in expressions.items() if not ask(f"({expression})[30m:5s]")}


def screenshot(cluster: RayCluster, file: Path) -> None:
    command = [
        *(tool("chromium"), "--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1500,850"),
        *("--virtual-time-budget=20000", f"--screenshot={file}", f"{cluster.dashboard}/#/actors"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert 10_000 < file.stat().st_size < 300_000


@pytest.mark.slow
def test_every_expression_has_an_answer(
    ray_cluster: RayCluster, problems: list[Problem], problems_file: Path, tmp_path: Path
) -> None:
    tool("prometheus")
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    config = rl_config(
        tmp_path / "sft" / "run" / "model",
        problems_file,
        tmp_path / "rl",
        sampling={"confidence_threshold": 0.9, "guard_share": 0.5},
        train={"steps": 4},
        sync={"every": 1},
        eval={
            "every": 2,
            "problems": {"source": "problems", "path": str(problems_file), "num_prompt_tests": 0},
            "num_samples": 2,
        },
    )
    run_name = f"{tmp_path.name}/rl"
    variables = {"$SessionName": session.name, "$Cluster": ".*", "$run": f"{run_name}|sft/run"}
    expressions = {f"rule {r['record']}": r["record"] for r in rules() if "record" in r}
    for where, expression in of_panels():
        expressions[where] = re.sub("|".join(map(re.escape, variables)), lambda m: variables[m[0]], expression)
    assert not [where for where, expression in expressions.items() if "$" in expression]
    excused = set.union(*NEEDS.values())
    with prometheus(tmp_path, session / "prom_metrics_service_discovery.json") as ask:
        (tmp_path / "sft").mkdir()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
        tune(tmp_path / "sft", problems, {"tiny": sizes}, steps=400)
        with opened(config, telemetry_config=config.telemetry) as run:
            run.train()
            deadline = time.monotonic() + WAIT_S
            while True:
                left = {w: e for w, e in unanswered(ask, expressions).items() if not metrics_in(e) & excused}
                if not left:
                    break
                assert time.monotonic() < deadline, left
                time.sleep(2)
            groups = ask.get("rules")["groups"]
            assert [rule for group in groups for rule in group["rules"] if rule.get("lastError")] == []
            (steps,) = ask(f'ray_diffrl_steps{{run="{run_name}"}}')
            assert float(steps["value"][1]) == 4 and steps["metric"]["SessionName"] == session.name
            (critical,) = [ask('ALERTS{alertstate="firing",severity="critical",alertname!="DiffrlNodeMemory"}')]
            assert critical == []  # the machine's memory is not ours
            names = {
                actor.name for actor in list_actors(address=ray_cluster.dashboard, filters=[("state", "=", "ALIVE")])
            }
            for role in ("RolloutWorker", "RewardWorker", "Reference", "LearnerRank"):
                assert any(re.fullmatch(rf"{role}-\d+", name or "") for name in names), names
            if file := os.environ.get("DIFFRL_SCREENSHOT"):
                screenshot(ray_cluster, Path(file).absolute())
