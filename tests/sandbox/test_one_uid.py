"""A pod without root, as under the Pod Security standard `restricted`: the program has the judge's own uid."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from sandbox.judge import frames, protocol
from sandbox.pod import PodSandbox, local_pod
from sandbox.types import Limits, Submission, TestStatus, Verdict
from tests.sandbox import corpora
from tests.sandbox.attacks import ATTACKS, NEIGHBOURS
from tests.sandbox.attacks.attack import Attack
from tests.sandbox.attacks.neighbours import OF_ITS_TESTS
from tests.sandbox.test_attacks import assert_clean, pass_rate
from tests.sandbox.test_attacks import judge as judge_attack
from tests.sandbox.test_pod import HUNT

pytestmark = [pytest.mark.docker, pytest.mark.filterwarnings("ignore:.*invalid escape sequence")]
SLOW = pytest.mark.slow
UID, TOKEN = 10002, "0f1e2d3c4b5a69780f1e2d3c4b5a6978"
ROOMY = Limits(cpu_s=10, wall_s=60)
QUICK = (  # of the attacks on every backend, which the slow tests all make here
    *("files_of_other_processes", "traces_and_reads_other_processes", "priorities_limits_and_cores_of_other_processes"),
    *("signals_to_everybody", "mark_in_files", "mark_in_system_v_objects"),
)
LONG = ("a_swarm_flees_from_fork_to_fork", "closes_the_folders", "puts_files_in_their_place")


@pytest.fixture(scope="module")
def engine(container_engine: str) -> Iterator[docker.DockerClient]:
    with contextlib.closing(docker.DockerClient(base_url=container_engine)) as client:
        yield client


@pytest.fixture(scope="module")
def pod(container_engine: str, judge_image: str) -> Iterator[str]:
    with local_pod(judge_image, container_engine, slots=1, token=TOKEN, uid=UID) as (address, _):
        yield address


@pytest.fixture
def sandbox(pod: str) -> Iterator[PodSandbox]:
    with PodSandbox(address=pod, token=TOKEN, slots=1) as sandbox:
        yield sandbox


def container_of(engine: docker.DockerClient, address: str) -> Container:
    host = address.rpartition(":")[0]
    for container in engine.containers.list(filters={"label": "diffrl.sandbox"}):
        if any(network["IPAddress"] == host for network in container.attrs["NetworkSettings"]["Networks"].values()):
            return container
    raise AssertionError(f"no container has {host}")


def await_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def judge(sandbox: PodSandbox, code: str, *tests: str, limits: Limits = ROOMY) -> Verdict:
    return sandbox.judge(Submission(id="t", code=code, tests=tests, limits=limits))


def landlock_version(sandbox: PodSandbox) -> int:
    code = "import ctypes\ndef f(): return ctypes.CDLL(None).syscall(444, None, 0, 1)"
    return int(judge(sandbox, code, "assert False, f()").details[0].rpartition(" ")[2])


SEES = """
import os
def f(what):
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    if what == "writable":
        places = []
        for top, folders, names in os.walk("/"):
            folders[:] = [n for n in folders if os.path.join(top, n) not in ("/proc", "/sys", "/scratch", "/dev/shm")]
            for path in (top, *(os.path.join(top, name) for name in names)):
                if os.access(path, os.W_OK) and (os.path.isdir(path) or os.path.isfile(path)): places.append(path)
        return places
    if what == "judge": return {os.stat(f"/proc/{pid}/environ").st_uid for pid in os.listdir("/proc") if pid.isdecimal()}
    if what == "env": return dict(os.environ)
    return status[what].split()
