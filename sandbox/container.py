"""The `docker` backend: a warm container of the judge image, with several slots.

Protects: this machine from the program, by what the engine gives a container (namespaces, default seccomp profile,
read-only root, no network, no capabilities for programs, no-new-privileges, limits on memory, processes and CPU), or by
another OCI runtime (`runtime: runsc` for gVisor); the tests from the program and one submission from the next, by
uids, see sandbox/judge/. A program's own processes, files and System V objects are gone before the next one starts in
its slot. Nothing is mounted from this machine, and the environment inside is empty.

Does not protect: kernel bugs (name gVisor for that); timing channels. Slots of one container share /dev/shm, System V
keys, loopback, its memory limit and the view of /proc: programs that run at the same time can talk there, or use it up
for each other; their working folder and /tmp are their own. Where that matters, have one slot in each container. Who
may talk to the engine is root on its machine: that is this process, never a program.
"""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, ImageNotFound
from docker.types import LogConfig

from sandbox.client import Connection
from sandbox.image.fingerprint import judge_fingerprint
from sandbox.types import SandboxError, SandboxUnavailableError, Submission, Verdict

CAPABILITIES = ["SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE"]
FINGERPRINT_LABEL = "diffrl.judge"
OWNER_LABEL = "diffrl.owner"
_ENGINE_S = 120.0  # for one request to the engine, or a container's first word
_SCRATCH = "size=64m,nr_inodes=16k"
_MAX_LAST_WORDS = 4096


def require_available(image: str, engine_url: str | None = None) -> None:
    """Returns when an engine answers and has the image of this version; raises SandboxUnavailableError."""
    with contextlib.closing(engine_of(engine_url)) as engine:
        try:
            labels = engine.images.get(image).labels
        except ImageNotFound:
            raise SandboxUnavailableError(
                f"image: the container engine has no image {image}: run `diffrl sandbox build`, or name another one in"
                " sandbox.image"
            ) from None
        except (DockerException, OSError) as error:
            raise SandboxUnavailableError(
                f"backend: the container engine of docker does not answer ({error}): start Docker, or set sandbox.backend:"
                " process"
            ) from None
    if labels.get(FINGERPRINT_LABEL) != judge_fingerprint():
        raise SandboxUnavailableError(
            f"image: the image {image} holds another version of the judge than this one: run `diffrl sandbox build` again"
        )


class ContainerSandbox:
    """Judges as many submissions at a time as it has slots, in one container that is started at the first of them.

    After `recycle_after` submissions, and when it dies, a fresh container takes over. A container ends with the
    connection of the process that started it, so a killed client leaves none behind; one that was frozen then, and did
    not notice, is removed when the next one starts.

    image       as `diffrl sandbox build` made it
    memory_mb   limit of the whole container; None: 1 GiB for each slot and 256 MiB
    runtime     OCI runtime, such as runsc; None: the engine's default
    engine_url  such as unix:///var/run/docker.sock; None: what DOCKER_HOST or the default says
    """

    name = "docker"

    def __init__(
        self,
        *,
        image: str,
        slots: int = 4,
        runtime: str | None = None,
        memory_mb: int | None = None,
        engine_url: str | None = None,
        recycle_after: int = 2000,
    ) -> None:
        self.slots = slots
        self._image = image
        self._runtime = runtime
        self._memory_mb = memory_mb or 1024 * slots + 256
        self._engine_url = engine_url
        self._recycle_after = recycle_after
        self._lock = threading.Lock()
        self._current: _Container | None = None
        self._free = threading.Semaphore(slots)

    def judge(self, submission: Submission) -> Verdict:
        with self._free:
            container = self._checked_out()
            try:
                return container.connection.judge(submission)
            except SandboxError as error:
                raise type(error)(f"{error}{container.last_words()}") from None
            finally:
                self._check_in(container)

    def survivors(self) -> list[str]:
        """Processes, files and System V objects that judged programs left behind; a dead container leaves nothing."""
        with self._lock:
            container = self._current
        return [] if container is None or container.connection.lost else container.connection.survivors()

    def stats(self) -> dict[str, int]:
        """The supervisor's counters, see Connection.stats; empty when no container runs."""
        with self._lock:
            container = self._current
        return container.connection.stats() if container else {}

    def close(self) -> None:
        """Ends the container. A later `judge` would start a new one."""
        with self._lock:
            container, self._current = self._current, None
        if container is not None:
            container.close()

    @property
    def container_id(self) -> str | None:
        """Of the container that takes the next submission."""
        with self._lock:
            return self._current.id if self._current else None

    def __enter__(self) -> "ContainerSandbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _checked_out(self) -> "_Container":
        with self._lock:
            worn = self._current is not None and self._current.uses >= self._recycle_after
            if self._current is None or self._current.connection.lost or worn:
                old, self._current = self._current, None
                if old is not None and not old.in_flight:
                    old.close()
                self._current = self._start()
            self._current.uses += 1
            self._current.in_flight += 1
            return self._current

    def _check_in(self, container: "_Container") -> None:
        with self._lock:
            container.in_flight -= 1
            last = container is not self._current and not container.in_flight
        if last:
            container.close()

    def _start(self) -> "_Container":
        tmpfs = {f"/scratch/{index}": f"{_SCRATCH},mode=0711" for index in range(self.slots)}
        options: dict[str, Any] = {
            "network_mode": "none",
            "read_only": True,
            "cap_drop": ["ALL"],
            "cap_add": CAPABILITIES,
            "security_opt": ["no-new-privileges"],
            "pids_limit": 64 + 160 * self.slots,
            "mem_limit": f"{self._memory_mb}m",
            "memswap_limit": f"{self._memory_mb}m",
            "nano_cpus": self.slots * 10**9,
            "tmpfs": tmpfs,
            "runtime": self._runtime,
            "auto_remove": True,
        }
        return _Container(self._image, ["--slots", str(self.slots)], options, self._engine_url)


