"""Clusters whose nodes an autoscaler adds and removes: `python -m tests.actors.autoscaled SCENARIO FOLDER` prints what
happened there, a line of JSON each. In a PID namespace of its own, whose end is that of all nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from actors import placement
from actors.calls import Done
from actors.elastic import ElasticPool, Room
from actors.placement import Ask, make_room
from actors.pool import WorkerPool, wait_for
from actors.processes import place_of
from actors.system import spawner
from diffrl.config import SupervisionConfig
from diffrl.errors import ConfigError
from tests.actors.failing_workers import Held
from tests.conftest import free_ports, wait_for_port

GROUP = "diffrl/group"
HEAD = "ray.head.default"  # the one name that works
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
FILES = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_prestart_worker_first_driver": "0",  # a node has 30 seconds to start, so that it starts nothing that nobody needs
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
LIMIT_S = 400.0  # of what takes half a minute


def config_of(port: int, groups: dict[str, int], idle_s: float) -> dict:
    """Of groups with at most so many nodes of two CPUs; as an external provider: the fake one's own defaults are missing in
    Ray's wheel."""
    kinds = {
        name: {
            "resources": {"CPU": 2},
            "labels": {GROUP: name},
            "node_config": {},
            "min_workers": 0,
            "max_workers": number,
        }
        for name, number in groups.items()
    }
    return {
        "cluster_name": "test",
        "max_workers": sum(groups.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}, **kinds},
        "head_node_type": HEAD,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in COMMANDS},
        **{name: [] for name in FILES},
    }


def start(folder: Path, groups: dict[str, int], idle_s: float) -> None:
    """The head, and this process in its cluster."""
    port, agent_port, client_port = free_ports(3)
    (folder / "config.yaml").write_text(json.dumps(config_of(port, groups, idle_s)))
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


def ask(group: str, count: int, cpus: float = 1.0) -> Ask:
    return Ask(
        number=f"{group}.num_workers",
        cpus=f"{group}.cpus_per_worker",
        gpus=None,
        count=count,
        resources={"CPU": cpus},
        labels={GROUP: group},
    )


def nodes(group: str) -> list[str]:
    found = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Labels"].get(GROUP) == group]
    return sorted(found)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# What cannot be had, and what can


def room(folder: Path) -> None:
    start(folder, {"rollout": 2}, 300.0)
    for count in (5, 4):
        began = time.monotonic()
        try:
            make_room([ask("rollout", count)], LIMIT_S)
            said = ""
        except ConfigError as error:
            said = str(error)
        say(asked=count, said=said, nodes=len(nodes("rollout")), seconds=round(time.monotonic() - began, 1))


# Workers that come and go


def elastic(folder: Path) -> None:
    """A burst of judging and then none, beside two rollout workers; then one of their nodes is lost in the middle of work."""
    start(folder, {"rollout": 2, "judge": 2}, 5.0)
    asks = [ask("rollout", 2, 2.0), ask("judge", 1)]
    make_room(asks, LIMIT_S)
    config = SupervisionConfig(start_s=30.0, backoff_s=0.1)

    def maker(group: str, cpus: float) -> Callable[[], Any]:
        return spawner(Held, {"num_cpus": cpus, "label_selector": {GROUP: group}}, str(folder))

    rollouts = WorkerPool(maker("rollout", 2.0), 2, role="rollout", config=config)
    judges = ElasticPool(
        maker("judge", 1.0), 1, most=5, idle_s=3.0, places=Room(asks, "judge"), role="judge", config=config
    )
    pools = (rollouts, judges)
    for pool in pools:
        pool.wait_ready()
    done: list[tuple[str, int | None, Any]] = []

    def until(name: str, condition: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < LIMIT_S, name
            wait_for(pools)
            for pool in pools:
                while pool.outcomes:
                    outcome = pool.outcomes.popleft()
                    assert isinstance(outcome, Done), outcome
                    done.append((pool.role, outcome.call.key, outcome.value))
        say(
            event=name,
            seconds=round(time.monotonic() - began, 1),
            **{f"{group}_nodes": len(nodes(group)) for group in ("rollout", "judge")},
            **{f"{pool.role}_workers": sum(worker.works for worker in pool.slots) for pool in pools},
            losses=sum(pool.num_restarts for pool in pools),
        )

    before = nodes("rollout")
    until("begin", lambda: True)
    hold = folder / "hold"
    hold.touch()
    for value in range(20):
        judges.submit(value, "work", value)
    until("burst", lambda: sum(worker.works for worker in judges.slots) == 4)
    until("all that there can be", lambda: not judges.asked)
    hold.unlink()
    until("judged", lambda: not judges.busy)
    until("workers left", lambda: len(judges.slots) == 1)
    until("nodes left", lambda: len(nodes("judge")) == 1)
    say(rollout_nodes_stayed=nodes("rollout") == before)

    hold.touch()
    for value in range(20, 26):
        rollouts.submit(value, "work", value)
    until("rollouts begin", lambda: len(rollouts.running) == 4)
    lose_node(place_of(rollouts.workers[1]).node_id)
    until("node lost", lambda: rollouts.num_restarts == 1)
    hold.unlink()
    until("sampled", lambda: not rollouts.busy)
    until("node replaced", lambda: not rollouts.is_placing and not rollouts.starting)
    say(done=sorted(done))
    for pool in pools:
        pool.close()


def lose_node(node_id: str) -> None:
    """With all its processes, at once."""
    for process in psutil.process_iter(["name", "environ"]):
        environment = process.info["environ"] or {}
        if process.info["name"] == "raylet" and environment.get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node_id:
            for each in (process, *process.children(recursive=True)):
                each.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    {"room": room, "elastic": elastic}[sys.argv[1]](Path(sys.argv[2]))
