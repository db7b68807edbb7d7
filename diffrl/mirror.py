"""Checkpoints of a run in a second place: another disk, an object store, whatever fsspec opens.

The copy has the layout of the run folder: `checkpoints/step-000040`, and beside it the files without which no run goes on.
A checkpoint's note is copied last, so one without it is not whole. Rollouts stay where they were written.
"""

from pathlib import Path
from typing import Any

import fsspec

from diffrl.checkpoint import NOTE, checkpoint_path
from diffrl.errors import ConfigError
from diffrl.quarantine import QUARANTINE
from diffrl.run_folder import METRICS

FILES = ("config.yaml", "run.json", METRICS, QUARANTINE, "report_before.json")


class Mirror:
    """The copy of one run folder. Raises ConfigError for an address that cannot be used."""

    def __init__(self, url: str):
        self.url = url
        try:
            found: Any = fsspec.core.url_to_fs(url)
            self.files, self.root = found[0], found[1].rstrip("/")
            self.files.exists(self.root)
        except Exception as error:  # of whatever package and service is behind the address
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"checkpoint.copy_to: {url!r} cannot be used ({type(error).__name__}: {reason}); name a folder or an address "
                "for which fsspec's package and credentials are there"
            ) from error

    def steps(self) -> list[int]:
        """Of the checkpoints that are whole, in order."""
        notes = self.files.glob(f"{self.root}/checkpoints/step-*/{NOTE}")
        return sorted(int(note.split("/")[-2].removeprefix("step-")) for note in notes)

    def push(self, run_folder: Path, step: int, *, keep: int) -> None:
        """Copy a checkpoint, then delete all but the newest `keep`."""
        checkpoint = checkpoint_path(run_folder, step)
        if step in self.steps():
            self.discard(step)  # of an earlier attempt
        sources = [file for file in checkpoint.rglob("*") if file.is_file() and file != checkpoint / NOTE]
        sources += [file for name in FILES if (file := run_folder / name).exists()]
        for file in [*sources, checkpoint / NOTE]:
            target = f"{self.root}/{file.relative_to(run_folder).as_posix()}"
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(file), target)
        for old in self.steps()[:-keep]:
            self.discard(old)

    def discard(self, step: int) -> None:
        folder = f"{self.root}/checkpoints/step-{step:06d}"
        self.files.rm_file(f"{folder}/{NOTE}")
        self.files.rm(folder, recursive=True)

    def pull(self, run_folder: Path) -> bool:
        """Make a run folder out of the newest checkpoint; False where there is none."""
        steps = self.steps()
        if not steps:
            return False
        checkpoint = f"{self.root}/checkpoints/step-{steps[-1]:06d}"
        names = self.files.find(checkpoint)
        beside = [f"{self.root}/{name}" for name in FILES]
        for name in [*names, *(name for name in beside if self.files.exists(name))]:
            target = run_folder / name.removeprefix(f"{self.root}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(name, str(target))
        return True
