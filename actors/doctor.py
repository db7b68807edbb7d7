"""`diffrl doctor`: what this machine has, whether a run can start on it, and what to do about each thing that is not as it
should be. Starts nothing but the probe of the sandbox (never a container).

Every check is a function from what it needs to know to a Finding. Heavy packages are imported by the checks that need them,
so that a broken one is a finding too.
"""

import contextlib
import errno
import glob
import io
import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from diffrl.errors import ConfigError
from sandbox.backends import BackendOptions, choose_backend, require_available
from sandbox.image.fingerprint import judge_fingerprint
from sandbox.types import SandboxUnavailableError

if TYPE_CHECKING:
    from diffrl.config import AnyConfig
    from diffrl.models.sizes import Sizes

MIN_PYTHON = (3, 11)
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port", 52365: "--dashboard-agent-listen-port"}  # of `ray start --head`
CONNECT_S = 2.0
RAY_SHARE = 0.3  # of memory, for Ray's object store
RAY_MOST = 200e9  # bytes that it takes by itself
RAY_SHM_CAP = 10e9  # above this it shrinks to what /dev/shm has, below it moves to /tmp
DISK_FLOOR = 2 << 30  # for rollouts, metrics and logs
FILES_WARN, FILES_WANTED = 4096, 8192  # Ray's own numbers
CHANGE = "change the config, or override the key: key=value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Finding(check="ports", verdict="warn", found="8265 is taken", way_out="ray start --head --dashboard-port=PORT")"""

    check: str
    verdict: Literal["ok", "warn", "bad"]
    found: str
    way_out: str = ""  # of what is not ok

    def __str__(self) -> str:
        return f"{self.verdict:<5}{self.check:<12}{self.found}" + (f" -> {self.way_out}" if self.way_out else "")


