"""A container engine for the tests: a private dockerd where that is possible, so that no test depends on the machine's.

The private engine keeps everything it owns in one folder and touches nothing that another engine beside it uses: no
iptables rules, no sysctl, a bridge and a containerd namespace of its own (with `--bridge none` it would delete docker0).
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import docker
import docker.errors
import pytest

_START_S = 60


@contextlib.contextmanager
def container_engine() -> Iterator[str]:
    """Base URL of an engine that works."""
    problem = "needs root and dockerd (`make engine`)"
    if os.geteuid() == 0 and shutil.which("dockerd"):
        with contextlib.ExitStack() as stack:
            try:
                url = stack.enter_context(private_engine())
            except (OSError, subprocess.SubprocessError) as error:
                problem = str(error)
            else:
                yield url
                return
    url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not _answers(url):
        unavailable(f"no container engine: {problem}")
    yield url


def unavailable(problem: str) -> NoReturn:
    """Skips the test, or fails it in CI on Debian as root, where engine, image and kubectl can always be had."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists():
        pytest.fail(problem)
    pytest.skip(problem)


@contextlib.contextmanager
def private_engine() -> Iterator[str]:
    """Base URL of a dockerd that only the caller uses; OSError or SubprocessError when none can be started."""
    bridge = f"dk{secrets.token_hex(4)}"
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="dk-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        url, log = f"unix://{folder}/docker.sock", Path(folder, "log")
        command = [
            *("setpriv", "--pdeathsig", "TERM", "dockerd", f"--host={url}", f"--pidfile={folder}/pid"),
            *(f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--bridge={bridge}"),
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
            *(f"--containerd-namespace={bridge}", f"--containerd-plugins-namespace={bridge}-plugins"),
        ]
        subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True, capture_output=True)
        try:
            with log.open("w") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                _wait_until_it_answers(url, process, log)
                yield url
                _remove_containers(url)  # dockerd would give each of them ten seconds
            finally:
                _stop(process)
        finally:
            subprocess.run(["ip", "link", "delete", bridge], check=True, capture_output=True)
            _unmount_below(folder)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"dockerd did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        if url.startswith("unix://"):
            with socket.socket(socket.AF_UNIX) as probe:  # the SDK would leave its socket open
                probe.connect(url.removeprefix("unix://"))
        with contextlib.closing(docker.DockerClient(url)) as client:
            return client.ping()
    except (docker.errors.DockerException, OSError):
        return False


def _remove_containers(url: str) -> None:
    with contextlib.closing(docker.DockerClient(url)) as client:
        for container in client.containers.list(all=True, ignore_removed=True):
            container.remove(force=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _unmount_below(folder: str) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in reversed(mounts):
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", path], check=False)
