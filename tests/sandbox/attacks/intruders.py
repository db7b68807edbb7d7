"""Programs that look for other processes, for the machine's files, and for the programs before and after them."""

from sandbox.types import TestStatus
from tests.sandbox.attacks.attack import (
    ALIVE,
    ANY_RATE,
    NO_FORGERY,
    NO_TRACE,
    NO_WAY_OUT,
    RIGHT,
    ROOM,
    attacks,
)

OTHERS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def others(): return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
def attempt(action, *args):
    try: return action(*args)
    except (OSError, ValueError): return None
out = []
"""
PROVEN = "\ndef f(x): return x * x if any(out) else None\n"

_WAYS_OUT = {
    "files_of_other_processes": """
for pid in others():
    for name in ("mem", "environ", "maps", "auxv", "io", "stack", "syscall", "personality"):
        out.append(attempt(lambda: open(f"/proc/{pid}/{name}", "rb").read(1)))
    for name in ("fd", "map_files", "root/opt", "cwd/."):
        out.append(attempt(lambda: os.listdir(f"/proc/{pid}/{name}")))
    for name in ("oom_score_adj", "clear_refs", "coredump_filter"):
        out.append(attempt(lambda: open(f"/proc/{pid}/{name}", "w").write("1")))""",
    "traces_and_reads_other_processes": """
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
here = Vector(ctypes.addressof(buffer), 8)
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
for pid in others():
    for address in (0x400000, id(out), ctypes.addressof(buffer)):
        there = Vector(address, 8)
        out.append(libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0)
        out.append(libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0)
    out += [libc.ptrace(request, pid, 0, 0) == 0 for request in (PTRACE_ATTACH, PTRACE_SEIZE)]
    pidfd = libc.syscall(434, pid, 0)  # pidfd_open
    out += [libc.syscall(438, pidfd, fd, 0) >= 0 for fd in range(32)]  # pidfd_getfd""",
    "priorities_limits_and_cores_of_other_processes": """
import resource
for pid in others():
    out.append(attempt(lambda: os.setpriority(os.PRIO_PROCESS, pid, 19) or True))
    out.append(attempt(lambda: os.sched_setaffinity(pid, {0}) or True))
    out.append(attempt(lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)) or True))
    out.append(attempt(lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))))
    out.append(libc.syscall(251, 1, pid, 3 << 13) == 0)  # ioprio_set""",
    "network_and_sockets_of_the_machine": r"""
import socket
def reached(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as end:
        end.settimeout(0.2)
        end.connect(address)
        return True
for address in (("127.0.0.1", 22), ("10.0.0.1", 80), ("169.254.169.254", 80), ("1.1.1.1", 53)):
    out.append(attempt(reached, socket.AF_INET, address))
for path in ("/var/run/docker.sock", "/run/systemd/private", "/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0"):
    out.append(attempt(reached, socket.AF_UNIX, path))
for line in open("/proc/net/unix").readlines()[1:]:
    if "@" in line: out.append(attempt(reached, socket.AF_UNIX, "\0" + line.split()[7][1:]))
out.append(attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)))""",
    "files_and_rights_of_the_machine": """
import glob, sys
for path in ("/etc/shadow", "/home", "/work", "/proc/1/root/etc/shadow", "/dev/mem", "/dev/kmsg", "/dev/vda",
             "/proc/kcore", "/proc/kmsg", "/sys/fs/cgroup/cgroup.procs", "/var/lib/docker", "/run/secrets"):
    out.append(attempt(lambda: open(path, "rb").read(1)))
    out.append(attempt(os.listdir, path))
out += [key for key in os.environ if key not in ("LC_CTYPE", "PATH", "HOME", "HOSTNAME", "LANG")]
for path in ("/usr/lib", "/etc", "/opt", "/bin", "/", "/dev", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
             "/proc/sys/kernel/hostname", *glob.glob("/opt/judge/sandbox/judge/*"), *sys.path):
    writable = os.O_WRONLY | os.O_CREAT
    out.append(attempt(lambda: os.open(path + "/x" if os.path.isdir(path) else path, writable)))
libc.setuid(0); libc.setresuid(0, 0, 0); libc.setgroups(0, None)
out += [os.getuid() == 0, libc.sethostname(b"x", 1) == 0, libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0]
out += [attempt(os.chroot, "/proc/1/root"), attempt(lambda: os.mknod("device", 0o60644, os.makedev(8, 0)) or True)]""",
}

