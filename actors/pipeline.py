"""`diffrl pipeline`: the stages of one YAML file one after the other, each from the model of the one before.

What is finished and unchanged is not run again (diffrl/manifests.py). What has to be decided is decided when a stage's turn
comes, since only then its parent is known: a stage that was run again with the same outcome costs those after it nothing.
"""

import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from rich.console import Console
from rich.table import Column, Table

from actors.dry_run import dry_run
from actors.evaluate_folder import evaluate_folder
from actors.placement import ask_of_evaluation, check_cluster, check_labels
from actors.prepare import check_gpus, check_shares, choose_sandbox, said_in_a_line
from actors.system import connect, num_cpus_needed, num_cpus_used
from diffrl.config import AnyConfig, ModelConfig, RLConfig
from diffrl.config_file import dump_config
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError, suggestion
from diffrl.files import write_json
from diffrl.fingerprints import FileHashes, data_files, model_files, problem_files
from diffrl.manifests import (
    Decision,
    Inputs,
    StageManifest,
    decide,
    inputs_file,
    read_manifest,
    stage_config,
    write_inputs,
    write_manifest,
)
from diffrl.pipeline_file import Pipeline
from diffrl.run_folder import git_commit, move_aside

MARK = "pipeline_run.yaml"  # by which the folder of a pipeline is known


def run_pipeline(
    pipeline: Pipeline, *, first: str | None = None, until: str | None = None, only_plan: bool = False
) -> None:
    """Bring the stages up to date, from `first` to `until`; those before `first` are taken as they are. Raises ConfigError,
    and RunStoppedError where a stage or its evaluation had to stop."""
    run = PipelineRun(pipeline, first=first, until=until)
    run.check()
    if only_plan:
        run.explain()
        return
    run.check_evaluation()
    try:
        for name in run.names:
            run.stage(name)
    finally:
        if run.owns_ray:
            ray.shutdown()
    run.summary()


