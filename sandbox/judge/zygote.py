"""First process of a sandbox: forks a child per program, measures it, kills it, wipes after it.

It takes only these requests, from the host, over its control socket (one JSON datagram each, answered by one):
  spawn {limits} + a socket   forks a child that talks over that socket        -> {"pid"}
  usage {}                    CPU seconds of everything below it so far         -> {"cpu", "ended"}
  kill  {}                    kills everything below it                         -> {"cpu", "ended"}
  end   {}                    the same, wipes scratch space, forgets the CPU     -> {"cpu", "ended", "dirty"}
`ended` is the wait status of the last spawned child if it ended by itself, else null. `dirty`: something could not be
put back as it was, use this sandbox no more.

Protected: source, tests and values pass by in the child's own socket, never through here, so a child that reads the
memory it was forked with finds nothing. Isolated, this is PID 1 of its pid namespace, which the kernel shields from
every signal of its children, and kill(-1) reaches all of them. It is not dumpable. Started by root, children run
under a uid that is not its own. Not protected: without root, children share its uid and may change its rlimits or
priority (seen afterwards: `dirty`). Not isolated (plain subprocess), none of this holds: children can kill it, and
hide from the sweep in a race of forks.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from typing import Any

_PRELOAD = [
    "abc",
    "array",
    "bisect",
    "builtins",
    "cmath",
    "collections.abc",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "numbers",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "threading",
    "traceback",
    "typing",
]
_WIPE_AT_MOST = 500  # entries; beyond that a new sandbox is cheaper
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38


class Zygote:
    """State of one sandbox between requests."""

    def __init__(
        self, *, control: socket.socket, role: str, isolated: bool, uid: int | None, scratch: list[str]
    ) -> None:
        self._control = control
        self._role = importlib.import_module(f"sandbox.judge.{role}")
        self._isolated = isolated
        self._uid = uid
        self._scratch = scratch
        self._cpu = 0.0  # of reaped processes of this submission
        self._child: int | None = None
        self._ended: int | None = None
        self._own_state = _own_state()

    def serve(self) -> None:
        """Answers requests until the host closes the control socket."""
        while True:
            data, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
            if not data:
                self._sweep()
                return
            request = json.loads(data)
            answer = getattr(self, "_do_" + request.pop("op"))(fds, **request)
            self._control.send(json.dumps(answer).encode())

    def _do_spawn(self, fds: list[int], limits: dict[str, int]) -> dict[str, Any]:
        self._ended = None
        pid = os.fork()
        if pid == 0:
            try:
                self._control.close()
                self._become_child(limits)
                self._role.main(socket.socket(fileno=fds[0]))
            finally:
                os._exit(0)
        os.close(fds[0])
        self._child = pid
        return {"pid": pid}

    def _do_usage(self, fds: list[int]) -> dict[str, Any]:
        self._reap(os.WNOHANG | os.WUNTRACED)
        return {"cpu": self._cpu + sum(map(_cpu_of, self._descendants())), "ended": self._ended}

    def _do_kill(self, fds: list[int]) -> dict[str, Any]:
        self._reap(os.WNOHANG)
        ended = self._ended
        self._sweep()
        self._child = self._ended = None
        return {"cpu": self._cpu, "ended": ended}

    def _do_end(self, fds: list[int]) -> dict[str, Any]:
        answer = self._do_kill(fds)
        dirty = not self._wipe() or (self._isolated and _shared_memory_left()) or _own_state() != self._own_state
        self._cpu = 0.0
        return {**answer, "dirty": dirty}

    def _become_child(self, limits: dict[str, int]) -> None:
        """Gives up what the program must not have; the last thing before its code is read."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        if not self._isolated:
            os.setsid()
        for name, value in limits.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        self._switch_uid()
        os.chdir(self._scratch[0])
        os.dup2(1, 2)  # stdout is /dev/null already; stderr carries the zygote's own last words to the host

    def _switch_uid(self) -> None:
        if self._uid is not None:
            os.setgroups([])
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)

    def _descendants(self) -> list[int]:
        if self._isolated:
            return [int(name) for name in os.listdir("/proc") if name.isdecimal() and name != "1"]
        found, parents = [], [os.getpid()]
        while parents:
            parents = [child for pid in parents for child in _children(pid)]
            found += parents
        return found

    def _reap(self, flags: int) -> bool:
        """Collects ended children; False when there are no children at all. A child that stopped itself is killed."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, flags)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if os.WIFSTOPPED(status):
                os.kill(pid, signal.SIGKILL)
                continue
            self._cpu += usage.ru_utime + usage.ru_stime
            if pid == self._child:
                self._ended = status
            if not flags:
                return True

    def _sweep(self) -> None:
        """Kills everything below this process and waits for it."""
        while True:
            if self._isolated:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                for pid in self._descendants():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            if not self._reap(0):
                return

    def _wipe(self) -> bool:
        """Empties scratch space, as the children's uid; False when it is not empty afterwards."""
        if not any(map(os.listdir, self._scratch)):
            return True
        pid = os.fork()
        if pid == 0:
            try:
                self._switch_uid()
                _remove_entries(self._scratch)
            finally:
                os._exit(0)
        self._reap(0)
        return not any(map(os.listdir, self._scratch))


def _remove_entries(folders: list[str]) -> None:
    left = _WIPE_AT_MOST
    for folder in folders:
        for path, names, files in os.walk(folder):
            left -= len(names) + len(files)
            if left < 0:
                return
            for name in names:
                if not os.path.islink(os.path.join(path, name)):
                    os.chmod(os.path.join(path, name), 0o700)  # before the walk goes in
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _cpu_of(pid: int) -> float:
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the process-wide CPU clock of that process
    except OSError:
        return 0.0


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _shared_memory_left() -> bool:
    """Whether System V objects outlived their makers: they would be a channel to later programs."""
    for kind in ("shm", "sem", "msg"):
        with open(f"/proc/sysvipc/{kind}") as file:
            if len(file.readlines()) > 1:
                return True
    return False


def _own_state() -> tuple[Any, ...]:
    limits = [resource.getrlimit(kind) for kind in range(16)]
    return limits, os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


def main() -> None:
    """Runs a zygote; the one argument is JSON with the fields of `Zygote` and the number of the control socket."""
    options = json.loads(sys.argv[1])
    control = socket.socket(fileno=options.pop("control"))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    for name in _PRELOAD:
        importlib.import_module(name)
    zygote = Zygote(control=control, **options)
    sys.argv[1:] = []
    os.environ.clear()
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"pid": os.getpid()}).encode())
    zygote.serve()
