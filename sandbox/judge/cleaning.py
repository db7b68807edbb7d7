"""What is left of a program when it has been judged, and how it is removed: processes, files, System V objects.

Everything here works for a range of uids, because the slots of one container share its process table and its scratch
space. Killing goes through a child that switches to the uid and signals -1: the kernel delivers that to all processes
of the uid at once, so a fork bomb cannot outrun it, and to no other.
"""

import contextlib
import ctypes
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator

_SYSV = {"shm": "shmid", "sem": "semid", "msg": "msqid"}  # kind -> name of its id in /proc/sysvipc
_IPC_RMID = 0


def as_uid(uid: int, action: Callable[[], None]) -> None:
    """Runs `action` in a child that has switched to `uid`; what becomes of it is for the caller to check.

    Only when no process of that uid runs any more: it could stop the child, which would be waited for in vain.
    """

    def switch_and_act() -> None:
        switch_uid(uid)
        action()

    _in_child(switch_and_act)


def switch_uid(uid: int) -> None:
    """Gives up root, every group and with them every capability, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def kill_uid(uid: int, guard: int) -> None:
    """Kills every process of a uid at once.

    The child that does it has `uid` as its effective uid only: whom it may signal goes by that, who may signal it by
    the others, which are `guard`, a uid that no program and no other caller has.
    """

    def kill() -> None:
        os.setgroups([])
        os.setresgid(guard, guard, guard)
        os.setresuid(guard, uid, guard)
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    _in_child(kill)


def _in_child(action: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def processes_of(uids: range) -> list[int]:
    """Pids whose real uid is in the range; zombies count, as they still wait for their parent."""
    return [pid for pid in pids() if uid_of(pid) in uids]


def uid_of(pid: int) -> int | None:
    """Real uid of a process; from its status, because the owner of /proc/PID is root when it is not dumpable."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:  # bytes: it names itself as it likes
        for line in file:
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    return None


def entries(folders: Iterable[str], uids: range | None = None) -> list[str]:
    """Paths right below the folders, all of them or those that belong to a range of uids."""
    found = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
            for entry in listing:
                with contextlib.suppress(FileNotFoundError):  # a neighbour's
                    if uids is None or entry.stat(follow_symlinks=False).st_uid in uids:
                        found.append(entry.path)
    return found


def remove(paths: Iterable[str], at_most: int | None = None) -> None:
    """Removes files and whole trees, as far as this process may.

    Inner folders are moved up beside the outermost before they are emptied, so no depth of nesting, and no path
    longer than the kernel takes, stops it. Beyond `at_most` entries it gives up.
    """
    left = at_most if at_most is not None else 1 << 62
    counter = 0
    todo = list(paths)
    while todo:
        path = todo.pop()
        left -= 1
        if left < 0:
            return
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            _take_over(path)
            parent = os.path.dirname(path)
            inner = []
            with os.scandir(path) as listing:
                for entry in listing:
                    left -= 1
                    if left < 0:
                        return
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(entry.path)
                    else:
                        os.unlink(entry.path)
            for folder in inner:
                _take_over(folder)
                counter += 1
                moved = os.path.join(parent, f".removed-{os.getpid()}-{counter}")
                os.rename(folder, moved)
                todo.append(moved)
            os.rmdir(path)


def _take_over(folder: str) -> None:
    """Whatever this process needs to empty and move a folder, without the capability FOWNER."""
    with contextlib.suppress(OSError):
        if os.geteuid() == 0:
            os.chown(folder, 0, 0, follow_symlinks=False)
        os.chmod(folder, 0o700)


def reset(folder: str, mode: int) -> None:
    """Takes from an empty folder what a program can write on it: attributes, access lists, mode, times."""
    with contextlib.suppress(OSError):
        for name in os.listxattr(folder):
            os.removexattr(folder, name)
    with contextlib.suppress(OSError):
        os.chmod(folder, mode)
        os.utime(folder, (0, 0))


def sysv_objects(uids: range | None = None) -> list[tuple[str, int]]:
    """(kind, id) of System V shared memory, semaphores and queues, which outlive their makers."""
    found = []
    for kind, number in _SYSV.items():
        for row in _sysv_rows(kind):
            if uids is None or int(row["uid"]) in uids or int(row["cuid"]) in uids:
                found.append((kind, int(row[number])))
    return found


def remove_sysv(objects: Iterable[tuple[str, int]]) -> None:
    libc = ctypes.CDLL(None)
    for kind, number in objects:
        arguments = (number, 0, _IPC_RMID, None) if kind == "sem" else (number, _IPC_RMID, None)
        getattr(libc, f"{kind}ctl")(*arguments)


def _sysv_rows(kind: str) -> Iterator[dict[str, str]]:
    with contextlib.suppress(FileNotFoundError), open(f"/proc/sysvipc/{kind}", "rb", buffering=0) as file:
        head, *lines = file.read().decode().splitlines()
        for line in lines:
            yield dict(zip(head.split(), line.split(), strict=False))


def pids() -> list[int]:
    """Of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def processes() -> dict[int, tuple[int, str]]:
    """Pid -> (parent, state). One look: who is forked meanwhile may be missing."""
    found = {}
    for pid in pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].decode().split()[:2]
            found[pid] = int(parent), state
    return found


def below(ancestor: int, *, alive: bool = False) -> list[int]:
    """Pids of what descends from a process; `alive`: without those that are dead and wait for their parent."""
    seen = processes()
    found, generation = [], {ancestor}
    while generation:
        generation = {pid for pid, (parent, _) in seen.items() if parent in generation}
        found += generation
    return [pid for pid in found if not alive or seen[pid][1] not in "ZX"]
