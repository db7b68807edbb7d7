"""The checkpoints of a supervised stage: `run_dir/checkpoints/step-000500`, committed by the note that is written last.

Everything that the next step depends on is in one: weights, optimizer, how many steps are done (and with them the place
in the stream of rows), how long metrics.jsonl was, and the best validation so far. Whoever goes on from it cuts
metrics.jsonl back, so that a run that was disturbed leaves the lines of one that was not.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from actors.engine import NOTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress(step=500, metrics_bytes=81920, num_bad=0, best_step=400, best_loss=1.25)"""

    step: int = 0  # steps done
    metrics_bytes: int = 0  # of metrics.jsonl after them
    num_bad: int = 0  # steps skipped in a row
    best_step: int | None = None  # after how many steps validation was best
    best_loss: float | None = None

    @classmethod
    def from_note(cls, note: dict[str, Any]) -> Self:
        return cls(**note)

    def note(self) -> dict[str, Any]:
        return asdict(self)


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:06d}"


def committed_steps(run_folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole, in order."""
    notes = (run_folder / "checkpoints").glob(f"step-*/{NOTE}")
    return sorted(int(note.parent.name.removeprefix("step-")) for note in notes)


def last_step(run_folder: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    return max(committed_steps(run_folder), default=0)


def prune(run_folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and the best, and what is left of those that were never committed."""
    kept = {*committed_steps(run_folder)[-keep:], best_step}
    for folder in (run_folder / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) not in kept:
            (folder / NOTE).unlink(missing_ok=True)  # first: half of one must not pass for a whole one
            shutil.rmtree(folder)