def doctor(config_path: str | None, overrides: Sequence[str], *, as_json: bool) -> bool:
    """Print a line for each check as soon as it is made, or all of them as JSON. True when nothing is bad."""
    findings: list[Finding] = []
    for finding in examine(config_path, overrides):
        findings.append(finding)
        if not as_json:
            print(" ".join(str(finding).splitlines()), flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return all(finding.verdict != "bad" for finding in findings)


def examine(config_path: str | None, overrides: Sequence[str]) -> Iterator[Finding]:
    """Of this machine, then of the run."""
    yield check_python(sys.version_info[:3])
    packages = check_packages(our_requirements(), metadata.version)
    yield packages
    yield attempted("torch", find_torch)
    config, refusal = None, None
    if config_path is not None and packages.verdict != "bad":
        config, refusal = read_config(config_path, overrides)
    address = (config and config.ray.address) or os.environ.get("RAY_ADDRESS") or None
    starts_here = address in (None, "local")
    yield check_ray(address, timeout=CONNECT_S)
    if starts_here:
        yield check_ports(HEAD_PORTS)
    yield check_ray_auth(os.environ, Path.home() / ".ray" / "auth_token", joins=not starts_here)
    if starts_here:
        yield check_shared_memory(free_bytes("/dev/shm"), memory_bytes())
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if config is None or config.stage == "rl":
        yield check_sandbox(sandbox_options(config))
    yield find_disk(config)
    if refusal is not None:
        yield refusal
    if config is not None:
        yield from check_data(data_paths(config))
        yield from check_run(config)


# The machine


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
            check=check, verdict="bad", found=f"cannot be imported: {said}", way_out="rm -r .venv; make venv"
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
    found = (
        f"{build}; {len(devices)} CUDA devices{f' ({chr(44).join(devices)})' if devices else ''}, {threads} CPU threads"
    )
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
        way_out = (
            f"ray start --head --port={port} there, or unset RAY_ADDRESS (ray.address): runs start their own cluster"
        )
        return Finding(
            check="ray", verdict="bad", found=f"nobody answers at {address} ({error})", way_out=f"{way_out} then"
        )


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
        way_out=f"{way_out} (a run needs none)",
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
    store = min(RAY_SHARE * memory, RAY_MOST, max(RAY_SHM_CAP, 0.95 * available))
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


def check_open_files(soft: int, hard: int) -> Finding:
    """Ray raises the limit of its own processes as far as the hard one lets it."""
    reached = hard if hard == resource.RLIM_INFINITY or hard > soft else soft
    words = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    found = f"{words[0]} (ulimit -n), at most {words[1]}"
    if reached == resource.RLIM_INFINITY or reached >= FILES_WARN:
        return Finding(check="open files", verdict="ok", found=found)
    way_out = f"ulimit -n {FILES_WANTED}; in a container --ulimit nofile={FILES_WANTED}"
    return Finding(check="open files", verdict="warn", found=found, way_out=way_out)


def sandbox_options(config: "AnyConfig | None") -> BackendOptions | ConfigError:
    """Of an RL config; else those that commands have without options."""
    if config is None or config.stage != "rl":
        return BackendOptions()
    from actors.reward import backend_options

    try:
        return backend_options(config.sandbox)
    except SandboxUnavailableError as error:  # a token file that cannot be read
        return ConfigError(str(error))


def check_sandbox(options: BackendOptions | ConfigError) -> Finding:
    """What would judge, tried out: the engine is asked for its image, bubblewrap starts once."""
    way_out = "diffrl sandbox build (a container engine), or apt-get install bubblewrap, and see README: The judge"
    if isinstance(options, ConfigError):
        return Finding(check="sandbox", verdict="bad", found=str(options), way_out=way_out)
    why_not_docker: list[str] = []
    try:
        backend = choose_backend(options, why_not_docker.append)
        require_available(options)
    except SandboxUnavailableError as error:
        found = "; ".join([*why_not_docker, " ".join(str(error).split())])
        return Finding(check="sandbox", verdict="bad", found=found, way_out=way_out)
    told = {
        "docker": f"image {options.image} with this version's judge {judge_fingerprint()[:12]}",
        "process": "plain subprocesses are allowed" if options.allow_unisolated else "bubblewrap works",
        "pod": f"{', '.join(options.addresses)} answer",
    }[backend]
    if backend == "process" and options.allow_unisolated:
        found = f"process, {told}: judged programs may have this user's rights"
        way_out = "apt-get install bubblewrap, and leave sandbox.allow_unisolated out"
        return Finding(check="sandbox", verdict="warn", found=found, way_out=way_out)
    return Finding(check="sandbox", verdict="ok", found="; ".join([f"{backend}, {told}", *why_not_docker]))


def find_disk(config: "AnyConfig | None") -> Finding:
    """For run_dir, or the folder of this process."""
    folder = nearest_folder(Path(config.run_dir if config else ".").absolute())
    needed = 0
    if config is not None:
        from diffrl.models.sizes import sizes_of

        with contextlib.suppress(ValueError, OSError):  # what is wrong with the model is told by check_run
            sizes = sizes_of(config.model)
            needed = 0 if sizes is None else saved_bytes(config, sizes)
    return check_disk(folder, free=shutil.disk_usage(folder).free, needed=needed)


def check_disk(folder: Path, *, free: int, needed: int) -> Finding:
    """`needed`: what the run saves of its model, 0 where that is not known; the rest of a run wants DISK_FLOOR more."""
    found = f"{size(free)} free at {folder}, the run needs about {size(needed + DISK_FLOOR)}"
    found += f" ({size(needed)} for checkpoints and models)" if needed else ""
    if free >= needed + DISK_FLOOR:
        return Finding(check="disk", verdict="ok", found=found)
    verdict = "bad" if free < needed else "warn"
    way_out = "make room, choose another run_dir" + (", or lower checkpoint.keep" if needed else "")
    return Finding(check="disk", verdict=verdict, found=found, way_out=way_out)


def saved_bytes(config: "AnyConfig", sizes: "Sizes") -> int:
    """Of everything that a run has on the disk at once, at most: checkpoints of whole optimizer state, exported models."""
    from diffrl.config import RLConfig

    engine = config.learner if isinstance(config, RLConfig) else config.workers
    item = 4 if config.model.dtype == "float32" else 2
    masters = 4 * sizes.trained if engine.zero_stage >= 1 else 0
    checkpoint = item * sizes.parameters + masters + 8 * sizes.trained
    if isinstance(config, RLConfig):  # the newest learner state, and the next while it is written
        checkpoints, models = 2, 2 if config.eval.every else 1
    else:  # besides those that are kept the best, and the next
        best = config.validation.rows > 0
        checkpoints, models = config.checkpoint.keep + 1 + best, 1 + best
    return checkpoints * checkpoint + (models + 1) * item * sizes.parameters  # one more while it takes its place


# The run


def read_config(path: str, overrides: Sequence[str]) -> "tuple[AnyConfig | None, Finding | None]":
    """The config, or what is wrong with it."""
    from diffrl.config_file import load_config

    try:
        return load_config(path, overrides), None
    except ConfigError as error:
        return None, refused(error)


def refused(error: ConfigError) -> Finding:
    found, _, way_out = " ".join(str(error).split()).rpartition("; ")
    return Finding(check="config", verdict="bad", found=found or way_out, way_out=way_out if found else CHANGE)


def data_paths(config: "AnyConfig") -> dict[str, Path]:
    """By their keys; generated data, and data sets that are named and not files, have none."""
    sections = {"data": config.data}
    if config.stage == "rl":
        sections |= {"eval.problems": config.eval.problems, "report.problems": config.report and config.report.problems}
    return {
        f"{key}.path": Path(section.path)
        for key, section in sections.items()
        if section is not None and section.path is not None and section.source not in ("microcode", "hub")
    }


def check_data(paths: Mapping[str, Path]) -> Iterator[Finding]:
    """That each file can be opened; a folder needs one at least."""
    for key, path in paths.items():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        try:
            for file in files:
                file.open("rb").close()
        except OSError as error:
            yield Finding(check="data", verdict="bad", found=f"{key}: {error}", way_out=f"let this user read {path}")
            continue
        if files:
            total = sum(file.stat().st_size for file in files)
            told = f"{key}: {path}, {len(files)} {'file' if len(files) == 1 else 'files'}, {size(total)}"
            yield Finding(check="data", verdict="ok", found=told)
        else:
            way_out = f"put a file there or set {key}=PATH"
            yield Finding(
                check="data", verdict="bad", found=f"{key}: {path} does not exist or is empty", way_out=way_out
            )


def check_run(config: "AnyConfig") -> Iterator[Finding]:
    """All that `diffrl train CONFIG --dry-run` checks."""
    from actors.dry_run import dry_run

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            dry_run(config)
    except ConfigError as error:
        yield refused(error)
        return
    lines = said.getvalue().splitlines()
    open_questions = [line.removeprefix("not checked: ") for line in lines if line.startswith("not checked: ")]
    told = "; ".join(line for line in lines if not line.startswith("not checked: "))
    yield Finding(check="config", verdict="ok", found=f"{config.stage}, {told}")
    for question in open_questions:
        way_out = "ask the doctor again where it is"
        yield Finding(check="config", verdict="warn", found=f"not checked: {question}", way_out=way_out)


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


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
