"""Which backend is taken, what is said about it, and that a pool of each judges alike."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import docker
import pytest

from sandbox import container, process
from sandbox.backends import BackendOptions, choose_backend, open_sandbox, pods_for, read_token, require_available
from sandbox.pod import local_pod
from sandbox.types import SandboxUnavailableError, Submission, TestStatus

NOWHERE = "unix:///nowhere/docker.sock"
PASSED, FAILED = TestStatus.PASSED, TestStatus.FAILED


@pytest.fixture
def docker_options(container_engine: str, judge_image: str) -> BackendOptions:
    return BackendOptions(backend="docker", image=judge_image, engine_url=container_engine)


def choice(**options: object) -> tuple[str, list[str]]:
    said: list[str] = []
    return choose_backend(BackendOptions(**options), said.append), said  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", ["docker", "process", "pod"])
def test_a_named_backend_is_taken_without_looking(backend: str) -> None:
    assert choice(backend=backend, engine_url=NOWHERE) == (backend, [])


def test_auto_without_an_engine_is_process_and_says_why() -> None:
    backend, said = choice(engine_url=NOWHERE)
    assert backend == "process" and len(said) == 1
    assert said[0].startswith("docker is not used: no container engine answers")
    require_available(BackendOptions(engine_url=NOWHERE))


def test_auto_on_a_machine_without_bubblewrap_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.shutil, "which", lambda name: None)
    with pytest.raises(SandboxUnavailableError, match="apt-get install bubblewrap"):
        require_available(BackendOptions(engine_url=NOWHERE))
    require_available(BackendOptions(engine_url=NOWHERE, allow_unisolated=True))


@pytest.mark.docker
def test_auto_takes_docker_where_the_image_of_this_version_is(container_engine: str, judge_image: str) -> None:
    assert choice(image=judge_image, engine_url=container_engine) == ("docker", [])
    backend, said = choice(image="diffrl-sandbox:nowhere", engine_url=container_engine)
    assert backend == "process" and "no image diffrl-sandbox:nowhere: run `diffrl sandbox build`" in said[0]


@pytest.mark.docker
def test_auto_does_not_take_an_image_of_another_version(
    container_engine: str, judge_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "judge_fingerprint", lambda: "0" * 64)
    backend, said = choice(image=judge_image, engine_url=container_engine)
    assert backend == "process" and "another version of the judge" in said[0]


@pytest.mark.docker
def test_a_runtime_that_the_engine_does_not_have_is_refused(docker_options: BackendOptions) -> None:
    require_available(docker_options)
    require_available(replace(docker_options, runtime="runc"))
    with pytest.raises(SandboxUnavailableError, match=r"runtime: 'runsk' is unknown .* which has .*runc"):
        require_available(replace(docker_options, runtime="runsk"))


def test_pods_need_addresses_and_a_token() -> None:
    with pytest.raises(SandboxUnavailableError, match="addresses"):
        open_sandbox(BackendOptions(backend="pod", token="t"))
    with pytest.raises(SandboxUnavailableError, match="DIFFRL_SANDBOX_TOKEN"):
        require_available(BackendOptions(backend="pod", addresses=("127.0.0.1:1",)))
    with pytest.raises(ValueError, match="backend: 'podd' must be one of auto, docker, process, pod"):
        BackendOptions(backend="podd")


def test_the_token_comes_from_the_file_or_the_environment_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(" secret\n")
    assert read_token(str(tmp_path / "token")) == "secret"
    monkeypatch.delenv("DIFFRL_SANDBOX_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("DIFFRL_SANDBOX_TOKEN", "other")
    assert read_token(None) == "other"
    with pytest.raises(SandboxUnavailableError, match=r"token_file: .*nowhere"):
        read_token(str(tmp_path / "nowhere"))
    assert "secret" not in repr(BackendOptions(token="secret"))


@contextlib.contextmanager
def options_of(backend: str, request: pytest.FixtureRequest) -> Iterator[BackendOptions]:
    if backend == "process":
        yield BackendOptions(backend="process", slots=2)
        return
    engine, image = request.getfixturevalue("container_engine"), request.getfixturevalue("judge_image")
    if backend == "docker":
        yield BackendOptions(backend="docker", slots=3, slots_per_container=2, image=image, engine_url=engine)
        return
    with local_pod(image, engine, slots=2) as (one, token):
        yield BackendOptions(backend="pod", slots=2, addresses=(one,), token=token)


@pytest.mark.parametrize(
    ("backend", "slots"),
    [
        ("process", 2),
        pytest.param("docker", 4, marks=pytest.mark.docker),
        pytest.param("pod", 2, marks=pytest.mark.docker),
    ],
)
def test_a_pool_of_each_backend_judges(backend: str, slots: int, request: pytest.FixtureRequest) -> None:
    """Three slots in containers of at most two are two containers of two."""
    with options_of(backend, request) as options, open_sandbox(options) as pool:
        assert (pool.name, pool.slots) == (backend, slots)
        verdict = pool.judge(
            Submission(id="a", code="def f(x): return x", tests=("assert f(1) == 1", "assert f(1)==2"))
        )
        assert verdict.statuses == (PASSED, FAILED) and verdict.trust == "high"
        assert pool.stats().canaries == 1 and pool.survivors() == []


@pytest.mark.docker
def test_a_pod_is_started_where_none_is_named_and_gone_afterwards(docker_options: BackendOptions) -> None:
    def containers() -> set[str]:
        with contextlib.closing(docker.DockerClient(docker_options.engine_url)) as engine:
            return {c.id or "" for c in engine.containers.list(all=True, ignore_removed=True)}

    before = containers()
    options = BackendOptions(backend="pod", slots=1, image=docker_options.image, engine_url=docker_options.engine_url)
    with pods_for(options) as started:
        assert len(started.addresses) == 1 and started.token
        with open_sandbox(started) as pool:
            verdict = pool.judge(Submission(id="a", code="def f(x): return x", tests=("assert f(1) == 1",)))
            assert verdict.statuses == (PASSED,)
        with pods_for(started) as same:
            assert same is started
    assert containers() == before


@pytest.mark.docker
def test_containers_that_are_killed_cost_no_verdict(docker_options: BackendOptions) -> None:
    """Whatever was being judged in a killed container is judged again in another one, at most one attempt each."""
    slow = "import time\ndef f(x):\n    time.sleep(0.05)\n    return x * x\n"
    options = replace(docker_options, slots=4, slots_per_container=2)
    with contextlib.closing(docker.DockerClient(docker_options.engine_url)) as engine:
        before = {c.id for c in engine.containers.list(all=True, ignore_removed=True)}
        with open_sandbox(options, attempts=10) as pool, ThreadPoolExecutor(6) as threads:
            submissions = [Submission(id=str(i), code=slow, tests=("assert f(3) == 9",) * 4) for i in range(30)]
            futures = [threads.submit(pool.judge, submission) for submission in submissions]
            for _ in range(2):
                time.sleep(0.5)
                ours = [c for c in engine.containers.list(ignore_removed=True) if c.id not in before]
                if ours:
                    ours[0].kill()
            assert [future.result(600).statuses for future in futures] == [(PASSED,) * 4] * 30
            assert pool.stats().restarts >= 1 and sum(pool.stats().errors.values()) >= 1
        assert {c.id for c in engine.containers.list(all=True, ignore_removed=True)} == before
