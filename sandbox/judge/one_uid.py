"""The judge in a container that may not switch uids, as the Pod Security standard `restricted` wants it: every process
in there, the program included, has the same uid. It takes one submission at a time.

The processes are those of every container (see __init__.py). What uids do elsewhere is done by other means:
- memory, environment and descriptors of the judge, the evaluator above all: no process of it is dumpable, so without
  CAP_SYS_PTRACE, which nobody in there has, /proc/PID is root's and tracing is refused. The judge's own filter of
  system calls refuses tracing once more.
- signals: a second filter (seccomp.spare), which a program gets before its first line and cannot take off, refuses
  every system call that signals a process which ran before the program did, a group or everybody. That is the
  whole judge, as the evaluator is forked before the program that it tests. Besides, the kernel shields PID 1.
- what is left behind: processes end by their descent (zygote.py). After each program PID 1 looks: when anything else
  runs than the judge's own processes it kills all others at once, which no race of forks survives, and starts them
  anew. As they must not inherit its memory, they are started as a program of their own. It empties /scratch and
  /dev/shm, whoever has made what is in there, and removes System V objects.
- files of the tests, and what tests start: Landlock, where the kernel has it (landlock.py).
The asserts do not run in PID 1 itself: a test that never ends in C code (a program can see to that, by what it returns)
would take the container along, and every test would share a process with the token.

Less protected than with a uid for each program:
- Without Landlock. A program opens files that its tests write meanwhile; a test that runs or imports what lies in its
  working folder can be forged. It signals subprocesses of its tests and, as the kernel takes a thread's number for its
  process's, it can end a test that has started threads. Then the judge has failed: nothing is paid.
- /dev/shm, which program and tests share, and names, modes and times of all files in /scratch.
- Processes. The kernel counts them over all pods of this uid on a node, so RLIMIT_NPROC is only a wide backstop. A
  program with more than max_processes is killed within a tenth of a second, threads not counted; the pod's own limit
  (podPidsLimit) must hold off a bomb until then.
- Limits. The tests, in their process, and the judge share a uid with the program: quotas of the kernel for each user
  (pipe buffers, watches, pending signals) are the same for all.
- The token. A file that the supervisor can read can be read by programs, so it is taken from the environment only.
  What an administrator runs in the container is not hidden from programs, its environment included, and ends with the
  next program.
"""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from sandbox.judge import cleaning, nursery, seccomp

_HOME = Path(__file__).resolve().parents[2]
_START = "import sys; sys.path.append({home!r}); from sandbox.judge import nursery; nursery.begin({fd})"
_EMPTIED = [str(nursery.SCRATCH), *nursery.SHARED_SCRATCH]
_NO_PLACE_FOR_FILES = ("/proc", "/sys", "/dev/mqueue")  # of the last one every program's share is 0


def problem(num_slots: int) -> str | None:
    """Why programs cannot be judged here, or None."""
    who = f"runs as uid {os.geteuid()}, so programs have no uid of their own"
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if held := [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status[name], 16)]:
        return f"{who} and would have its capabilities ({', '.join(held)} in /proc/1/status): drop them all"
    if num_slots != 1:
        return f"{who}: --slots is {num_slots}, give --slots 1 and start more containers"
    if os.getpid() != 1:
        return f"{who}: it must be the first process of its container and is process {os.getpid()}: no shared process"
    if not seccomp.KNOWN_MACHINE:
        return f"{who}: there is no filter of system calls for this kind of machine: start it as root"
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        return f"{who} and could leave something for the next: make its root file system read-only"
    for folder in _EMPTIED:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return f"{who} and may not write to {folder}: mount a tmpfs there that is open to this uid"
    if open_places := [place for place in _mounts() if _may_keep_files(place)]:
        return f"{who} and could leave something for the next in {open_places[0]}: do not mount it, or read-only"
    return None


def _mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _may_keep_files(place: str) -> bool:
    if any(Path(place).is_relative_to(other) for other in (*_NO_PLACE_FOR_FILES, *_EMPTIED)):
        return False
    return os.access(place, os.W_OK) and (os.path.isdir(place) or os.path.isfile(place))


class OneSlot:
    """The slot and all processes below PID 1."""

    def __init__(self) -> None:
        self._own: set[int] = set()  # processes of the judge
        self._nursery: socket.socket | None = None

    def start(self, index: int) -> socket.socket:
        """Ends and removes all there is; the socket of a new session. OSError: something cannot be removed."""
        if self._nursery is not None:
            self._nursery.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        self._empty()
        if things := _things():
            raise OSError(f"cannot remove {things[0]}")
        self._nursery, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            command = [sys.executable, "-I", "-S", "-B", "-c", _START.format(home=str(_HOME), fd=theirs.fileno())]
            pid = os.posix_spawn(sys.executable, command, {}, setsigmask=())
        session = nursery.ask(self._nursery, {"op": "slot", "index": index})[1][0]
        self._own = {1, pid, *(child for child, (parent, _) in cleaning.processes().items() if parent == pid)}
        return socket.socket(fileno=session)

    def settled(self) -> bool:
        """After a program: removes what it left; False when it left a process, or something that cannot be removed."""
        try:
            self._empty()
        except OSError:
            return False
        return not self.left()

    def left(self) -> list[str]:
        """What programs left behind, or have right now."""
        return [f"process {pid}" for pid in cleaning.processes() if pid not in self._own] + _things()

    def _empty(self) -> None:
        for folder in _EMPTIED:
            cleaning.reset(folder, 0o1777)
        cleaning.remove(cleaning.entries(_EMPTIED))
        cleaning.remove_sysv(cleaning.sysv_objects())
        for folder in nursery.folders_of(0):
            folder.mkdir(parents=True, exist_ok=True)


def _things() -> list[str]:
    """Files and System V objects, of whomever."""
    folders = [str(folder) for folder in nursery.folders_of(0)]
    ours = {*folders, os.path.dirname(folders[0])}
    found = [entry for entry in cleaning.entries([*_EMPTIED, *ours]) if entry not in ours]
    return found + [f"{kind} {number}" for kind, number in cleaning.sysv_objects()]
