"""A run over several hosts, made of namespaces (hosts.py): submitted from outside, with a token; learner ranks on two of them;
the judge's image on others, which reach nothing. Hosts come and go, and its numbers are those of one host.
"""

import contextlib
import dataclasses
import json
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from actors.driver import train
from diffrl.config import RLConfig
from diffrl.config_file import dump_config
from diffrl.data.microcode import microcode_problems
from diffrl.rollout_store import read_all
from diffrl.types import Problem
from sandbox.client import Connection
from sandbox.container import CAPABILITIES, create
from sandbox.pod import PORT, connect
from sandbox.types import SandboxUnavailableError
from tests.actors.conftest import NUM_PROBLEMS, rl_config, tune
from tests.actors.test_loop import metric_lines
from tests.cluster.hosts import Host, Network, address, inside
from tests.cluster.manifests import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.docker]

STEPS = 14
CALM = 3  # steps before anything happens
JUDGED_S = 1.0  # of every program, so that a host is lost while it judges
SLOTS = 2  # of a sandbox host
LATE_S = 5.0  # beyond the judge's own deadline
DRAIN_S = 3  # a host that is told to go takes nothing new for so long, then it goes
WAIT_S = 1200.0  # for what takes minutes
TRY_S = 3.0
ANY_PORT = 7777  # something listens there on every host
GROUP = "diffrl/group"
# Ports of a node's agents. A raylet that is not told waits for them, 15 seconds long.
PORTS = {"metrics-export-port": 8080, "dashboard-agent-grpc-port": 8081, "runtime-env-agent-port": 8082}
# `ray start`, which gives a node half a minute to start.
PATIENT_RAY = f"""
import time
from ray._private import services
from ray.scripts.scripts import main

get_node = services.get_node
deadline = time.monotonic() + {WAIT_S}

def wait_for_node(*args):
    while True:
        try:
            return get_node(*args)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)

services.get_node = wait_for_node
main()
"""
# Groups and CPUs of the hosts with Ray. A rollout worker fills half of a host, so they spread, and both fit on one.
RAY_HOSTS = {
    "head": ("head", 1),
    "learner-a": ("learner", 1),
    "learner-b": ("learner", 1),
    "rollout-a": ("rollout", 2),
    "rollout-b": ("rollout", 2),
}


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """With a test that waits, beside their own."""
    everything = microcode_problems("train", num_prompt_tests=0)
    chosen = everything[:: len(everything) // NUM_PROBLEMS][:NUM_PROBLEMS]
    wait = f"assert __import__('time').sleep({JUDGED_S}) is None"
    return [dataclasses.replace(p, reward_tests=(wait, *p.reward_tests)) for p in chosen]


@pytest.fixture(scope="module")
def shared(ray_cluster: Any, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the hosts share: model and problems."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tuned").mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
    tune(folder / "tuned", problems, {"tiny": sizes}, steps=200).rename(folder / "model")
    (folder / "problems.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in problems))
    return folder


def config_of(folder: Path, run: str, /, **sections: dict) -> RLConfig:
    return rl_config(
        folder / "model",
        folder / "problems.jsonl",
        folder / run,
        train={"steps": STEPS, "prompts_per_step": 4},
        **sections,
    )


@pytest.fixture(scope="module")
def one_host(shared: Path) -> Path:
    """The run on this machine: one worker of each kind, and the ranks, whose sums are the same in the same number of them."""
    train(config_of(shared, "one", learner={"num_ranks": 2}, sandbox={"backend": "process", "slots": 4}))
    return shared / "one"


@dataclass(kw_only=True)
class SandboxHost:
    """A container of the judge's image with a link of its own."""

    name: str
    container: str
    pid: int
    number: int

    @property
    def address(self) -> str:
        return address(self.number)


class Site:
    """All hosts, what happens to them, and when."""

    def __init__(self, network: Network, engine: docker.DockerClient, image: str, folder: Path, shared: Path):
        self.network, self.engine, self.image, self.folder = network, engine, image, folder
        self.began = time.monotonic()
        self.events: list[tuple[float, str]] = []
        self.hosts: dict[str, Host] = {}
        self.rays: dict[str, subprocess.Popen[bytes]] = {}  # `ray start` on each
        self.sandboxes: dict[str, SandboxHost] = {}
        self.named: list[str] = []  # sandbox hosts that `sandbox-pods` leads to, as a headless Service would
        self.ray_token, self.token = secrets.token_hex(16), secrets.token_hex(16)
        self.names = folder / "hosts"
        self.names.touch()
        (folder / "token").write_text(self.token)
        self.mounts = {self.names: "/etc/hosts"}
        self.ray_mounts = {**self.mounts, shared: "/run/shared", folder / "token": "/run/diffrl/token"}

    @property
    def head(self) -> Host:
        return self.hosts["head"]

    def say(self, event: str) -> None:
        self.events.append((time.monotonic() - self.began, event))

    def write_names(self) -> None:
        """In place: hosts see the file itself."""
        lines = [f"{host.address} {host.name}" for host in (*self.hosts.values(), *self.sandboxes.values())]
        lines += [f"{self.sandboxes[name].address} sandbox-pods" for name in self.named]
        self.names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def add_host(self, name: str, mounts: Mapping[Path, str]) -> Host:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp/home",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.ray_token,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
            "RAY_worker_register_timeout_seconds": str(int(WAIT_S)),
        }
        self.hosts[name] = host = Host(name, self.network, environment, mounts)
        self.write_names()
        return host

    def start_ray(self, name: str) -> None:
        """And wait for it. Without --block the head outlives its server for Ray Client, which may start too slowly."""
        group, cpus = RAY_HOSTS[name]
        host, log = self.hosts[name], self.folder / f"{name}.log"
        role = (
            ["--head", "--port=6379", "--dashboard-host=0.0.0.0"]
            if host is self.head
            else ["--block", f"--address={self.head.address}:6379"]
        )
        options = [f"--num-cpus={cpus}", f"--labels={GROUP}={group}", f"--node-ip-address={host.address}"]
        options += [f"--object-store-memory={100 << 20}", *(f"--{name}={port}" for name, port in PORTS.items())]
        with log.open("wb") as output:
            self.rays[name] = host.start(["python", "-c", PATIENT_RAY, "start", *role, *options], output)
        until(
            lambda: "Ray runtime started" in log.read_text(),
            f"Ray on {name}",
            lambda: log.read_text() if self.rays[name].poll() else None,
        )

    def add_sandbox(self, name: str) -> None:
        """As the pods of cluster/: without rights, token and port alike; named when it listens."""
        options = {
            "network_mode": "none",
            "read_only": True,
            "cap_drop": ["ALL"],
            "cap_add": CAPABILITIES,
            "security_opt": ["no-new-privileges"],
            "tmpfs": {"/scratch": "size=256m,mode=0777"},
        }
        command = ["--slots", str(SLOTS), "--listen", f"0.0.0.0:{PORT}"]
        environment = {"DIFFRL_SANDBOX_TOKEN": self.token}
        container = create(self.engine, self.image, command, options, environment=environment)
        self.engine.api.start(container)
        pid = self.engine.api.inspect_container(container)["State"]["Pid"]
        number = self.network.link(pid)
        self.network.isolate(number, PORT, [self.hosts[host].address for host in RAY_HOSTS])
        self.sandboxes[name] = SandboxHost(name=name, container=container, pid=pid, number=number)
        self.connect(name).close()
        self.named.append(name)
        self.write_names()

    def connect(self, name: str, token: str | None = None) -> Connection:
        """From the head."""
        at = f"{self.sandboxes[name].address}:{PORT}"
        return inside(self.head.pid, lambda: connect(at, token or self.token, patience_s=WAIT_S))

    def cut_off(self, name: str) -> None:
        """A host that loses its power: nobody hears of it. Its name goes on leading there."""
        lost = self.sandboxes[name]
        self.network.unplug(lost.number)
        self.engine.api.kill(lost.container, "KILL")

    def leave(self, name: str) -> None:
        """A host that is told to go."""
        host = self.hosts[name]
        (ray_start,) = psutil.Process(self.rays[name].pid).children()
        ray_start.terminate()
        self.rays[name].wait(WAIT_S)
        host.stop()


@contextlib.contextmanager
def site(engine_url: str, image: str, folder: Path, shared: Path) -> Iterator[Site]:
    """Five hosts with Ray, two with sandboxes, and one that is not part of the cluster."""
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(docker.DockerClient(engine_url)))
        network = stack.enter_context(Network())
        made = Site(network, engine, image, folder, shared)

        def end() -> None:
            for host in made.hosts.values():
                host.stop()
            for sandbox in made.sandboxes.values():
                engine.api.remove_container(sandbox.container, force=True, v=True)

        stack.callback(end)
        for name in RAY_HOSTS:
            made.add_host(name, made.ray_mounts)
        made.add_host("outside", made.mounts)
        for name in ("sandbox-a", "sandbox-b"):
            made.add_sandbox(name)
        yield made


