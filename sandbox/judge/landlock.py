"""Landlock for a program that has the judge's uid (one_uid.py): where the kernel has it, the program reads and writes no
file of its tests (Linux 5.13), and signals no process that it did not start (6.12), whatever its number.

Elsewhere, and where a container's own filter of system calls refuses it, nothing happens; the rest of the protection does
not rest on it. What it leaves open: the shared folders, and names, modes and times of all files.
"""

import ctypes
import os
import stat
import struct

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # on every kind of machine
_ASK_VERSION, _BENEATH = 1, 1
_WRITE, _READ = 1 << 1, 1 << 2
_CHANGE = sum(1 << bit for bit in range(4, 13))  # make and remove entries of every kind
_SINCE = {2: 1 << 13, 3: 1 << 14}  # version -> to move between folders, to truncate
_SCOPE_SIGNAL = 1 << 1

_syscall = ctypes.CDLL(None, use_errno=True).syscall


def confine(own: list[str]) -> None:
    """Takes from this process and all that it starts, for good, every file outside of `own` that could be a test's."""
    version = _syscall(_CREATE, None, 0, _ASK_VERSION)
    if version < 1:
        return
    everything = _WRITE | _READ | _CHANGE | sum(right for since, right in _SINCE.items() if version >= since)
    fields = [everything, 0, _SCOPE_SIGNAL][: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = _checked(_CREATE, attributes, len(attributes), 0)
    scratch = {"/" + path.split("/")[1] for path in own if not path.startswith("/dev/")}
    for place in ("/" + name for name in os.listdir("/")):
        if place not in scratch and stat.S_ISDIR(os.lstat(place).st_mode):
            _allow(rules, place, _READ | _WRITE)  # as far as owners and read-only mounts let it
    for place in own:
        if os.path.isdir(place):
            _allow(rules, place, everything)
    _checked(_RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, place: str, rights: int) -> None:
    fd = os.open(place, os.O_PATH | os.O_NOFOLLOW)
    _checked(_ADD_RULE, rules, _BENEATH, struct.pack("=Qi", rights, fd), 0)
    os.close(fd)


def _checked(*arguments: int | bytes) -> int:
    result = _syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock was not taken")
    return result
