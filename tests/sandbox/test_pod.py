"""The pod backend: a real supervisor of the judge image on TCP, on a network that leads nowhere."""

import hashlib
import secrets
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import docker
import pytest

from sandbox.judge import frames, protocol
from sandbox.pod import METRICS_PORT, PodSandbox, connect, local_pod
from sandbox.types import Limits, SandboxRefusedError, SandboxUnavailableError, Submission, TestStatus, Verdict

pytestmark = pytest.mark.docker
PASSED, FAILED = TestStatus.PASSED, TestStatus.FAILED


@pytest.fixture(scope="module")
def pod(container_engine: str, judge_image: str) -> Iterator[tuple[str, str]]:
    with local_pod(judge_image, container_engine, slots=2) as address_and_token:
        yield address_and_token


@pytest.fixture
def sandbox(pod: tuple[str, str]) -> Iterator[PodSandbox]:
    with PodSandbox(address=pod[0], token=pod[1], slots=2) as sandbox:
        yield sandbox


def judge(sandbox: PodSandbox, code: str, *tests: str, limits: Limits | None = None) -> Verdict:
    return sandbox.judge(Submission(id="t", code=code, tests=tests, limits=limits or Limits(cpu_s=0.5, wall_s=5)))


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_right_and_wrong(sandbox: PodSandbox) -> None:
    verdict = judge(sandbox, "def f(x): return x * x", "assert f(2) == 4", "assert f(2) == 5", "f(")
    assert verdict.statuses == (PASSED, FAILED, TestStatus.ERROR)
    assert sandbox.survivors() == []


def test_a_scratch_that_is_mounted_open_to_all_is_closed(sandbox: PodSandbox) -> None:
    code = """
import os
def f():
    try: open("/scratch/left behind", "w")
    except PermissionError: return oct(os.stat("/scratch").st_mode & 0o7777)
"""
    assert judge(sandbox, code, "assert f() == '0o711'").statuses == (PASSED,)


def test_counters_are_served_but_not_to_programs(pod: tuple[str, str], sandbox: PodSandbox) -> None:
    code = """
import socket
def f(host, port):
    with socket.socket() as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        return sock.recv(10)
"""
    host = pod[0].rpartition(":")[0]
    tests = [f"assert f({own.encode()}, {METRICS_PORT}) == b''" for own in (host, "127.0.0.1")]
    verdict = judge(sandbox, code, *tests)
    assert verdict.statuses == (PASSED, PASSED), verdict.details
    with urllib.request.urlopen(f"http://{host}:{METRICS_PORT}/metrics", timeout=60) as answer:
        served = answer.read().decode().splitlines()
    stats = sandbox.stats()
    assert f"diffrl_sandbox_judged_total {stats['judged']}" in served and stats["judged"] >= 1
    assert f"diffrl_sandbox_slots {stats['slots']}" in served


def test_what_a_program_prints_does_not_reach_the_log_of_the_pod(sandbox: PodSandbox) -> None:
    code = "import os\ndef f(): return [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]"
    verdict = judge(sandbox, code, "assert f() == ['/dev/null'] * 3, f()")
    assert verdict.statuses == (PASSED,), verdict.details


def test_many_clients_at_once(pod: tuple[str, str]) -> None:
    def client(number: int) -> list[TestStatus]:
        with PodSandbox(address=pod[0], token=pod[1], slots=2) as sandbox:
            return [judge(sandbox, f"def f(): return {number}", f"assert f() == {n}").statuses[0] for n in range(4)]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(client, range(4)))
    for number, statuses in enumerate(results):
        assert statuses == [PASSED if n == number else FAILED for n in range(4)]


@pytest.mark.parametrize("token", ["", "x" * 32])
def test_a_wrong_token_is_refused(pod: tuple[str, str], token: str) -> None:
    with pytest.raises(SandboxUnavailableError, match=r"different tokens.*DIFFRL_SANDBOX_TOKEN"):
        connect(pod[0], token)
    with PodSandbox(address=pod[0], token=token) as sandbox, pytest.raises(SandboxUnavailableError):
        judge(sandbox, "", "assert True")


