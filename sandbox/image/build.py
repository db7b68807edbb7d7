"""Makes the judge's image in a container engine, without a registry.

Two layers: the root file system (imported once per engine, minutes when nothing is cached, seconds from the cache) and
the judge of this checkout with its bytecode (a second). Both are the same bytes whenever cache and sources are the same.

The image's user is root: the judge's first process switches to one uid per test, so it needs root with a handful of
capabilities, which the backend leaves it. Programs never run as root. Started as another user, without capabilities, it
judges one program at a time (judge/one_uid.py).
"""

import contextlib
import io
import json
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.image.fingerprint import judge_fingerprint, judge_sources
from sandbox.image.rootfs import MIRROR, rootfs_key, rootfs_tar
from sandbox.types import SandboxUnavailableError

if TYPE_CHECKING:
    import docker

HOME = "/opt/judge"
START = f"import sys; sys.path.append({HOME!r}); from sandbox.judge import supervisor; supervisor.main()"
ENTRYPOINT = ["/usr/bin/python3", "-I", "-S", "-B", "-c", START]
ENVIRONMENT = {"LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}  # of the judge; a program's environment is empty
ROOTFS_REPOSITORY = "diffrl-sandbox-rootfs"
_COMPILE = f"""
import compileall, os, sys
good = compileall.compile_dir({HOME!r}, quiet=1)
for folder, _, names in os.walk({HOME!r}):
    for name in ("", *names):
        os.utime(os.path.join(folder, name), (0, 0))
sys.exit(not good)
"""
_TIMEOUT_S = 600


def build_image(
    variant: str, tag: str, *, mirror: str = MIRROR, cache_dir: Path | None = None, engine_url: str | None = None
) -> str:
    """Id of the image `tag`, made now unless the engine already has it under this tag.

    build_image("base", "diffrl-sandbox:base")

    variant: "base" (standard library) or "full" (the packages of prepare.py). engine_url: as for docker.DockerClient,
    default DOCKER_HOST or the usual socket. Raises SandboxUnavailableError with the way out.
    """
    labels = {
        "diffrl.judge": judge_fingerprint(),
        "diffrl.rootfs": rootfs_key(variant, mirror),
        "diffrl.variant": variant,
    }
    rootfs = f"{ROOTFS_REPOSITORY}:{variant}-{labels['diffrl.rootfs']}"
    with _engine(engine_url) as client:
        if (found := _find(client, tag)) and labels.items() <= found.labels.items():
            return found.id
        have_rootfs = _find(client, rootfs) is not None
    tar = None if have_rootfs else rootfs_tar(variant, mirror=mirror, cache_dir=cache_dir)
    with _engine(engine_url) as client:
        if tar is not None:
            _import(client, tar, rootfs)
        return _add_judge(client, rootfs, tag, labels)


def _import(client: "docker.DockerClient", tar: Path, tag: str) -> None:
    """`docker import`."""
    repository, _, version = tag.rpartition(":")
    with tar.open("rb") as file:
        answer = client.api.import_image_from_data(file, repository=repository, tag=version)
    last = json.loads(answer.splitlines()[-1])
    if "error" in last:
        raise OSError(f"the root file system was not taken: {last['error']}")


def _add_judge(client: "docker.DockerClient", rootfs: str, tag: str, labels: dict[str, str]) -> str:
    """Copies the judge in, compiles it with the image's own Python, and commits."""
    repository, _, version = tag.rpartition(":")
    if not repository:
        raise ValueError(f"image tag {tag!r}: write NAME:TAG")
    container = client.containers.create(rootfs, [*ENTRYPOINT[:2], "-c", _COMPILE], network_mode="none")
    try:
        container.put_archive(HOME, _judge_tar())
        container.start()
        if status := container.wait()["StatusCode"]:
            raise OSError(f"compiling the judge ended with status {status}: {container.logs().decode()[-300:]}")
        image = container.commit(repository, version, changes="\n".join(_changes(labels)))
    finally:
        container.remove(force=True)
    return str(image.id)


def _changes(labels: dict[str, str]) -> Iterator[str]:
    """The image's configuration as lines of a Dockerfile."""
    yield f"ENTRYPOINT {json.dumps(ENTRYPOINT)}"
    yield "CMD []"
    for name, value in ENVIRONMENT.items():
        yield f"ENV {name}={shlex.quote(value)}"
    for name, value in labels.items():
        yield f"LABEL {name}={shlex.quote(value)}"


def _judge_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in judge_sources().items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _find(client: "docker.DockerClient", tag: str) -> Any:
    import docker.errors

    with contextlib.suppress(docker.errors.ImageNotFound):
        return client.images.get(tag)
    return None


@contextlib.contextmanager
def _engine(url: str | None) -> "Iterator[docker.DockerClient]":
    """A client whose errors come out as SandboxUnavailableError."""
    try:
        import docker
        import docker.errors
    except ImportError as error:
        raise SandboxUnavailableError("the docker SDK is missing: run `pip install 'diffrl[docker]'`") from error
    try:
        client = docker.DockerClient(url, timeout=_TIMEOUT_S) if url else docker.from_env(timeout=_TIMEOUT_S)
        with contextlib.closing(client):
            yield client
    except (docker.errors.DockerException, OSError) as error:  # requests' errors are OSErrors
        where = url or "DOCKER_HOST or the usual socket"
        raise SandboxUnavailableError(
            f"no usable container engine at {where} ({str(error)[:300]}): start one (Debian: `apt-get install docker.io`,"
            " then `dockerd`), or name another"
        ) from error
