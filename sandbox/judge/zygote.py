"""First process of a sandbox: forks a child per program, measures it, kills it, wipes after it.

It takes only these requests, from the session, over its control socket (one JSON datagram each, answered by one):
  spawn {limits} + a socket   forks a child that talks over that socket        -> {"pid"}
  usage {}                    CPU seconds of everything below it so far         -> {"cpu", "ended"}
  kill  {}                    kills everything below it                         -> {"cpu", "ended"} or "trouble" too
  end   {}                    the same, wipes scratch space, forgets the CPU     -> {"cpu", "ended", "dirty"}
  left  {}                    what earlier programs left behind                 -> {"left"}
`ended` is the wait status of the last spawned child if it ended by itself, else null. `dirty`: something could not be
put back as it was, use this sandbox no more.

Protected: source, tests and values pass by in the child's own socket, never through here, so a child that reads the
memory it was forked with finds nothing. It is not dumpable. Four scopes say what belongs to it:
- `namespace`: it is PID 1 of a pid namespace, which the kernel shields from every signal of its children, and
  everything else in there is a program's. Started by root, children run under another uid, a new one for each program.
  Not protected: without root, children share its uid and may change its rlimits or priority (seen afterwards: `dirty`).
- `uid`: it shares a container with other zygotes; what has one of its uids is a program's.
- `one_uid`: it shares a container and the only uid there is; what descends from it is a program's (one_uid.py).
- `tree` (plain subprocess): what descends from it is a program's. None of the protection holds: children can kill it,
  and hide from the sweep in a race of forks.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from sandbox.judge import cleaning, landlock, private_tmp, seccomp, warming
from sandbox.judge.cpu import RunningCpu

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
_PRELOAD_IF_THERE = ["numpy"]
_LIBRARIES = "/usr/lib/python3/dist-packages"  # where Debian's packages live; -S leaves it out
_NEIGHBOURS = 4096  # processes that this uid may have elsewhere on the machine, where the kernel counts them together
_WIPE_AT_MOST = 500  # entries; beyond that a new namespace is cheaper
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38


class Zygote:
    """State of one sandbox between requests.

    scope     "namespace", "uid", "one_uid" or "tree", see above
    uids      [first, count]: each program gets the next one; None: children keep the zygote's own uid
    scratch   folders that programs may write to, wiped after each; the first is where they start
    """

    def __init__(
        self, *, control: socket.socket, role: str, scope: str, uids: list[int] | None, scratch: list[str]
    ) -> None:
        self._control = control
        self._role_name = role
        self._role = importlib.import_module(f"sandbox.judge.{role}")
        self._scope = scope
        self._uids = range(uids[0], uids[0] + uids[1]) if uids else None
        self._turn = 0
        self._scratch = scratch
        self._cpu = 0.0  # of reaped processes of this submission
        self._running = RunningCpu()
        self._child: int | None = None
        self._ended: int | None = None
        self._max_processes = 0
        self._trouble = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # what a child says that could not be set up
        self._own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self._own_state = _own_state()
        self._renew_folder()

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
        self._max_processes = limits["NPROC"]
        pid = os.fork()
        if pid == 0:
            try:
                self._control.close()
                self._become_child(limits)
                for fd in self._trouble:
                    os.close(fd)
                self._trouble = -1, -1
                self._role.main(socket.socket(fileno=fds[0]))
                os._exit(0)
            except BaseException as error:
                if self._trouble[1] >= 0:
                    os.write(self._trouble[1], f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
            finally:
                os._exit(1)
        os.close(fds[0])
        self._child = pid
        return {"pid": pid}

    def _do_usage(self, fds: list[int]) -> dict[str, Any]:
        self._reap(os.WNOHANG | os.WUNTRACED)
        pids = self._descendants()
        if self._scope == "one_uid" and self._role_name == "solution" and len(pids) > self._max_processes:
            _kill_all(pids)  # the session sees the end, and has killed what was missed
        return {"cpu": self._cpu + self._running.seconds(pids), "ended": self._ended}

    def _do_kill(self, fds: list[int]) -> dict[str, Any]:
        self._reap(os.WNOHANG)
        ended = self._ended
        self._sweep()
        self._child = self._ended = None
        answer = {"cpu": self._cpu, "ended": ended}
        with contextlib.suppress(BlockingIOError):
            answer["trouble"] = os.read(self._trouble[0], 1 << 12).decode(errors="replace")
        return answer

    def _do_end(self, fds: list[int]) -> dict[str, Any]:
        answer = self._do_kill(fds)
        dirty = not self._wipe() or _own_state() != self._own_state
        self._cpu = 0.0
        self._turn += 1
        if not dirty:
            self._renew_folder()
        return {**answer, "dirty": dirty}

    def _do_left(self, fds: list[int]) -> dict[str, Any]:
        objects = [f"{kind} {number}" for kind, number in self._sysv_objects()]
        return {"left": [f"process {pid}" for pid in self._descendants()] + self._entries() + objects}

    def _uid(self) -> int | None:
        return self._uids[self._turn % (len(self._uids) - 1)] if self._uids else None  # the last one is the guard

    def _become_child(self, limits: dict[str, int]) -> None:
        """Gives up what the program must not have; the last thing before its code is read."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        if self._scope != "namespace":
            os.setsid()
        if self._role_name == "solution":  # without memory the program goes first, never who judges it
            _set_oom_score(1000)
            if self._scope == "one_uid":  # a crowd of its processes must not keep this one from ending it
                os.nice(10)
        limits["AS"] += self._own_bytes
        if self._scope == "one_uid":
            limits["NPROC"] += _NEIGHBOURS
        for name, value in limits.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        folder = self._scratch[0]
        try:
            os.chdir(folder)  # before the uid is switched: root enters what an earlier child of this program has closed
        except OSError:  # or removed, where it may: its own loss
            os.chdir(folder := "/")
        if self._scope in ("uid", "one_uid"):
            private_tmp.enter(folder)
        uid = self._uid()
        if uid is not None:
            cleaning.switch_uid(uid)
        if self._scope == "one_uid":  # whatever runs now, before the program does, is the judge's
            seccomp.spare(pid for pid in cleaning.pids() if pid != os.getpid())
            if self._role_name == "solution":
                landlock.confine(self._scratch)
        os.dup2(1, 2)  # stdout is /dev/null already; stderr carries the zygote's own last words

    def _descendants(self) -> list[int]:
        if self._scope == "namespace":
            return [int(name) for name in os.listdir("/proc") if name.isdecimal() and name != "1"]
        if self._scope == "uid":
            assert self._uids is not None
            return cleaning.processes_of(self._uids)
        if self._scope == "one_uid":
            return cleaning.below(os.getpid())
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
            self._cpu += usage.ru_utime + usage.ru_stime  # and of all that it waited for
            self._running.forget(pid, all_below=pid == self._child)
            if pid == self._child:
                self._ended = status
            if not flags:
                return True

    def _sweep(self) -> None:
        """Kills everything below this process and waits for it."""
        if self._scope == "uid" and self._child is not None and self._ended is None:
            os.kill(self._child, signal.SIGKILL)
            self._reap(0)
        # Whoever is dead keeps its number until it is reaped. So one that flees from fork to fork runs out of numbers.
        while self._scope == "one_uid" and (alive := cleaning.below(os.getpid(), alive=True)):
            _kill_all(alive)
        # Orphans become children of this process, so without a child there is nobody below.
        while self._reap(os.WNOHANG):
            uid = self._uid()
            if self._scope == "namespace":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            elif self._uids and uid is not None:
                cleaning.kill_uid(uid, self._uids[-1])
            else:
                _kill_all(self._descendants())
            self._reap(0)

    def _wipe(self) -> bool:
        """Removes what the program left, as the program's own uid; False when something remains."""
        if self._scope == "one_uid":  # the supervisor does, when both zygotes are done
            return True
        self._reset_folders()  # first, as one that is closed cannot be listed
        if not self._entries() and not self._sysv_objects():
            return True
        self._remove_all()
        self._reset_folders()  # removing has left times on them
        return not self._entries() and not self._sysv_objects()

    def _reset_folders(self) -> None:
        for folder in self._scratch if self._scope != "uid" else ():  # there each program gets a new one
            cleaning.reset(folder, 0o700 if self._scope == "tree" else 0o1777)

    def _remove_all(self) -> None:
        def remove() -> None:
            cleaning.remove(self._entries(), None if self._scope == "uid" else _WIPE_AT_MOST)
            cleaning.remove_sysv(self._sysv_objects())

        uid = self._uid()
        if uid is None:
            remove()
        else:
            cleaning.as_uid(uid, remove)
            cleaning.remove(self._entries())  # what others put into its folders

    def _renew_folder(self) -> None:
        """Where several share a container, every program starts in a new folder, on which nothing is written yet."""
        uid = self._uid()
        if self._scope == "uid" and uid is not None:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(self._scratch[0])
            os.mkdir(self._scratch[0], 0o700)
            os.chown(self._scratch[0], uid, uid)

    def _entries(self) -> list[str]:
        if self._scope != "uid":
            return cleaning.entries(self._scratch)
        return cleaning.entries(self._scratch[:1]) + cleaning.entries(self._scratch[1:], self._uids)

    def _sysv_objects(self) -> list[tuple[str, int]]:
        return [] if self._scope == "tree" else cleaning.sysv_objects(self._uids)


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _set_oom_score(score: int) -> None:
    with contextlib.suppress(OSError):
        file = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(file, b"%d" % score)
        finally:
            os.close(file)


