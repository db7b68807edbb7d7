"""Forks the slots of a container, and cleans up after one that is gone. It never sees a request.

A slot is three processes: the session, which reads submissions and drives them, and the two zygotes that it drives
(see zygote.py), with uids and scratch folders of their own. All three are forked from here, so neither zygote has any
memory of a request, of another slot, or of the supervisor's token. Where there is one uid (one_uid.py), the supervisor
starts the nursery as a program of its own, for a single slot, and cleans up itself.

Requests, from the supervisor (one JSON datagram each):
  slot {index}   cleans up after the last slot of that number and starts a new one -> {"ok"} + the session's socket
  left {}        what judged programs left behind                                  -> {"left"}
"""

import contextlib
import gc
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.judge import cleaning, frames, private_tmp, protocol, zygote
from sandbox.judge.session import Session
from sandbox.judge.zygote_client import ZygoteClient
from sandbox.types import SandboxError

SHARED_SCRATCH = ["/dev/shm"]
SCRATCH = Path("/scratch")  # a folder for each slot, on a file system of its own where the engine mounts one
_LEAVE_S = 5.0
UIDS_EACH = 100  # for one zygote: every program gets the next one


class Nursery:
    """Slots of one container, by number. `first_uid` None: all have this process's uid."""

    def __init__(self, control: socket.socket, first_uid: int | None) -> None:
        self._control = control
        self._first_uid = first_uid
        self._pids: dict[int, set[int]] = {}  # of the living processes of each slot

    def serve(self) -> None:
        """Answers requests until the supervisor is gone."""
        while data := self._control.recv(1 << 16):
            request = json.loads(data)
            if request["op"] == "slot":
                with self._slot(request["index"]) as session:
                    socket.send_fds(self._control, [b'{"ok": true}'], [session.fileno()])
            else:
                left = [item for index in self._pids for item in self._left(index)]
                self._control.send(json.dumps({"left": left}).encode())

    def _uids(self, index: int, role: int | None = None) -> range:
        assert self._first_uid is not None
        first = self._first_uid + 2 * UIDS_EACH * index
        if role is None:
            return range(first, first + 2 * UIDS_EACH)
        return range(first + UIDS_EACH * role, first + UIDS_EACH * (role + 1))

    def _slot(self, index: int) -> socket.socket:
        folders = folders_of(index)
        if self._first_uid is not None:
            self._clean(index)
            folders[0].parent.mkdir(parents=True, exist_ok=True)
            if SCRATCH.stat().st_mode & 0o022:  # a pod's volume is open to all, and what programs left there would stay
                SCRATCH.chmod(0o711)
        controls = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in folders]
        ours, theirs = socket.socketpair()
        pids = []
        for role, (name, folder) in enumerate(zip(("solution", "evaluator"), folders, strict=True)):
            uids = None if self._first_uid is None else self._uids(index, role)
            options: dict[str, Any] = {
                "role": name,
                "scope": "one_uid" if uids is None else "uid",
                "uids": None if uids is None else [uids.start, len(uids)],
                "scratch": [str(folder), *SHARED_SCRATCH],
            }
            control = controls[role][1]
            pids.append(self._fork(control, lambda c=control, o=options: zygote.run(c, o)))
        pids.append(
            self._fork(theirs, lambda: _session(theirs, controls[0][0], controls[1][0]), *(c[0] for c in controls))
        )
        self._pids[index] = set(pids)
        for sock in (theirs, *(end for pair in controls for end in pair)):
            sock.close()
        return ours

    def _fork(self, sock: socket.socket, main: Callable[[], None], *others: socket.socket) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            _close_all_but({sock.fileno(), *(other.fileno() for other in others)})
            zygote.shield()  # a child starts without its parent's being a subreaper
            main()
        except BaseException:
            traceback.print_exc()  # to the container's stderr
        finally:
            os._exit(0)

    def _clean(self, index: int) -> None:
        """Ends what is left of a slot: its own processes, then all that runs or lies about under its uids."""
        deadline = time.monotonic() + _LEAVE_S
        while self._pids.get(index) and time.monotonic() < deadline:
            time.sleep(0.002)  # they leave by themselves when the session does
            self._reap()
        for pid in self._pids.pop(index, ()):
            os.kill(pid, signal.SIGKILL)  # not reaped, so the number is still its own
        uids = self._uids(index)
        while pids := cleaning.processes_of(uids):
            for uid in {uid for pid in pids if (uid := cleaning.uid_of(pid)) is not None and uid in uids}:
                cleaning.kill_uid(uid, uids[-1])
            self._reap()
        cleaning.remove(cleaning.entries([str(SCRATCH / str(index))]))
        cleaning.remove(cleaning.entries(SHARED_SCRATCH, uids))
        for uid in uids if cleaning.sysv_objects(uids) else ():  # only their owner may remove them
            if objects := cleaning.sysv_objects(range(uid, uid + 1)):
                cleaning.as_uid(uid, lambda objects=objects: cleaning.remove_sysv(objects))

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                for pids in self._pids.values():
                    pids.discard(pid)

    def _left(self, index: int) -> list[str]:
        self._reap()
        uids = self._uids(index)
        folders = map(str, folders_of(index))
        found = [f"process {pid}" for pid in cleaning.processes_of(uids)]
        found += cleaning.entries(folders) + cleaning.entries(SHARED_SCRATCH, uids)
        return found + [f"{kind} {number}" for kind, number in cleaning.sysv_objects(uids)]


def ask(control: socket.socket, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The supervisor's end: an answer and the descriptors that came along. EOFError: the nursery died."""
    control.send(json.dumps(request).encode())
    data, fds, _, _ = socket.recv_fds(control, 1 << 20, 1)
    if not data:
        raise EOFError("the nursery died")
    return json.loads(data), list(fds)


def folders_of(index: int) -> list[Path]:
    """Where the programs and the tests of a slot start."""
    return [SCRATCH / str(index) / role for role in ("solution", "evaluator")]


def main(control: socket.socket, first_uid: int | None) -> None:
    """Runs the nursery in the calling process until the supervisor is gone."""
    _close_all_but({control.fileno()})
    zygote.shield()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    private_tmp.keep_in_subprocesses()
    os.environ.clear()
    gc.collect()
    gc.freeze()
    Nursery(control, first_uid).serve()


def begin(fd: int) -> None:
    """The same as `main` in a process that was started for it, with the number of the control socket."""
    zygote.shield()
    zygote.preload()
    main(socket.socket(fileno=fd), None)


def _session(front: socket.socket, solution: socket.socket, evaluator: socket.socket) -> None:
    """Judges what arrives on `front`, one submission after the other, until something is not as it was."""
    clients = ZygoteClient(solution, 1), ZygoteClient(evaluator, 1)
    for client in clients:
        client.hello()
    while True:
        try:
            request = frames.recv(front)
        except EOFError:
            return
        session = Session(*clients, protocol.submission_from_wire(request["submission"]))
        try:
            verdict = session.run()
        except SandboxError as error:
            frames.send(front, {"error": str(error), "dirty": True})
            return
        frames.send(front, {"verdict": protocol.verdict_to_wire(verdict), "dirty": session.dirty})
        if session.dirty:
            return


def _close_all_but(kept: set[int]) -> None:
    """Closes every descriptor above stderr that this process inherited and does not need."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
