"""A filter of system calls for programs and tests: refuses what no judged program needs and what reaches beyond it.

Refused with EPERM: tracing, keyrings (they outlive a program), mounts, namespaces of its own, io_uring, bpf,
performance counters, userfaultfd, and limits or scheduling of any process but the caller (without root, programs have
the zygote's uid). `clone3` gives ENOSYS, so that libraries fall back to `clone`, whose flags a filter can read.

Containers have their engine's own filter as well. On machines of other kinds than those in the table there is none.
"""

import ctypes
import platform
import struct

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
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


# Made ready here, before any fork.
_FILTER = program(platform.machine())
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_code = ctypes.create_string_buffer(_FILTER or b"")
_fprog = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(_FILTER or b"") // 8, ctypes.addressof(_code)))


def install() -> None:
    """Puts the calling process, which has no_new_privs, and all that it starts behind the filter, for good."""
    if _FILTER is not None and _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _fprog, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls was not taken")
