"""Programs that know that they run under the judge's own uid, and go for its processes, its files and its clean-up.

For pods without root only (sandbox/judge/one_uid.py): elsewhere some prove what is harmless there, such as holding another
process without the right to signal it.
"""

from sandbox.types import Limits, TestStatus
from tests.sandbox.attacks.attack import ALIVE, ANY_RATE, LIMITS_HOLD, NO_TRACE, NO_WAY_OUT, RIGHT, ROOM, attacks
from tests.sandbox.attacks.intruders import OTHERS, PROVEN

_SIGNALS = """
import fcntl, struct
KILL, F_SETOWN_EX = 9, 15
libc.syscall.argtypes = [ctypes.c_long] * 4 + [ctypes.c_void_p]
info = lambda sender: ctypes.create_string_buffer(struct.pack("iiiii", KILL, 0, -1, 0, sender) + bytes(108))
everybody = [n for pid in others() for n in (pid, -pid)] + [-1]
for target in everybody:
    for high in (0, 1 << 32, 0x7FFFFFFF << 32):  # the kernel looks at the lower half
        number = (target & 0xFFFFFFFF) | high
        out.append(libc.syscall(62, number, KILL, 0, None) == 0)
        out.append(libc.syscall(200, number, KILL, 0, None) == 0)  # tkill
        out.append(libc.syscall(129, number, KILL, ctypes.addressof(info(0)), None) == 0)  # rt_sigqueueinfo
        out.append(libc.syscall(434, number, 0, 0, None) >= 0)  # pidfd_open
    end = os.pipe()[0]
    out.append(attempt(lambda: fcntl.fcntl(end, fcntl.F_SETOWN, target) == 0))
    out += [attempt(lambda: fcntl.fcntl(end, F_SETOWN_EX, struct.pack("ii", kind, abs(target)))) for kind in (0, 1, 2)]
    out += [libc.ioctl(end, number, struct.pack("i", target)) == 0 for number in (0x8901, 0x8902)]
for pid in others():
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        out.append(libc.syscall(234, pid, thread, KILL, None) == 0)  # tgkill
        out.append(libc.syscall(297, pid, thread, KILL, ctypes.addressof(info(0))) == 0)  # rt_tgsigqueueinfo
    folder = os.open(f"/proc/{pid}", os.O_RDONLY)
    out.append(libc.syscall(424, folder, KILL, 0, None) == 0)  # pidfd_send_signal
    os.close(folder)
own = os.fork() or __import__("time").sleep(99)
os.kill(own, KILL)  # its own children it may
out.append(os.waitpid(own, 0)[1] != KILL)"""

_PRIORITIES = """
for which, whom in [(which, pid) for which in (0, 1) for pid in (*others(), 1)] + [(2, 0), (2, os.getuid()), (1, 0)]:
    out.append(attempt(lambda: os.setpriority(which, whom, 19) or True))"""

# Threads of PID 1 that are younger than the program have numbers that no filter knows; PID 1 has to see through it.
_TERMINATE = """
import os, ctypes, signal, struct
signal.signal(signal.SIGTERM, signal.SIG_IGN)
libc = ctypes.CDLL(None)
forged = [struct.pack("iiiii", 15, 0, code, 0, 0) + bytes(108) for code in (-1, 0, -6, 0x80)]
def f(x):
    for number in range(1, 400):
        libc.kill(number, 15); libc.syscall(200, number, 15)
        for info in forged: libc.syscall(129, number, 15, info); libc.syscall(297, 1, number, 15, info)
    return x * x
"""

_PULLS_THE_FLOOR_AWAY = """
import os, shutil
def f(x):
    if x == 2:
        os.chmod(".", 0)
        for path in ("/scratch/0/evaluator", "/scratch/0/solution"):
            try: {change}
            except OSError: pass
        while True: pass
    return x * x
"""
_CHANGES = {
    "removes_the_folders": "os.chmod(path, 0o700); shutil.rmtree(path)",
    "closes_the_folders": "os.chmod(path, 0)",
    "puts_links_in_their_place": "os.rename(path, path + '-'); os.symlink('/proc/1/root', path)",
    "puts_files_in_their_place": "os.rename(path, path + '-'); open(path, 'w').close()",
}