# Each of these runs twice: what the first run leaves, the second must not find.
_MARKS = {
    "files": """
import os
places = ["/tmp/mark", "/dev/shm/mark", "/var/tmp/mark", "mark", "../mark", "/run/mark", "/dev/mqueue/mark"]
def look(): return [place for place in places if os.path.lexists(place)]
def leave():
    for place in places:
        try: open(place, "w").write("1"); os.chmod(place, 0)
        except OSError: pass""",
    "attributes_of_folders": """
import os
places = [place for place in ("/tmp", "/dev/shm", ".", "/scratch", "/var/tmp", "/dev") if os.path.isdir(place)]
def look(): return [p for p in places if os.listxattr(p) or int(os.stat(p).st_mtime) == 12345]
def leave():
    for place in places:
        for action in (lambda: os.setxattr(place, "user.mark", b"1"), lambda: os.utime(place, (12345, 12345))):
            try: action()
            except OSError: pass""",
    "system_v_objects": """
import ctypes
libc = ctypes.CDLL(None)
def look(): return any(line.split()[0] == "77777" for k in ("shm", "sem", "msg") for line in open("/proc/sysvipc/" + k))
def leave(): libc.shmget(77777, 4096, 0o1666); libc.semget(77777, 1, 0o1666); libc.msgget(77777, 0o1666)""",
    "message_queues": """
import ctypes
libc = ctypes.CDLL(None)
def look(): return libc.syscall(240, b"mark", 0, 0, None) >= 0
def leave(): libc.syscall(240, b"mark", 0o102, 0o666, None)""",
    "keyrings": """
import ctypes
libc = ctypes.CDLL(None)
def look(): return [k for k in (-3, -4, -5, -6) if libc.syscall(250, 10, k, b"user", b"mark", 0) > 0]
def leave():
    for ring in (-3, -4, -5, -6): libc.syscall(248, b"user", b"mark", b"1", 1, ring)""",
    "a_daemon_with_a_socket": r"""
import os, socket, time
def look():
    end = socket.socket(socket.AF_UNIX)
    try: end.connect("\0mark"); return True
    except OSError: return False
def leave():
    ready = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        end = socket.socket(socket.AF_UNIX); end.bind("\0mark"); end.listen(); os.write(ready[1], b"1"); time.sleep(99)
    os.read(ready[0], 1)""",
    "a_lock_of_a_daemon": """
import fcntl, os, time
def look():
    fd = os.open(os.__file__, os.O_RDONLY)
    try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: return True
    finally: os.close(fd)
def leave():
    r, w = os.pipe()
    if os.fork() == 0:
        os.setsid(); fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX); os.write(w, b"1"); time.sleep(99)
    os.read(r, 1)""",
}

_LEFTOVERS = {
    "poisoned_imports": """
import glob, os, sys
libraries = [*glob.glob("/usr/lib/python3*"), *glob.glob("/usr/lib/python3*/*-packages"), os.path.dirname(os.__file__)]
names = ["sitecustomize.py", "usercustomize.py", "x.pth", "json.py", "os.py", "fractions.py", "evaluator.py", "pyvenv.cfg",
         "python311.zip", ".pythonrc.py", "__pycache__/json.cpython-311.pyc", "__pycache__/fractions.cpython-311.pyc"]
for place in {*sys.path, *libraries, ".", "/tmp", "/dev/shm", "/opt/judge", "/opt/judge/sandbox/judge"}:
    for name in names:
        try:
            os.makedirs(os.path.dirname(os.path.join(place, name)), exist_ok=True)
            open(os.path.join(place, name), "w").write("import os; os._exit(0)\\n")
        except OSError: pass
class Finder:
    def find_spec(self, *a): raise SystemExit
sys.meta_path.insert(0, Finder()); sys.path_hooks.insert(0, Finder); sys.path_importer_cache.clear()
os.environ.update(PYTHONSTARTUP="/tmp/os.py", PYTHONPATH="/tmp", LD_PRELOAD="/tmp/x.so", PATH="/tmp")""",
    "deep_folders": """
import os
home = os.getcwd()
for base in ("/dev/shm", "/tmp", home):
    try:
        os.chdir(base)
        for _ in range(700): os.mkdir("d" * 100); os.chdir("d" * 100)
        open("leaf", "w").close()
    except OSError: pass
os.chdir(home)""",
    "odd_names_and_modes": r"""
import os, socket
odd = [b"\xff\xfe", b"new\nline", b"-rf", b" ", b"~", b"\x1b[2J", b"*", b"a" * 255, b".removed-1-1", b"\xe2\x80\xae", b"..."]
for base in (b".", b"/dev/shm", b"/tmp"):
    for name in odd:
        inside = lambda *parts: os.path.join(base, name, *parts)
        try:
            os.mkdir(inside()); open(inside(name), "w").close(); os.mkfifo(inside(b"fifo"))
            os.symlink(b"/", inside(b"root")); os.symlink(b".", inside(b"loop")); os.link(inside(name), inside(b"hard"))
            os.mkdir(inside(b"closed")); open(inside(b"closed", b"x"), "w").close()
            os.chmod(inside(b"closed"), 0); os.chmod(inside(), 0)
        except OSError: pass
    try:
        os.mkfifo(base + b"/fifo"); os.symlink(b"/proc/1/root", base + b"/escape")
        socket.socket(socket.AF_UNIX).bind(base + b"/socket")
    except OSError: pass""",
    "closed_working_folder": """
import os
for path in (".", "/tmp", "/dev/shm"):
    try: os.chmod(path, 0)
    except OSError: pass""",
    "many_files": """
import os
for base in ("/dev/shm", "."):
    try:
        for n in range(4000): os.mknod(f"{base}/{n}")
    except OSError: pass""",
    "full_disk": """
for place in (".", "/tmp", "/dev/shm"):
    for n in range(8):
        try:
            with open(f"{place}/{n}", "wb") as file:
                for _ in range(31): file.write(bytes(1 << 20))
        except OSError: pass""",
    "sparse_and_deleted_files": """
import mmap, os
kept = []
for place in (".", "/dev/shm"):
    try:
        file = open(f"{place}/sparse", "w+b"); os.unlink(file.name); file.truncate(31 << 20); file.write(b"x")
        kept.append(mmap.mmap(file.fileno(), 31 << 20)); open(f"{place}/big", "wb").truncate(1 << 40)
    except OSError: pass""",
    "memory_of_nobody": """
import ctypes, os
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
try:
    for n in range(4): os.posix_fallocate(os.memfd_create(f"m{n}"), 0, 16 << 20)
except OSError: pass
for n in range(4): libc.shmat(libc.shmget(0, 16 << 20, 0o1600), None, 0)""",
    "namespaces_of_its_own": """
import ctypes, os, time
libc = ctypes.CDLL(None)
if os.fork() == 0:
    uid = os.getuid()
    for flag in (0x10000000 | 0x20000000, 0x00020000, 0x40000000, 0x08000000): libc.unshare(flag)  # user, pid, mount, ...
    try: open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
    except OSError: pass
    libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)
    if os.fork() == 0: os.setsid(); time.sleep(99)
    os._exit(0)
os.wait()""",
}

