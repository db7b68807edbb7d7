"""Turns a fresh Debian root file system into the judge's; runs inside it, as root: `python3 prepare.py base|full`.

rootfs.py runs it in a chroot and the Dockerfile in a container, so the image is the same whichever made it.

Programs later run there with a read-only root, an empty environment and a uid without a name. So whatever a library
would look up in the environment or write on its first import is settled by files here: bytecode, and matplotlib's
backend and font cache.
"""

import compileall
import glob
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {
    "base": (),
    "full": (
        "python3-bs4",
        "python3-lxml",
        "python3-matplotlib",
        "python3-numpy",
        "python3-pandas",
        "python3-requests",
        "python3-scipy",
        "python3-seaborn",
        "python3-sklearn",
    ),
}
STUB = "python3-pythran"  # scipy's package depends on what compiled it: with it come g++ and OpenBLAS, 700 MB
TRIMMED = (
    "/usr/lib/python3/dist-packages/**/tests",
    "/usr/share/doc/*",
    "/usr/share/i18n/*",
    "/usr/share/info/*",
    "/usr/share/javascript/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/unicode/*",
    "/var/cache/apt/*",
    "/var/cache/debconf/*-old",
    "/var/cache/ldconfig/*",
    "/var/lib/apt/lists/*",
    "/var/log/*",
)
TMP = "/proc/self/fd/99"  # what each program has open there is its /tmp, see judge/private_tmp.py
MATPLOTLIB = "/usr/lib/python3/dist-packages/matplotlib/__init__.py"
MATPLOTLIB_CACHE = "/var/cache/matplotlib"


def install(packages: tuple[str, ...]) -> None:
    """Debian packages without what they merely recommend."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder, "stub", "DEBIAN", "control")
        control.parent.mkdir(parents=True)
        control.write_text(
            f"Package: {STUB}\nVersion: 99\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n"
            "Description: stands in for a compiler that is not needed to run what it compiled\n"
        )
        os.chmod(folder, 0o755)  # apt reads it as another user
        subprocess.run(["dpkg-deb", "--build", f"{folder}/stub", f"{folder}/stub.deb"], check=True)
        options = ["-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io"]
        subprocess.run(["apt-get", "install", *options, f"{folder}/stub.deb", *packages], check=True, env=environment)


def settle_matplotlib() -> None:
    """Backend Agg, and one folder that is both configuration and cache, read-only, with the list of fonts in it."""
    rc = Path("/etc/matplotlibrc")
    rc.write_text(_replace_once(rc.read_text(), "\nbackend: TkAgg\n", "\nbackend: agg\n"))
    anchor = "    configdir = os.environ.get('MPLCONFIGDIR')\n"
    early = f"    if not configdir:\n        return {MATPLOTLIB_CACHE!r}\n"
    source = Path(MATPLOTLIB)
    source.write_text(_replace_once(source.read_text(), anchor, anchor + early))
    os.makedirs(MATPLOTLIB_CACHE, exist_ok=True)
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], check=True, env={})


def _replace_once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not in this version of matplotlib"
    return text.replace(old, new)


def trim() -> None:
    """Removes what nobody reads in a sandbox, and every set-uid and set-gid bit."""
    for pattern in TRIMMED:
        for path in glob.glob(pattern, recursive=True):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif os.path.lexists(path):  # it may have gone with a folder above it
                os.unlink(path)
    for folder, _, names in os.walk("/usr"):
        for path in (os.path.join(folder, name) for name in names):
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                os.chmod(path, stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))


def main() -> None:
    """Everything for one variant."""
    packages = PACKAGES[sys.argv[1]]
    os.umask(0o022)
    if packages:
        install(packages)
        settle_matplotlib()
    trim()
    for folder in glob.glob("/usr/lib/python3*"):
        compileall.compile_dir(folder, quiet=2)  # broken files are there on purpose, as data of tests
    os.makedirs("/opt/judge", exist_ok=True)
    shutil.rmtree("/tmp")
    os.symlink(TMP, "/tmp")


if __name__ == "__main__":
    main()
