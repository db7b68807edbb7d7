"""What a machine must have for runs of ours: the machine's part of `diffrl doctor`.

Every check is a function from what it needs to know to a Finding. Heavy packages are imported by the checks that need them,
so that a broken one is a finding too.
"""

import contextlib
import errno
import glob
import os
import resource
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

MIN_PYTHON = (3, 11)
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port", 52365: "--dashboard-agent-listen-port"}  # of `ray start --head`
CONNECT_S = 2.0
RAY_SHARE = 0.3  # of memory, for Ray's object store
RAY_MOST = 200e9  # bytes that it takes by itself
RAY_SHM_CAP = 10e9  # above this it shrinks to what /dev/shm has, below it moves to /tmp
FILES_WARN, FILES_WANTED = 4096, 8192  # Ray's own numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Finding(check="ports", verdict="warn", found="8265 is taken", way_out="ray start --head --dashboard-port=PORT")"""

    check: str
    verdict: Literal["ok", "warn", "bad"]
    found: str
    way_out: str = ""  # of what is not ok

    def __str__(self) -> str:
        return f"{self.verdict:<5}{self.check:<12}{self.found}" + (f" -> {self.way_out}" if self.way_out else "")


def check_python(version: tuple[int, ...]) -> Finding:
    found = "Python " + ".".join(map(str, version))
    if version >= MIN_PYTHON:
        return Finding(check="python", verdict="ok", found=found)
    least = ".".join(map(str, MIN_PYTHON))
    return Finding(
        check="python", verdict="bad", found=f"{found} is older than {least}", way_out=f"make venv with {least}"
    )


def our_requirements() -> list[str] | None:
    """What diffrl's metadata ask for; None when it is not installed."""
    try:
        return metadata.requires("diffrl") or []
    except metadata.PackageNotFoundError:
        return None


