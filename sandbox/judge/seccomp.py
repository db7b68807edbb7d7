"""A filter of system calls for programs and tests: refuses what no judged program needs and what reaches beyond it.

Refused with EPERM: tracing, keyrings (they outlive a program), mounts, namespaces of its own, io_uring, bpf,
performance counters, userfaultfd, and limits or scheduling of any process but the caller (without root, programs have
the zygote's uid). `clone3` gives ENOSYS, so that libraries fall back to `clone`, whose flags a filter can read.

Where programs have the judge's uid (one_uid.py) a second filter refuses them every way to signal the judge's processes
and to change their priority.

Containers have their engine's own filter as well. On machines of other kinds than those in the table there is none.
"""

import ctypes
import platform
import struct
from collections.abc import Iterable

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld abs, jeq, jset, ret
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_NEW = 0x7E020080  # namespaces of every kind
_X32 = 0x40000000
# name -> number on x86_64, number on aarch64
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "ioprio_set": (251, 30),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_FOR_ONESELF_ONLY = {  # the first argument must be 0
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_TO_A_PROCESS = {  # the first argument says to whom a signal goes, or what to hold for one
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
}
_PIDFD_SEND_SIGNAL, _SETPRIORITY = (424, 424), (141, 140)
_FCNTL, _F_SETOWN = (72, 25), [8, 15]  # and F_SETOWN_EX: whom the kernel signals when a descriptor is ready
_IOCTL, _FIOSETOWN = (16, 29), [0x8901, 0x8902]  # and SIOCSPGRP: the same
_AUDIT = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, what the kernel calls it


def program(machine: str) -> bytes | None:
    """The filter as the kernel reads it, struct sock_filter after struct sock_filter; None for an unknown machine."""
    if machine not in _AUDIT:
        return None
    column, audit = _AUDIT[machine]
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), (_IF_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL_PROCESS)]
    lines += [(_LOAD, 0, 0, _NUMBER), (_IF_ANY_BIT, 0, 1, _X32), (_RETURN, 0, 0, _KILL_PROCESS)]
    for numbers in _REFUSED.values():
        lines += [(_IF_EQUAL, 0, 1, numbers[column]), refuse]
    lines += [(_IF_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    lines += [
        (_IF_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_ANY_BIT, 0, 1, _CLONE_NEW),
        refuse,
    ]
    lines += [(_RETURN, 0, 0, _ALLOW)]
    for numbers in _FOR_ONESELF_ONLY.values():
        lines += [(_IF_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_IF_EQUAL, 1, 0, 0), refuse]
        lines += [(_RETURN, 0, 0, _ALLOW)]
    lines += [(_RETURN, 0, 0, _ALLOW)]
    return _packed(lines)


def signal_program(machine: str, judge: Iterable[int]) -> bytes:
    """The second filter: refuses signals to these processes, their process groups or everybody, and other priorities than
    the caller's own. KeyError for a machine that is not in the tables."""
    column, _ = _AUDIT[machine]
    everybody = [-1, *(number for pid in judge for number in (pid, -pid))]
    lines = [(_LOAD, 0, 0, _NUMBER)]
    for numbers in _TO_A_PROCESS.values():
        lines += _refusing(numbers[column], 0, everybody)
    lines += _refusing(_FCNTL[column], 1, _F_SETOWN) + _refusing(_IOCTL[column], 1, _FIOSETOWN)
    refuse, allow = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)
    lines += [(_IF_EQUAL, 0, 1, _PIDFD_SEND_SIGNAL[column]), refuse]
    lines += [(_IF_EQUAL, 0, 6, _SETPRIORITY[column])]
    for argument in (0, 1):  # of a process, not a group or a user; the caller's own
        lines += [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument), (_IF_EQUAL, 1, 0, 0), refuse]
    return _packed([*lines, allow])


def _refusing(number: int, argument: int, values: list[int]) -> list[tuple[int, int, int, int]]:
    """Lines that end a system call's way through a filter: refused when an argument is one of the values."""
    checks = [(_IF_EQUAL, len(values) - i, 0, value & 0xFFFFFFFF) for i, value in enumerate(values)]
    ends = [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    block = [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument), *checks, *ends]
    return [(_IF_EQUAL, 0, len(block), number), *block]


def _packed(lines: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


KNOWN_MACHINE = platform.machine() in _AUDIT
_FILTER = program(platform.machine())  # made ready here, before any fork
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def install() -> None:
    """Puts the calling process, which has no_new_privs, and all that it starts behind the filter, for good."""
    if _FILTER is not None:
        _install(_FILTER)


def spare(judge: Iterable[int]) -> None:
    """The same with the second filter."""
    _install(signal_program(platform.machine(), judge))


def _install(code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code)
    fprog = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
    if _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls was not taken")
