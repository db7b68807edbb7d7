"""A cluster whose autoscaler adds at most two nodes of two CPUs, and what it says to two runs: `python -m
tests.actors.autoscaled FOLDER`. In a PID namespace of its own, whose end is that of all nodes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from actors import placement
from actors.placement import Ask, make_room
from diffrl.errors import ConfigError
from tests.conftest import free_ports, wait_for_port

GROUP = {"diffrl/group": "rollout"}
HEAD = "ray.head.default"  # the one name that works
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
FILES = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}


def config_of(port: int) -> dict:
    """As an external provider: the fake one's own defaults are missing in Ray's wheel."""
    return {
        "cluster_name": "test",
        "max_workers": 2,
        "upscaling_speed": 100,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "rollout": {
                "resources": {"CPU": 2},
                "labels": GROUP,
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": HEAD,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in COMMANDS},
        **{name: [] for name in FILES},
    }


def rollouts(count: int) -> Ask:
    return Ask(
        number="rollout.num_workers",
        cpus="rollout.cpus_per_worker",
        gpus=None,
        count=count,
        resources={"CPU": 1.0},
        labels=GROUP,
    )


def main(folder: Path) -> None:
    port, agent_port, client_port = free_ports(3)
    (folder / "config.yaml").write_text(json.dumps(config_of(port)))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"),
        *("--include-dashboard=false", f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={folder}"),
        *(f"--object-store-memory={100 << 20}", f"--autoscaling-config={folder}/config.yaml"),
    ]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
    wait_for_port(port, head, folder / "head.log")
    ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="error")
    placement.JOIN_S = 0.0  # the autoscaler is why there is hope
    for count in (5, 4):
        began = time.monotonic()
        try:
            make_room([rollouts(count)], 400.0)
            said = ""
        except ConfigError as error:
            said = str(error)
        there = sum(node["Labels"].items() >= GROUP.items() for node in ray.nodes() if node["Alive"])
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"asked": count, "said": said, "nodes": there, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