def check_packages(requirements: Sequence[str] | None, version_of: Callable[[str], str]) -> Finding:
    """Installed versions against the supported ranges; extras are left out. `version_of` raises PackageNotFoundError."""
    if requirements is None:
        return Finding(check="packages", verdict="bad", found="diffrl is not installed", way_out="pip install -e .")
    fitting, wrong, wanted = [], [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = version_of(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
        else:
            if requirement.specifier.contains(version, prereleases=True):
                fitting.append(f"{requirement.name} {version}")
                continue
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        wanted.append(f"'{requirement}'")
    if not wrong:
        return Finding(check="packages", verdict="ok", found=", ".join(fitting))
    way_out = f"make venv, or pip install {' '.join(wanted)}"
    return Finding(check="packages", verdict="bad", found="; ".join(wrong), way_out=way_out)


def attempted(check: str, make: Callable[[], Finding]) -> Finding:
    """A package that cannot be imported is what a doctor is asked about."""
    try:
        return make()
    except (ImportError, OSError) as error:
        said = " ".join(str(error).split())
        return Finding(
            check=check, verdict="bad", found=f"cannot be imported: {said}", way_out="make venv, after removing .venv"
        )


def find_torch() -> Finding:
    import torch

    count = torch.cuda.device_count()
    return check_torch(
        torch.__version__,
        built_for=torch.version.cuda,
        devices=[torch.cuda.get_device_name(index) for index in range(count)],
        threads=torch.get_num_threads(),
        nvidia=glob.glob("/dev/nvidia[0-9]*"),
    )


def check_torch(
    version: str, *, built_for: str | None, devices: Sequence[str], threads: int, nvidia: Sequence[str]
) -> Finding:
    """`built_for`: the version of CUDA. `devices`: those that torch sees. `nvidia`: the device files of this machine."""
    build = f"torch {version}, built for {f'CUDA {built_for}' if built_for else 'CPU'}"
    cuda = f"{len(devices)} CUDA devices" + (f" ({', '.join(devices)})" if devices else "")
    found = f"{build}; {cuda}, {threads} CPU threads"
    if nvidia and built_for is None:
        way_out = "GPUs are of no use to this build: pip install torch from an index with CUDA builds"
        return Finding(check="torch", verdict="warn", found=f"{found}, but {', '.join(nvidia)}", way_out=way_out)
    if built_for is not None and not devices:
        way_out = (
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            if nvidia
            else "runs use the CPU; a smaller build: make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu"
        )
        return Finding(check="torch", verdict="warn", found=found, way_out=way_out)
    return Finding(check="torch", verdict="ok", found=found)


def check_ray(address: str | None, *, timeout: float) -> Finding:
    """Whether a cluster that runs are to join answers. `address`: of the config, else RAY_ADDRESS."""
    if address in (None, "local"):
        found = "no address (ray.address, RAY_ADDRESS): a run starts a cluster of its own and ends it"
        return Finding(check="ray", verdict="ok", found=found)
    if address == "auto":
        way_out = "name the head's host:port, which can be checked"
        return Finding(check="ray", verdict="warn", found="address auto: whatever cluster Ray finds", way_out=way_out)
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        way_out = "write host:port, such as 127.0.0.1:6379, or unset RAY_ADDRESS"
        return Finding(check="ray", verdict="bad", found=f"address {address!r} is not host:port", way_out=way_out)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout):
            return Finding(check="ray", verdict="ok", found=f"{address} answers: runs join that cluster")
    except (OSError, OverflowError) as error:  # the latter: no such port
        way_out = f"ray start --head --port={port} there, or unset RAY_ADDRESS or ray.address: runs then start their own cluster"
        return Finding(check="ray", verdict="bad", found=f"nobody answers at {address} ({error})", way_out=way_out)


def check_ports(options: Mapping[int, str]) -> Finding:
    """Ports that `ray start --head` takes, by the option that names another."""
    taken = [port for port in options if is_taken(port)]
    if not taken:
        found = f"{', '.join(map(str, options))} are free for a head"
        return Finding(check="ports", verdict="ok", found=found)
    others = " ".join(f"{options[port]}=PORT" for port in taken)
    way_out = f"if a Ray head of yours has them, join it: RAY_ADDRESS=127.0.0.1:6379; else ray start --head {others}"
    return Finding(
        check="ports",
        verdict="warn",
        found=f"taken: {', '.join(map(str, taken))}",
        way_out=f"{way_out} (a run's own cluster takes others)",
    )


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended takes no port
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def check_ray_auth(environment: Mapping[str, str], token_file: Path, *, joins: bool) -> Finding:
    """Whether processes of a cluster ask each other for a token. Ray 2.60: without RAY_AUTH_MODE a new local cluster does and
    writes `token_file`, `ray start` does if there is a token, and who joins by an address does not.

    `joins`: an address is given.
    """
    mode, named = environment.get("RAY_AUTH_MODE"), environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else token_file
    token = "RAY_AUTH_TOKEN" if environment.get("RAY_AUTH_TOKEN") else str(file) if has_text(file) else None
    if mode is None and not joins:
        return Finding(
            check="ray auth",
            verdict="ok",
            found=f"RAY_AUTH_MODE is not set, token: {token or 'none yet'}; a run's own cluster uses it"
            + ("" if token else f" and writes {token_file}, from when on `ray start` uses it too"),
        )
    if mode is None:
        if token is None:
            found = "RAY_AUTH_MODE is not set, no token: for a cluster without authentication"
            return Finding(check="ray auth", verdict="ok", found=found)
        found = f"{token} is there, so `ray start` uses it, but who joins by an address does not without RAY_AUTH_MODE"
        way_out = "export RAY_AUTH_MODE=token, or disabled, for the head and for runs alike"
        return Finding(check="ray auth", verdict="warn", found=found, way_out=way_out)
    if mode.lower() != "token":
        found = f"RAY_AUTH_MODE={mode}: whoever reaches the cluster's ports runs code on it"
        way_out = "unset it or set token, unless nobody else reaches this machine"
        return Finding(check="ray auth", verdict="warn", found=found, way_out=way_out)
    if token is None and (joins or named):
        found = f"RAY_AUTH_MODE=token, and no token in {file} or RAY_AUTH_TOKEN"
        way_out = "copy the head's ~/.ray/auth_token there" if joins else "ray get-auth-token --generate"
        return Finding(check="ray auth", verdict="bad", found=found, way_out=way_out)
    if token is None:
        way_out = "ray get-auth-token --generate, before `ray start`; a run's own cluster writes one itself"
        return Finding(check="ray auth", verdict="warn", found="RAY_AUTH_MODE=token, and no token yet", way_out=way_out)
    return Finding(check="ray auth", verdict="ok", found=f"RAY_AUTH_MODE=token, token: {token}")


def has_text(file: Path) -> bool:
    try:
        return bool(file.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return False


def check_shared_memory(free: int | None, memory: int) -> Finding:
    """Where Ray's object store will lie. `free`: of /dev/shm, None without one; `memory`: of this machine or container."""
    available = free or 0
    store = object_store_bytes(available, memory)
    told = f"/dev/shm has {size(available)} free, Ray's object store takes {size(store)} (up to 30% of memory)"
    if store <= available:
        return Finding(check="/dev/shm", verdict="ok", found=told)
    wanted = f"{1.1 * RAY_SHARE * memory / 2**30:.1f}g"
    return Finding(
        check="/dev/shm",
        verdict="warn",
        found=f"{told}: it would lie in /tmp, which is slow",
        way_out=f"docker run --shm-size={wanted}, or mount -o remount,size={wanted} /dev/shm",
    )


def object_store_bytes(free: int, memory: int) -> float:
    """What Ray takes by itself."""
    return min(RAY_SHARE * memory, RAY_MOST, max(RAY_SHM_CAP, 0.95 * free))


def check_open_files(soft: int, hard: int) -> Finding:
    """Ray raises the limit of its own processes as far as the hard one lets it."""
    reached = hard if hard == resource.RLIM_INFINITY or hard > soft else soft
    words = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    found = f"{words[0]} (ulimit -n), at most {words[1]}"
    if reached == resource.RLIM_INFINITY or reached >= FILES_WARN:
        return Finding(check="open files", verdict="ok", found=found)
    way_out = f"ulimit -n {FILES_WANTED}; in a container --ulimit nofile={FILES_WANTED}"
    return Finding(check="open files", verdict="warn", found=found, way_out=way_out)


# Measures


def free_bytes(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def memory_bytes() -> int:
    """Of this machine, or what the container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # of the other version of cgroups; "max"
            total = min(total, int(Path(name).read_text()))
    return total


def size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
