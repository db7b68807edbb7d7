"""The docker backend, sentence by sentence of its docstring, and what happens when its parts break."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from sandbox.client import ConnectionLostError
from sandbox.container import ContainerSandbox, require_available
from sandbox.image.build import build_image
from sandbox.types import (
    Limits,
    SandboxError,
    SandboxUnavailableError,
    Submission,
    SubmissionTooLargeError,
    TestStatus,
    Verdict,
)
from tests.container_engine import private_engine

pytestmark = pytest.mark.docker
PASSED, FAILED = TestStatus.PASSED, TestStatus.FAILED
SHORT = Limits(cpu_s=0.5, wall_s=5)


@pytest.fixture(scope="module")
def sandbox(container_engine: str, judge_image: str) -> Iterator[ContainerSandbox]:
    with ContainerSandbox(image=judge_image, slots=2, engine_url=container_engine) as sandbox:
        yield sandbox


@pytest.fixture
def own_sandbox(container_engine: str, judge_image: str) -> Iterator[ContainerSandbox]:
    """One whose container a test may break."""
    with ContainerSandbox(image=judge_image, slots=1, engine_url=container_engine) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def engine(container_engine: str) -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(base_url=container_engine)
    yield client
    client.close()


def judge(sandbox: ContainerSandbox, code: str, *tests: str, limits: Limits = SHORT) -> Verdict:
    return sandbox.judge(Submission(id="t", code=code, tests=tests, limits=limits))


def assert_clean(sandbox: ContainerSandbox) -> None:
    """Nothing is left, a right program passes and a wrong one does not."""
    assert sandbox.survivors() == []
    assert judge(sandbox, "def f(x): return x * x", "assert f(2) == 4").statuses == (PASSED,)
    assert judge(sandbox, "def f(x): return 4", "assert f(3) == 9").statuses == (FAILED,)


def await_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def running(engine: docker.DockerClient) -> set[str]:
    return {container.id for container in engine.containers.list(all=True, ignore_removed=True)}


def test_every_status(sandbox: ContainerSandbox) -> None:
    code = """
import os, time
def f(x):
    if x == 1: return 1
    if x == 2: return 5
    if x == 3: raise ValueError(x)
    if x == 4:
        while True: pass
    if x == 5: bytearray(8 << 30)
    if x == 6: os._exit(0)
"""
    verdict = judge(sandbox, code, *(f"assert f({x}) == {x}" for x in range(1, 7)))
    assert [str(status) for status in verdict.statuses] == [
        "passed",
        "failed",
        "error",
        "timeout",
        "out_of_memory",
        "killed",
    ]
    assert verdict.trust == "high" and verdict.cpu_s >= 0.1


WHO = """
import os, socket
def f(what):
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    if what == "uid": return os.getuid()
    if what == "write":
        refused = []
        for path in ("/x", "/usr/x", "/opt/judge/x", "/scratch/x", "/scratch/0/x", "/scratch/1/x", "/etc/passwd"):
            try: open(path, "a").close()
            except OSError: refused.append(path)
        return len(refused)
    if what == "network":
        names = [name for _, name in socket.if_nameindex()]
        try: socket.create_connection(("172.17.0.1", 80), timeout=1)
        except OSError: return names
        return "connected"
    if what == "slots":
        return [name for name in ("/scratch/0/solution", "/scratch/1/solution") if os.access(name, os.R_OK)]
    if what == "env": return dict(os.environ)
    if what == "tracer":
        readable = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            for name in ("mem", "environ", "fd", "maps"):
                try: os.listdir(f"/proc/{pid}/fd") if name == "fd" else open(f"/proc/{pid}/{name}").close()
                except OSError: continue
                readable.append(int(pid))
        return set(readable) - {os.getpid()}
    return status[what].split()[0]
