"""The supervisor's counters over HTTP in Prometheus' text format, which an autoscaler of sandbox pods follows.

One request at a time, with a short patience. Programs of the container can reach the port too: they are known by
their address and hung up on, so that they neither read the counters nor keep a scraper waiting.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping

_PATIENCE_S = 2.0
_SERIES = {  # counter of Supervisor.stats -> its kind, what it says
    "busy": ("gauge", "submissions that are being judged"),
    "waiting": ("gauge", "submissions that wait for a slot"),
    "slots": ("gauge", "submissions that can be judged at the same time"),
    "draining": ("gauge", "1: nothing new is taken"),
    "judged": ("counter", "verdicts given"),
    "errors": ("counter", "submissions on which the judge failed"),
    "slots_started": ("counter", "slots that were started, in place of others too"),
}


def render(stats: Mapping[str, int]) -> str:
    """The text that is served: `diffrl_sandbox_busy 3` and so on; counters end in `_total`."""
    lines = []
    for name, (kind, what) in _SERIES.items():
        series = f"diffrl_sandbox_{name}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {series} {what}", f"# TYPE {series} {kind}", f"{series} {stats[name]}"]
    return "\n".join(lines) + "\n"


def serve(address: str, stats: Callable[[], Mapping[str, int]]) -> int:
    """Answers from a thread of its own, for ever; the port."""
    host, _, port = address.rpartition(":")
    server = socket.create_server((host, int(port)), backlog=16)
    threading.Thread(target=_answer_all, args=(server, stats), daemon=True).start()
    return int(server.getsockname()[1])


def from_inside(peer: str, own: str) -> bool:
    """Whether a connection to the address `own` was made in this container."""
    return peer == own or peer.startswith("127.") or peer == "::1"


def _answer_all(server: socket.socket, stats: Callable[[], Mapping[str, int]]) -> None:
    while True:
        with contextlib.suppress(OSError):  # a scraper that left
            sock, (peer, *_) = server.accept()
            with sock:
                if not from_inside(peer, sock.getsockname()[0]):
                    _answer(sock, render(stats()).encode())


def _answer(sock: socket.socket, body: bytes) -> None:
    """The same answer, whatever is asked."""
    sock.settimeout(_PATIENCE_S)
    sock.recv(1 << 16)
    head = [
        "HTTP/1.1 200 OK",
        "Content-Type: text/plain; version=0.0.4",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    sock.sendall("\r\n".join([*head, "", ""]).encode() + body)
