"""CPU time of processes that this one has not waited for, by looking at them from time to time."""

import os
import time
from pathlib import Path


class RunningCpu:
    """What runs below a zygote has used, and what has ended there without being waited for by the zygote.

    The kernel adds the time of an ended process to the one that waited for it, and to nobody when it was ignored; what
    was seen of the latter is remembered here. Not counted: ignored processes that live for less than the time between two
    looks. A program can use CPU in such children up to its wall-clock limit.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}  # pid -> seconds, when last looked at
        self._ended = 0.0  # seconds of those that have gone since

    def seconds(self, pids: list[int]) -> float:
        """CPU seconds so far, given all that runs now."""
        alive = {pid: _own(pid) for pid in pids}
        self._ended += sum(seconds for pid, seconds in self._seen.items() if alive.get(pid, 0.0) < seconds)
        self._seen = alive
        return sum(alive.values()) + max(self._ended, sum(map(_of_waited_for, pids)))

    def forget(self, pid: int, *, all_below: bool) -> None:
        """The zygote has waited for this process, and knows its time and that of all it had waited for."""
        self._seen.pop(pid, None)
        if all_below:
            self._ended = 0.0


def _own(pid: int) -> float:
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the process-wide CPU clock of that process
    except OSError:  # it is gone, or the kernel (gVisor) has no clocks of other processes
        return _from_stat(pid, 11)


def _of_waited_for(pid: int) -> float:
    return _from_stat(pid, 13)


def _from_stat(pid: int, field: int) -> float:
    """User and system time, two neighbouring fields of /proc/PID/stat counted from behind the process's name."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[field : field + 2]
    except (OSError, ValueError):
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
