"""`diffrl status`: what the folder of a run, or of a pipeline, says about it, also while it is being written.

Imports neither torch nor the configs' models, so that it answers at once; a test compares the few names of files below with
those of their writers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from diffrl.checkpoint import last_checkpoint
from diffrl.errors import ConfigError

SCHEMA_VERSION = 1  # of run.json: run_folder.py
PIPELINE_MARK = "pipeline_run.yaml"  # actors/pipeline.py
SPEED_STEPS = 10  # over which seconds per step are averaged
STEP_KEYS = ("loss/total", "loss/diffusion")  # one of them is in the line of every step, and in no other
SHOWN = (
    *("reward/mean", "reward/solved_frac", "eval/pass@1", "loss/total", "loss/kl"),
    *("loss/diffusion", "validation/diffusion", "optim/grad_norm"),
)
RATES = ("time/tokens_per_second",)  # among the seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """RunStatus(folder="runs/a/sft", stage="sft", attempt=2, finished_s=None, has_model=False, steps=40, num_steps=60,
    metrics={"loss/diffusion": 1.2, "validation/diffusion": 1.3}, seconds_per_step=0.8, restarts=1, masked_samples=0,
    written_s_ago=3.2, checkpoint="checkpoints/step-000040", quarantined=({"problem_id": "mbpp/7", "reason": "timeout"},),
    stalls=("step-000012.txt",), unreadable_lines=0)"""

    folder: str
    stage: str
    attempt: int  # how often the run has been started
    finished_s: float | None  # seconds it took; None: not recorded as finished
    has_model: bool  # run_dir/model is written when training ends, also when it had to stop
    steps: int  # done
    num_steps: int | None  # None: the config leaves it to the data
    metrics: Mapping[str, float | None]  # the newest of each; None: not finite
    seconds_per_step: float | None  # None: no step yet
    restarts: int  # of workers that the driver replaced; Ray Train's own are not counted
    masked_samples: int  # of groups that were trained on, which the judge failed on
    written_s_ago: float | None  # since the last write to metrics.jsonl; None: not written yet
    checkpoint: str | None  # the newest that is whole
    quarantined: Sequence[Mapping[str, Any]]
    stalls: Sequence[str]  # files that the watchdog wrote
    unreadable_lines: int  # of metrics.jsonl, without a torn last one


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStatus:
    """PipelineStatus(folder="runs/a", finished=False, stages={"pretrain": RunStatus(...), "sft": None})"""

    folder: str
    finished: bool  # its summary is written
    stages: Mapping[str, RunStatus | None]  # in their order; None: not started


def status_of(path: Path, now: float) -> RunStatus | PipelineStatus:
    """Of a run's folder, or a pipeline's. `now`: seconds since the epoch. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"RUN: {path} is not there; give the folder of a run, such as runs/quickstart/rl")
    if (path / PIPELINE_MARK).is_file() or (path / "pipeline.json").is_file():
        return pipeline_status(path, now)
    if not (path / "run.json").is_file():
        inside = sorted(file.parent.name for file in path.glob("*/run.json"))
        way_out = f"it holds {', '.join(inside)}" if inside else "give a folder that diffrl train or pipeline made"
        raise ConfigError(f"RUN: {path} is not the folder of a run or pipeline (it has no run.json); {way_out}")
    return run_status(path, now)


def pipeline_status(path: Path, now: float) -> PipelineStatus:
    if (path / PIPELINE_MARK).is_file():
        names = list(mapping(path / PIPELINE_MARK).get("stages", {}))
    else:
        names = [row["stage"] for row in mapping(path / "pipeline.json").get("stages", [])]
    started = {name: (path / name / "run.json").is_file() for name in names}
    stages = {name: run_status(path / name, now) if started[name] else None for name in names}
    finished = (path / "pipeline.json").is_file() and all((path / name / "manifest.json").is_file() for name in names)
    return PipelineStatus(folder=str(path), finished=finished, stages=stages)


def run_status(path: Path, now: float) -> RunStatus:
    run, config = mapping(path / "run.json"), mapping(path / "config.yaml")
    if run.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"RUN: {path}/run.json has schema_version {run.get('schema_version')!r}, this version of diffrl knows "
            f"{SCHEMA_VERSION}; use the version of diffrl that run.json names"
        )
    file = path / "metrics.jsonl"
    rows, unreadable = read_lines(file)
    steps = [row for row in rows if any(key in row for key in STEP_KEYS)]
    train, method = config.get("train", {}), config.get("method", {})
    samples = train.get("prompts_per_step", 0) * method.get("group_size", 0)
    return RunStatus(
        folder=str(path),
        stage=str(config.get("stage")),
        attempt=int(run.get("attempt", 1)),
        finished_s=finished_seconds(path, run),
        has_model=(path / "model").is_dir(),
        steps=int(steps[-1]["step"]) + 1 if steps else 0,
        num_steps=train.get("steps"),
        metrics={key: values[-1] for key in SHOWN if (values := [finite(row[key]) for row in rows if key in row])},
        seconds_per_step=seconds_per_step(steps[-SPEED_STEPS:]),
        restarts=count_restarts(steps),
        masked_samples=sum(round(row.get("sandbox/infra_error_frac", 0) * samples) for row in steps),
        written_s_ago=max(0.0, now - file.stat().st_mtime) if file.is_file() else None,
        checkpoint=str(newest.relative_to(path)) if (newest := last_checkpoint(path)) else None,
        quarantined=tuple(read_lines(path / "quarantine.jsonl")[0]),
        stalls=tuple(sorted(file.name for file in (path / "stalls").glob("*"))),
        unreadable_lines=unreadable,
    )


