"""Hosts made of namespaces: each has its own processes, network, /tmp, /run, /dev/shm and name, and shares only the folders
that are mounted into it.

The network is a router in a namespace of its own (Docker drops forwarded packets in the root one), with one link to each
host. It has no way out.

A host ends when its standard input does: at the latest with this process, however that ends. With its first process goes
everything on it, its mounts and its link.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import psutil

from tests.container_engine import unavailable

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "iptables", "nsenter", "unshare")
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
CLONE_NEWNET = 0x40000000
END_S = 30.0

# $1 the host's name; then pairs of what is mounted and where; after "--" folders that stay where they are.
HOST = """
set -e
hostname "$1"
shift
mount -t tmpfs tmpfs /run
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$2"; elif [ ! -e "$2" ]; then mkdir -p "${2%/*}" && touch "$2"; fi
    mount --bind "$1" "$2"
    shift 2
done
shift
for kept; do
    mkdir -p "/run/kept$kept"
    mount --bind "$kept" "/run/kept$kept"
done
mount -t tmpfs tmpfs /tmp
for kept; do
    mkdir -p "$kept"
    mount --move "/run/kept$kept" "$kept"
done
mount -t tmpfs tmpfs /dev/shm
mkdir /tmp/home
echo ready
read -r forever || true
"""
ROUTER = """
set -e
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
echo ready
read -r forever || true
"""

Answer = TypeVar("Answer")


def inside(pid: int, call: Callable[[], Answer]) -> Answer:
    """Call in a thread that is on the network of a process; the sockets that it makes stay there."""

    def enter() -> Answer:
        with open(f"/proc/{pid}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


class Network:
    """Links from the router to the hosts, numbered from 1: host N has the address 10.77.N.2."""

    def __enter__(self) -> Self:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.geteuid() != 0:
            unavailable(f"hosts of namespaces need root, and {', '.join(TOOLS)} (`make engine`)")
        self.links = 0
        self.router = begun(["unshare", "--net", "bash", "-c", ROUTER])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended(self.router)

    def __call__(self, *command: str) -> None:
        """On the router."""
        on_network(self.router.pid, *command)

    def link(self, pid: int) -> int:
        """A new link to the network namespace of a process; its number."""
        self.links = number = self.links + 1
        self("ip", "link", "add", f"host{number}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self("ip", "address", "add", f"10.77.{number}.1/24", "dev", f"host{number}")
        self("ip", "link", "set", f"host{number}", "up")
        on_network(pid, "ip", "address", "add", f"{address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            on_network(pid, "ip", "link", "set", device, "up")
        on_network(pid, "ip", "route", "add", "default", "via", f"10.77.{number}.1")
        return number

    def unplug(self, number: int) -> None:
        """Nobody is told."""
        self("ip", "link", "delete", f"host{number}")

    def isolate(self, number: int, port: int, clients: Sequence[str]) -> None:
        """As the NetworkPolicy of cluster/ does: these clients reach that port of it, it answers them and reaches nothing."""
        device = f"host{number}"
        for client in clients:
            to_port = ("-p", "tcp", "--dport", str(port), "-s", client)
            self("iptables", "-A", "FORWARD", "-o", device, *to_port, "-j", "ACCEPT")
        self("iptables", "-A", "FORWARD", "-o", device, "-j", "DROP")
        self("iptables", "-A", "FORWARD", "-i", device, "-j", "DROP")
        self("iptables", "-A", "INPUT", "-i", device, "-j", "DROP")


def address(number: int) -> str:
    return f"10.77.{number}.2"


class Host:
    """One of them. What runs on it is started by `start`, or by `run`, which waits for its end."""

    def __init__(self, name: str, network: Network, environment: Mapping[str, str], mounts: Mapping[Path, str]):
        """`mounts`: what lies where; a place that does not exist must be below /run."""
        self.name = name
        self.environment = environment
        self.started: list[subprocess.Popen[bytes]] = []
        pairs = [str(word) for pair in mounts.items() for word in pair]
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", HOST, name, name]
        self.unshare = begun([*unshare, *pairs, "--", *kept()])
        (init,) = psutil.Process(self.unshare.pid).children()
        self.pid = init.pid
        self.address = address(network.link(self.pid))

    def start(
        self, command: Sequence[str], output: IO[bytes] | int | None = None, **environment: str
    ) -> subprocess.Popen:
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES, "--"]
        self.started.append(
            subprocess.Popen(
                [*enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
            )
        )
        return self.started[-1]

    def run(self, command: Sequence[str], timeout_s: float, **environment: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(command, subprocess.PIPE, **environment)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output.decode()

    def names(self) -> list[str]:
        """Of the processes on it, as they call themselves."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(" ".join(process.cmdline()))
            except (OSError, psutil.Error):  # it has ended meanwhile
                continue
        return found

    def stop(self) -> None:
        """Everything on it is killed."""
        if self.unshare.poll() is None:
            for init in psutil.Process(self.unshare.pid).children():
                init.kill()
        ended(self.unshare)
        for process in self.started:
            process.wait(END_S)
            if process.stdout is not None:
                process.stdout.close()


def kept() -> list[str]:
    """Folders that a host's own /tmp would hide: the checkout, and Python's."""
    hidden = [path for path in (str(ROOT), sys.prefix, sys.base_prefix) if path.startswith("/tmp/")]
    return sorted({path for path in hidden if path == str(ROOT) or not path.startswith(f"{ROOT}/")})


def begun(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that has said that it is ready, and ends with its standard input."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    if process.stdout.readline() == b"ready\n":
        return process
    process.stdin.close()
    problem = process.stderr.read().decode()
    ended(process)
    unavailable(f"namespaces for hosts cannot be made on this machine: {problem}")


def ended(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.wait(END_S)


def on_network(pid: int, *command: str) -> None:
    made = subprocess.run(["nsenter", f"--target={pid}", "--net", *command], capture_output=True, text=True)
    assert made.returncode == 0, (command, made.stderr)
