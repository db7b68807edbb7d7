"""The judge's image: what is in it, that it is made once, its errors; and the engine and network that tests get."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from sandbox.image import build, fingerprint, prepare, rootfs
from sandbox.judge import private_tmp
from sandbox.types import SandboxUnavailableError
from tests import container_engine as engines

ROOT = Path(__file__).parents[2]
ON_DEBIAN = Path("/etc/debian_version").exists()
DOCKERFILE = ROOT / "sandbox" / "image" / "Dockerfile"
AS_A_PROGRAM = {
    "user": "20001:20001",
    "read_only": True,
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "tmpfs": {"/scratch": "mode=1777"},  # no working_dir, which the engine would make first, with a mode of its own
    "entrypoint": ["/usr/bin/env", "-i", "/usr/bin/python3", "-I", "-B", "-c"],
}
LOOK_AROUND = """
import glob, hashlib, importlib.util, json, os, stat, struct
paths = [os.path.join(folder, name) for top in ("/usr", "/etc", "/var", "/opt", "/root", "/home")
         for folder, _, names in os.walk(top) for name in names]
files = {path: os.stat(path) for path in paths if os.path.isfile(path) and not os.path.islink(path)}

def read(path):
    with open(path, "rb") as file:
        return file.read()

def is_stale(path):
    cached = importlib.util.cache_from_source(path)
    fresh = struct.pack("<III", 0, int(files[path].st_mtime), files[path].st_size)
    return cached not in files or read(cached)[4:16] != fresh

