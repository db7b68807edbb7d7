"""`diffrl analyze`: the paper's analysis of models, and of the rollouts that runs have stored.

A model is sampled at every setting, in this process or in Ray tasks that share the problems, while what is sampled already is
judged. Nothing of it depends on the number of workers: seeds come from (seed, problem, sample), the same for every model
and setting, so that differences are differences between pairs.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.commands import context_length, device_of, open_policy, open_tokenizer, policy_of
from actors.evaluate import EVALUATION_ATTEMPTS, num_correct
from actors.evaluate_folder import judged
from actors.placement import Ask, make_room
from actors.prepare import choose_sandbox, said_in_a_line
from actors.reward import RewardWorker
from actors.rollout import sampled_groups
from actors.system import cluster
from diffrl.analysis.confidence import first_looks
from diffrl.analysis.math_set import is_right, math_problems
from diffrl.analysis.plots import write_plots
from diffrl.analysis.results import MathResult, ModelResult, Result, RunResult, claims_of, tables_of
from diffrl.analysis.samples import Looks, Sample, measure, order_map
from diffrl.analysis.stored import read_run
from diffrl.analysis.summary import claim_lines, summary
from diffrl.config import SupervisionConfig
from diffrl.config.analyze import AnalyzeConfig
from diffrl.config.pipeline import EvaluationConfig
from diffrl.config_file import dump_config
from diffrl.data.sources import check_ids, problems_of
from diffrl.errors import ConfigError
from diffrl.files import write_json
from diffrl.infilling import check_length
from diffrl.prompts import chat_ids
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.run_folder import move_aside
from diffrl.sampler import Engine
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup

MARK = "analysis.json"  # what a folder that an analysis wrote is known by


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Source(name="rl", path=Path("runs/quickstart/rl/model"), is_model=True)"""

    name: str
    path: Path
    is_model: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One setting. Job(problems=(Problem(...), ...), config=EvaluationConfig(...), num_looks=3)"""

    problems: tuple[Problem, ...]
    config: EvaluationConfig
    num_looks: int = 0  # first steps at which the confidence of each problem's first sample is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """What a job gives, in the order of its problems; no looks where none were asked for."""

    groups: tuple[RolloutGroup, ...]
    looks: tuple[Looks, ...]


def analyze(paths: Sequence[str], config: AnalyzeConfig) -> None:
    """Write tables, plots and summary.md to `config.out`; print the claims. Raises ConfigError before anything is sampled,
    RunStoppedError when the judge fails."""
    start = time.monotonic()
    with said_in_a_line(config):
        sources = open_sources(paths)
        check_out(Path(config.out))
        folders = [source for source in sources if source.is_model]
        problems, math = problems_for(config, folders)
        results: dict[str, Result] = {s.name: read_run(s.name, s.path, config) for s in sources if not s.is_model}
        if folders:
            config = config.model_copy(update={"sandbox": choose_sandbox(config.sandbox)[0]})
        part = part_of(Path(config.out))
    cpus = config.num_workers * config.cpus_per_worker
    with cluster(config.ray.address, cpus) if folders and config.num_workers else nullcontext():
        for source in folders:
            results[source.name] = explore(source, config, problems, math)
    ordered = [results[source.name] for source in sources]
    claims = claims_of(ordered, seed=config.seed)
    tables = tables_of(ordered, claims, max_k=config.max_k, seed=config.seed)
    missing = missing_of(ordered)
    described = [(source.name, description(source, results[source.name])) for source in sources]

    out = Path(config.out)
    for name, table in tables.items():
        write_json(part / f"{name}.json", table)
    plots = write_plots(part, tables)
    (part / "summary.md").write_text(summary(tables, described, missing))
    (part / "config.yaml").write_text(dump_config(config))
    seconds = time.monotonic() - start
    write_json(
        part / MARK,
        {"sources": {s.name: str(s.path) for s in sources}, "missing": missing, "seconds": round(seconds, 1)},
    )
    if out.exists():
        if any(out.iterdir()):
            move_aside(out)
        else:
            out.rmdir()
    part.rename(out)
    for line in [*claim_lines(tables), *missing]:
        print(line)
    print(f"{len(tables)} tables, {len(plots) // 2} plots in {seconds:.0f} s -> {out / 'summary.md'}")


# Sources


def open_sources(paths: Sequence[str]) -> list[Source]:
    """Raises ConfigError for what is neither a model's folder nor a run's."""
    kinds = [(Path(path), is_model(Path(path))) for path in paths]
    if again := [path for n, path in enumerate(paths) if Path(path).resolve() in [p.resolve() for p, _ in kinds[:n]]]:
        raise ConfigError(f"SOURCE: {again[0]} is given twice; give each folder once")
    short = [name_of(path.resolve(), model) for path, model in kinds]
    return [
        Source(name=name if short.count(name) == 1 else str(path), path=path, is_model=model)
        for name, (path, model) in zip(short, kinds, strict=True)
    ]


def name_of(folder: Path, model: bool) -> str:
    if not model:
        return f"{folder.name} rollouts"
    return folder.parent.name if folder.name == "model" else folder.name


def is_model(path: Path) -> bool:
    """Or a run with rollouts."""
    if not path.is_dir():
        raise ConfigError(f"SOURCE: no folder at {path}; give a model's, such as runs/quickstart/rl/model, or a run's")
    if (path / "config.json").is_file():
        return True
    if (path / "rollouts").is_dir():
        return False
    inside = sorted(file.parent for file in (*path.glob("model/config.json"), *path.glob("*/model/config.json")))
    runs = sorted(folder.parent for folder in path.glob("*/rollouts"))
    way_out = " or ".join(str(each) for each in [*inside, *runs][:4]) or "a folder with config.json, or with rollouts/"
    raise ConfigError(f"SOURCE: {path} is neither a model's folder nor a run with rollouts; give {way_out}")


def check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is not a folder; name another")
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise ConfigError(f"out: {out} holds something else than an analysis; name another")


def part_of(out: Path) -> Path:
    """An empty folder beside `out`, which takes its place at the end."""
    part = out.resolve().with_name(f".{out.resolve().name}.part")
    part.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():  # of a call that was killed
        file.unlink()
    return part


def problems_for(config: AnalyzeConfig, models: Sequence[Source]) -> tuple[list[Problem], list[Problem]]:
    """Code and math, and whether every model can be asked for them. Raises ConfigError."""
    if not models:
        return [], []
    if config.problems is None:
        raise ConfigError(
            f"problems: missing, and {models[0].path} is a model; say what to sample, such as problems.source=humaneval "
            "problems.path=FILE, or give --config configs/quickstart_analysis.yaml"
        )
    problems = problems_of(config.problems, "problems")
    check_ids(problems, "problems")
    math: list[Problem] = []
    if config.math is not None:
        try:
            math = math_problems(config.math.path, config.math.limit)
        except ValueError as error:
            raise ConfigError(f"math.path: {error}") from error
    for source in models:
        if policy_of(source.path).family == "causal":
            raise ConfigError(f"SOURCE: {source.path} is autoregressive and has one order only; give a diffusion model")
        tokenizer = open_tokenizer(source.path)
        if tokenizer.chat_template is None:
            raise ConfigError(f"SOURCE: the tokenizer of {source.path} has no chat template; add one")
        context = context_length(source.path)
        for problem in (*problems, *math):
            try:
                check_length(len(chat_ids(tokenizer, problem)), config.sampling.completion_tokens, context)
            except ValueError as error:
                raise ConfigError(f"{source.path}: {problem.id}: {error}") from error
    return problems, math


# One model


def explore(source: Source, config: AnalyzeConfig, problems: Sequence[Problem], math: Sequence[Problem]) -> ModelResult:
    """Raises RunStoppedError when the judge failed on a sample: it never counts as wrong."""
    settings = config.settings()
    main = settings[0]
    jobs = [
        Job(problems=tuple(problems), config=config.at(*setting), num_looks=config.num_looks * (setting == main))
        for setting in settings
    ]
    of_math = [Job(problems=tuple(math), config=config.at(*main))] if math else []
    worker = RewardWorker(config.sandbox, RECIPE_WEIGHTS)
    attempts = EVALUATION_ATTEMPTS * config.sandbox.attempts
    found: list[Explored] = []
    verdicts: list[list[Future[bool]]] = []
    with closing(worker.pool), ThreadPoolExecutor(config.sandbox.slots) as threads:
        try:
            for number, explored in enumerate(explored_by(source.path, config, [*jobs, *of_math])):
                say(source, [*jobs, *of_math][number])
                found.append(explored)
                if number < len(jobs):  # math has no programs
                    samples = [(group, n) for group in explored.groups for n in range(len(group.rollouts))]
                    verdicts.append([threads.submit(passes, worker, *each, attempts) for each in samples])
            passed = [[verdict.result() for verdict in own] for own in verdicts]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    cells = {
        setting: samples_of(explored.groups, own)
        for setting, explored, own in zip(settings, found[: len(jobs)], passed, strict=True)
    }
    return ModelResult(
        name=source.name,
        cells={
            setting: measure(samples, max_k=config.max_k, pass_ks=config.pass_k) for setting, samples in cells.items()
        },
        main=main,
        order=order_map(cells[main]),
        looks={g.problem.id: look for g, look in zip(found[0].groups, found[0].looks, strict=True)},
        math=math_result(found[-1], config) if math else None,
    )


def math_result(explored: Explored, config: AnalyzeConfig) -> MathResult:
    right = [is_right(group.problem, rollout.text) for group in explored.groups for rollout in group.rollouts]
    samples = samples_of(explored.groups, [None] * len(right))
    return MathResult(measures=measure(samples, max_k=config.max_k, pass_ks=()), right=float(np.mean(right)))


def passes(worker: RewardWorker, group: RolloutGroup, index: int, attempts: int) -> bool:
    """Raises RunStoppedError when the judge fails again and again."""
    return num_correct(group.problem, [judged(worker, group, index, attempts=attempts)]) == 1


def samples_of(groups: Sequence[RolloutGroup], passed: Sequence[bool | None]) -> list[Sample]:
    rollouts = [(group.problem.id, rollout) for group in groups for rollout in group.rollouts]
    return [
        Sample(
            problem_id=id,
            ids_C=rollout.completion_ids_C,
            step_map_C=rollout.step_map_C,
            probability_C=rollout.probability_C,
            num_tokens=rollout.num_tokens,
            passed=result,
        )
        for (id, rollout), result in zip(rollouts, passed, strict=True)
    ]


def say(source: Source, job: Job) -> None:
    config, kind = job.config, job.problems[0].family if job.problems[0].family == "math" else "code"
    print(
        f"{source.name}: {len(job.problems)} {kind} problems x {config.num_samples} samples at temperature "
        f"{config.temperature:g}, {config.sampling.steps} steps",
        file=sys.stderr,
        flush=True,
    )


# Sampling


def explored_by(folder: Path, config: AnalyzeConfig, jobs: Sequence[Job]) -> Iterator[Explored]:
    return explored_here(folder, jobs) if config.num_workers == 0 else explored_with_ray(folder.resolve(), config, jobs)


def explored_here(folder: Path, jobs: Sequence[Job]) -> Iterator[Explored]:
    """One job after the other. Raises ConfigError for a folder that cannot be loaded."""
    first = jobs[0].config
    torch.set_num_threads(first.threads)
    tokenizer = open_tokenizer(folder)
    model = open_policy(folder, tokenizer)
    for job in jobs:
        engine = Engine(
            model,
            job.config.params(),
            max_tokens=first.max_tokens_per_batch,
            vocab_size=len(tokenizer),
            device=device_of(model),
        )
        yield do(job, engine, tokenizer)


def do(job: Job, engine: Engine, tokenizer: PreTrainedTokenizerFast) -> Explored:
    config, window = job.config, job.config.sampling.completion_tokens
    seeds = [[derive_seed(config.seed, "analysis", p.id, s) for s in range(config.num_samples)] for p in job.problems]
    groups = tuple(sampled_groups(engine, tokenizer, job.problems, completion_tokens=window, seeds=seeds))
    looks = tuple(
        first_looks(
            engine.model,
            group.prompt_ids_P,
            group.rollouts[0].completion_ids_C,
            group.rollouts[0].step_map_C,
            num_looks=job.num_looks,
            device=engine.device,
        )
        for group in (groups if job.num_looks else ())
    )
    return Explored(groups=groups, looks=looks)


def explored_with_ray(folder: Path, config: AnalyzeConfig, jobs: Sequence[Job]) -> Iterator[Explored]:
    """The problems of every job dealt out to tasks of the cluster this process is in. `folder` is on every node."""
    number = config.num_workers
    ask = Ask(
        number="num_workers",
        cpus="cpus_per_worker",
        gpus="gpus_per_worker",
        count=number,
        resources={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
        labels=config.labels,
        together=False,
    )
    make_room([ask], SupervisionConfig().start_s, "num_workers")
    task = ray.remote(explored_share).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        label_selector=dict(config.labels),
        max_retries=1,
    )
    parts = ray.get([task.remote(folder, jobs, share, number) for share in range(number)])
    for place, job in enumerate(jobs):
        dealt = [(n % number, n // number) for n in range(len(job.problems))]
        yield Explored(
            groups=tuple(replace(parts[w][place].groups[n], ordinal=n * number + w) for w, n in dealt),
            looks=tuple(parts[w][place].looks[n] for w, n in dealt) if job.num_looks else (),
        )


def explored_share(folder: Path, jobs: Sequence[Job], share: int, number: int) -> list[Explored]:
    own = [replace(job, problems=job.problems[share::number]) for job in jobs]
    return list(explored_here(folder, own))


# Words


def description(source: Source, result: Result) -> str:
    number = result.overall.num_samples
    if isinstance(result, ModelResult):
        temperature, steps = result.main
        return (
            f"model {source.path}: {len(result.cells)} settings of {number} samples each; unless said otherwise temperature "
            f"{temperature:g}, {steps} steps"
        )
    return f"rollouts of {source.path}: {number} completions of {len(result.steps)} training steps"


def missing_of(results: Sequence[Result]) -> list[str]:
    """What this analysis lacks, and how to have it."""
    models = [result for result in results if isinstance(result, ModelResult)]
    words = [
        f"{result.name}: stored rollouts say nothing of other temperatures, numbers of steps and first-step confidence; give its "
        "model folder too"
        for result in results
        if isinstance(result, RunResult)
    ]
    if len(models) == 1:
        words.append("before and after RL: not compared, one model was given; give the model it started from first")
    if models and not any(model.math for model in models):
        words.append("code against math: not compared, no math set was given; give math.path=FILE in GSM8K's format")
    for model in models:
        if model.math is not None:
            words.append(
                f"{model.name}: {model.math.right:.1%} of its math samples end in the right number; where that is near 0 the "
                "comparison of code and math is about a model that does no math"
            )
    return words
