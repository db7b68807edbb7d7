"""`diffrl sweep`: the runs of a grid, here one after the other or as jobs of a Ray cluster, and their summary.

Every run is `diffrl train CONFIG ... run_dir=OUT/NAME --resume auto`, so a sweep that is started again goes on with what is
unfinished and leaves the rest as it is. OUT gets sweep.json, sweep.md and curves.svg.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ray.job_submission import JobStatus

from actors.driver import train
from actors.stages import train_supervised
from actors.submit import POLL_S, Submission, checked_run_dir, live_job, open_client, said_of, start, stop_command
from diffrl.config import AnyConfig, RLConfig
from diffrl.config_file import load_config
from diffrl.errors import ConfigError, RunStoppedError, shown
from diffrl.files import write_json, write_whole
from diffrl.metrics import find
from diffrl.run_folder import METRICS, read_run, unfinished_run
from diffrl.status import read_lines
from diffrl.sweep import SHOWN, Cell, Finished, as_json, as_markdown, cells_of, draw, groups_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """SweepOptions(config="configs/quickstart.yaml", overrides=("train.steps=20",), over=("seed=0,1,2",), out="runs/sweep",
    address=None, working_dir=".", at_a_time=1, metrics=None)"""

    config: str
    overrides: Sequence[str]
    over: Sequence[str]
    out: str | None
    address: str | None  # of a cluster's head; None: here
    working_dir: str
    at_a_time: int  # jobs
    metrics: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Planned(cell=Cell(...), overrides=("train.steps=20", "seed=0", "run_dir=runs/sweep/seed-0"), config=RLConfig(...),
    finished=False)"""

    cell: Cell
    overrides: tuple[str, ...]
    config: AnyConfig
    finished: bool

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


def sweep(options: SweepOptions, *, dry_run: bool = False) -> None:
    """Raises ConfigError before anything starts, RunStoppedError at the end when runs failed."""
    metrics = options.metrics or SHOWN
    if unknown := next((key for key in metrics if find(key) is None), None):
        raise ConfigError(f"--metric: {shown(unknown)} is unknown; diffrl/metrics.py names them all")
    runs = plan(options)
    waiting = [run for run in runs if not run.finished]
    check(waiting, options)
    out = runs[0].folder.parent
    done = f", {len(runs) - len(waiting)} finished already" if len(waiting) < len(runs) else ""
    print(f"sweep: {len(runs)} runs in {out}{done}", flush=True)
    if dry_run:
        print("\n".join([*(f"  {run.cell.name}" for run in waiting), "nothing was started"]))
        return
    failed = run_here(waiting, options) if options.address is None else run_jobs(waiting, options)
    whole = [
        Finished(cell=run.cell, seconds=seconds_of(run), rows=rows_of(run))
        for run in runs
        if run.cell.name not in failed
    ]
    if whole and not any(run.rows for run in whole):
        raise RunStoppedError(
            f"sweep: the jobs ended, and {out} is not seen from here; sum up on a machine that sees it: same command"
        )
    if whole:
        groups = groups_of(whole, metrics)
        write_json(out / "sweep.json", as_json(whole, groups))
        write_whole(out / "sweep.md", as_markdown(groups) + "\n")
        draw(groups, out / "curves.svg", title=f"{options.config}: mean and range over runs")
        print(as_markdown(groups))
    if failed:
        raise RunStoppedError(
            f"sweep: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command goes on with them"
        )


def plan(options: SweepOptions) -> list[Planned]:
    """Every run, its config checked. Raises ConfigError."""
    cells = cells_of(options.over)
    out = options.out or f"{load_config(options.config, options.overrides).run_dir}_sweep"
    planned = []
    for cell in cells:
        overrides = (*options.overrides, *cell.overrides, f"run_dir={Path(out) / cell.name}")
        config = load_config(options.config, overrides)
        run = unfinished_run(config)
        finished = run is not None and "finished" in run
        planned.append(Planned(cell=cell, overrides=overrides, config=config, finished=finished))
    return planned


def check(runs: Sequence[Planned], options: SweepOptions) -> None:
    """What the configs cannot know: data, models, room. Once for what differs in its seed alone. Raises ConfigError."""
    if options.address is not None:
        for run in runs:
            checked_run_dir(submission(run, options))
        return
    seen: list[AnyConfig] = []
    for run in runs:
        alike = run.config.model_copy(update={"seed": 0, "run_dir": "-"})
        if alike in seen:
            continue
        seen.append(alike)
        with redirect_stdout(StringIO()):
            if isinstance(run.config, RLConfig):
                train(run.config, dry_run=True, resume="auto")
            else:
                train_supervised(run.config, dry_run=True, resume="auto")


def run_here(runs: Sequence[Planned], options: SweepOptions) -> list[str]:
    """Each in a process of its own; the names of those that failed."""
    failed = []
    for number, run in enumerate(runs, start=1):
        print(f"sweep: run {number} of {len(runs)}: {run.cell.name}", flush=True)
        command = [sys.executable, "-m", "actors.cli", "train", options.config, *run.overrides, "--resume", "auto"]
        if subprocess.run(command).returncode != 0:
            failed.append(run.cell.name)
    return failed


def run_jobs(runs: Sequence[Planned], options: SweepOptions) -> list[str]:
    """At most `at_a_time` at once; the names of those that failed. A job that lives from an earlier start is waited for."""
    assert options.address is not None
    waiting, live, failed = list(runs), dict[str, str](), []  # live: run -> job
    try:
        with said_of(options.address):
            client = open_client(options.address)
            while waiting or live:
                while waiting and len(live) < options.at_a_time:
                    run = waiting.pop(0)
                    there = live_job(client, run.config.run_dir)
                    job = there.submission_id if there else start(client, submission(run, options), run.config.run_dir)
                    live[run.cell.name] = str(job)
                    print(f"sweep: {run.cell.name}: job {job}{', which goes on' if there else ''}", flush=True)
                time.sleep(POLL_S)
                for name, job in list(live.items()):
                    status = client.get_job_info(job).status
                    if status.is_terminal():
                        print(f"sweep: {name}: {status.value.lower()}", flush=True)
                        failed += [name] if status != JobStatus.SUCCEEDED else []
                        del live[name]
    except KeyboardInterrupt:
        stops = "; ".join(stop_command(job, options.address) for job in live.values())
        raise RunStoppedError(
            f"sweep: its jobs go on, and the same command follows them; to stop them: {stops}"
        ) from None
    return failed


def submission(run: Planned, options: SweepOptions) -> Submission:
    assert options.address is not None
    return Submission(
        config=options.config, overrides=run.overrides, address=options.address, working_dir=options.working_dir
    )


def seconds_of(run: Planned) -> float | None:
    return read_run(run.folder).get("finished") if (run.folder / "run.json").is_file() else None


def rows_of(run: Planned) -> list[dict]:
    return read_lines(run.folder / METRICS)[0]