class _Container:
    """One container and the connection through its standard streams."""

    def __init__(self, image: str, command: list[str], options: dict[str, Any], engine_url: str | None) -> None:
        self.uses = self.in_flight = 0
        self._engine_url = engine_url
        self._engine = engine_of(engine_url)
        self._closed = False
        self._channel: _AttachedStreams | None = None
        self.id: str | None = None
        try:
            cpus = self._engine.info()["NCPU"] * 10**9
            options["nano_cpus"] = min(options["nano_cpus"], cpus)  # the engine refuses more than there are
            remove_orphans(self._engine)
            self.id = create(self._engine, image, command, options)
            self._channel = _AttachedStreams(self._engine, self.id)
            self._engine.api.start(self.id)
            self.connection = Connection(self._channel, start_s=_ENGINE_S)
        except (DockerException, OSError, SandboxError) as error:
            words = self.last_words()
            self.close()
            raise SandboxError(f"could not start a sandbox container: {error}{words}") from None

    def last_words(self) -> str:
        """What the container wrote to stderr, as the end of a message."""
        words = self._channel.stderr.decode(errors="replace").strip() if self._channel else ""
        return f": {words.splitlines()[-1][:300]}" if words else ""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._channel is not None:
            self._channel.close()
        if self.id is not None:
            with contextlib.suppress(DockerException, OSError):  # gone already, or the engine is
                _probe(self._engine_url)
                self._engine.api.remove_container(self.id, force=True, v=True)
                remove_orphans(self._engine)  # when a run ends nobody else may come to do it
        self._engine.close()


class _AttachedStreams:
    """A container's standard streams as one channel; what it writes to stderr is put aside."""

    def __init__(self, engine: docker.DockerClient, container_id: str) -> None:
        params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        self._keeper: Any = engine.api.attach_socket(container_id, params=params)
        self._sock: socket.socket = getattr(self._keeper, "_sock", self._keeper)
        self._left = 0  # bytes of stdout that belong to the current chunk
        self.stderr = b""

    def recv(self, size: int) -> bytes:
        while not self._left:
            header = self._exactly(8)
            if not header:
                return b""
            length = int.from_bytes(header[4:], "big")
            if header[0] == 1:
                self._left = length
            else:
                self.stderr = (self.stderr + self._exactly(length))[-_MAX_LAST_WORDS:]
        data = self._sock.recv(min(size, self._left))
        self._left -= len(data)
        return data

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def settimeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for an answer
        self._keeper.close()
        self._sock.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                return b""
            data += more
        return data


def create(
    engine: docker.DockerClient, image: str, command: list[str], options: dict[str, Any], user: str = "0:0", **more: Any
) -> str:
    """Makes a container whose standard input ends with the first client that attaches to it; returns its id."""
    host_config = engine.api.create_host_config(log_config=LogConfig(type="none"), **options)
    created = engine.api.create_container(
        image,
        command=command,
        host_config=host_config,
        hostname="sandbox",
        user=user,
        stdin_open=True,
        labels={"diffrl.sandbox": "1", OWNER_LABEL: f"{_machine()} {os.getpid()}"},
        **more,
    )
    return created["Id"]


def remove_orphans(engine: docker.DockerClient) -> None:
    """Removes containers that processes of this machine made which are no more."""
    for container in engine.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True):
        machine, _, pid = container.labels[OWNER_LABEL].rpartition(" ")
        if machine and machine == _machine() and _is_gone(int(pid)):
            with contextlib.suppress(DockerException):  # somebody else is removing it
                container.remove(force=True, v=True)


def _machine() -> str:
    """In which process ids mean what they mean here: since its start, in this namespace. Empty where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def engine_of(engine_url: str | None) -> docker.DockerClient:
    """A client of the engine; SandboxUnavailableError when none answers."""
    try:
        _probe(engine_url)
        if engine_url is not None:
            return docker.DockerClient(base_url=engine_url, timeout=int(_ENGINE_S))
        return docker.from_env(timeout=int(_ENGINE_S))
    except (DockerException, OSError) as error:
        raise SandboxUnavailableError(
            f"backend: no container engine answers at {_url(engine_url)} ({error}): start Docker, which backend docker needs, or"
            " set sandbox.backend: process"
        ) from None


def _probe(engine_url: str | None) -> None:
    """Raises OSError when nobody listens on a local engine's socket: the SDK would leak one of its own."""
    url = _url(engine_url)
    if url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(url.removeprefix("unix://"))


def _url(engine_url: str | None) -> str:
    return engine_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
