"""The `process` backend: two warm bubblewrap sandboxes on this machine, one for the programs and one for the tests.

Protects (with bubblewrap): this machine's files, network, processes and environment from the program; the tests from
the program; one submission from the next. Each sandbox has pid, net, ipc and uts namespaces of its own, a read-only
view of /usr and of the interpreter, size-limited scratch space that is wiped after each submission, no capabilities
and no_new_privs. As root, every program runs under a uid of its own that no other process of the machine has (from
20000 up, a block for each ProcessSandbox, reserved by abstract sockets), so RLIMIT_NPROC counts only its processes. As
an ordinary user each sandbox has a user namespace of its own, and Linux 5.14 and later count processes for each of
those; on older kernels the user's own processes are added to the limit.

Does not protect: no cgroups, so a program may use max_processes * memory_mb plus the scratch space and memfds; kernel
bugs; timing channels. Without root, see zygote.py. Tests that run beside the solution (`trust: low`), see
solution.py.

With `allow_unisolated=True` and no working bubblewrap the same processes run as plain subprocesses. That protects
against accidents (hangs, memory, wrong exits) and keeps tests and programs in different processes, and NOTHING ELSE: a
hostile program reads and writes every file of this user, uses the network, and can kill or trace the judge and so
forge its own verdict. Started by root, not even the number of its processes is limited.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from sandbox.judge.session import Session
from sandbox.judge.zygote_client import ZygoteClient
from sandbox.types import SandboxError, SandboxUnavailableError, Submission, Verdict

_JUDGE = Path(__file__).resolve().parent / "judge"
_JUDGE_INSIDE = "/opt/judge"
_SCRATCH = ("/tmp", "/dev/shm")
_SCRATCH_BYTES = 64 << 20
_START = "import sys; sys.path.append(sys.argv.pop(1)); from sandbox.judge import zygote; sys.path.pop(); zygote.main()"
_UIDS_EACH = 100  # for one sandbox: every program gets the next one
_UIDS = range(20000, 60000, 2 * _UIDS_EACH)


def require_available(allow_unisolated: bool = False) -> None:
    """Returns when submissions can be judged here; raises SandboxUnavailableError with the way out."""
    if allow_unisolated or (problem := _bubblewrap_problem()) is None:
        return
    raise SandboxUnavailableError(
        f"backend: process cannot isolate programs here ({problem}): run `apt-get install bubblewrap`, or set"
        " `sandbox.allow_unisolated: true` to run them as plain subprocesses with this user's rights"
    )


def _bubblewrap_problem() -> str | None:
    """Why bubblewrap cannot be used, or None. Tries it, which costs the start of one sandbox."""
    if shutil.which("bwrap") is None:
        return "bwrap is not on PATH"
    try:
        with _Sandbox("solution", isolated=True, uid=_UIDS[0] if os.geteuid() == 0 else None) as probe:
            probe.hello()
    except SandboxError as error:
        return f"bwrap does not work: {error}"
    return None


class ProcessSandbox:
    """Judges submissions one at a time (calls from several threads wait for each other).

    with ProcessSandbox() as sandbox:
        verdict = sandbox.judge(submission)
    """

    name = "process"
    slots = 1

    def __init__(self, *, allow_unisolated: bool = False, recycle_after: int = 500) -> None:
        require_available(allow_unisolated)
        self._isolated = not allow_unisolated or _bubblewrap_problem() is None
        self._recycle_after = recycle_after
        self._uses = 0
        self._pair: tuple[_Sandbox, _Sandbox] | None = None
        self._lock = threading.Lock()
        self._uid_lease: _UidLease | None = None

    def judge(self, submission: Submission) -> Verdict:
        """A verdict about the program; SandboxError when the judge itself failed, and the next call starts anew."""
        with self._lock:
            try:
                solution, evaluator = self._pair or self._start_pair()
                session = Session(solution.client, evaluator.client, submission)
                verdict = session.run()
            except BaseException:
                self._discard()
                raise
            self._uses += 1
            if session.dirty or self._uses >= self._recycle_after:
                self._discard()
            return verdict

    def survivors(self) -> list[str]:
        """Processes, files and System V objects that judged programs left behind."""
        with self._lock:
            return [item for sandbox in self._pair or () for item in sandbox.client.left()]

    def close(self) -> None:
        """Ends both sandboxes. A later `judge` would start new ones."""
        with self._lock:
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_pair(self) -> "tuple[_Sandbox, _Sandbox]":
        if self._isolated and os.geteuid() == 0:
            self._uid_lease = _UidLease()
        uid = self._uid_lease.uid if self._uid_lease else None
        solution = _Sandbox("solution", isolated=self._isolated, uid=uid)
        try:
            evaluator = _Sandbox("evaluator", isolated=self._isolated, uid=None if uid is None else uid + _UIDS_EACH)
        except BaseException:
            solution.close()
            raise
        self._pair, self._uses = (solution, evaluator), 0
        for sandbox in self._pair:
            sandbox.hello()
        return self._pair

    def _discard(self) -> None:
        for sandbox in self._pair or ():
            sandbox.close()
        if self._uid_lease is not None:
            self._uid_lease.close()
        self._pair = self._uid_lease = None


class _Sandbox:
    """One zygote and the process that holds it."""

    def __init__(self, role: str, *, isolated: bool, uid: int | None) -> None:
        self._folder = None if isolated else tempfile.TemporaryDirectory(prefix="diffrl-sandbox-")
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = {
            "control": theirs.fileno(),
            "role": role,
            "scope": "namespace" if isolated else "tree",
            "uids": None if uid is None else [uid, _UIDS_EACH],
            "scratch": list(_SCRATCH) if self._folder is None else [self._folder.name],
        }
        python = os.path.realpath(sys.executable)
        home = _JUDGE_INSIDE if isolated else str(_JUDGE.parent.parent)
        command = [python, "-I", "-S", "-B", "-c", _START, home, json.dumps(options)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*_bubblewrap(python, uid), *command] if isolated else command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env={"MALLOC_ARENA_MAX": "2", "LANG": "C.UTF-8"},
                    start_new_session=True,
                )
        except OSError as error:
            control.close()
            raise SandboxError(f"could not start a sandbox: {error}") from error
        self._control = control
        self.client = ZygoteClient(control, _process_limit_base(isolated))

    def hello(self) -> None:
        """Waits until the zygote is ready; SandboxError with what it, or bubblewrap, wrote."""
        try:
            self.client.hello()
        except SandboxError as error:
            raise SandboxError(f"{error}: {self._last_words()}") from None

    def close(self) -> None:
        """Ends the zygote, and with it everything below it."""
        self._control.close()  # the zygote sweeps and leaves when its control socket closes
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        return text.splitlines()[-1][:300] if text else f"exit status {self._process.poll()}"


def _bubblewrap(python: str, uid: int | None) -> list[str]:
    """The bwrap command line up to the program. `uid`: started by root, children will switch to it."""
    command = ["--as-pid-1", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    if uid is None:
        command += ["--unshare-user", "--uid", "20000", "--gid", "20000"]
    else:  # what the zygote needs to switch to the children's uid and to kill them
        command += [word for name in ("SETUID", "SETGID", "KILL") for word in ("--cap-add", f"CAP_{name}")]
    for path in ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        command += ["--ro-bind-try", path, path]
    prefix = os.path.realpath(sys.base_prefix)
    for path in dict.fromkeys((prefix, python)):
        if not Path(path).is_relative_to("/usr") and (path == prefix or not Path(path).is_relative_to(prefix)):
            for parent in reversed(Path(path).parents[:-1]):  # bwrap would make them 0700
                command += ["--dir", str(parent)]
            command += ["--ro-bind", path, path]
    command += ["--dir", "/opt", "--dir", _JUDGE_INSIDE, "--dir", f"{_JUDGE_INSIDE}/sandbox"]
    command += ["--ro-bind", str(_JUDGE), f"{_JUDGE_INSIDE}/sandbox/judge", "--proc", "/proc", "--dev", "/dev"]
    for path in _SCRATCH:
        command += ["--perms", "1777", "--size", str(_SCRATCH_BYTES), "--tmpfs", path]
    return [shutil.which("bwrap") or "bwrap", *command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _process_limit_base(isolated: bool) -> int:
    """What RLIMIT_NPROC counts beside the programs' own processes."""
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if os.geteuid() == 0 or (isolated and release >= (5, 14)):
        return 1
    count = 0
    for status in Path("/proc").glob("[0-9]*/task/*/status"):
        with contextlib.suppress(OSError):
            count += f"\nUid:\t{os.getuid()}\t" in status.read_text()
    return count + 1


class _UidLease:
    """A block of uids that no other sandbox on this machine uses while this object lives."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        start = os.getpid()
        for offset in range(len(_UIDS)):
            self.uid = _UIDS[(start + offset) % len(_UIDS)]
            try:
                self._socket.bind(f"\0diffrl-sandbox-uid-{self.uid}")
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        self.close()
        raise SandboxError("no free uid")

    def close(self) -> None:
        """Gives the uids back."""
        self._socket.close()