"""


def test_what_a_program_is_and_sees(sandbox: ContainerSandbox) -> None:
    checks = {
        "'CapEff'": "'0000000000000000'",
        "'CapBnd'": "'00000000000000e3'",
        "'NoNewPrivs'": "'1'",
        "'Seccomp'": "'2'",
        "'write'": "7",
        "'env'": "{}",
        "'network'": "['lo']",
        "'tracer'": "set()",
    }
    tests = [f"assert f({key}) == {value}, f({key})" for key, value in checks.items()]
    tests.append("assert len(f('slots')) == 1")
    verdict = judge(sandbox, WHO, *tests)
    assert verdict.statuses == (PASSED,) * len(tests), verdict.details


def test_every_program_has_a_uid_of_its_own(sandbox: ContainerSandbox) -> None:
    seen = [judge(sandbox, WHO, "import os; assert False, (f('uid'), os.getuid())").details[0] for _ in range(4)]
    uids = [int(uid) for detail in seen for uid in detail.partition("(")[2].rstrip(")").split(", ")]
    assert len(set(uids)) == len(uids) == 8
    assert min(uids) >= 1 << 20


def test_the_container_is_confined(sandbox: ContainerSandbox, engine: docker.DockerClient) -> None:
    assert_clean(sandbox)
    assert sandbox.container_id is not None
    inspected = engine.api.inspect_container(sandbox.container_id)
    host = inspected["HostConfig"]
    assert host["NetworkMode"] == "none" and host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
    assert not host["Privileged"] and not host["Binds"] and not inspected["Mounts"]
    assert host["Memory"] == host["MemorySwap"] == (2 * 1024 + 256) << 20
    assert host["PidsLimit"] == 64 + 160 * 2 and host["NanoCpus"] > 0
    assert inspected["Config"]["Env"] is None or not any("TOKEN" in line for line in inspected["Config"]["Env"])


LEFTOVERS = {
    "a deep tree": "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')",
    "files of mode 0": "import os\nfor folder in ('/tmp', '/dev/shm'):\n"
    "    os.makedirs(folder + '/a/b'); open(folder + '/a/b/c', 'w').close(); os.chmod(folder + '/a', 0)",
    "a fifo and a socket": "import os, socket\nos.mkfifo('/tmp/p')\nsocket.socket(socket.AF_UNIX).bind('/tmp/s')",
    "System V objects": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert min(libc.shmget(7, 4096, 0o1666), libc.semget(7, 1, 0o1666), libc.msgget(7, 0o1666)) >= 0",
    "daemons": "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nif os.fork() == 0:\n"
    "    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)",
    "a full disk": "import os\nfor folder in ('/tmp', '/dev/shm'):\n    try:\n        for i in range(20):\n"
    "            open(f'{folder}/{i}', 'wb').write(bytes(30 << 20))\n    except OSError: pass",
    "all inodes": "import os\ntry:\n    for i in range(10**6): os.mkdir(f'{i}')\nexcept OSError: pass",
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_nothing_is_left_for_the_next_program(own_sandbox: ContainerSandbox, name: str) -> None:
    roomy = Limits(cpu_s=5, wall_s=30)
    verdict = judge(own_sandbox, LEFTOVERS[name] + "\ndef f(): return 1", "assert f() == 1", limits=roomy)
    assert verdict.statuses == (PASSED,), verdict.details
    container = own_sandbox.container_id
    assert_clean(own_sandbox)
    assert own_sandbox.container_id == container


def test_slots_judge_at_the_same_time(sandbox: ContainerSandbox) -> None:
    meet = """
