"""One Ray cluster and one container engine for the whole run, started when a test first asks, stopped at the end."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from sandbox.image.build import build_image
from sandbox.image.fingerprint import judge_fingerprint
from sandbox.types import SandboxUnavailableError
from tests import container_engine as engines

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
os.environ.pop("RAY_ADDRESS", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    address: str  # of the head, host:port
    dashboard: str  # where jobs are submitted


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    import ray

    port, dashboard_port, agent_port, client_port, *metrics_ports = free_ports(6)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # A second head on this machine would not start without.
    environment |= zip(("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT"), map(str, metrics_ports), strict=True)
    # Ray puts sockets below its folder, whose names must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=16"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
            *(f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={folder}"),
            f"--object-store-memory={300 << 20}",
        ]
        with (Path(folder) / "start.log").open("w") as log:
            head = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            cluster = RayCluster(address=f"127.0.0.1:{port}", dashboard=f"http://127.0.0.1:{dashboard_port}")
            wait_for_port(port, head, Path(folder) / "start.log")
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            yield cluster
            ray.shutdown()
        finally:
            head.terminate()
            head.wait(60)


@pytest.fixture(scope="session")
def container_engine() -> Iterator[str]:
    """Base URL for docker.DockerClient."""
    with engines.container_engine() as url:
        yield url


@pytest.fixture(scope="session")
def judge_image(container_engine: str) -> str:
    """Tag of the base image with this checkout's judge."""
    tag = f"diffrl-sandbox:test-{judge_fingerprint()[:12]}"  # an engine may be shared by several checkouts
    try:
        build_image("base", tag, engine_url=container_engine)
    except SandboxUnavailableError as error:
        engines.unavailable(str(error))
    return tag


@pytest.fixture(scope="session")
def internal_network(container_engine: str) -> Iterator[str]:
    """Name of a network without a way out, whose containers this machine reaches by their addresses."""
    with contextlib.closing(docker.DockerClient(container_engine)) as client:
        network = client.networks.create(f"diffrl-test-{os.getpid()}", driver="bridge", internal=True)
        try:
            yield str(network.name)
        finally:
            network.remove()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    pytest.fail(f"the Ray head did not start: {log.read_text()[-2000:]}")
