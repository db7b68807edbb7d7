"""Slots whose programs have uids of their own: the judge in a container that is started as root, with capabilities."""

import os
import random
import socket
import threading
import traceback
from pathlib import Path
from typing import Any

from sandbox.judge import nursery, zygote

_CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "KILL": 5, "SETGID": 6, "SETUID": 7}  # their bits


def problem() -> str | None:
    """Why programs cannot get uids of their own, or None."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if not missing:
        return None
    return f"runs as root without {', '.join(missing)}: add these capabilities, or start it as another user"


def fork_nursery() -> "OwnUids":
    """Called before this process knows anything that programs must not know."""
    zygote.preload()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            nursery.main(theirs, random.SystemRandom().randrange(1 << 20, 1 << 30, 1 << 12))
        except BaseException:
            traceback.print_exc()  # to the container's stderr
        finally:
            os._exit(1)
    theirs.close()
    return OwnUids(ours)


class OwnUids:
    """The supervisor's end of the nursery, which sees with its zygotes to what programs leave."""

    def __init__(self, control: socket.socket) -> None:
        self._nursery = control
        self._asking = threading.Lock()

    def start(self, index: int) -> socket.socket:
        return socket.socket(fileno=self._ask({"op": "slot", "index": index})[1][0])

    def settled(self) -> bool:
        return True

    def left(self) -> list[str]:
        return self._ask({"op": "left"})[0]["left"]

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        with self._asking:
            return nursery.ask(self._nursery, request)