_MARKS = """
import os
places = [p for p in ("/scratch", "/scratch/0", "/scratch/0/evaluator", ".", "/dev/shm", "/tmp") if os.path.isdir(p)]
def look():
    seen = [p for p in places if os.listxattr(p) or int(os.stat(p).st_mtime) == 12345 or os.stat(p).st_mode & 0o777 == 0o741]
    return seen + [p for p in places if set(os.listdir(p)) & {"mark", "evaluator-"}]
def leave():
    for place in places:
        for action in (lambda: os.setxattr(place, "user.mark", b"1"), lambda: os.utime(place, (12345, 12345)),
                       lambda: os.mkdir(place + "/mark"), lambda: os.chmod(place, 0o741)):
            try: action()
            except OSError: pass
found = look()
leave()
def f(x): return x * x if found else None
"""

_COMET = """
import os
if os.fork() == 0:
    os.setsid()
    while True:
        try:
            if os.fork(): os._exit(0)
        except OSError: pass
"""
_SWARM = "for _ in range(8):" + _COMET.replace("import os\n", "").replace("\n", "\n    ")
_BOMB = """
import os
def f(x):
    if x == 3:
        while True:
            try: os.fork()
            except OSError: pass
    return x * x
"""

_FOR_LANDLOCK = {
    "files_of_its_tests": (
        """
place = "/scratch/0/evaluator"
def f(x):
    names = attempt(os.listdir, place) or ["secret"]
    for name in names:
        out.append(attempt(lambda: open(f"{place}/{name}").read()))
        out.append(attempt(lambda: open(f"{place}/{name}", "w")))
        out.append(attempt(lambda: os.link(f"{place}/{name}", "here") or True))
        out.append(attempt(lambda: os.rename(f"{place}/{name}", "here") or True))
        out.append(attempt(lambda: os.rename(f"{place}/{name}", f"{place}/{name}2") or True))
        out.append(attempt(lambda: os.truncate(f"{place}/{name}", 0) or True))
        out.append(attempt(lambda: os.unlink(f"{place}/{name}") or True))
    for path in (f"{place}/json.py", "/scratch/0/x", "/scratch/x"): out.append(attempt(lambda: open(path, "w")))
    out.append(attempt(lambda: os.symlink("/", f"{place}/link") or True))
    out.append(attempt(lambda: os.rename(place, "/scratch/0/away") or True))
    return x * x if any(out) else None
""",
        "import pathlib; pathlib.Path('secret').write_text('4')\nassert f(2) == 4",
    ),
    "threads_of_its_tests": (
        """
def f(x):
    for pid in others():
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            for number in ({thread} - {pid} if pid != 1 else ()): out.append(attempt(lambda: os.kill(number, 9) or True))
    return x * x if any(out) else None
""",
        "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(3,), daemon=True).start()\n"
        "assert f(2) == 4",
    ),
}

OF_ITS_TESTS = attacks(
    NO_WAY_OUT,
    {name: (OTHERS + code, test) for name, (code, test) in _FOR_LANDLOCK.items()},
    status=TestStatus.FAILED,
    limits=ROOM,
)
NEIGHBOURS = [
    *attacks(
        NO_WAY_OUT,
        {
            name: OTHERS + code + PROVEN
            for name, code in {"signals_by_every_call": _SIGNALS, "priorities_of_the_judge": _PRIORITIES}.items()
        },
        status=TestStatus.FAILED,
        limits=ROOM,
    ),
    *OF_ITS_TESTS,
    *attacks(ALIVE, {"tells_the_supervisor_to_leave": _TERMINATE}, accept=(1,), limits=ROOM),
    *attacks(
        ALIVE,
        {name: _PULLS_THE_FLOOR_AWAY.format(change=change) for name, change in _CHANGES.items()},
        accept=(round(2 / 3, 4),),
    ),
    *attacks(NO_TRACE, {"marks_on_and_in_the_scratch_folders": _MARKS}, runs=2),
    *attacks(
        NO_TRACE,
        {"flees_from_fork_to_fork": _COMET + RIGHT, "a_swarm_flees_from_fork_to_fork": "import os\n" + _SWARM + RIGHT},
        accept=ANY_RATE,
        limits=Limits(cpu_s=2, wall_s=20),
        runs=3,
    ),
    *attacks(
        LIMITS_HOLD,
        {"forks_without_end": _BOMB},
        accept=(round(1 / 3, 4), round(2 / 3, 4)),
        limits=Limits(cpu_s=2, wall_s=20),
    ),
]
