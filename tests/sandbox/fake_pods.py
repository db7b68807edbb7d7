"""Pods on this machine whose supervisors judge nothing: they answer as they are told, and can fail in ways that are hard
to bring about with real ones."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sandbox.judge import frames
from sandbox.judge.supervisor import Client
from sandbox.types import TestStatus

TOKEN = "t" * 32
WAIT_S = 60.0  # for what takes milliseconds


class FakePod:
    """Judges the canary rightly and passes everything else, as soon as `gate` is open."""

    def __init__(self, *, slots: int = 2, token: str = TOKEN) -> None:
        self.slots, self.token = slots, token
        self.gate = threading.Event()
        self.gate.set()
        self.judged: list[str] = []  # ids, canaries left out
        self.greeted: list[float] = []  # when somebody connected
        self.others = 0  # submissions that it says it has from others
        self.draining = self.full = self.mute = self.lies = False
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.at = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def held(self) -> set[str]:
        """What it is judging."""
        with self._lock:
            return set(self._held)

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._socks)

    def hang_up(self) -> None:
        with self._lock:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody listens any more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.mute = True
        self.gate.set()
        self.hang_up()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                self.greeted.append(time.monotonic())
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with self._lock:
            self._socks.append(sock)
        client = Client(sock)
        try:
            client.send({"hello": {"slots": self.slots, "python": "3.11.2", "challenge": "c"}})
            proved = client.prove(self.token, "c")
            while proved:
                self._take(client, client.receive())
        except (OSError, EOFError, frames.FrameError):
            pass
        finally:
            with self._lock:
                self._socks.remove(sock)
            sock.close()

    def _take(self, client: Client, message: dict[str, Any]) -> None:
        if self.mute:
            return
        if message["op"] == "stats":
            counters = {"busy": len(self.held) + self.others, "waiting": 0, "slots": self.slots}
            client.send({"id": message["id"], "stats": {**counters, "draining": int(self.draining)}})
        elif self.draining or self.full:
            client.send({"id": message["id"], "error": "not now", "refused": True})
        else:
            threading.Thread(target=self._judge, args=(client, message), daemon=True).start()

    def _judge(self, client: Client, message: dict[str, Any]) -> None:
        submission = message["submission"]
        statuses = [TestStatus.PASSED] * len(submission["tests"])
        if submission["id"] == "canary/wrong" and not self.lies:
            statuses[1] = TestStatus.FAILED
        if not submission["id"].startswith("canary"):
            with self._lock:
                self.judged.append(submission["id"])
                self._held.add(submission["id"])
            assert self.gate.wait(WAIT_S)
            with self._lock:
                self._held.discard(submission["id"])
        verdict = {
            "id": submission["id"],
            "statuses": statuses,
            "details": [""] * len(statuses),
            "beside": [False] * len(statuses),
            "cpu_s": 0.0,
        }
        if not self.mute:
            client.send({"id": message["id"], "verdict": verdict})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)