class PipelineRun:
    """What is known of the stages between two of them lies in the folder alone."""

    def __init__(self, pipeline: Pipeline, *, first: str | None, until: str | None):
        self.pipeline = pipeline
        self.config = pipeline.config
        self.folder = Path(self.config.run_dir)
        self.hashes = FileHashes(self.folder / "hashes.json")
        self.names = stages_between(list(pipeline.stages), first, until)
        self.before = list(pipeline.stages)[: list(pipeline.stages).index(self.names[0])]
        self.actions: dict[str, Decision] = {}
        self.owns_ray = False

    # Before anything starts.

    def check(self) -> None:
        """What can go wrong in a later stage is found now, not when its turn comes. Raises ConfigError."""
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / MARK).is_file():
            raise ConfigError(
                f"run_dir: {self.folder} exists and is not the folder of a pipeline; choose another run_dir"
            )
        for name in self.before:
            if read_manifest(self.folder / name) is None:
                raise ConfigError(
                    f"--from: {self.names[0]} needs the model of {name}, which has not finished; leave it out"
                )

    def check_evaluation(self) -> None:
        """Raises ConfigError for problems or a sandbox that are not there."""
        evaluation = self.config.evaluation
        if evaluation is None:
            return
        with said_in_a_line(self.config):
            check_shares(evaluation, "evaluation.")
            needed = evaluation.num_workers * evaluation.gpus_per_worker
            check_gpus(evaluation, needed, self.config.ray.address, "evaluation.")
            asked, address = [ask_of_evaluation(evaluation)], self.config.ray.address
            check_labels(asked, address)
            choose_sandbox(evaluation.sandbox, "evaluation.sandbox")
            problems_of(evaluation.problems, "evaluation.problems")
            check_cluster(asked, address)

    def explain(self) -> None:
        """The checks and estimates of every stage, then the plan as a table."""
        for name in self.names:
            print(f"[{name}]")
            try:
                dry_run(self.pipeline.stages[name], model=self.stand_in(name))
            except ConfigError as error:
                raise ConfigError(f"stages.{name}.{error}") from error
        try:
            self.check_evaluation()
        except ConfigError as error:
            if is_here(self.pipeline.stages[self.names[0]].model):
                raise
            print(f"not checked: {error}")
        plan = dict(self.plan())
        headers = ("stage", "action", "reason", "starts from", "resources")
        table = Table(*(Column(header, overflow="fold") for header in headers), title=str(self.folder))
        for name, decision in plan.items():
            config = self.pipeline.stages[name]
            source = config.model.path or "random weights"
            table.add_row(name, decision.action, "; ".join(decision.reasons), source, resources(config))
        Console().print(table)
        print("nothing was started")

    def plan(self) -> Iterator[tuple[str, Decision]]:
        """What would be done, as far as it can be said: a stage behind one that runs depends on its outcome."""
        runs: str | None = None
        for name in self.names:
            decision = self.decide(name, parent_runs=runs is not None)
            if runs is not None:
                own = () if decision.action in ("skip", "evaluate", "resume") else decision.reasons
                reasons = (*own, f"parent: {runs} runs first")
                decision = Decision(action="run", reasons=reasons)
            if decision.action in ("run", "resume"):
                runs = name
            yield name, decision

    def stand_in(self, name: str) -> ModelConfig | None:
        """The first stage's model instead of one that is not there yet; sizes and tokenizer are the same in all stages."""
        config = self.pipeline.stages[name]
        if is_here(config.model):
            return None
        return next(iter(self.pipeline.stages.values())).model

    # A stage.

    def inputs(self, name: str, *, parent_runs: bool = False) -> Inputs:
        """Raises ConfigError for data that are not there. With `parent_runs` the parent is taken to be what it was."""
        config, manifest = self.pipeline.stages[name], read_manifest(self.folder / name)
        if parent_runs:
            parent = {} if manifest is None else manifest.inputs.parent
        else:
            parent = {} if config.model.path is None else model_files(config.model.path, self.hashes)
        return Inputs(config=stage_config(config), data=data_files(config, self.hashes), parent=parent)

    def decide(self, name: str, *, parent_runs: bool = False) -> Decision:
        config, folder = self.pipeline.stages[name], self.folder / name
        try:
            inputs = self.inputs(name, parent_runs=parent_runs)
        except ConfigError:
            if not is_here(config.model):  # a plan made on another machine, where the data may be missing too
                return Decision(action="run", reasons=("not run yet",))
            raise
        return decide(
            folder,
            inputs,
            model=model_files(folder / "model", self.hashes),
            evaluation=self.asked(name),
        )

    def stage(self, name: str) -> None:
        """Whatever its turn asks for: nothing, an evaluation, or the stage itself."""
        folder = self.folder / name
        decision = self.actions[name] = self.decide(name)
        words = {"skip": "not run again", "evaluate": "evaluated", "resume": "goes on", "run": "runs"}
        print(f"{name}: {words[decision.action]}: {'; '.join(decision.reasons)}", flush=True)
        if decision.action in ("run", "resume"):
            if not any(d.action in ("run", "resume") for n, d in self.actions.items() if n != name):
                self.check_later(name)
            self.train(name, decision)
        manifest = read_manifest(folder)
        assert manifest is not None
        asked = self.asked(name)
        if asked is not None and (manifest.evaluation is None or manifest.evaluation["asked"] != asked):
            write_manifest(folder, replace(manifest, evaluation=self.evaluate(name, asked)))
        self.hashes.save()

    def check_later(self, name: str) -> None:
        """The configs of all stages behind the first that runs; that one checks itself."""
        for later in self.names[self.names.index(name) + 1 :]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    dry_run(self.pipeline.stages[later], model=self.stand_in(later))
            except ConfigError as error:
                raise ConfigError(f"stages.{later}.{error}") from error

    def train(self, name: str, decision: Decision) -> None:
        """Run or resume; the manifest is written when all is done."""
        config, folder, inputs = self.pipeline.stages[name], self.folder / name, self.inputs(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).write_text(dump_config(self.config))
        if decision.action == "run" and folder.exists() and read_manifest(folder) is None:
            move_aside(folder)  # now, or it would pass for the beginning of what starts here
        write_inputs(folder, inputs)
        self.connect()
        started = time.perf_counter()
        resume = "auto" if decision.action == "resume" else None
        if isinstance(config, RLConfig):
            from actors.driver import train

            train(config, resume=resume)
        else:
            from actors.stages import train_supervised

            train_supervised(config, resume=resume)
        seconds = round(time.perf_counter() - started, 3)
        write_manifest(
            folder,
            StageManifest(
                name=name,
                inputs=inputs,
                model=model_files(folder / "model", self.hashes),
                metrics={**read_metrics(folder, config), "seconds": seconds},
                evaluation=None,
                facts={"version": version("diffrl"), "git_commit": git_commit()},
            ),
        )
        inputs_file(folder).unlink()

    # Evaluation.

    def asked(self, name: str) -> dict[str, Any] | None:
        """What the evaluation of a stage's model depends on; None when it has none."""
        config = self.config.evaluation
        if config is None or (config.stages is not None and name not in config.stages):
            return None
        return {**config.result_keys(), "data": problem_files(config.problems, self.hashes, "evaluation.problems")}

    def evaluate(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config.evaluation
        assert config is not None
        self.connect()
        sandbox, _ = choose_sandbox(config.sandbox)
        problems = problems_of(config.problems)
        started = time.perf_counter()
        rates = evaluate_folder(
            self.folder / name / "model",
            config.model_copy(update={"sandbox": sandbox}),
            problems,
            ray_address=self.config.ray.address,
        )
        return {
            "asked": asked,
            **{f"pass@{k}": rates.pass_at(k) for k in sorted({1, config.num_samples})},
            "num_problems": len(problems),
            "num_correct": list(rates.num_correct),
            "seconds": round(time.perf_counter() - started, 3),
        }

    # Around the stages.

    def connect(self) -> None:
        """Be in the cluster in which all that runs runs: one that was given, or one of this machine with slots enough for
        whoever asks for most."""
        evaluation = self.config.evaluation
        asked = [num_cpus_used(config) for config in self.pipeline.stages.values()]
        asked += [evaluation.num_workers * evaluation.cpus_per_worker] if evaluation else []
        self.owns_ray |= connect(self.config.ray.address, max(asked), log_to_driver=False)

    def summary(self) -> None:
        """The table of all stages, on stdout and in pipeline.json."""
        rows = []
        for name in (*self.before, *self.names):
            manifest = read_manifest(self.folder / name)
            assert manifest is not None
            found = manifest.evaluation or {}
            decision = self.actions.get(name, Decision(action="skip", reasons=("before --from",)))
            rates = {key: value for key, value in found.items() if key.startswith("pass@")}
            rows.append(
                {"stage": name, "action": decision.action, "reasons": decision.reasons, **manifest.metrics, **rates}
            )
        write_json(self.folder / "pipeline.json", {"stages": rows})
        keys = sorted({key for row in rows for key in row if key.startswith("pass@")}, key=lambda key: int(key[5:]))
        table = Table(
            "stage", "", "steps", "loss", *keys, "seconds", title="pass@k on held-out problems" if keys else None
        )
        for row in rows:
            reward = f"\nreward {row['reward_first']:.3f} -> {row['reward_last']:.3f}" if "reward_last" in row else ""
            table.add_row(
                row["stage"],
                {"skip": "as it was", "evaluate": "evaluated"}.get(row["action"], "run"),
                f"{row['steps']:.0f}",
                f"{row['loss_first']:.3f} -> {row['loss_last']:.3f}{reward}",
                *(f"{100 * row[key]:.1f}%" if key in row else "" for key in keys),
                f"{row['seconds']:.0f}",
            )
        Console().print(table)


def stages_between(known: list[str], first: str | None, until: str | None) -> list[str]:
    """The names from `first` to `until`, both included. Raises ConfigError."""
    for option, name in (("--from", first), ("--until", until)):
        if name is not None and name not in known:
            raise ConfigError(f"{option}: no stage {name!r}{suggestion(name, known)}; known: {', '.join(known)}")
    start = 0 if first is None else known.index(first)
    stop = len(known) if until is None else known.index(until) + 1
    if start >= stop:
        raise ConfigError(f"--until: {until} comes before --from {first}; the order is {', '.join(known)}")
    return known[start:stop]


def is_here(model: ModelConfig) -> bool:
    return model.path is None or Path(model.path).is_dir()


def read_metrics(folder: Path, config: AnyConfig) -> dict[str, float]:
    """Steps of metrics.jsonl, and its loss (of RL the rewards too) at first and at last: means over a fifth of the steps,
    for a single step's depends on what it hid."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = (
        {"loss": "loss/total", "reward": "reward/mean"} if isinstance(config, RLConfig) else {"loss": "loss/diffusion"}
    )
    steps = [row for row in rows if keys["loss"] in row]
    metrics: dict[str, float] = {"steps": steps[-1]["step"] + 1}
    for name, key in keys.items():
        values = [row[key] for row in steps if row[key] is not None]
        count = -(-len(values) // 5)
        metrics |= {f"{name}_first": fmean(values[:count]), f"{name}_last": fmean(values[-count:])}
    return metrics


def resources(config: AnyConfig) -> str:
    """CPU slots and GPUs that a stage asks Ray for."""
    rl = isinstance(config, RLConfig)
    gpus = config.num_gpus if rl else config.workers.num_workers * config.workers.gpus_per_worker
    return f"{num_cpus_needed(config):g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")
