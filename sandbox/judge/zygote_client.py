"""The session's end of a zygote's control socket (requests: see zygote.py)."""

import json
import socket
from dataclasses import dataclass
from typing import Any

from sandbox.types import SandboxError

_ANSWER_S = 60.0  # a zygote answers at once; this long means that it is lost, whatever the load
_FILE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A zygote's answer: CPU seconds below it, how its child ended by itself (a wait status), whether it is still fit
    for use.

    Usage(cpu_s=0.21, ended=9, dirty=False)
    """

    cpu_s: float
    ended: int | None
    dirty: bool = False


class ZygoteClient:
    """The host's end of a zygote's control socket. Any trouble raises SandboxError."""

    def __init__(self, control: socket.socket, max_processes_base: int = 0) -> None:
        self._control = control
        self._control.settimeout(_ANSWER_S)
        self._max_processes_base = max_processes_base

    def hello(self) -> None:
        """Waits for the zygote's first word."""
        self._receive()

    def spawn(self, sock: socket.socket, memory_mb: int, max_processes: int) -> None:
        """Starts a child that owns `sock`; the host's copy of it is closed."""
        limits = {
            "AS": memory_mb << 20,
            "NPROC": max_processes + self._max_processes_base,
            "FSIZE": _FILE_BYTES,
            "NOFILE": 128,
            "CORE": 0,
            "MSGQUEUE": 0,
        }
        with sock:
            self._ask({"op": "spawn", "limits": limits}, (sock.fileno(),))

    def usage(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "usage"})))

    def kill(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "kill"})))

    def end(self) -> Usage:
        return Usage(**self._renamed(self._ask({"op": "end"})))

    def left(self) -> list[str]:
        """Processes, files and System V objects that programs left behind."""
        return self._ask({"op": "left"})["left"]

    @staticmethod
    def _renamed(answer: dict[str, Any]) -> dict[str, Any]:
        if trouble := answer.pop("trouble", ""):
            raise SandboxError(f"a process could not be set up: {trouble}")
        return {"cpu_s": answer.pop("cpu"), **answer}

    def _ask(self, request: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        except OSError as error:
            raise SandboxError(f"the sandbox left: {error}") from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._control.recv(1 << 16)
        except OSError as error:
            raise SandboxError(f"the sandbox does not answer: {error}") from error
        if not data:
            raise SandboxError("the sandbox left")
        return json.loads(data)