import os, time
def f(me, other):
    open(f"/dev/shm/{me}", "w").close()
    deadline = time.monotonic() + 30
    while not os.path.exists(f"/dev/shm/{other}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    return True
"""
    patient = Limits(cpu_s=10, wall_s=60)
    with ThreadPoolExecutor(2) as threads:
        tests = "assert f('here', 'there')", "assert f('there', 'here')"
        verdicts = list(threads.map(lambda test: judge(sandbox, meet, test, limits=patient), tests))
    assert [verdict.statuses for verdict in verdicts] == [(PASSED,), (PASSED,)]


PRIVATE = """
import os, subprocess, sys, tempfile, time
def f(me, other):
    os.mkdir("/tmp/name")
    with open("/tmp/name/file", "w") as file: file.write(me)
    subprocess.run([sys.executable, "-c", "open('/tmp/name/file', 'a').write('+')"], check=True)
    os.system("echo - >> /tmp/name/file")
    open(f"/dev/shm/{me}", "w").close()
    deadline = time.monotonic() + 30
    while not os.path.exists(f"/dev/shm/{other}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    with tempfile.NamedTemporaryFile() as file: assert file.name.startswith("/tmp/")
    return sorted(os.listdir("/tmp")), sorted(os.listdir(".")), open("/tmp/name/file").read()
"""


def test_programs_that_run_at_the_same_time_do_not_meet_in_tmp(sandbox: ContainerSandbox) -> None:
    names = "here", "there"
    tests = [f"assert f({a!r}, {b!r}) == (['name'], ['name'], '{a}+-\\n')" for a, b in (names, names[::-1])]
    with ThreadPoolExecutor(2) as threads:
        patient = Limits(cpu_s=10, wall_s=60)
        verdicts = list(threads.map(lambda test: judge(sandbox, PRIVATE, test, limits=patient), tests))
    assert [verdict.statuses for verdict in verdicts] == [(PASSED,), (PASSED,)], verdicts


def test_verdicts_find_their_submissions(sandbox: ContainerSandbox) -> None:
    def judged(number: int) -> Verdict:
        tests = (*(f"assert f({x}) == {x * number}" for x in range(number % 3 + 1)), "assert f(1) == 0")
        return sandbox.judge(
            Submission(id=f"n{number}", code=f"def f(x): return x * {number}", tests=tests, limits=SHORT)
        )

    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(judged, range(1, 101)))
    for number, verdict in enumerate(verdicts, start=1):
        assert verdict.id == f"n{number}"
        assert verdict.statuses == (*[PASSED] * (number % 3 + 1), FAILED)


def test_a_killed_container_is_an_error_and_the_next_call_starts_another(
    own_sandbox: ContainerSandbox, engine: docker.DockerClient
) -> None:
    assert_clean(own_sandbox)
    first = own_sandbox.container_id
    assert first is not None
    with ThreadPoolExecutor(1) as threads:
        doomed: Future[Verdict] = threads.submit(
            judge, own_sandbox, "import time\ndef f(): time.sleep(60)", "f()", limits=Limits(cpu_s=1, wall_s=100)
        )
        await_until(lambda: own_sandbox.stats()["busy"] == 1)
        engine.api.kill(first)
        with pytest.raises(ConnectionLostError):
            doomed.result(60)
    assert_clean(own_sandbox)
    assert own_sandbox.container_id != first
    await_until(lambda: first not in running(engine))


def test_a_slot_that_dies_is_an_error_and_is_replaced(
    own_sandbox: ContainerSandbox, engine: docker.DockerClient
) -> None:
    assert_clean(own_sandbox)
    container = own_sandbox.container_id
    supervisor = engine.api.inspect_container(container)["State"]["Pid"]
    (nursery,) = children(supervisor)
    os.kill(max(children(nursery)), signal.SIGKILL)  # the session: forked last
    with pytest.raises(SandboxError, match="a slot of the sandbox died"):
        judge(own_sandbox, "", "assert True")
    assert_clean(own_sandbox)
    assert own_sandbox.container_id == container


def test_a_fresh_container_after_so_many_submissions(
    container_engine: str, judge_image: str, engine: docker.DockerClient
) -> None:
    with ContainerSandbox(image=judge_image, slots=1, engine_url=container_engine, recycle_after=2) as sandbox:
        seen = []
        for _ in range(5):
            assert judge(sandbox, "", "assert True").statuses == (PASSED,)
            seen.append(sandbox.container_id)
        assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
        await_until(lambda: not {seen[0], seen[2]} & running(engine))
    await_until(lambda: seen[4] not in running(engine))


@pytest.mark.parametrize("frozen_until", [None, "another starts", "another ends"])
def test_a_killed_client_leaves_no_container(
    container_engine: str,
    judge_image: str,
    engine: docker.DockerClient,
    own_sandbox: ContainerSandbox,
    frozen_until: str | None,
) -> None:
    program = (
        "import sys, time; from sandbox.container import ContainerSandbox; from sandbox.types import Submission\n"
        "sandbox = ContainerSandbox(image=sys.argv[1], engine_url=sys.argv[2])\n"
        "sandbox.judge(Submission(id='t', code='', tests=('assert True',)))\n"
        "print(sandbox.container_id, flush=True); time.sleep(600)"
    )
    if frozen_until == "another ends":
        judge(own_sandbox, "", "assert True")
    client = subprocess.Popen(
        [sys.executable, "-c", program, judge_image, container_engine],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert client.stdout is not None
    with client, client.stdout:
        container = client.stdout.readline().strip()
        assert container in running(engine)
        if frozen_until is not None:
            engine.containers.get(container).pause()
        client.kill()
    if frozen_until is not None:
        assert container in running(engine)
    if frozen_until == "another starts":
        assert judge(own_sandbox, "", "assert True").statuses == (PASSED,)
    own_sandbox.close()
    await_until(lambda: container not in running(engine))


def test_a_submission_that_is_too_large(own_sandbox: ContainerSandbox) -> None:
    with pytest.raises(SubmissionTooLargeError, match="at most"):
        judge(own_sandbox, "#" * (33 << 20), "assert True")
    assert_clean(own_sandbox)


def test_close_while_judging(own_sandbox: ContainerSandbox) -> None:
    assert_clean(own_sandbox)
    closer = threading.Timer(0.5, own_sandbox.close)
    closer.start()
    with pytest.raises(ConnectionLostError):
        judge(own_sandbox, "import time\ndef f(): time.sleep(60)", "f()", limits=Limits(cpu_s=1, wall_s=100))
    closer.join()
    assert_clean(own_sandbox)


def test_engine_or_image_missing(container_engine: str, judge_image: str, engine: docker.DockerClient) -> None:
    require_available(judge_image, container_engine)
    with pytest.raises(SandboxUnavailableError, match=r"no container engine answers.*sandbox.backend: process"):
        require_available(judge_image, "unix:///nowhere/docker.sock")
    with pytest.raises(SandboxUnavailableError, match=r"no image diffrl-nowhere:1.*diffrl sandbox build"):
        require_available("diffrl-nowhere:1", container_engine)
    with (
        ContainerSandbox(image="diffrl-nowhere:1", engine_url=container_engine) as sandbox,
        pytest.raises(SandboxError, match=r"could not start a sandbox container.*No such image"),
    ):
        judge(sandbox, "", "assert True")


def test_an_engine_that_stops(container_engine: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start an engine that may be stopped")
    with private_engine() as url:
        build_image("base", "diffrl-sandbox:test", engine_url=url)
        sandbox = ContainerSandbox(image="diffrl-sandbox:test", slots=1, engine_url=url)
        assert_clean(sandbox)
    with sandbox, pytest.raises(SandboxUnavailableError, match=r"no container engine answers at .*: start Docker"):
        judge(sandbox, "", "assert True")


def test_an_image_of_another_version(container_engine: str, judge_image: str, engine: docker.DockerClient) -> None:
    api = engine.api
    other = api.commit(
        api.create_container(judge_image)["Id"], "diffrl-other", "1", changes="LABEL diffrl.judge=0123456789abcdef"
    )
    for container in engine.containers.list(
        all=True, ignore_removed=True, filters={"ancestor": judge_image, "status": "created"}
    ):
        container.remove()
    try:
        with pytest.raises(SandboxUnavailableError, match=r"another version of the judge.*diffrl sandbox build"):
            require_available("diffrl-other:1", container_engine)
    finally:
        api.remove_image(other["Id"], force=True)


def test_another_runtime_is_asked_of_the_engine(container_engine: str, judge_image: str) -> None:
    with (
        ContainerSandbox(image=judge_image, runtime="no-such-runtime", engine_url=container_engine) as sandbox,
        pytest.raises(SandboxError, match="no-such-runtime"),
    ):
        judge(sandbox, "", "assert True")
