"""A root file system with Debian's Python as a tar, made by debootstrap, so that no image registry is needed.

Tars are kept in $XDG_CACHE_HOME/diffrl/sandbox-image (or ~/.cache/...), named after a hash over everything that decides
what is in them: suite, packages, mirror, machine and the text of prepare.py. A tar appears whole or not at all, and one
lock per cache folder keeps two builds apart. A cached tar needs neither root nor the network.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sandbox.image import prepare
from sandbox.types import SandboxUnavailableError

SUITE = "bookworm"
PYTHON = ("python3-minimal", "python3")
MIRROR = "http://deb.debian.org/debian"
_PREPARE = Path(prepare.__file__)
_EXCLUDED = ("./dev/*", "./proc/*", "./run/*", "./sys/*", "./tmp/*")  # devices cannot be made by a rootless engine
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # root's, whoever became root
_TIMEOUT_S = 3600  # a stuck mirror ends one day
_LOG = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Where tars are kept unless the caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffrl" / "sandbox-image"


def rootfs_key(variant: str, mirror: str) -> str:
    """Short hash over all that decides what is in the root file system; ValueError for an unknown variant."""
    if variant not in prepare.PACKAGES:
        raise ValueError(f"image variant {variant!r}: choose one of {', '.join(prepare.PACKAGES)}")
    recipe = "\0".join((SUITE, *PYTHON, variant, mirror, platform.machine(), _PREPARE.read_text()))
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def rootfs_tar(variant: str, *, mirror: str = MIRROR, cache_dir: Path | None = None) -> Path:
    """The cached tar, made first if need be (about a minute). SandboxUnavailableError with the way out."""
    cache = cache_dir or default_cache_dir()
    tar = cache / f"{variant}-{rootfs_key(variant, mirror)}.tar"
    if tar.exists():
        return tar
    _require_tools()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if not tar.exists():
            for left in cache.glob("build-*"):  # of a build that was killed
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
                _make(Path(folder), variant, mirror)
                os.replace(Path(folder) / "rootfs.tar", tar)
    return tar


def _make(folder: Path, variant: str, mirror: str) -> None:
    """Leaves `rootfs.tar` in the folder. Mounts and processes of the build end with their own namespaces."""
    root = folder / "rootfs"
    log = folder / "log"
    _LOG.info("making the root file system of the %s image from %s", variant, mirror)
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    includes = f"--include={','.join(PYTHON)}"
    _run([*alone, "debootstrap", "--variant=minbase", includes, SUITE, str(root), mirror], log, mirror)
    shutil.copy(_PREPARE, root / "tmp" / "prepare.py")
    command = ["chroot", str(root), "/usr/bin/python3", "-B", "/tmp/prepare.py", variant]
    _run([*alone, f"--mount-proc={root}/proc", *command], log, mirror)
    for name in ("hostname", "machine-id", "resolv.conf"):  # debootstrap copies them from this machine
        (root / "etc" / name).write_text("")
    excludes = [f"--exclude={pattern}" for pattern in _EXCLUDED]
    options = ["--sort=name", "--numeric-owner", "--one-file-system"]
    _run(["tar", "-C", str(root), *options, *excludes, "-cf", str(folder / "rootfs.tar"), "."], log, mirror)


def _run(command: list[str], log: Path, mirror: str) -> None:
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    environment = {"PATH": _PATH, "LC_ALL": "C", **proxies}
    with log.open("w+") as output:
        try:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=True,
                timeout=_TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            output.seek(0)
            said = [line for line in output.read().splitlines() if line.startswith("E: ")] or [str(error)]
            raise SandboxUnavailableError(
                f"no root file system for the judge's image ({said[0][:300]}): is {mirror} reachable? Name another"
                " Debian mirror, or build sandbox/image/Dockerfile where a registry is reachable"
            ) from error


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise SandboxUnavailableError(
            "the judge's image is made by debootstrap, which needs root: run it as root once (the result is kept), or"
            " build sandbox/image/Dockerfile where a registry is reachable"
        )
    for tool, package in (("debootstrap", "debootstrap"), ("unshare", "util-linux")):
        if shutil.which(tool, path=_PATH) is None:
            raise SandboxUnavailableError(f"{tool} is missing: run `apt-get install {package}`")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for its turn."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
