"""The `pod` backend: a supervisor of the judge image that listens on TCP, such as a pod of a Kubernetes cluster. This is
one pod; pods.py spreads work over many.

Protects: what the container it runs in protects, see container.py (in a cluster the pod's securityContext and runtime
class say so, and a NetworkPolicy keeps it from reaching anything); its slots from strangers, who do not hold the token,
which never crosses the wire, and this client from a stranger in the sandbox's place, who cannot prove it either.

Does not protect: what crosses the network is neither encrypted nor signed after the greeting; use a network that is
private, or a mesh that encrypts. Programs inside can reach what the pod can reach, the supervisor's own port included:
there the token stops them, which no process that runs programs has ever held.
"""

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from docker.errors import DockerException

from sandbox.client import Connection
from sandbox.container import CAPABILITIES, create, engine_of
from sandbox.types import SandboxError, SandboxUnavailableError, Submission, Verdict

PORT = 7010
METRICS_PORT = 7011  # see judge/metrics.py
LOST_S = 4  # without a sign of life, the other host is given up
_CONNECT_S = 10.0  # until it has greeted
_STARTING_S = 30.0  # a pod may be about to listen, or to be replaced


class PodSandbox:
    """Judges up to `slots` submissions at a time over one connection, which is made anew when it breaks.

    address  "host:port"
    """

    name = "pod"

    def __init__(self, *, address: str, token: str, slots: int = 4) -> None:
        self.slots = slots
        self._address = address
        self._token = token
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._free = threading.Semaphore(slots)

    def judge(self, submission: Submission) -> Verdict:
        with self._free:
            return self._connected().judge(submission)

    def survivors(self) -> list[str]:
        """Processes, files and System V objects that judged programs left behind."""
        return self._connected().survivors()

    def stats(self) -> dict[str, int]:
        """The supervisor's counters, see Connection.stats."""
        return self._connected().stats()

    def close(self) -> None:
        """Ends the connection, not the pod. A later `judge` would connect again."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> "PodSandbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _connected(self) -> Connection:
        with self._lock:
            if self._connection is None or self._connection.lost:
                self._connection = connect(self._address, self._token, patience_s=_STARTING_S)
            return self._connection


@contextlib.contextmanager
def local_pod(
    image: str, engine_url: str | None = None, slots: int = 4, token: str | None = None, uid: int = 0
) -> Iterator[tuple[str, str]]:
    """One pod of the judge image in this machine's engine, on a network that leads to this machine only.

    Yields (address, token) when it answers. For trying the backend: programs in there can reach services that listen on
    this machine. With a `uid` it starts without root and without capabilities, as the Pod Security standard `restricted`
    has it, and then with one slot only (judge/one_uid.py).
    """
    token = token or secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(engine_of(engine_url)))
        try:
            network = engine.networks.create(f"diffrl-sandbox-{secrets.token_hex(4)}", internal=True)
            stack.callback(network.remove)
            options = {
                "network_mode": network.name,
                "read_only": True,
                "cap_drop": ["ALL"],
                "cap_add": [] if uid else CAPABILITIES,
                "security_opt": ["no-new-privileges"],
                "pids_limit": 64 + 160 * slots,
                "tmpfs": {"/scratch": "size=256m,mode=0777"},  # as open as an emptyDir of Kubernetes
            }
            command = ["--slots", str(slots), "--listen", f"0.0.0.0:{PORT}", "--metrics", f"0.0.0.0:{METRICS_PORT}"]
            environment = {"DIFFRL_SANDBOX_TOKEN": token}
            name = create(engine, image, command, options, user=f"{uid}:{uid}", environment=environment)
            stack.callback(engine.api.remove_container, name, force=True, v=True)
            engine.api.start(name)
            host = engine.api.inspect_container(name)["NetworkSettings"]["Networks"][network.name]["IPAddress"]
        except DockerException as error:
            raise SandboxError(f"could not start a sandbox pod: {error}") from None
        address = f"{host}:{PORT}"
        connect(address, token, patience_s=_STARTING_S).close()
        yield address, token


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SandboxUnavailableError(f"addresses: {address!r} is no address: give host:port")
    return host.strip("[]"), int(port)


def connect(address: str, token: str, patience_s: float = 0.0) -> Connection:
    """Raises SandboxUnavailableError for a wrong token, SandboxError when no sandbox answers; for `patience_s` nobody need
    listen yet."""
    host, port = host_and_port(address)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=_CONNECT_S)
            break
        except ConnectionRefusedError as error:
            if time.monotonic() >= deadline:
                raise SandboxError(f"nothing listens at {address}: {error}") from None
            time.sleep(0.1)
        except OSError as error:
            raise SandboxError(f"cannot reach {address}: {error}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, LOST_S - 1)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_S)
    try:
        return Connection(_Socket(sock), token, start_s=_CONNECT_S)
    except SandboxError as error:
        raise type(error)(f"{error} (at {address})") from None


class _Socket:
    """A socket on which one thread waits while others send; closing it wakes that thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.recv, self.sendall, self.settimeout = sock.recv, sock.sendall, sock.settimeout

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
