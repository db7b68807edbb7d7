"""Where the metrics of a run go beside metrics.jsonl: TensorBoard, Ray's metrics (for Prometheus), W&B, MLflow.

metrics.jsonl is the record, and a run that cannot write it stops. These here are copies: one that fails says so once, and
the run goes on. A run that is resumed, or a stage that lost its workers, does some steps again; every sink sees to it that
a step is shown once. W&B and MLflow are packages of their own, imported only for who asks for them.

To add one: write the class (a `Sink`), add its line to SINKS and its package to PACKAGES, and its name to `SinkName`.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.metrics import Counter, Gauge

from actors.processes import one_line
from diffrl.config.telemetry import TelemetryConfig
from diffrl.errors import ConfigError
from diffrl.metrics import STEP_ENDED_AT, STEPS, Metric, find

RAY_METRICS: dict[str, Any] = {}  # by name: a process makes each of them once
REPEAT_S = 5.0  # Ray's processes tell their metrics every 10 s
FLUSH_S = 2.0  # what a run that is killed may have lost of TensorBoard's files
# Module and what installs it.
PACKAGES = {
    "tensorboard": ("tensorboardX", "pip install tensorboardX"),
    "wandb": ("wandb", "pip install 'diffrl[wandb]'"),
    "mlflow": ("mlflow", "pip install 'diffrl[mlflow]'"),
}


class Sink(Protocol):
    def write(self, steps: int, values: Mapping[str, float]) -> None:
        """Finite values, after so many steps of the run."""
        ...

    def rewind(self, steps: int) -> None:
        """What was written of this step, counted from 1, and of later ones comes again."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkRun:
    """SinkRun(folder=Path("runs/a"), stage="rl", project="diffrl", first=41): the run, and the step with which it begins or
    goes on."""

    folder: Path
    stage: str
    project: str
    first: int

    @property
    def name(self) -> str:
        """Its name in services with many runs."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}"

    @property
    def id(self) -> str:
        """Another one for every run, the same for every start of it: the token of the first."""
        return (self.folder / "attempts" / "000001").read_text()


class TensorBoard:
    """Event files in run_dir/tensorboard. A file begins by saying from which step on what the files before it hold does not
    count."""

    def __init__(self, run: SinkRun):
        proto = import_module("tensorboardX.proto.event_pb2")
        self.Event, self.SessionLog = proto.Event, proto.SessionLog
        self.Summary = import_module("tensorboardX.proto.summary_pb2").Summary
        self.EventsWriter = import_module("tensorboardX.event_file_writer").EventsWriter
        self.folder = run.folder / "tensorboard"
        self.open(run.first)

    def open(self, steps: int) -> None:
        self.folder.mkdir(exist_ok=True)
        # Files are read in the order of their names, which have seconds; several may begin within one.
        self.file = self.EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        start = self.SessionLog(status=self.SessionLog.START)
        self.file.write_event(self.Event(wall_time=time.time(), step=steps, session_log=start))
        self.flushed_at = 0.0

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        summary = self.Summary(value=[self.Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self.file.write_event(self.Event(wall_time=time.time(), step=steps, summary=summary))
        if time.monotonic() - self.flushed_at > FLUSH_S:
            self.file.flush()
            self.flushed_at = time.monotonic()

    def rewind(self, steps: int) -> None:
        self.close()
        self.open(steps)

    def close(self) -> None:
        self.file.close()


class RayMetrics:
    """Ray's own metrics: what it tells Prometheus of a cluster has ours too, as `ray_` and the name of `Metric.prometheus`,
    with the labels of the metric and `run`. There a count or a counter only ever grows. Ray tells a gauge once each time
    that it is set, and Prometheus forgets what it is not told: so gauges are set again while a step goes on."""

    def __init__(self, run: SinkRun):
        self.run = run.name
        self.totals: dict[str, float] = {}  # of counters, by key
        self.gauges: dict[tuple[str, ...], tuple[Any, float, dict[str, str]]] = {}  # as they were set last
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.repeat, daemon=True)
        self.thread.start()

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        if not ray.is_initialized():
            return  # a stage's last lines are read when its cluster is gone
        for key, value in values.items():
            found = find(key)
            if found is None:  # of no known kind; who wrote it has been warned
                continue
            metric, labels = found
            tags = {"run": self.run, **dict(zip(metric.labels, labels, strict=True))}
            if metric.kind == "gauge":
                self.set(metric, value, tags)
            elif (more := value if metric.kind == "count" else self.growth(key, value)) > 0:
                self.of(metric).inc(more, tags)
        self.set(STEPS, steps, {"run": self.run})
        self.set(STEP_ENDED_AT, time.time(), {"run": self.run})

    def set(self, metric: Metric, value: float, tags: dict[str, str]) -> None:
        gauge = self.of(metric)
        gauge.set(value, tags)
        self.gauges[metric.prometheus, *tags.values()] = gauge, value, tags

    def repeat(self) -> None:
        while not self.ended.wait(REPEAT_S):
            for gauge, value, tags in list(self.gauges.values()):
                if ray.is_initialized():
                    gauge.set(value, tags)

    def growth(self, key: str, value: float) -> float:
        """Of a counter, which begins at zero with every start of the run."""
        before, self.totals[key] = self.totals.get(key, 0.0), value
        return value - before if value >= before else value

    def of(self, metric: Metric) -> Any:
        if metric.prometheus not in RAY_METRICS:
            kind = Gauge if metric.kind == "gauge" else Counter
            words = f"{metric.name}: {metric.help} ({metric.unit})"
            RAY_METRICS[metric.prometheus] = kind(metric.prometheus, words, tag_keys=("run", *metric.labels))
        return RAY_METRICS[metric.prometheus]

    def rewind(self, steps: int) -> None:
        """Time goes forward there."""

    def close(self) -> None:
        self.ended.set()
        self.thread.join()


class WandB:
    """A run of W&B, gone on with by every start of ours. It takes steps in their order only: those that it has are left
    out, and they are the same."""

    def __init__(self, run: SinkRun):
        wandb = import_module("wandb")
        self.run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config={"stage": run.stage, "run_dir": str(run.folder)},
        )

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        if steps >= self.run.step:
            self.run.log(dict(values), step=steps)

    def rewind(self, steps: int) -> None:
        """See above."""

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, gone on with by every start of ours. It keeps whatever it gets, so steps that it has are left out."""

    def __init__(self, run: SinkRun):
        mlflow = import_module("mlflow")
        self.client = mlflow.MlflowClient()
        self.Value = mlflow.entities.Metric
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(run.project)
        known = self.client.search_runs([number], f"tags.diffrl_run = '{run.id}'")
        tags = {"diffrl_run": run.id, "stage": run.stage, "run_dir": str(run.folder)}
        found = known[0] if known else self.client.create_run(number, tags=tags, run_name=run.name)
        self.id = found.info.run_id
        self.last = int(found.data.metrics.get("steps", 0)) if known else 0

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        if steps < self.last:
            return
        self.last = steps
        now = int(1000 * time.time())
        named = {key.replace("@", "_at_"): value for key, value in values.items()} | {"steps": float(steps)}
        self.client.log_batch(self.id, [self.Value(key, value, now, steps) for key, value in named.items()])

    def rewind(self, steps: int) -> None:
        """See above."""

    def close(self) -> None:
        self.client.set_terminated(self.id)


