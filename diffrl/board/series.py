"""metrics.jsonl, followed while it is written. Lines of one step are one row; what comes later in the file counts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_POINTS = 400  # of a curve; longer ones are means of equal parts


class Series:
    """`refresh` reads what is new; `curves` answers."""

    def __init__(self, path: Path):
        self.path = path
        self.version = 0
        self.forget()

    def forget(self) -> None:
        self.offset, self.inode = 0, -1
        self.rows: dict[int, dict[str, float]] = {}
        self.unreadable = 0

    def refresh(self) -> bool:
        """Whether anything is new. A file that was cut, or is another one, is read from its beginning."""
        try:
            stat = self.path.stat()
        except OSError:
            changed = bool(self.rows)
            self.forget()
            self.version += changed
            return changed
        if stat.st_size < self.offset or stat.st_ino != self.inode:
            self.forget()
            self.inode = stat.st_ino
        if stat.st_size == self.offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(stat.st_size - self.offset)
        whole = data[: data.rfind(b"\n") + 1]  # a last line without an end is being written
        self.offset += len(whole)
        for line in whole.splitlines():
            self.take(line)
        self.version += bool(whole)
        return bool(whole)

    def take(self, line: bytes) -> None:
        try:
            row: Any = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            self.unreadable += 1
            return
        kept = {
            str(name): float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self.rows[step] = self.rows.get(step, {}) | kept

    @property
    def names(self) -> list[str]:
        return sorted({name for row in list(self.rows.values()) for name in row})

    def curves(self, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Name -> {x: steps, y: values}, at most MAX_POINTS of each."""
        rows = sorted(self.rows.items())
        found = {}
        for name in names:
            points = [(float(step), row[name]) for step, row in rows if name in row]
            found[name] = dict(zip(("x", "y"), thinned(points), strict=True))
        return found


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    x = [part[-1][0] for part in parts]
    return x, [sum(value for _, value in part) / len(part) for part in parts]
