"""Where an RL run begins: in a new folder, at the newest checkpoint of its own, or, as a branch, at another run's."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffrl.checkpoint import RunState, last_checkpoint
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.errors import ConfigError
from diffrl.mirror import Mirror
from diffrl.quarantine import QUARANTINE
from diffrl.resume import Difference, differences
from diffrl.run_folder import METRICS, Attempt, check_run_folder, claim_attempt, create_run_folder, unfinished_run

REPORT_BEFORE = "report_before.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """RunStart(folder=Path("runs/a"), attempt=Attempt(...), checkpoint=Path("runs/a/checkpoints/step-000040"),
    state=RunState(step=40, ...), said=("optim.lr: 2e-06, was 1e-06: it changes what is computed from there on",))"""

    folder: Path
    attempt: Attempt
    checkpoint: Path | None  # None: from the beginning
    state: RunState
    said: tuple[str, ...] = ()  # what differs from the config that the checkpoint was made with


def check_resume(config: RLConfig, resume: str | None) -> Path | None:
    """The checkpoint to go on from, None for a run from its beginning. Raises ConfigError; changes nothing."""
    folder = Path(config.run_dir)
    if resume is None:
        return None
    if resume in ("auto", "last"):
        unfinished_run(config)
        checkpoint = last_checkpoint(folder)
        if checkpoint is None and resume == "last":
            raise ConfigError(
                f"--resume: last, but {folder} has no checkpoint; use auto to begin where there is none, or name one"
            )
    else:
        checkpoint = Path(resume)
    if checkpoint is not None:
        try:
            state = RunState.read(checkpoint)
        except ValueError as error:
            raise ConfigError(f"--resume: {error}") from None
        metrics = checkpoint.parent.parent / METRICS
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < state.metrics_bytes:
            raise ConfigError(
                f"--resume: {metrics} has {size} bytes, and had {state.metrics_bytes} when {checkpoint} was made; restore it, "
                "or start from the checkpoint's model (model.path)"
            )
    if resume not in ("auto", "last"):
        assert checkpoint is not None
        if checkpoint.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"run_dir: {folder} holds the checkpoint {checkpoint} and would be moved aside; choose another run_dir for "
                "the branch, or --resume last to go on with the run itself"
            )
        branch_differences(config, checkpoint)
    return checkpoint


def branch_differences(config: RLConfig, checkpoint: Path) -> list[Difference]:
    """Between the config of a checkpoint's run and another one. Raises ConfigError for what its state does not fit."""
    then = load_config(checkpoint.parent.parent / "config.yaml")
    found = [d for d in differences(then, config) if d.field != "run_dir"]
    fixed = next((d for d in found if d.kind == "fixed"), None)
    if fixed is not None:
        raise ConfigError(
            f"{fixed.field}: {fixed.now!r} must be {fixed.then!r}, with which {checkpoint} was made ({fixed.meaning}); change "
            "it back, or start from its model (model.path)"
        )
    return found


def begin(config: RLConfig, resume: str | None, **facts: dict[str, str]) -> RunStart | None:
    """Claim the run folder: no earlier start of the run may write any more. None when the run is finished.

    A branch gets a folder of its own, with the lines of metrics.jsonl, the quarantine and the report before training of
    where it comes from. Raises ConfigError.
    """
    if resume in ("auto", "last") and config.checkpoint.copy_to is not None:
        folder = Path(config.run_dir)
        check_run_folder(folder, config.model.path)
        if not (folder / "run.json").exists():
            Mirror(config.checkpoint.copy_to).pull(folder)
    checkpoint = check_resume(config, resume)
    said: tuple[str, ...] = ()
    run = unfinished_run(config) if resume in ("auto", "last") else None
    if run is not None and "finished" in run:
        return None
    if run is None:
        if checkpoint is not None:
            said = tuple(
                f"{d.field}: {d.now!r}, was {d.then!r}: {d.meaning}" for d in branch_differences(config, checkpoint)
            )
            facts = {**facts, "branch": {"checkpoint": str(checkpoint.resolve())}}
        folder = create_run_folder(config, **facts)
        if checkpoint is not None:
            copy_beginning(checkpoint, folder)
    else:
        folder = Path(config.run_dir)
    return RunStart(
        folder=folder,
        attempt=claim_attempt(folder),
        checkpoint=checkpoint,
        state=RunState() if checkpoint is None else RunState.read(checkpoint),
        said=said,
    )


def copy_beginning(checkpoint: Path, folder: Path) -> None:
    for name in (METRICS, REPORT_BEFORE, QUARANTINE):
        if (file := checkpoint.parent.parent / name).exists():
            shutil.copyfile(file, folder / name)