def test_nothing_is_judged_before_the_token_is_proved(pod: tuple[str, str]) -> None:
    submission = protocol.submission_to_wire(Submission(id="t", code="", tests=("assert True",)))
    with dial(pod[0]) as sock:
        assert frames.recv(sock)["hello"]["challenge"]
        frames.send(sock, {"id": 1, "op": "judge", "submission": submission})
        assert frames.recv(sock) == {"error": "wrong token"}
        assert sock.recv(1) == b""


def test_a_proof_is_good_for_one_challenge(pod: tuple[str, str]) -> None:
    with dial(pod[0]) as first, dial(pod[0]) as second:
        challenge = frames.recv(first)["hello"]["challenge"]
        assert frames.recv(second)["hello"]["challenge"] != challenge
        frames.send(second, {"proof": protocol.proof(pod[1], challenge, "client"), "challenge": "00"})
        assert frames.recv(second) == {"error": "wrong token"}


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x01\x00\x00" + b"x" * 70000, b"GET / HTTP/1.1\r\n\r\n"])
def test_strangers_are_hung_up_on(pod: tuple[str, str], sandbox: PodSandbox, data: bytes) -> None:
    with dial(pod[0]) as sock:
        frames.recv(sock)
        sock.sendall(data)
        assert "bytes, at most 4096 are allowed" in frames.recv(sock)["error"]
        with pytest.raises((ConnectionResetError, EOFError)):
            frames.recv(sock)
    assert judge(sandbox, "", "assert True").statuses == (PASSED,)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tests": "assert True"}, "tests: give a list of strings"),
        ({"mode": "telepathy"}, "mode is 'telepathy': choose from"),
        ({"limits": {"cpu_s": 1}}, "limits: give an object with the fields cpu_s, max_processes, memory_mb"),
        ({"code": None}, "code: give a string"),
        ({"more": 1}, "submission: give an object with the fields"),
    ],
)
def test_a_bad_request_is_answered_and_hurts_nobody(pod: tuple[str, str], change: dict, complaint: str) -> None:
    submission = protocol.submission_to_wire(Submission(id="t", code="", tests=("assert True",)))
    with dial(pod[0]) as sock:
        challenge = frames.recv(sock)["hello"]["challenge"]
        frames.send(sock, {"proof": protocol.proof(pod[1], challenge, "client"), "challenge": "0"})
        assert frames.recv(sock) == {"welcome": protocol.proof(pod[1], "0", "supervisor")}
        frames.send(sock, {"id": 1, "op": "judge", "submission": submission | change})
        answer = frames.recv(sock)
        assert answer["id"] == 1 and answer["error"].startswith(complaint)
        frames.send(sock, {"id": 2, "op": "dance"})
        assert frames.recv(sock) == {"id": 2, "error": "unknown operation 'dance'"}
        frames.send(sock, {"id": 3, "op": "judge", "submission": submission})
        assert frames.recv(sock)["verdict"]["statuses"] == ["passed"]


def test_a_rogue_supervisor_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:

        def rogue() -> None:
            sock, _ = server.accept()
            with sock:
                frames.send(sock, {"hello": {"slots": 1, "python": "3.11.2", "challenge": "aa"}})
                frames.send(sock, {"welcome": frames.recv(sock)["proof"]})

        answered = threads.submit(rogue)
        with pytest.raises(SandboxUnavailableError, match="different tokens"):
            connect(f"127.0.0.1:{server.getsockname()[1]}", secrets.token_hex(16))
        answered.result(60)