def mapping(file: Path) -> dict[str, Any]:
    """A YAML or JSON file of the folder. Raises ConfigError."""
    try:
        text = file.read_text()
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"RUN: {file} cannot be read ({error}); give the folder of a run that is whole") from None
    if not isinstance(value, dict):
        raise ConfigError(f"RUN: {file} holds no mapping; give the folder of a run that is whole")
    return value


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Objects of a JSONL file that may be missing, and how many lines are none. A last line without an end is being written."""
    rows, unreadable = [], 0
    whole = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    for line in whole:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def finished_seconds(path: Path, run: Mapping[str, Any]) -> float | None:
    """From run.json, else from the manifest that a pipeline wrote."""
    if "finished" in run:
        return float(run["finished"])
    manifest = path / "manifest.json"
    return mapping(manifest).get("metrics", {}).get("seconds") if manifest.is_file() else None


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float | None:
    if not rows:
        return None
    return sum(v for row in rows for k, v in row.items() if k.startswith("time/") and k not in RATES) / len(rows)


def count_restarts(rows: Sequence[Mapping[str, Any]]) -> int:
    """Each `restarts/*` counts up within a start of the run and begins at zero with the next one."""
    total, before = 0, {}
    for row in rows:
        now = {key: value for key, value in row.items() if key.startswith("restarts/")}
        total += sum(v - before.get(k, 0) if v >= before.get(k, 0) else v for k, v in now.items())
        before = now
    return int(total)


# Words


def as_json(status: RunStatus | PipelineStatus) -> str:
    return json.dumps(asdict(status), indent=2)


def as_text(status: RunStatus | PipelineStatus) -> str:
    """Of a run a few lines, of a pipeline one line for each stage."""
    if isinstance(status, RunStatus):
        head = f"{status.folder}: {status.stage}, {state(status)}"
        return "\n".join([head, *(f"  {name:<12}{text}" for name, text in parts(status).items())])
    lines = [f"{status.folder}: pipeline, {'finished' if status.finished else 'not finished'}"]
    for name, run in status.stages.items():
        told = "not started" if run is None else "; ".join([state(run), *(f"{k} {v}" for k, v in parts(run).items())])
        lines.append(f"  {name:<12}{told}")
    return "\n".join(lines)


def state(run: RunStatus) -> str:
    if run.finished_s is not None:
        return f"attempt {run.attempt}, finished in {duration(run.finished_s)}"
    ended = " (model/ is written: training ended, or had to stop)" if run.has_model else ""
    return f"attempt {run.attempt}, not recorded as finished{ended}"


def parts(run: RunStatus) -> dict[str, str]:
    """What there is to say, by its name."""
    total = "an unknown number (train.steps is not set: the data decide)" if run.num_steps is None else run.num_steps
    told = {"steps": f"{run.steps} of {total}"}
    if run.metrics:
        told["metrics"] = ", ".join(f"{k} {'nan' if v is None else format(v, '.4g')}" for k, v in run.metrics.items())
    if run.seconds_per_step is not None:
        told["speed"] = f"{run.seconds_per_step:.3g} s a step (of the last {min(SPEED_STEPS, run.steps)})"
    told["disturbed"] = f"{run.restarts} workers restarted, {run.masked_samples} samples masked"
    told["written"] = "nothing yet" if run.written_s_ago is None else f"{duration(run.written_s_ago)} ago"
    told["checkpoint"] = run.checkpoint or "none"
    if run.quarantined:
        told["quarantine"] = ", ".join(f"{row.get('problem_id')} ({row.get('reason')})" for row in run.quarantined)
    if run.stalls:
        told["stalls"] = ", ".join(f"stalls/{name}" for name in run.stalls)
    if run.unreadable_lines:
        told["damaged"] = f"{run.unreadable_lines} lines of metrics.jsonl cannot be read"
    return told


def duration(seconds: float) -> str:
    """3.2 s, 5 min 12 s, 3 h 20 min, 2 d 4 h"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