print(json.dumps({
    "judge": {path.removeprefix("/opt/judge/"): hashlib.sha256(read(path)).hexdigest()
              for path in files if path.startswith("/opt/") and path.endswith(".py")},
    "set_id": [path for path, info in files.items() if info.st_mode & (stat.S_ISUID | stat.S_ISGID)],
    "writable": [path for path, info in files.items() if info.st_mode & stat.S_IWOTH],
    "left": [path for path in files if path.startswith(
        ("/var/lib/apt/lists/", "/var/cache/apt/", "/var/log/", "/usr/share/doc/", "/root/.cache/", "/tmp/"))],
    "stale": [path for path in files if path.endswith(".py")
              and path.startswith(("/opt/", "/usr/lib/python3")) and is_stale(path)],
}))
"""
PLOT = """
import os, time
os.chdir("/scratch")
import bs4, lxml.etree, matplotlib.pyplot as plt, numpy as np, pandas as pd, requests, scipy.stats, seaborn, sklearn.cluster
frame = pd.DataFrame({"x": np.arange(9.0), "y": np.arange(9.0) ** 2})
seaborn.scatterplot(frame, x="x", y="y")
plt.savefig("plot.png")
labels = sklearn.cluster.KMeans(2, n_init=1, random_state=0).fit(frame).labels_
assert labels[0] != labels[-1] and np.linalg.det(np.eye(3)) == 1.0
assert abs(scipy.stats.linregress(frame.x, 2 * frame.x).slope - 2.0) < 1e-9
assert bs4.BeautifulSoup("<p>hi", "lxml").p.text == "hi"
print(plt.get_backend(), os.listdir("."), open("plot.png", "rb").read(4), time.process_time() < 10)
"""


@pytest.fixture(scope="module")
def client(container_engine: str) -> Iterator[docker.DockerClient]:
    with contextlib.closing(docker.DockerClient(container_engine, timeout=600)) as client:
        yield client


def run(client: docker.DockerClient, image: str, program: str, **options: Any) -> str:
    """What the program printed, stderr included; an exit status other than 0 raises."""
    return client.containers.run(image, [program], remove=True, stderr=True, **options).decode()


def look_around(client: docker.DockerClient, image: str) -> dict[str, Any]:
    options = {"entrypoint": build.ENTRYPOINT[:5], "network_mode": "none", "read_only": True}
    return json.loads(run(client, image, LOOK_AROUND, **options))


def file_in(client: docker.DockerClient, image: str, path: str) -> bytes:
    """As it is in the image, without what a started container puts over it."""
    container = client.containers.create(image, ["true"], network_mode="none")
    try:
        stream, _ = container.get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
            file = tar.extractfile(tar.getmembers()[0])
            assert file is not None
            return file.read()
    finally:
        container.remove()


@pytest.mark.docker
def test_the_image_holds_this_judge_its_bytecode_and_nothing_of_its_making(client, judge_image):
    judge = {path: hashlib.sha256(content).hexdigest() for path, content in fingerprint.judge_sources().items()}
    expected = {"judge": judge, "set_id": [], "writable": [], "left": [], "stale": []}
    assert look_around(client, judge_image) == expected
    for path in ("/etc/machine-id", "/etc/resolv.conf", "/etc/hostname"):
        assert file_in(client, judge_image, path) == b"", path


@pytest.mark.docker
def test_the_image_says_what_it_is(client, judge_image):
    config = client.images.get(judge_image).attrs["Config"]
    assert config["Entrypoint"] == build.ENTRYPOINT and not config["Cmd"] and not config["User"]
    assert set(config["Env"]) == {f"{name}={value}" for name, value in build.ENVIRONMENT.items()}
    assert config["Labels"] == {
        "diffrl.judge": fingerprint.judge_fingerprint(),
        "diffrl.rootfs": rootfs.rootfs_key("base", rootfs.MIRROR),
        "diffrl.variant": "base",
    }


@pytest.mark.docker
def test_built_again_it_is_the_same_image_and_under_another_name_the_same_layers(
    client, container_engine, judge_image, monkeypatch
):
    first = client.images.get(judge_image)
    monkeypatch.setattr(rootfs, "_PATH", "")  # neither debootstrap nor tar: all is there already
    assert build.build_image("base", judge_image, engine_url=container_engine) == first.id
    other = client.images.get(build.build_image("base", "diffrl-sandbox:again", engine_url=container_engine))
    assert other.attrs["RootFS"] == first.attrs["RootFS"]


@pytest.mark.docker
def test_a_changed_judge_is_a_new_image_above_the_same_root_file_system(
    client, container_engine, judge_image, tmp_path, monkeypatch
):
    package = tmp_path / "sandbox"
    shutil.copytree(ROOT / "sandbox", package)
    monkeypatch.setattr(fingerprint, "_PACKAGE", package)
    (package / "judge" / "extra.py").write_text("ANSWER = 42\n")
    changed = client.images.get(build.build_image("base", "diffrl-sandbox:changed", engine_url=container_engine))
    assert file_in(client, changed.id, "/opt/judge/sandbox/judge/extra.py") == b"ANSWER = 42\n"
    old, new = (image.attrs["RootFS"]["Layers"] for image in (client.images.get(judge_image), changed))
    assert old[0] == new[0] and old[1] != new[1]
    (package / "judge" / "extra.py").write_text("ANSWER =\n")
    with pytest.raises(SandboxUnavailableError, match="SyntaxError"):
        build.build_image("base", "diffrl-sandbox:broken", engine_url=container_engine)


def test_the_fingerprint_is_over_what_runs_inside(tmp_path, monkeypatch):
    package = tmp_path / "sandbox"
    shutil.copytree(ROOT / "sandbox", package)
    here = fingerprint.judge_fingerprint()
    monkeypatch.setattr(fingerprint, "_PACKAGE", package)
    assert fingerprint.judge_fingerprint() == here
    (package / "process.py").write_text("")  # runs outside
    assert fingerprint.judge_fingerprint() == here
    seen = {here}
    for change in (
        lambda: (package / "types.py").write_text("changed"),
        lambda: (package / "judge" / "zygote.py").rename(package / "judge" / "zygote2.py"),
        lambda: (package / "judge" / "new.py").write_text(""),
        lambda: (package / "judge" / "new.py").write_text("x"),
    ):
        change()
        seen.add(fingerprint.judge_fingerprint())
    assert len(seen) == 5


def test_the_dockerfile_makes_the_same_image():
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith("#")]
    arguments = {word: [rest for first, rest in lines if first == word] for word, _ in lines}
    assert arguments["FROM"] == [f"debian:{rootfs.SUITE}-slim AS rootfs", "scratch"]
    assert arguments["RUN"][0].endswith(" " + " ".join(rootfs.PYTHON))
    assert arguments["RUN"][1].startswith('python3 -B /tmp/prepare.py "$VARIANT"')
    assert [json.loads(entrypoint) for entrypoint in arguments["ENTRYPOINT"]] == [build.ENTRYPOINT]
    assert arguments["ENV"] == [" ".join(f"{name}={value}" for name, value in build.ENVIRONMENT.items())]
    assert arguments["LABEL"] == ["diffrl.judge=$JUDGE diffrl.variant=$VARIANT"]
    copied = {}
    for *sources, target in (copy.split() for copy in arguments["COPY"]):
        if target.startswith(build.HOME):
            for path in (path for source in sources for path in ROOT.glob(source)):
                copied[f"{target.removeprefix(build.HOME + '/')}{path.name}"] = path.read_bytes()
    assert copied == fingerprint.judge_sources()


def test_a_programs_tmp_is_where_the_image_points():
    assert prepare.TMP == private_tmp.TARGET


def test_the_packages_that_the_benchmarks_need_are_named():
    assert prepare.PACKAGES["base"] == ()
    libraries = "bs4 lxml matplotlib numpy pandas requests scipy seaborn sklearn"
    assert prepare.PACKAGES["full"] == tuple(f"python3-{name}" for name in libraries.split())


def test_errors_name_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="choose one of base, full"):
        rootfs.rootfs_tar("large", cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(SandboxUnavailableError, match=r"needs root: .*sandbox/image/Dockerfile"):
            rootfs.rootfs_tar("base", cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 0)
        patch.setattr(rootfs, "_PATH", str(tmp_path))
        with pytest.raises(SandboxUnavailableError, match="apt-get install debootstrap"):
            rootfs.rootfs_tar("base", cache_dir=tmp_path)
        cached = tmp_path / f"base-{rootfs.rootfs_key('base', rootfs.MIRROR)}.tar"
        cached.touch()
        assert rootfs.rootfs_tar("base", cache_dir=tmp_path) == cached  # and with the tar there is nothing to miss


def test_without_an_engine_the_error_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(SandboxUnavailableError, match=r"no usable container engine at tcp://127.0.0.1:9 .*`dockerd`"):
        build.build_image("base", "diffrl-sandbox:x", engine_url="tcp://127.0.0.1:9", cache_dir=tmp_path)


def test_without_an_engine_tests_are_skipped_and_in_ci_they_fail(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no container engine"), engines.container_engine():
        pass
    monkeypatch.setenv("CI", "true")
    expected = pytest.fail.Exception if os.geteuid() == 0 and ON_DEBIAN else pytest.skip.Exception
    with pytest.raises(expected, match="no container engine"), engines.container_engine():
        pass


def test_a_mirror_that_does_not_answer_leaves_nothing_behind(tmp_path):
    if os.geteuid() != 0 or not Path("/usr/sbin/debootstrap").exists():
        engines.unavailable("needs root and debootstrap (`make engine`)")
    (tmp_path / "build-of-a-killed-process").mkdir()
    mirror = "http://127.0.0.1:9/debian"
    with pytest.raises(SandboxUnavailableError, match=rf"\(E: .*\): is {mirror} reachable\?"):
        rootfs.rootfs_tar("base", mirror=mirror, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.docker
def test_this_machine_reaches_a_container_of_the_internal_network(client, judge_image, internal_network):
    server = client.containers.run(
        judge_image,
        ["-m", "http.server", "8000"],
        entrypoint=["/usr/bin/python3"],
        network=internal_network,
        working_dir="/opt/judge",
        detach=True,
    )
    try:
        server.reload()
        address = server.attrs["NetworkSettings"]["Networks"][internal_network]["IPAddress"]
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}:8000/", timeout=5) as answer:
                    assert b"sandbox/" in answer.read()
                break
            except OSError:
                assert time.monotonic() < deadline, server.logs()
                time.sleep(0.1)
    finally:
        server.remove(force=True)


@pytest.mark.slow
@pytest.mark.docker
def test_a_program_plots_in_the_full_image_with_nothing_but_scratch_space(client, container_engine):
    image = build.build_image("full", "diffrl-sandbox:full-test", engine_url=container_engine)
    assert run(client, image, PLOT, **AS_A_PROGRAM) == "agg ['plot.png'] b'\\x89PNG' True\n"
    found = look_around(client, image)
    assert (found["set_id"], found["writable"], found["left"], found["stale"]) == ([], [], [], [])


@pytest.mark.slow
@pytest.mark.docker
def test_the_dockerfile_builds(client, judge_image):
    """On the root file system made here in the place of Debian's own image, with an ordinary /tmp as that has."""
    ours = f"{build.ROOTFS_REPOSITORY}:base-{rootfs.rootfs_key('base', rootfs.MIRROR)}"
    debian = f"FROM {ours}\nRUN rm /tmp && mkdir -m 1777 /tmp\n"
    client.images.build(fileobj=io.BytesIO(debian.encode()), tag=f"debian:{rootfs.SUITE}-slim")
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        tar.add(ROOT / "sandbox", "sandbox")
    context.seek(0)
    image, _ = client.images.build(
        fileobj=context,
        custom_context=True,
        dockerfile="sandbox/image/Dockerfile",
        network_mode="host",
        buildargs={"JUDGE": fingerprint.judge_fingerprint()},
    )
    ours = client.images.get(judge_image)
    for key in ("Entrypoint", "Cmd", "User"):
        assert (image.attrs["Config"][key] or None) == (ours.attrs["Config"][key] or None)
    assert ours.labels.items() - image.labels.items() == {("diffrl.rootfs", ours.labels["diffrl.rootfs"])}
    assert look_around(client, image.id) == look_around(client, judge_image)