"""


def test_what_a_program_is_and_sees(sandbox: PodSandbox) -> None:
    checks = {
        "Uid": [str(UID)] * 4,
        "Gid": [str(UID)] * 4,
        "Groups": [str(UID)],
        **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
        "NoNewPrivs": ["1"],
        "Seccomp": ["2"],
        "writable": ["/dev/mqueue"],  # where nothing can be made, see the attack on message queues
        "judge": {0},  # nobody's who is not root: no process in there is dumpable
        "env": {},
    }
    tests = [f"assert f({what!r}) == {value}, f({what!r})" for what, value in checks.items()]
    verdict = judge(sandbox, SEES, *tests)
    assert verdict.statuses == (TestStatus.PASSED,) * len(tests), verdict.details


@pytest.mark.parametrize(
    "attack",
    [
        *(pytest.param(a, marks=SLOW) if a.name in LONG else a for a in NEIGHBOURS),
        *(a for a in ATTACKS if a.name in QUICK),
    ],
    ids=lambda attack: attack.name,
)
def test_a_program_gets_what_it_deserves_and_leaves_nothing(sandbox: PodSandbox, attack: Attack) -> None:
    if attack in OF_ITS_TESTS and landlock_version(sandbox) < 6:
        pytest.skip("held off by Landlock, which this kernel or engine has not, or not for signals")
    for _ in range(attack.runs):
        verdict = judge_attack(sandbox, attack)
        assert pass_rate(verdict) in attack.accept, (attack.property, verdict)
        assert verdict.trust == "high"
        assert attack.status is None or {*verdict.statuses} == {attack.status}, verdict
        assert_clean(sandbox)
    assert sandbox.stats()["draining"] == sandbox.stats()["errors"] == 0


def test_no_program_finds_the_token(sandbox: PodSandbox) -> None:
    digests = [hashlib.sha256(word.encode()).hexdigest() for word in (TOKEN, "0123456789abcdef" * 2)]
    verdict = judge(sandbox, HUNT, *(f"assert False, f('{digest}')" for digest in digests))
    assert verdict.details[0].startswith("AssertionError: ") and "found" not in verdict.details[0]
    assert verdict.details[1] == "AssertionError: found"


def test_whatever_else_runs_ends_with_a_program_and_the_judge_goes_on(
    engine: docker.DockerClient, pod: str, sandbox: PodSandbox
) -> None:
    before = sandbox.stats()["slots_started"]
    sleep = ["/usr/bin/python3", "-c", "import time; time.sleep(600)"]
    stranger = engine.api.exec_create(container_of(engine, pod).id, sleep)["Id"]
    engine.api.exec_start(stranger, detach=True)
    await_until(lambda: bool(sandbox.survivors()))
    assert judge(sandbox, "def f(x): return x * x", "assert f(2) == 4").statuses == (TestStatus.PASSED,)
    await_until(lambda: not engine.api.exec_inspect(stranger)["Running"])
    assert sandbox.stats()["slots_started"] == before + 1
    assert_clean(sandbox)


def test_sigterm_from_outside_drains(engine: docker.DockerClient, container_engine: str, judge_image: str) -> None:
    with local_pod(judge_image, container_engine, slots=1, uid=UID) as (address, _):
        container = container_of(engine, address)
        container.kill("SIGTERM")
        assert container.wait(timeout=60)["StatusCode"] == 0


@contextlib.contextmanager
def started(engine: docker.DockerClient, image: str, *arguments: str, **change: Any) -> Iterator[Container]:
    options: dict[str, Any] = {"read_only": True, "tmpfs": {"/scratch": "mode=0777"}}
    options |= {"environment": {"DIFFRL_SANDBOX_TOKEN": TOKEN}} | change
    container = engine.containers.create(
        image,
        ["--listen", "127.0.0.1:7010", *(arguments or ("--slots", "1"))],
        user=f"{UID}:{UID}",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network_mode="none",
        **options,
    )
    try:
        container.start()
        yield container
    finally:
        container.remove(force=True)


@pytest.mark.parametrize(
    ("said", "arguments", "change"),
    [
        ("--slots is 2, give --slots 1", ["--slots", "2"], {}),
        (
            "DIFFRL_SANDBOX_TOKEN_FILE is /run/token, which programs could read",
            [],
            {"environment": {"DIFFRL_SANDBOX_TOKEN_FILE": "/run/token"}},
        ),
        pytest.param("make its root file system read-only", [], {"read_only": False}, marks=SLOW),
        pytest.param("may not write to /scratch: mount a tmpfs", [], {"tmpfs": {"/scratch": "mode=0755"}}, marks=SLOW),
        ("could leave something for the next in /more", [], {"tmpfs": {"/scratch": "mode=0777", "/more": "mode=0777"}}),
        pytest.param("it must be the first process of its container", [], {"pid_mode": "host"}, marks=SLOW),
    ],
)
def test_it_says_why_it_does_not_start(
    engine: docker.DockerClient, judge_image: str, said: str, arguments: list[str], change: dict[str, Any]
) -> None:
    with started(engine, judge_image, *arguments, **change) as container:
        assert container.wait(timeout=60)["StatusCode"] == 2
        (line,) = container.logs().decode().splitlines()
        assert line.startswith("sandbox: ") and said in line


@pytest.mark.parametrize("place", [pytest.param("/dev/termination-log", marks=SLOW), "/root/termination-log"])
def test_the_kubelet_s_file_for_last_words_is_out_of_reach_where_cluster_has_it(
    engine: docker.DockerClient, judge_image: str, tmp_path: Path, place: str
) -> None:
    log = tmp_path / "log"
    log.touch()
    log.chmod(0o666)
    volumes = {str(log): {"bind": place, "mode": "rw"}}
    with started(engine, judge_image, volumes=volumes) as container:
        if place.startswith("/dev"):
            assert container.wait(timeout=60)["StatusCode"] == 2
            assert f"could leave something for the next in {place}" in container.logs().decode()
        else:
            await_until(lambda: len(container.top()["Processes"]) == 5)
            container.kill("SIGTERM")
            assert container.wait(timeout=60)["StatusCode"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpus", "count"),
    [(corpora.humaneval, 164), (corpora.mbpp, 974), (corpora.humaneval_plus, 164), (corpora.mbpp_plus, 378)],
)
def test_right_programs_pass(sandbox: PodSandbox, corpus: Callable[[], Iterable[Submission]], count: int) -> None:
    """All of them, but for the few whose tests fit in no frame, which no pod and no container takes."""
    num_judged, num_too_large = 0, 0
    for submission in corpus():
        if len(json.dumps(protocol.submission_to_wire(submission))) > frames.MAX_FRAME - 1000:
            num_too_large += 1
            continue
        verdict = sandbox.judge(submission)
        assert set(verdict.statuses) == {TestStatus.PASSED} and verdict.trust == "high", verdict
        num_judged += 1
    assert num_judged + num_too_large == count and num_too_large < 0.02 * count
    assert sandbox.stats()["errors"] == 0 and sandbox.survivors() == []