@pytest.mark.parametrize("address", ["localhost", "localhost:x", ":7010"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(SandboxUnavailableError, match=r"addresses.*host:port"):
        connect(address, "x" * 32)


HUNT = """
import ctypes, hashlib, re
def f(digest):
    seen = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.split()[1].startswith("rw"):
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                data = ctypes.string_at(first, last - first)
                for word in set(re.findall(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", data)):
                    seen += 1
                    if hashlib.sha256(word).hexdigest() == digest: return "found"
    return seen
planted = "0123456789abcdef" + "0123456789abcdef"
"""


def test_no_process_that_runs_programs_holds_the_token(pod: tuple[str, str], sandbox: PodSandbox) -> None:
    """The program looks for whatever hashes to the given digest in all memory it was forked with."""
    digests = [hashlib.sha256(word.encode()).hexdigest() for word in (pod[1], "0123456789abcdef" * 2)]
    limits = Limits(cpu_s=10, wall_s=60)
    verdict = judge(sandbox, HUNT, *(f"assert False, f('{digest}')" for digest in digests), limits=limits)
    assert verdict.details[0].startswith("AssertionError: ") and "found" not in verdict.details[0]
    assert verdict.details[1] == "AssertionError: found"  # the hunt does find what is there


def test_a_program_that_connects_from_inside_keeps_nobody_out(pod: tuple[str, str], sandbox: PodSandbox) -> None:
    code = """
import socket, time
def f(host, port):
    sockets = [socket.create_connection((host, port)) for _ in range(60)]
    time.sleep(2)
    greeted = 0
    for sock in sockets:
        sock.settimeout(1)
        try: greeted += bool(sock.recv(100))
        except OSError: pass
    return greeted
"""
    host, _, port = pod[0].rpartition(":")
    patient = Limits(cpu_s=5, wall_s=60)
    with ThreadPoolExecutor(1) as threads:
        flood = threads.submit(judge, sandbox, code, f"assert f({host!r}, {port}) <= 16", limits=patient)
        while not flood.done():
            connect(*pod).close()
        assert flood.result().statuses == (PASSED,), flood.result().details


@pytest.mark.parametrize("token", [None, "short"])
def test_it_does_not_listen_without_a_token(container_engine: str, judge_image: str, token: str | None) -> None:
    client = docker.DockerClient(base_url=container_engine)
    environment = {} if token is None else {"DIFFRL_SANDBOX_TOKEN": token}
    container = client.containers.create(
        judge_image, ["--listen", "0.0.0.0:7010"], network_mode="none", environment=environment
    )
    try:
        container.start()
        assert container.wait(timeout=60)["StatusCode"] == 2
        assert b"--listen needs a token of 16 characters or more" in container.logs()
    finally:
        container.remove(force=True)
        client.close()


def test_it_does_not_start_where_programs_cannot_have_uids_of_their_own(
    container_engine: str, judge_image: str
) -> None:
    client = docker.DockerClient(base_url=container_engine)
    container = client.containers.create(judge_image, network_mode="none", cap_drop=["ALL"])
    try:
        container.start()
        assert container.wait(timeout=60)["StatusCode"] == 2
        assert b"runs as root without CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID" in container.logs()
    finally:
        container.remove(force=True)
        client.close()


def test_sigterm_drains(container_engine: str, judge_image: str) -> None:
    client = docker.DockerClient(base_url=container_engine)
    slow = "import time\ndef f():\n    time.sleep(3)\n    return 1"
    patient = Limits(cpu_s=1, wall_s=60)
    with (
        local_pod(judge_image, container_engine, slots=1) as (address, token),
        PodSandbox(address=address, token=token, slots=4) as sandbox,
        ThreadPoolExecutor(2) as threads,
    ):
        accepted = [threads.submit(judge, sandbox, slow, "assert f() == 1", limits=patient) for _ in range(2)]
        deadline = time.monotonic() + 60
        while (stats := sandbox.stats())["busy"] + stats["waiting"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (container,) = client.containers.list(
            filters={"label": "diffrl.sandbox", "network": network_of(client, address)}
        )
        container.kill("SIGTERM")
        while not sandbox.stats()["draining"]:
            assert time.monotonic() < deadline
        with pytest.raises(SandboxRefusedError, match="about to leave"):
            judge(sandbox, "", "assert True")
        assert [future.result(60).statuses for future in accepted] == [(PASSED,), (PASSED,)]
        assert container.wait(timeout=60)["StatusCode"] == 0
    client.close()


def network_of(client: docker.DockerClient, address: str) -> str:
    host = address.rpartition(":")[0]
    for network in client.networks.list(greedy=True):
        ends = (network.attrs.get("Containers") or {}).values()
        if any(end["IPv4Address"].partition("/")[0] == host for end in ends):
            return network.id
    raise AssertionError(f"no network holds {host}")


def test_a_broken_connection_is_made_anew(sandbox: PodSandbox) -> None:
    assert judge(sandbox, "", "assert True").statuses == (PASSED,)
    assert sandbox._connection is not None
    sandbox._connection.close()
    assert judge(sandbox, "", "assert True").statuses == (PASSED,)
