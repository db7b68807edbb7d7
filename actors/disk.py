"""A run waits while its disk is nearly full, and says so: what it would lose by stopping is more than the wait."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

SAY_AGAIN_S = 600.0


def free_mb(folder: Path) -> int:
    return shutil.disk_usage(folder).free >> 20


def size_mb(folder: Path) -> int:
    """Of all files below; 0 where there is nothing."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20


def wait_for_room(folder: Path, needed_mb: int, wait: Callable[[], object], say: Callable[[str], None]) -> None:
    """Until so many MB are free. `wait` takes a moment."""
    told: float | None = None
    while (free := free_mb(folder)) < needed_mb:
        now = time.monotonic()
        if told is None or now - told > SAY_AGAIN_S:
            say(
                f"disk: {free} MB are free in {folder}, fewer than {needed_mb} (supervision.min_free_mb, and what is to be "
                "written): the run waits until there is room"
            )
            told = now
        wait()
    if told is not None:
        say(f"disk: {free_mb(folder)} MB are free in {folder}: the run goes on")
