"""The checkpoints of a run, of all stages: `run_dir/checkpoints/step-000500`, whole or not there at all.

A checkpoint is written under another name, synced, given its note (`state.json`, last) and renamed; a folder without a
note was never committed. Everything that the next step depends on is in one, and how long metrics.jsonl was: whoever goes
on from it cuts that file back, so that a run that was disturbed leaves the lines of one that was not.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from diffrl.files import write_json

NOTE = "state.json"  # written last, so a folder with it is complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of a supervised stage. Progress(step=500, metrics_bytes=81920, num_bad=0, best_step=400, best_loss=1.25)"""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Of an RL run: what its driver knows between two steps, beside the weights.

    RunState(step=40, version=40, reference_version=0, next_ordinal=324, asked=((320, 321, 322, 323),),
             metrics_bytes=61440, exact=False, watched=(), best_rate=0.41, best_step=39)
    """

    step: int = 0  # steps done
    version: int = 0  # of the policy
    reference_version: int = 0
    next_ordinal: int = 0  # of the first prompt that has not been drawn
    asked: tuple[tuple[int, ...], ...] = ()  # ordinals of each of the next steps whose groups are there already
    metrics_bytes: int = 0  # of metrics.jsonl after them
    exact: bool = False  # the guard has ended approximate sampling
    watched: tuple[Mapping[str, float], ...] = ()  # the guard's metrics of each step
    best_rate: float | None = None  # pass@1 of the best evaluation
    best_step: int | None = None  # the step before it
    ended: bool = False  # no step follows

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Raises ValueError for a folder that is no committed checkpoint of an RL run."""
        try:
            note = json.loads((checkpoint / NOTE).read_text())
            asked = tuple(tuple(ordinals) for ordinals in note["asked"])
            return cls(**{**note, "asked": asked, "watched": tuple(note["watched"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{checkpoint} is not a checkpoint of an RL run ({type(error).__name__}: {error}); name a folder "
                f"checkpoints/step-... that has a {NOTE}"
            ) from None

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


def last_checkpoint(run_folder: Path) -> Path | None:
    step = last_step(run_folder)
    return checkpoint_path(run_folder, step) if step else None


def commit(part: Path, checkpoint: Path, note: Mapping[str, Any]) -> None:
    """Make what was written to `part` the checkpoint; on the disk, not only on its way there."""
    write_json(part / NOTE, note)
    for folder, _, files in os.walk(part):
        for path in (*(os.path.join(folder, name) for name in files), folder):
            sync(path)
    discard(checkpoint)  # of an earlier attempt at the same step
    part.rename(checkpoint)
    sync(checkpoint.parent)


def part_path(checkpoint: Path, attempt: int) -> Path:
    """Where a start of the run writes a checkpoint before it is committed."""
    return checkpoint.with_name(f".{checkpoint.name}.attempt-{attempt}")


def sync(path: str | Path) -> None:
    """A file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(checkpoint: Path) -> None:
    if checkpoint.exists():
        (checkpoint / NOTE).unlink(missing_ok=True)  # first: half of one must not pass for a whole one
        shutil.rmtree(checkpoint)


def prune(run_folder: Path, *, keep: int, best_step: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep` and the best, and what is left of those that were never committed."""
    kept = {*committed_steps(run_folder)[-keep:], best_step}
    for folder in (run_folder / "checkpoints").glob("*step-*"):
        if folder.name.startswith(".") or int(folder.name.removeprefix("step-")) not in kept:
            discard(folder)
