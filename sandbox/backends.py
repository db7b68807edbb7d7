"""Which backend judges, and a pool of it.

docker   warm containers of the judge image                               container.py
pod      the same image elsewhere, reached over TCP with a token           pod.py, and many of them: pods.py
process  bubblewrap on this machine, no engine needed                      process.py
auto     docker where an engine answers and has the image of this version, else process
"""

import contextlib
import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox import process
from sandbox.pool import Pool, SandboxPool
from sandbox.types import Sandbox, SandboxUnavailableError

BACKENDS = ("auto", "docker", "process", "pod")
TOKEN_VARIABLE = "DIFFRL_SANDBOX_TOKEN"
DEFAULT_IMAGE = "diffrl-sandbox:base"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What to judge with.

    BackendOptions(backend="docker", slots=4, runtime="runsc")
    """

    backend: str = "auto"
    slots: int = 2  # submissions judged at the same time
    slots_per_container: int = 1  # docker: at most; several share a memory limit
    image: str = DEFAULT_IMAGE
    runtime: str | None = None  # OCI runtime of docker, such as runsc
    addresses: tuple[str, ...] = ()  # host:port of pods; a name may lead to many
    token: str = field(default="", repr=False)  # of pods
    allow_unisolated: bool = False  # process: without bubblewrap, as plain subprocesses
    engine_url: str | None = None  # of docker; None: what DOCKER_HOST or the default says

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: {self.backend!r} must be one of {', '.join(BACKENDS)}")


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def choose_backend(options: BackendOptions, say: Callable[[str], None] = warn) -> str:
    """docker, process or pod. `say` hears in one line why `auto` did not take docker. Starts nothing."""
    if options.backend != "auto":
        return options.backend
    try:
        _require_docker(options)
    except SandboxUnavailableError as error:
        say(f"docker is not used: {str(error).partition(': ')[2]}")
        return "process"
    return "docker"


def require_available(options: BackendOptions, say: Callable[[str], None] = warn) -> None:
    """Returns when the backend can be used; raises SandboxUnavailableError with the way out. `say` hears in one line of
    pods that cannot be used, where others can."""
    backend = choose_backend(options, say=lambda text: None)
    if backend == "process":
        process.require_available(options.allow_unisolated)
    elif backend == "docker":
        _require_docker(options)
    else:
        _require_pod_options(options)
        _module("pods").require_available(options.addresses, options.token, say)


def open_sandbox(options: BackendOptions, *, attempts: int = 2) -> Pool:
    """A pool with `options.slots` slots, or a few more where containers share them out evenly."""
    options = replace(options, backend=choose_backend(options))
    if options.backend == "pod":
        _require_pod_options(options)
        return _module("pods").PodPool(options.addresses, options.token, options.slots, say=warn, attempts=attempts)
    size = options.slots if options.backend == "process" else math.ceil(options.slots / options.slots_per_container)
    each = math.ceil(options.slots / size)
    return SandboxPool(starter(replace(options, slots=each)), size, attempts=attempts)


def starter(options: BackendOptions) -> Callable[[], Sandbox]:
    """A function that makes one sandbox with `options.slots` slots (process: always one), at the addresses in turn.

    Raises SandboxUnavailableError; a pod that does not answer is the business of whoever uses the sandbox.
    """
    backend = choose_backend(options)
    if backend == "process":
        process.require_available(options.allow_unisolated)
        return lambda: process.ProcessSandbox(allow_unisolated=options.allow_unisolated)
    if backend == "docker":
        _require_docker(options)
        image, slots = options.image, options.slots
        make = _module("container").ContainerSandbox
        return lambda: make(image=image, slots=slots, runtime=options.runtime, engine_url=options.engine_url)
    _require_pod_options(options)
    addresses = itertools.cycle(options.addresses)
    make = _module("pod").PodSandbox
    return lambda: make(address=next(addresses), token=options.token, slots=options.slots)


@contextlib.contextmanager
def pods_for(options: BackendOptions) -> Iterator[BackendOptions]:
    """The options as they are; but if they ask for pods and name none, with one that runs here for as long as this."""
    if options.backend != "pod" or options.addresses:
        yield options
        return
    with _module("pod").local_pod(options.image, options.engine_url, options.slots) as (address, token):
        yield replace(options, addresses=(address,), token=token)


def read_token(path: str | None) -> str:
    """The pods' secret: the file's content without white space around it, else DIFFRL_SANDBOX_TOKEN, else ""."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxUnavailableError(f"token_file: {path!r} cannot be read ({error}); name a text file") from None


def _require_docker(options: BackendOptions) -> None:
    container = _module("container")
    container.require_available(options.image, options.engine_url)
    if options.runtime is not None:
        with contextlib.closing(container.engine_of(options.engine_url)) as engine:
            known = engine.info()["Runtimes"]
        if options.runtime not in known:
            raise SandboxUnavailableError(
                f"runtime: {options.runtime!r} is unknown to the container engine, which has {', '.join(sorted(known))};"
                " add it to the engine's configuration, or leave sandbox.runtime out"
            )


def _require_pod_options(options: BackendOptions) -> None:
    if not options.addresses:
        raise SandboxUnavailableError("addresses: () must name at least one host:port of backend pod")
    if not options.token:
        raise SandboxUnavailableError(
            f"token_file: None must name a file with the pods' token, or set {TOKEN_VARIABLE}"
        )


def _module(name: str) -> Any:
    """sandbox.container, pod or pods, which need the docker package; the process backend does not."""
    try:
        return importlib.import_module(f"sandbox.{name}")
    except ModuleNotFoundError as error:
        if error.name != "docker":
            raise
        raise SandboxUnavailableError(
            "backend: docker and pod need the Python package docker: pip install 'diffrl[docker]', or set sandbox.backend:"
            " process"
        ) from None
