"""Parts of an RL run by themselves: only rollouts, only learning from rollouts that are on the disk, one update again."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from actors.collector import Collector
from actors.driver import Run, sandbox_choice, train
from actors.learner import Learner
from actors.placement import ask_of_learner, asks_of
from actors.prepare import Prepared, prepare
from actors.run_start import begin
from actors.system import System, room_for
from actors.telemetry import Telemetry
from actors.weights import put_model
from diffrl.batches import StepRollouts, rollout_metrics
from diffrl.checkpoint import checkpoint_path, committed_steps
from diffrl.config import RLConfig
from diffrl.config.rl import EvalConfig, SyncConfig
from diffrl.config_file import load_config
from diffrl.errors import ConfigError
from diffrl.models.loading import load_policy
from diffrl.rollout_store import read_step, scored_groups, step_file, write_step
from diffrl.run_folder import METRICS, read_run, write_run
from diffrl.saved_batch import load_batch
from diffrl.types import ScoredGroup

# Rollouts


def sample(config: RLConfig) -> None:
    """The rollouts of a run's steps with the weights that it would begin with: sampled, judged, written; nothing learns."""
    started = time.perf_counter()
    config = config.model_copy(update={"report": None, "eval": EvalConfig()})
    prepared = prepare(config)
    start = begin(config, None, sandbox=sandbox_choice(prepared))
    assert start is not None
    with (
        room_for(prepared.config, asks_of(prepared.config)),
        System(prepared.config, prepared.tokenizer) as system,
        Telemetry(start.folder, prepared.num_steps, "rollouts") as telemetry,
    ):
        collector = Collector(prepared, start, system, telemetry)
        model = load_policy(prepared.config.model, prepared.tokenizer, seed=config.seed)
        collector.weights = collector.reference = put_model(model, version=0)
        for step in range(prepared.num_steps):
            collector.ask_ahead(step)
            drawn = collector.rollouts(step)
            groups = [*drawn.scored, *drawn.replaced]
            path = write_step(start.folder / "rollouts", step, groups, [0.0] * sum(len(s.judgements) for s in groups))
            metrics = rollout_metrics(drawn.scored)
            telemetry.write({"step": step, **metrics})
            telemetry.say(
                f"step {step + 1:>4}/{prepared.num_steps}  reward {metrics['reward/mean']:.3f}  "
                f"solved {100 * metrics['reward/solved_frac']:5.1f}%  {path}"
            )
    write_run(start.folder, read_run(start.folder) | {"finished": round(time.perf_counter() - started, 1)})


# Learning


def learn_from(config: RLConfig, source: Path) -> None:
    """A run that learns from the rollouts of another one, step for step, instead of sampling. With that run's config and
    model, and no staleness, its losses and weights are that run's."""
    config = config.model_copy(update={"report": None, "eval": EvalConfig(), "sync": SyncConfig(every=None)})
    prepared = prepare(config)
    for step in range(prepared.num_steps):
        stored(prepared, source, step)  # before anything starts

    class Stored(Run):
        def ask_ahead(self, step: int) -> None:
            """They are there."""

        def rollouts(self, step: int) -> StepRollouts:
            groups = stored(self.prepared, source, step)
            for scored in groups:
                ordinal = scored.group.ordinal
                self.buffer.reserve(ordinal)
                self.references[ordinal] = self.reference
                self.score_reference(scored.group)
                self.buffer.commit(scored)
                self.next_ordinal = max(self.next_ordinal, ordinal + 1)
            return self.take(self.complete([s.group.ordinal for s in groups]))

    train(config, run_class=Stored, samples=False)


def stored(prepared: Prepared, source: Path, step: int) -> list[ScoredGroup]:
    """The groups that a step of another run learned from. Raises ConfigError."""
    file = step_file(source / "rollouts", step)
    config = prepared.config
    try:
        groups = scored_groups(read_step(file), {p.id: p for p in prepared.problems}, prepared.tokenizer)
    except ValueError as error:
        raise ConfigError(f"--rollouts-from: {error}") from None
    groups = groups[: config.train.prompts_per_step]  # behind them are those that were replaced
    sizes = {"train.prompts_per_step": (len(groups), config.train.prompts_per_step)}
    for scored in groups:
        sizes["method.group_size"] = (len(scored.group.rollouts), config.method.group_size)
        window = len(scored.group.rollouts[0].completion_ids_C)
        sizes["sampling.completion_tokens"] = (window, config.sampling.completion_tokens)
    for field, (there, here) in sizes.items():
        if there != here:
            raise ConfigError(f"{field}: {here} must be {there}, as in {file}")
    return groups


# One update


def replay(path: Path) -> bool:
    """Compute the losses of a batch of `learner.keep_batches` once more, from the newest checkpoint before it through the
    batches between, and print them beside those of the run. True when they are equal. Raises ConfigError; writes nothing."""
    run_folder, step = path.parent.parent, step_of(path)
    config = load_config(run_folder / "config.yaml")
    if not isinstance(config, RLConfig):
        raise ConfigError(f"{path}: {run_folder} is a run of stage {config.stage}; name a batch of an RL run")
    start, batches = way_to(run_folder, step)
    row = next(row for row in metrics_of(run_folder) if row["step"] == step and "loss/total" in row)
    prepared = prepare(config.model_copy(update={"run_dir": str(run_folder / "replay")}))
    with (
        room_for(config, [ask_of_learner(config)]),
        Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
    ):
        learner.start()
        if start:
            learner.load((checkpoint_path(run_folder, start) / "learner").resolve())
        results = [learner.update(ray.put(load_batch(batch))) for batch in batches]
    again = results[-1].metrics
    for key in sorted(again):
        print(f"{key:24} {row[key]!r:>24} {again[key]!r:>24}{'' if row[key] == again[key] else '  differs'}")
    return all(row[key] == value for key, value in again.items())


def step_of(path: Path) -> int:
    try:
        return int(path.name.removeprefix("step-"))
    except ValueError:
        raise ConfigError(f"{path} names no kept batch; name RUN/batches/step-...") from None


def way_to(run_folder: Path, step: int) -> tuple[int, list[Path]]:
    """The step after which to begin, and the batches to go through, that of `step` last."""
    folder = run_folder / "batches"
    kept = {step_of(file.with_suffix("")) for file in folder.glob("step-*.json")}
    for start in sorted({0, *committed_steps(run_folder)}, reverse=True):
        if start <= step and kept >= set(range(start, step + 1)):
            return start, [folder / f"step-{number:06d}" for number in range(start, step + 1)]
    raise ConfigError(
        f"{folder}: no checkpoint of {committed_steps(run_folder)} leads to step {step} through the batches of {sorted(kept)}; "
        "keep as many (learner.keep_batches) as checkpoint.every"
    )


def metrics_of(run_folder: Path) -> Iterator[dict[str, Any]]:
    for line in (run_folder / METRICS).read_text().splitlines():
        yield json.loads(line)
