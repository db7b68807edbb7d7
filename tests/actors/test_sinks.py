"""Sinks: what TensorBoard's files hold, what Ray tells Prometheus, what W&B and MLflow are called with, and that a sink which
fails stops nobody. W&B and MLflow are packages that a user may install; here small stand-ins take their place, which keep
to what their documentation says."""

import json
import re
import struct
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from actors import sinks
from actors.prepare import prepare
from actors.sinks import Sinks, check_sinks
from actors.telemetry import SupervisedTelemetry, Telemetry
from diffrl.config import RLConfig, TelemetryConfig
from diffrl.config_file import validate
from diffrl.errors import ConfigError
from diffrl.manifests import stage_config
from diffrl.resume import differences
from diffrl.run_folder import MetricsFile
from tests.conftest import RayCluster

RL = {"stage": "rl", "data": {"source": "microcode"}}


def events(folder: Path) -> list[Event]:
    """Of all files in the order in which TensorBoard reads them: by name."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """What is left when every start of a session has taken away what it says."""
    values: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            assert event.session_log.status == SessionLog.START
            values = {key: {s: v for s, v in row.items() if s < event.step} for key, row in values.items()}
        for value in event.summary.value:
            assert event.step not in values.get(value.tag, {}), "a step is there twice"
            values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def opened(folder: Path, *names: str, said: list[str] | None = None) -> Sinks:
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    (folder / "attempts" / "000001").write_text("token")
    config = TelemetryConfig.model_validate({"sinks": list(names)})
    return Sinks(config, folder, "rl", (said if said is not None else []).append)


def test_tensorboard_shows_every_step_once_however_often_the_run_went_on(tmp_path: Path):
    first = opened(tmp_path, "tensorboard")
    for step in range(4):
        first.write({"step": step, "reward/mean": step / 2, "loss/kl": None, "optim/grad_norm": float("nan")})
    first.write({"step": 3, "eval/pass@1": 0.5})
    first.close()
    again = opened(tmp_path, "tensorboard")  # from the checkpoint after step 2, within the same second
    for step in (2, 3, 4):
        again.write({"step": step, "reward/mean": 10.0 + step})
    again.write({"step": 3, "reward/mean": 20.0})  # workers were lost, a step is done once more
    again.write({"step": 4, "reward/mean": 21.0})
    again.close()
    assert shown(tmp_path)["reward/mean"] == {1: 0.0, 2: 0.5, 3: 12.0, 4: 20.0, 5: 21.0}
    assert shown(tmp_path).keys() == {"reward/mean", "eval/pass@1"} and shown(tmp_path)["eval/pass@1"] == {}
    assert all(event.file_version == "brain.Event:2" for event in events(tmp_path) if event.file_version)


def test_a_run_that_is_killed_has_lost_no_more_than_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sinks, "FLUSH_S", 0.0)
    run = opened(tmp_path, "tensorboard")
    run.write({"step": 0, "reward/mean": 1.5})
    assert shown(tmp_path) == {"reward/mean": {1: 1.5}}  # and nothing was closed
    run.close()


class Broken:
    """Fails at everything."""

    def __init__(self, run: sinks.SinkRun):
        self.calls: list[str] = []

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        raise OSError(28, "No space\nleft on device")

    def rewind(self, steps: int) -> None:
        raise AssertionError

    def close(self) -> None:
        raise RuntimeError("closed")


def test_a_sink_that_fails_is_told_of_once_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(run: sinks.SinkRun) -> Any:
        raise ConnectionError("api.wandb.ai: no route to host")

    monkeypatch.setattr(sinks, "SINKS", {**sinks.SINKS, "mlflow": Broken, "wandb": refuse})
    said: list[str] = []
    run = opened(tmp_path, "mlflow", "wandb", "tensorboard", said=said)
    for step in (0, 1, 0):
        run.write({"step": step, "reward/mean": float(step)})
    run.close()
    assert said == [
        "telemetry.sinks: wandb failed (ConnectionError: api.wandb.ai: no route to host); the run goes on, metrics.jsonl has "
        "all of it",
        "telemetry.sinks: mlflow failed (OSError: [Errno 28] No space left on device); the run goes on, metrics.jsonl has "
        "all of it",
    ]
    assert shown(tmp_path)["reward/mean"] == {1: 0.0}


def test_an_interrupt_is_no_failure_of_a_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(run: sinks.SinkRun) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sinks, "SINKS", {"tensorboard": interrupt})
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, "tensorboard").write({"step": 0})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_refused_before_anything_starts(name: str, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sinks, "PACKAGES", {name: (f"{name}_missing", f"pip install 'diffrl[{name}]'")})
    (tmp_path / f"{name}_missing").mkdir()  # such as the folder that W&B leaves behind
    config = validate({**RL, "run_dir": str(tmp_path / "run"), "telemetry": {"sinks": [name]}}, "test")
    assert isinstance(config, RLConfig)
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert str(caught.value) == (
        f"telemetry.sinks: '{name}' needs the package {name}_missing, which is not installed; pip install 'diffrl[{name}]', "
        "or leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_default_sinks_need_nothing_more():
    check_sinks(TelemetryConfig())
    assert list(TelemetryConfig().sinks) == ["tensorboard", "ray"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sinks": ["tensorbord"]}, r"telemetry\.sinks\.0: 'tensorbord' .*'tensorboard'"),
        ({"sinks": ["ray", "ray"]}, r"telemetry\.sinks: 'ray' must be named once"),
        ({"sinks": "ray"}, r"telemetry\.sinks: 'ray' must be a list, such as \[a, b\]"),
        ({"sink": ["ray"]}, r"telemetry\.sink: unknown key, did you mean 'sinks'\?"),
        ({"project": ""}, r"telemetry\.project: ''"),
    ],
)
def test_mistakes_in_the_section_are_told_in_a_line(section: dict, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        validate({**RL, "telemetry": section}, "test")
    assert "\n" not in str(caught.value)


def test_where_metrics_go_changes_no_result():
    plain, other = (validate({**RL, "telemetry": {"sinks": names}}, "test") for names in (["ray"], []))
    assert [(d.field, d.kind) for d in differences(plain, other)] == [("telemetry.sinks", "free")]
    assert stage_config(plain) == stage_config(other) and "telemetry" not in stage_config(plain)


# Services


class Calls(list):
    """What a stand-in was called with."""

    def note(self, what: str, /, **values: Any) -> None:
        self.append((what, values))


def test_wandb_goes_on_with_its_run_and_gets_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, kept = Calls(), {}

    class WandbRun:
        """Its `step` is the one that the next `log` without a step would get; `log` of an earlier one is dropped there."""

        def __init__(self, id: str):
            self.id, self.step = id, kept.get(id, 0)

        def log(self, values: dict[str, float], step: int) -> None:
            assert step >= self.step
            self.step = kept[self.id] = step
            calls.note("log", values=values, step=step)

        def finish(self) -> None:
            calls.note("finish")

    def init(**options: Any) -> WandbRun:
        calls.note("init", **options)
        return WandbRun(options["id"])

    module = ModuleType("wandb")
    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for steps in (range(3), range(1, 4)):  # killed after step 3, and on from the checkpoint after step 1
        run = opened(tmp_path / "rl", "wandb")
        for step in steps:
            run.write({"step": step, "reward/mean": float(step)})
        run.write({"step": steps[-1], "eval/pass@1": 0.5})
        run.close()
    begun = [values for name, values in calls if name == "init"]
    assert begun[0] == begun[1] and begun[0]["id"] == "token" and begun[0]["resume"] == "allow"
    assert begun[0]["name"] == f"{tmp_path.name}/rl" and begun[0]["project"] == "diffrl"
    logged = [(values["step"], values["values"]) for name, values in calls if name == "log"]
    assert [step for step, _ in logged] == [1, 2, 3, 3, 3, 4, 4]
    assert logged[3] == (3, {"eval/pass@1": 0.5}) and logged[4] == (3, {"reward/mean": 2.0})
    assert [name for name, _ in calls].count("finish") == 2


def test_mlflow_goes_on_with_its_run_and_gets_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    service: dict[str, Any] = {"experiments": {}, "runs": {}}

    def as_run(run_id: str) -> Any:
        run = service["runs"][run_id]
        last = {key: value for key, value, _ in run["metrics"]}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id), data=SimpleNamespace(metrics=last))

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            known = service["experiments"]
            return SimpleNamespace(experiment_id=known[name]) if name in known else None

        def create_experiment(self, name: str) -> str:
            return service["experiments"].setdefault(name, "7")

        def search_runs(self, experiments: list[str], query: str) -> list[Any]:
            (token,) = re.fullmatch(r"tags\.diffrl_run = '(\w+)'", query).groups()  # pyright: ignore
            return [as_run(i) for i, run in service["runs"].items() if run["tags"]["diffrl_run"] == token]

        def create_run(self, experiment: str, *, tags: dict[str, str], run_name: str) -> Any:
            assert experiment == "7"
            service["runs"]["r1"] = {"tags": tags, "name": run_name, "metrics": [], "ended": 0}
            return as_run("r1")

        def log_batch(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
            for key, value, _, step in metrics:
                assert re.fullmatch(r"[\w./ -]+", key), "what MLflow takes as a name"
                service["runs"][run_id]["metrics"].append((key, value, step))

        def set_terminated(self, run_id: str) -> None:
            service["runs"][run_id]["ended"] += 1

    module = ModuleType("mlflow")
    vars(module).update(MlflowClient=Client, entities=SimpleNamespace(Metric=lambda *values: values))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for steps in (range(3), range(1, 4)):
        run = opened(tmp_path / "rl", "mlflow")
        for step in steps:
            run.write({"step": step, "eval/pass@1": step / 10})
        run.close()
    ((name, made),) = service["runs"].items()
    assert name == "r1" and made["name"] == f"{tmp_path.name}/rl" and made["ended"] == 2
    assert [(step, value) for key, value, step in made["metrics"] if key == "eval/pass_at_1"] == [
        (1, 0.0),
        (2, 0.1),
        (3, 0.2),
        (3, 0.2),  # the last one that was there may have been half written
        (4, 0.3),
    ]


# What a run does with them


def test_a_run_writes_the_same_numbers_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = TelemetryConfig(sinks=["tensorboard"])
    loss = {"loss/total": 0.1, "loss/kl": 0.01, "optim/grad_norm": 0.5, "sandbox/infra_error_frac": 0.0}
    slow = {"idle/judge_frac": 0.01, "idle/rollout_frac": 0.7, "time/rollouts": 9.0, "time/learner": 1.0}
    with Telemetry(tmp_path, 60, config=config) as telemetry:
        for step in range(60):
            telemetry.phase("rollouts")
            telemetry.step(step, {"reward/mean": step / 10, "reward/solved_frac": 0.5, **loss}, slow)
        telemetry.evaluation(59, {"eval/pass@1": 0.25})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = shown(tmp_path)
    assert values["reward/mean"] == pytest.approx({row["step"] + 1: row["reward/mean"] for row in rows[:-1]})
    assert values["eval/pass@1"] == {60: 0.25} and len(rows) == 61
    lines = capsys.readouterr().err.splitlines()
    advice = [number for number, line in enumerate(lines) if line.startswith("advice: judging is the bottleneck")]
    assert advice == [5, 56], "after the fifth step, and fifty steps later again"
    assert lines[0] == "step    1/60  reward 0.000  solved  50.0%  loss +0.1000  kl 0.0100  grad 0.500  10.0s"
    assert lines[-4:] == [
        f"{tmp_path} holds",
        "  metrics.jsonl     a line per step",
        "  curves.png        how it went",
        f"  tensorboard/      tensorboard --logdir {tmp_path / 'tensorboard'}",
    ]


def test_a_key_that_is_not_defined_is_an_error_here(tmp_path: Path):
    with Telemetry(tmp_path, 1) as telemetry, pytest.raises(UserWarning, match="'reward/means' is not defined"):
        telemetry.write({"step": 0, "reward/means": 1.0})


def test_lines_of_a_stage_reach_the_sinks_once_however_its_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SupervisedTelemetry, "POLL_S", 0.02)
    (tmp_path / "attempts").mkdir()

    def line(step: int, try_: int) -> dict[str, float | None]:
        times = {"time/step": float(try_), "time/tokens_per_second": 100.0}
        return {"step": step, "loss/diffusion": 3.0 - step / 4, "optim/grad_norm": None, **times}

    def wait_for(steps: int) -> None:
        deadline = time.monotonic() + 30
        while telemetry.last != steps:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    file = MetricsFile(tmp_path)
    file.write(line(0, 1))  # of an earlier start, which its sinks have
    kept = file.sync()
    file.write(line(1, 1))
    with SupervisedTelemetry(tmp_path, 5, "sft", TelemetryConfig(sinks=["tensorboard"])) as telemetry:
        file.cut(kept)
        for step in (1, 2, 3):
            file.write(line(step, 2))
        wait_for(4)
        file.cut(kept)  # workers were lost
        for step in (1, 2, 3, 4):
            file.write(line(step, 3))
        wait_for(5)
        file.close()
    values = shown(tmp_path)
    assert values["time/step"] == {2: 3.0, 3: 3.0, 4: 3.0, 5: 3.0}
    assert values["loss/diffusion"] == {2: 2.75, 3: 2.5, 4: 2.25, 5: 2.0}


def test_prometheus_reads_them_from_ray(ray_cluster: RayCluster, tmp_path: Path):
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    run = opened(tmp_path / "rl", "ray")
    restarts = {"restarts/judge": 0.0, "restarts/rollout": 2.0}
    run.write({"step": 0, "reward/mean": 1.5, "verdicts/passed": 3.0, "memory/judge_mb": 50.0, **restarts})
    run.write({"step": 1, "reward/mean": 2.5, "verdicts/passed": 4.0, "memory/rollout_mb": 70.0, **restarts})
    run.write({"step": 2, "restarts/rollout": 3.0})
    name = f'run="{tmp_path.name}/rl"'
    expected = {
        ("diffrl_reward_mean", ""): 2.5,
        ("diffrl_verdicts", 'status="passed"'): 7.0,
        ("diffrl_memory_mb", 'role="judge"'): 50.0,
        ("diffrl_memory_mb", 'role="rollout"'): 70.0,
        ("diffrl_restarts", 'role="rollout"'): 3.0,
        ("diffrl_steps", ""): 3.0,
    }

    def told() -> dict[tuple[str, str], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_") and name in line]
        return {
            key: float(line.rpartition(" ")[2])
            for key in expected
            for line in lines
            if re.match(rf"ray_{key[0]}(_total)?\{{", line) and key[1] in line
        }

    for _ in range(3):  # also when a step goes on for long: what one scrape has taken, the next one finds again
        deadline = time.monotonic() + 60
        while (found := told()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
    run.close()
