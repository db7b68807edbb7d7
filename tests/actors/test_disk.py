"""Waiting for room on a file system that really is full."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.disk import free_mb, size_mb, wait_for_room
from tests.container_engine import unavailable


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 16 MB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        unavailable(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_waited_for(small_disk: Path):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(12 << 20))
    assert size_mb(small_disk) == 12 and free_mb(small_disk) == 4
    said: list[str] = []
    waits: list[int] = []

    def wait() -> None:
        waits.append(free_mb(small_disk))
        if len(waits) == 3:
            filler.unlink()

    wait_for_room(small_disk, 8, wait, said.append)
    assert waits == [4, 4, 4]
    first, last = said
    assert first.startswith(f"disk: 4 MB are free in {small_disk}, fewer than 8 (supervision.min_free_mb, ")
    assert last == f"disk: 16 MB are free in {small_disk}: the run goes on"
    wait_for_room(small_disk, 8, wait, said.append)
    assert len(waits) == 3 and len(said) == 2