_SURVIVORS = {
    "signals_to_everybody": """
import os, signal
group, me = os.getpgrp(), os.getpid()
if os.fork() == 0:
    os.setsid()
    for number in (signal.SIGSTOP, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXCPU):
        for pid in range(1, 400):
            try: os.kill(pid, number) if pid != me else None
            except OSError: pass
    try: os.killpg(group, signal.SIGKILL)
    finally: os._exit(0)""",
    "stops_whoever_comes_to_kill_it": """
import ctypes, os, signal, threading
libc = ctypes.CDLL(None)
def storm(number):
    while True: libc.kill(-1, number)
if os.fork() == 0:
    os.setsid()
    for _ in range(3): threading.Thread(target=storm, args=(signal.SIGSTOP,)).start()
    storm(signal.SIGSTOP)""",
    "kills_whoever_comes_to_kill_it": """
import ctypes, os, signal, threading
libc = ctypes.CDLL(None)
def storm():
    while True: libc.kill(-1, signal.SIGKILL)
if os.fork() == 0:
    os.setsid()
    for _ in range(3): threading.Thread(target=storm).start()
    storm()""",
    "swaps_folders_while_they_are_removed": """
import os
os.mkdir("x"); os.chmod("x", 0o777)
for n in range(3):
    if os.fork() == 0:
        os.setsid()
        while True:
            for action in (lambda: os.mkdir(f"x/{n}"), lambda: os.rename(f"x/{n}", f"x/{n}-"), lambda: os.rmdir(f"x/{n}-"),
                           lambda: os.symlink("/dev/shm", f"x/{n}"), lambda: os.unlink(f"x/{n}")):
                try: action()
                except OSError: pass""",
    "daemons_that_hold_the_link": """
import ctypes, os, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
for n in range(6):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        while True:
            time.sleep(0.01)
            for fd in range(3, 10):
                try: os.write(fd, b"\\0\\0\\0\\2{}")
                except OSError: pass""",
}

# What is done to the ground that the next process of this program stands on, which the judge starts for the next test.
_TROUBLES = {
    "closes_its_folder": "closed = attempt(os.chmod, '.', 0)",
    "has_an_odd_name": r"libc.prctl(15, b'\xff\xfe) S 1 (')",
}
_HANGS = OTHERS + "{code}\ndef f(x):\n    while x == 3: pass\n    return x * x\n"

INTRUDERS = [
    *attacks(NO_WAY_OUT, {name: OTHERS + code + PROVEN for name, code in _WAYS_OUT.items()}, status=TestStatus.FAILED),
    *attacks(
        NO_TRACE,
        {
            f"mark_in_{name}": f"{code}\nfound = look()\nleave()\ndef f(x): return x * x if found else None\n"
            for name, code in _MARKS.items()
        },
        runs=2,
    ),
    *attacks(NO_TRACE, {name: code + RIGHT for name, code in _LEFTOVERS.items()}, accept=(1,), limits=ROOM, runs=2),
    *attacks(
        NO_TRACE,
        {name: (code + RIGHT, "import time; time.sleep(0.1)\nassert f(3) == 9") for name, code in _SURVIVORS.items()},
        accept=(0, 1),
        runs=3,
    ),
    *attacks(
        ALIVE,
        {"leaves_through_its_child": "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return x * x\n"},
        accept=ANY_RATE,
    ),
    *attacks(
        ALIVE,
        {f"{name}_and_hangs": _HANGS.format(code=code) for name, code in _TROUBLES.items()},
        accept=(round(2 / 3, 4),),
    ),
    *attacks(NO_FORGERY, {"answers_twice_by_fork": "import os\ndef f(x): return x + 1 if os.fork() else x + 3\n"}),
]
