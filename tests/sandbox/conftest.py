"""A sandbox of every backend, with one slot; pods with root and without."""

import contextlib
from collections.abc import Iterator

import pytest

from sandbox.container import ContainerSandbox
from sandbox.pod import PodSandbox, local_pod
from sandbox.process import ProcessSandbox
from sandbox.types import Sandbox

slow, docker = pytest.mark.slow, pytest.mark.docker


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("docker", marks=docker),
        pytest.param("process", marks=slow),
        pytest.param("pod", marks=(slow, docker)),
        pytest.param("pod without root", marks=(slow, docker)),
    ],
)
def any_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with contextlib.ExitStack() as stack:
        if request.param == "process":
            yield stack.enter_context(ProcessSandbox())
            return
        engine, image = (request.getfixturevalue(name) for name in ("container_engine", "judge_image"))
        if request.param == "docker":
            yield stack.enter_context(ContainerSandbox(image=image, slots=1, engine_url=engine))
        else:
            uid = 0 if request.param == "pod" else 10002
            address, token = stack.enter_context(local_pod(image, engine, slots=1, uid=uid))
            yield stack.enter_context(PodSandbox(address=address, token=token, slots=1))