def _own_state() -> tuple[Any, ...]:
    limits = [resource.getrlimit(kind) for kind in range(16)]
    return limits, os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


def preload() -> None:
    """Imports what programs often import, so that forked children have it at once."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # no threads before a fork
    if os.path.isdir(_LIBRARIES) and sys.flags.no_site and sys.prefix == "/usr":
        sys.path.append(_LIBRARIES)
    for name in _PRELOAD:
        importlib.import_module(name)
    for name in _PRELOAD_IF_THERE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def shield() -> None:
    """Makes this process one that its children cannot trace, read or outlive."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(control: socket.socket, options: dict[str, Any]) -> None:
    """Serves until the session closes the control socket. `options`: the other fields of `Zygote`."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    seccomp.install()  # children inherit it; the zygote needs none of what it refuses
    zygote = Zygote(control=control, **options)
    sys.argv[1:] = []
    os.environ.clear()
    warming.warm(options["role"])
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"pid": os.getpid()}).encode())
    zygote.serve()


def main() -> None:
    """A sandbox of its own; the one argument is JSON with the fields of `Zygote` and the number of the control socket."""
    options = json.loads(sys.argv[1])
    control = socket.socket(fileno=options.pop("control"))
    _set_oom_score(500)
    shield()
    preload()
    run(control, options)