SINKS: Mapping[str, Callable[[SinkRun], Sink]] = {
    "tensorboard": TensorBoard,
    "ray": RayMetrics,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_sinks(config: TelemetryConfig) -> None:
    """Raises ConfigError for one whose package is not installed."""
    for name in config.sinks:
        module, way_out = PACKAGES.get(name, ("ray", ""))
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # nothing, or a folder that happens to have that name
            raise ConfigError(
                f"telemetry.sinks: {name!r} needs the package {module}, which is not installed; {way_out}, or leave it out"
            )


class Sinks:
    """Those of a run. They are opened with the first line that is written, so that they know where the run begins."""

    def __init__(self, config: TelemetryConfig, folder: Path, stage: str, say: Callable[[str], None]):
        self.config, self.folder, self.stage, self.say = config, folder, stage, say
        self.sinks: dict[str, Sink] | None = None  # by name, once opened
        self.warned: set[str] = set()
        self.last = 0  # step

    def write(self, row: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl."""
        assert row["step"] is not None
        steps = int(row["step"]) + 1
        if self.sinks is None:
            self.sinks = {}
            run = SinkRun(folder=self.folder, stage=self.stage, project=self.config.project, first=steps)
            for name in self.config.sinks:
                with self.guarding(name):
                    self.sinks[name] = SINKS[name](run)
        values = {k: float(v) for k, v in row.items() if k != "step" and v is not None and math.isfinite(v)}
        for name, sink in self.sinks.items():
            with self.guarding(name):
                if steps < self.last:
                    sink.rewind(steps)
                sink.write(steps, values)
        self.last = steps

    def close(self) -> None:
        for name, sink in (self.sinks or {}).items():
            with self.guarding(name):
                sink.close()
        self.sinks = None

    def guarding(self, name: str) -> "Guard":
        return Guard(self, name)


class Guard:
    """What a sink raises is told once, whatever it is: these are other people's services."""

    def __init__(self, sinks: Sinks, name: str):
        self.sinks, self.name = sinks, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if self.name not in self.sinks.warned:
            self.sinks.warned.add(self.name)
            what = f"{type(error).__name__}: {one_line(str(error))}"
            self.sinks.say(
                f"telemetry.sinks: {self.name} failed ({what}); the run goes on, metrics.jsonl has all of it"
            )
        return True
