"""A /tmp for each slot of a container, without the right to mount anything.

The image's /tmp is a link to /proc/self/fd/99, which the kernel resolves for each process by itself. A program starts
with its own scratch folder, its working folder, open there. So programs that run at the same time cannot meet in /tmp,
take each other's names or fill it up for each other. Not so in a process that closed this descriptor: it has no /tmp.
"""

import _posixsubprocess
import contextlib
import os
from typing import Any

FD = 99
TARGET = f"/proc/self/fd/{FD}"


def enter(folder: str) -> None:
    """Makes `folder` the /tmp of this process and of those it starts."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.dup2(fd, FD)
    os.close(fd)


def keep_in_subprocesses() -> None:
    """The module subprocess closes what it was not told to keep; for programs, not for safety: they may undo it."""
    fork_exec: Any = _posixsubprocess.fork_exec

    def fork_exec_with_tmp(args: Any, executables: Any, close_fds: Any, kept: tuple[int, ...], *rest: Any) -> int:
        with contextlib.suppress(OSError):
            os.fstat(FD)
            kept = tuple(sorted({*kept, FD}))
        return fork_exec(args, executables, close_fds, kept, *rest)

    _posixsubprocess.fork_exec = fork_exec_with_tmp