# Who reaches whom


def reaches(pid: int, host: str, port: int) -> bool:
    def tried() -> bool:
        try:
            socket.create_connection((host, port), timeout=TRY_S).close()
        except OSError:
            return False
        return True

    return inside(pid, tried)


def reached(pid: int, places: Mapping[str, tuple[str, int]]) -> set[str]:
    with ThreadPoolExecutor(len(places)) as threads:
        answers = threads.map(lambda place: reaches(pid, *place), places.values())
        return {name for name, answer in zip(places, answers, strict=True) if answer}


def check_who_reaches_whom(site: Site) -> None:
    """What hosts with Ray reach, sandbox hosts do not, and nobody else reaches those."""
    with contextlib.ExitStack() as stack:
        for pid in (site.network.router.pid, *(host.pid for host in site.hosts.values())):
            stack.enter_context(inside(pid, lambda: socket.create_server(("0.0.0.0", ANY_PORT))))
        for name, sandbox in site.sandboxes.items():
            places = {host.name: (host.address, ANY_PORT) for host in site.hosts.values()}
            places |= {other.name: (other.address, PORT) for other in site.sandboxes.values() if other is not sandbox}
            places |= {"GCS": (site.head.address, 6379), "dashboard": (site.head.address, 8265)}
            places["router"] = (f"10.77.{sandbox.number}.1", ANY_PORT)
            assert reached(site.head.pid, places) == places.keys()
            assert reached(sandbox.pid, places) == set(), name
            assert reaches(site.head.pid, sandbox.address, PORT)
            assert not reaches(site.hosts["outside"].pid, sandbox.address, PORT)
            assert not reaches(site.head.pid, sandbox.address, PORT + 1)
    outside = site.hosts["outside"]
    with inside(outside.pid, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as heard:
        heard.bind(("0.0.0.0", ANY_PORT))
        heard.settimeout(TRY_S)
        for sender in (*site.sandboxes.values(), site.head):
            with inside(sender.pid, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as voice:
                voice.sendto(sender.name.encode(), (outside.address, ANY_PORT))
        assert heard.recv(100) == b"head"


# The run


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition: Callable[[], Any], what: str, goes_on: Callable[[], str | None] = lambda: None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        ended = goes_on()
        assert ended is None, f"no {what}: {ended}"
        assert time.monotonic() < deadline, f"no {what} in {WAIT_S:g} s"
        time.sleep(0.05)


def check_wrong_tokens(site: Site) -> None:
    outside, dashboard = site.hosts["outside"], f"http://{site.head.address}:8265"
    joins = ["ray", "start", f"--address={site.head.address}:6379", f"--node-ip-address={outside.address}"]
    for command in (["ray", "job", "submit", f"--address={dashboard}", "--", "true"], joins):
        status, said = outside.run(command, WAIT_S, RAY_AUTH_TOKEN="wrong" * 4)
        print(said)
        assert status != 0 and "token" in said.lower(), said
    with pytest.raises(SandboxUnavailableError, match="hold different tokens"):
        site.connect("sandbox-a", "w" * 32)


def where(site: Site) -> dict[str, list[str]]:
    """The workers on each host."""
    roles = ("LearnerRank", "Reference", "RewardWorker", "RolloutWorker")
    return {
        host.name: sorted(role for role in roles for name in host.names() if name.startswith(f"ray::{role}"))
        for host in site.hosts.values()
        if host.unshare.poll() is None
    }


def test_hosts_come_and_go_and_the_numbers_are_those_of_one_host(
    container_engine: str,
    judge_image: str,
    shared: Path,
    one_host: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = Path("/run/shared")
    config = config_of(
        seen,
        "several",
        rollout={"num_workers": 2, "cpus_per_worker": 1.0, "labels": {GROUP: "rollout"}},
        reference={"cpus": 0.0, "labels": {GROUP: "rollout"}},
        judge={"cpus_per_worker": 0.25, "labels": {GROUP: "head"}},
        learner={"num_ranks": 2, "cpus_per_rank": 1.0, "labels": {GROUP: "learner"}},
        sandbox={
            "backend": "pod",
            "slots": 4,
            "addresses": [f"sandbox-pods:{PORT}"],
            "token_file": "/run/diffrl/token",
        },
    )
    run_dir = shared / "several"
    (shared / "rl.yaml").write_text(dump_config(config))
    with site(container_engine, judge_image, tmp_path, shared) as hosts:
        for name in RAY_HOSTS:
            hosts.start_ray(name)
        hosts.say(f"Ray runs on {len(RAY_HOSTS)} hosts")
        check_who_reaches_whom(hosts)
        check_wrong_tokens(hosts)
        hosts.say("tokens and ways have been tried")

        submit = ["ray", "job", "submit", f"--address=http://{hosts.head.address}:8265", f"--working-dir={ROOT}"]
        left_out = json.dumps({"excludes": [".venv"]})  # even where it is a link
        with (tmp_path / "job.log").open("wb") as log:
            job = hosts.hosts["outside"].start(
                [*submit, f"--runtime-env-json={left_out}", "--", "diffrl", "train", "/run/shared/rl.yaml"], log
            )

        def goes_on() -> str | None:
            return None if job.poll() is None else (tmp_path / "job.log").read_text()[-3000:]

        def steps() -> int:
            return len(rows_of(run_dir))

        def passes(number: int) -> None:
            until(lambda: steps() >= number, f"step {number}", goes_on)

        passes(CALM)
        hosts.say(f"{steps()} steps are done; {where(hosts)}")
        assert where(hosts)["learner-a"] == where(hosts)["learner-b"] == ["LearnerRank"]
        assert where(hosts)["head"] == ["RewardWorker"]
        assert all("RolloutWorker" in where(hosts)[name] for name in ("rollout-a", "rollout-b"))

        with contextlib.closing(hosts.connect("sandbox-a")) as counters:
            until(lambda: counters.stats()["busy"] == SLOTS, "work for sandbox-a", goes_on)
            hosts.cut_off("sandbox-a")
        lost_at = steps()
        hosts.say(f"sandbox-a is cut off and killed in step {lost_at + 1}, with {SLOTS} programs in it")
        passes(lost_at + 2)
        hosts.say(f"{steps()} steps are done with one sandbox host")

        hosts.add_sandbox("sandbox-c")
        hosts.say(f"sandbox-c joins in step {steps() + 1}")
        with contextlib.closing(hosts.connect("sandbox-c")) as counters:
            until(lambda: counters.stats()["judged"] > 2, "work for sandbox-c", goes_on)  # more than the canary
        hosts.say(f"sandbox-c judges, in step {steps() + 1}")

        leaver = next(name for name, roles in where(hosts).items() if "Reference" in roles)
        left_at = steps()
        hosts.leave(leaver)
        hosts.say(f"{leaver} leaves in step {left_at + 1}, with a rollout worker and the reference")
        passes(left_at + 2)
        hosts.say(f"{steps()} steps are done; {where(hosts)}")

        assert job.wait(WAIT_S) == 0, (tmp_path / "job.log").read_text()[-3000:]
        hosts.say("the job has succeeded")
        events = hosts.events

    rows, expected = rows_of(run_dir), rows_of(one_host)
    calm_s = statistics.median(row["time/rollouts"] for row in rows[1:lost_at])
    stall_s = rows[lost_at]["time/rollouts"] - calm_s
    with capsys.disabled():
        print("\nseconds, what happened", *(f"{at:7.1f}  {event}" for at, event in events), sep="\n")
        print("step, seconds of rollouts, pool errors, restarts of rollout and reference workers")
        for row in rows:
            counts = [row[key] for key in ("pool/infra_errors", "restarts/rollout", "restarts/reference")]
            print(f"{row['step'] + 1:4}  {row['time/rollouts']:6.1f}", *counts)
        print(f"calm steps: {calm_s:.1f} s of rollouts; the stall after the lost sandbox host: {stall_s:.1f} s")
    assert rows[lost_at]["pool/infra_errors"] >= 1 and left_at + 2 <= STEPS
    assert stall_s <= config.sandbox.wall_s + LATE_S
    assert rows[-1]["restarts/rollout"] >= 1 and rows[-1]["restarts/reference"] >= 1
    assert rows[-1]["restarts/judge"] == rows[-1]["restarts/learner"] == 0

    mine, theirs = (read_all(folder / "rollouts").to_pylist() for folder in (run_dir, one_host))
    same = ("step", "ordinal", "sample_index", "completion", "statuses", "reward", "policy_version", "valid")
    assert [[row[key] for key in same] for row in mine] == [[row[key] for key in same] for row in theirs]
    assert len({row["reward"] for row in mine}) > 1 and all(row["valid"] for row in mine)
    assert len(rows) == len(expected) == STEPS
    for line, other in zip(metric_lines(run_dir), metric_lines(one_host), strict=True):
        assert json.loads(line) == pytest.approx(json.loads(other), rel=1e-5, abs=1e-5)
