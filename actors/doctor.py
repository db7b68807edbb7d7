"""`diffrl doctor`: what this machine has, whether a run can start on it, and what to do about each thing that is not as it
should be. Starts nothing but the probe of the sandbox (never a container).

Checks of the machine alone are in machine.py.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from actors.machine import (
    CONNECT_S,
    HEAD_PORTS,
    Finding,
    attempted,
    check_open_files,
    check_packages,
    check_ports,
    check_python,
    check_ray,
    check_ray_auth,
    check_shared_memory,
    find_torch,
    free_bytes,
    memory_bytes,
    our_requirements,
    size,
)
from diffrl.errors import ConfigError
from sandbox.backends import BackendOptions, choose_backend, require_available
from sandbox.image.fingerprint import judge_fingerprint
from sandbox.types import SandboxUnavailableError

if TYPE_CHECKING:
    from diffrl.config import AnyConfig
    from diffrl.models.sizes import Sizes

DISK_FLOOR = 2 << 30  # for rollouts, metrics and logs
CHANGE = "change the config, or override the key: key=value"


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
    torch = attempted("torch", find_torch)
    yield torch
    config, refusal = None, None
    if config_path is not None:
        config, refusal = read_config(config_path, overrides, broken="bad" in (packages.verdict, torch.verdict))
    address = (config and config.ray.address) or os.environ.get("RAY_ADDRESS") or None
    starts_here = address in (None, "local")
    yield check_ray(address, timeout=CONNECT_S)
    if starts_here:
        yield check_ports(HEAD_PORTS)
    yield check_ray_auth(os.environ, Path.home() / ".ray" / "auth_token", joins=not starts_here and address != "auto")
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


# What a run takes of it


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
    unusable: list[str] = []  # pods, where others answer
    try:
        backend = choose_backend(options, why_not_docker.append)
        require_available(options, unusable.append)
    except SandboxUnavailableError as error:
        found = "; ".join([*why_not_docker, " ".join(str(error).split())])
        return Finding(check="sandbox", verdict="bad", found=found, way_out=way_out)
    told = {
        "docker": f"image {options.image} with this version's judge {judge_fingerprint()[:12]}",
        "process": "plain subprocesses are allowed" if options.allow_unisolated else "bubblewrap works",
        "pod": f"{', '.join(options.addresses)} answer",
    }[backend]
    if unusable:
        return Finding(
            check="sandbox", verdict="warn", found=f"pod, {unusable[0]}", way_out="start sandboxes there too"
        )
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
    """Of everything that a run has on the disk at once, at most: checkpoints and exported models, one more of each while it
    is written."""
    from diffrl.config import RLConfig

    best = config.eval.every is not None if isinstance(config, RLConfig) else config.validation.rows > 0
    checkpoints, models = config.checkpoint.keep, 1 + best
    model = (4 if config.model.dtype == "float32" else 2) * sizes.parameters
    if isinstance(config, RLConfig):  # a checkpoint holds policy and reference as model folders too
        models += 2 * (checkpoints + 1)
    else:
        checkpoints += best
    return (checkpoints + 1) * checkpoint_bytes(config, sizes) + (models + 1) * model


def checkpoint_bytes(config: "AnyConfig", sizes: "Sizes") -> int:
    """Of all ranks: the state of `diffrl/estimate.py` without gradients."""
    from diffrl.config import RLConfig

    engine = config.learner if isinstance(config, RLConfig) else config.workers
    muon = not isinstance(config, RLConfig) and config.optim.muon_lr is not None
    weights = (4 if config.model.dtype == "float32" else 2) * sizes.parameters
    masters = 4 * sizes.trained if engine.zero_stage >= 1 else 0
    return weights + masters + 8 * sizes.trained - (4 * sizes.matrices if muon else 0)


# The run


def read_config(path: str, overrides: Sequence[str], *, broken: bool) -> "tuple[AnyConfig | None, Finding | None]":
    """The config, or what is wrong with it. `broken`: packages are, so that it cannot be read."""
    if broken:
        way_out = "mend the packages first"
        return None, Finding(check="config", verdict="warn", found=f"{path} was not looked at", way_out=way_out)
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
    except OSError as error:  # of a file that is there and cannot be read
        yield Finding(check="config", verdict="bad", found=str(error), way_out=CHANGE)
        return
    lines = said.getvalue().splitlines()
    open_questions = [line.removeprefix("not checked: ") for line in lines if line.startswith("not checked: ")]
    told = "; ".join([lines[0], *(line for line in lines if line.startswith("memory of "))])
    yield Finding(check="config", verdict="ok", found=told)
    for question in open_questions:
        way_out = "ask the doctor again where it is"
        yield Finding(check="config", verdict="warn", found=f"not checked: {question}", way_out=way_out)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
