"""The `diffrl` command; `diffrl --help` lists what it does. Bad input is one line on stderr and exit status 2; a run that had to
stop, one line and status 1. Every command imports what it needs: the configs alone bring torch.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffrl.errors import ConfigError, RunStoppedError
from sandbox.backends import DEFAULT_IMAGE, BackendOptions, read_token
from sandbox.image.rootfs import MIRROR
from sandbox.types import Limits, SandboxError

if TYPE_CHECKING:
    from diffrl.config import ProblemsConfig
    from diffrl.data.row_files import BadRow
    from diffrl.types import Problem

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning from unit tests for masked diffusion language models.",
)

sandbox = typer.Typer(no_args_is_help=True, help="The image that the docker and pod backends run.")
app.add_typer(sandbox, name="sandbox")

data = typer.Typer(no_args_is_help=True, help="Training data, and models made ready for them.")
app.add_typer(data, name="data")

ConfigPath = Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=20")]
Backend = Annotated[str, typer.Option(help="auto, docker, process or pod")]
Image = Annotated[str, typer.Option(help="of docker, and of a pod that is started here")]
Address = Annotated[
    list[str] | None, typer.Option(help="host:port of a pod; without one, --backend pod starts one here")
]
TokenFile = Annotated[str | None, typer.Option(help="the pods' secret; else DIFFRL_SANDBOX_TOKEN")]
Steps = Annotated[int | None, typer.Option(help="denoising steps; else as many as tokens")]
Temperature = Annotated[float, typer.Option(help="0: the most probable token")]
TopP = Annotated[float, typer.Option(help="1: all")]
TopK = Annotated[int, typer.Option(help="0: all")]
AlgorithmName = Annotated[str, typer.Option(help="origin, maskgit_plus, topk_margin or entropy")]
AllowUnisolated = Annotated[bool, typer.Option(help="process backend without bubblewrap")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, start nothing")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            help="auto: go on with the unfinished run in run_dir, if there is one; last: there must be one; rl also a "
            "checkpoint's folder, from which a new run branches off"
        ),
    ] = None,
    rollouts_only: Annotated[
        bool, typer.Option("--rollouts-only", help="rl: sample, judge and write, with the weights of the start")
    ] = False,
    rollouts_from: Annotated[
        str | None, typer.Option(help="rl: learn from the rollouts of this run instead of sampling")
    ] = None,
    profile: Annotated[int | None, typer.Option(help="rl: write traces of this step to run_dir/profile")] = None,
) -> None:
    """Run one stage: pretrain, midtrain, sft or rl, whatever the config says."""
    from diffrl.config import RLConfig
    from diffrl.config_file import load_config

    resolved = load_config(config, overrides or [])
    parts = {"--rollouts-only": rollouts_only, "--rollouts-from": rollouts_from, "--profile": profile}
    if asked := [option for option, value in parts.items() if value not in (None, False)]:
        if not isinstance(resolved, RLConfig) or dry_run or len(asked) > 1 or (resume and profile is None):
            raise ConfigError(f"{', '.join(asked)}: one of {', '.join(parts)} alone, with a config of stage rl")
        from actors.debug import learn_from, sample
        from actors.profiling import train_profiled

        if profile is not None:
            train_profiled(resolved, profile, resume=resume)
        elif rollouts_from is not None:
            learn_from(resolved, Path(rollouts_from))
        else:
            sample(resolved)
        return
    if dry_run:
        from actors.dry_run import dry_run as check

        check(resolved, resume=resume)
        return
    if isinstance(resolved, RLConfig):
        from actors.driver import train as train_rl

        train_rl(resolved, resume=resume)
    else:
        from actors.stages import train_supervised

        train_supervised(resolved, resume=resume)


@app.command()
def replay(
    batch: Annotated[str, typer.Argument(help="RUN/batches/step-000012, of a run with learner.keep_batches")],
) -> None:
    """Compute one step of a run's learning again and compare the losses; exit status 1 when they differ."""
    from actors.debug import replay as replay_batch

    if not replay_batch(Path(batch)):
        raise typer.Exit(1)


@app.command()
def pipeline(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart_pipeline.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as run_dir=runs/mine or stages.sft.optim.lr=1e-3")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="earlier stages are taken as they are")] = None,
    until: Annotated[str | None, typer.Option("--until", help="the last stage")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show the plan, start nothing")] = False,
) -> None:
    """Run several stages one after the other; what is finished and unchanged is not run again."""
    from diffrl.pipeline_file import load_pipeline

    resolved = load_pipeline(config, overrides or [])
    from actors.pipeline import run_pipeline

    run_pipeline(resolved, first=first, until=until, only_plan=dry_run)


@app.command()
def curate(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/curate.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as out=data/curated")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, sample nothing")] = False,
) -> None:
    """Let models solve problems, and split the problems by how often they do. What was done before is not done again."""
    from actors.curate import curate as run_curate
    from diffrl.config.curate import CurateConfig
    from diffrl.config_file import load_as

    run_curate(load_as(CurateConfig, config, overrides or []), only_check=dry_run)


@app.command()
def analyze(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... [KEY=VALUE...]",
            help="folders of models and of RL runs, the one before RL first; and overrides, such as num_samples=16",
        ),
    ],
    config: Annotated[str | None, typer.Option(help="YAML file, such as configs/quickstart_analysis.yaml")] = None,
) -> None:
    """Measure in which order models decode and what that gives: AR-ness, confidence, temperature, steps, before and after RL.
    Tables, plots and a summary go to the folder `out`."""
    from diffrl.config.analyze import AnalyzeConfig
    from diffrl.config_file import load_as

    overrides = [word for word in sources if "=" in word and not Path(word).exists()]
    folders = [word for word in sources if word not in overrides]
    resolved = load_as(AnalyzeConfig, config, overrides)
    if not folders:
        raise ConfigError("SOURCE: none given; give a model's folder, such as runs/quickstart/rl/model, or a run's")
    from actors.analyze import analyze as run_analysis

    run_analysis(folders, resolved)


@app.command()
def submit(
    address: Annotated[str, typer.Option(help="of the head's dashboard: http://HEAD:8265")],
    config: Annotated[str | None, typer.Argument(help="YAML file of a stage, in the working directory")] = None,
    overrides: Overrides = None,
    working_dir: Annotated[
        str, typer.Option(help="folder of which the job gets a copy, without what is ignored")
    ] = ".",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="print the job's name and leave")] = False,
    entrypoint_label: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the node for the driver; else the head")
    ] = None,
    submission_id: Annotated[str | None, typer.Option(help="the job's name; else Ray makes one")] = None,
    stop: Annotated[str | None, typer.Option(help="end this job instead")] = None,
) -> None:
    """Run `diffrl train CONFIG --resume auto` as a job of a Ray cluster and show its log; exit with its status."""
    from actors import submit as jobs

    if (config is None) == (stop is None):
        raise ConfigError("submit: give a config, or --stop and a job")
    if stop is not None:
        jobs.stop(stop, address)
        return
    assert config is not None
    pairs = [label.partition("=") for label in entrypoint_label or ()]
    if wrong := [label for label, (_, sign, _) in zip(entrypoint_label or (), pairs, strict=True) if not sign]:
        raise ConfigError(f"--entrypoint-label: {wrong[0]!r} must be KEY=VALUE")
    submission = jobs.Submission(
        config=config,
        overrides=tuple(overrides or ()),
        address=address,
        working_dir=working_dir,
        labels={key: value for key, _, value in pairs} or None,
        name=submission_id,
    )
    raise typer.Exit(jobs.submit(submission, wait=not no_wait))


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE: what differs, such as seed=0,1,2; several make a grid")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="folder of the runs and their summary; else run_dir and _sweep")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="run them as jobs: http://HEAD:8265; else one after the other here")
    ] = None,
    working_dir: Annotated[str, typer.Option(help="with --address, as of submit")] = ".",
    at_a_time: Annotated[int, typer.Option(help="with --address: so many jobs", min=1)] = 1,
    metric: Annotated[list[str] | None, typer.Option(help="to sum up; else rewards, pass@1, losses, KL")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every run, start nothing")] = False,
) -> None:
    """Run a config over a grid of overrides; mean and spread over seeds. What is finished is not run again."""
    from actors.sweep import SweepOptions
    from actors.sweep import sweep as run_sweep

    run_sweep(
        SweepOptions(
            config=config,
            overrides=tuple(overrides or ()),
            over=tuple(over or ()),
            out=out,
            address=address,
            working_dir=working_dir,
            at_a_time=at_a_time,
            metrics=None if metric is None else tuple(metric),
        ),
        dry_run=dry_run,
    )


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="folder of a run or of a pipeline, such as runs/quickstart")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """What a run's folder says of it: steps, metrics, speed, restarts, checkpoints; of a pipeline a line per stage."""
    from diffrl import status as words

    found = words.status_of(Path(run), time.time())
    print(words.as_json(found) if as_json else words.as_text(found))


@app.command()
def board(
    run: Annotated[str, typer.Argument(help="folder of a run, such as runs/quickstart/rl; it may still be going on")],
    run2: Annotated[str | None, typer.Argument(help="another one, to compare them")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; others than loopback need a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one")] = 8266,
    token: Annotated[
        str | None,
        typer.Option(help="who reads must know it; else, beyond loopback, one is made", envvar="DIFFRL_BOARD_TOKEN"),
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="by which this machine is called in a browser")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="folder with tokenizer.json; else the run's own")] = None,
) -> None:
    """Serve the rollouts and curves of a run as web pages, read-only, and print their address."""
    from diffrl.board.server import BoardOptions, serve

    options = BoardOptions(host=host, port=port, token=token, names=tuple(name or ()), tokenizer=tokenizer)
    serve([folder for folder in (run, run2) if folder is not None], options)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="folders of runs, such as runs/quickstart/rl", metavar="RUN...")],
    out: Annotated[str, typer.Option(help="the HTML file to write")] = "report.html",
    evaluations: Annotated[
        list[str] | None, typer.Option("--eval", help="folder of a diffrl eval, to be listed beside the runs")
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs: results with intervals, curves, verdicts, rollouts, configuration."""
    from diffrl.report.page import write_report

    print(write_report(runs, out, evaluations or []))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="YAML file: check that run too")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list on stdout")] = False,
) -> None:
    """Check this machine, and whether a run can start on it: a line per check. Exit status 1 if anything is bad."""
    from actors.doctor import doctor as examine

    raise typer.Exit(0 if examine(config, overrides or [], as_json=as_json) else 1)


@app.command(name="config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config, defaults included."""
    from diffrl.config_file import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@app.command(name="eval")
def evaluate(
    benchmark: Annotated[
        str,
        typer.Option(
            help="humaneval, humaneval_plus, mbpp, mbpp_plus, bigcodebench_complete, bigcodebench_instruct, livecodebench, "
            "gsm8k or humaneval_infilling"
        ),
    ],
    data: Annotated[str, typer.Option(help="the benchmark's own file")],
    solutions: Annotated[
        str | None, typer.Option(help="canonical: judge the data set's own solutions (the default)")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the folder of a model: evaluate it")] = None,
    out: Annotated[
        str | None, typer.Option(help="with --model: folder for the results; go on there if it began")
    ] = None,
    prompt: Annotated[str, typer.Option(help="chat (its template), or completion for base models")] = "chat",
    samples: Annotated[int, typer.Option(help="of each problem, above temperature 0")] = 1,
    k: Annotated[list[int] | None, typer.Option(help="of pass@k; may be given often; else 1 and --samples")] = None,
    tokens: Annotated[int | None, typer.Option(help="with --model: of a completion or hole; fewer may be text")] = None,
    steps: Steps = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0: the most probable token (the default); given often: a sweep")
    ] = None,
    top_p: TopP = 0.95,
    top_k: TopK = 50,
    algorithm: AlgorithmName = "entropy",
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="only the first rows of the file")] = None,
    max_tokens_per_batch: Annotated[int, typer.Option(help="rows x width of a forward pass")] = 16_384,
    workers: Annotated[int, typer.Option(help="Ray actors that share the sampling; 0: this process")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of each")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="of Ray actors", min=0.0)] = 0.0,
    slots: Annotated[int, typer.Option(help="programs judged at the same time", min=1)] = 2,
    backend: Backend = "auto",
    image: Image = DEFAULT_IMAGE,
    address: Address = None,
    token_file: TokenFile = None,
    allow_unisolated: AllowUnisolated = False,
) -> None:
    """Judge a benchmark's own solutions, or what a model makes of it, in the sandbox."""
    from actors.commands import SampleOptions, fill_holes, judge_solutions
    from diffrl.benchmarks import INFILLING

    judges = backend_options(backend, image, address, token_file, allow_unisolated, slots=slots)
    if model is None:
        if out is not None:
            raise ConfigError(f"--out: {out!r} given without --model; only a model's results are kept")
        judge_solutions(benchmark, data, solutions or "canonical", judges, limit)
        return
    if solutions is not None:
        raise ConfigError(f"--solutions: {solutions!r} given with --model; give one of them")
    temperatures = tuple(temperature or (0.0,))
    sampling = SampleOptions(
        model=model,
        tokens=tokens,
        steps=steps,
        temperature=temperatures[0],
        top_p=top_p,
        top_k=top_k,
        algorithm=algorithm,
        seed=seed,
    )
    if benchmark == INFILLING:
        if out is not None or samples > 1 or k or len(temperatures) > 1:
            raise ConfigError(f"--out, --samples, --k, several --temperature: not for {INFILLING}, which prints pass@1")
        fill_holes(data, sampling, judges, limit)
        return
    if out is None:
        raise ConfigError("--out: not given; name a folder for samples, verdicts and results, such as runs/eval/first")
    from actors.evaluate_benchmark import EvalOptions, evaluate_benchmark

    options = EvalOptions(
        benchmark=benchmark,
        data=data,
        out=out,
        style=prompt,
        temperatures=temperatures,
        num_samples=samples,
        ks=tuple(k or ()),
        limit=limit,
        max_tokens_per_batch=max_tokens_per_batch,
        workers=workers,
        threads=threads,
        gpus_per_worker=gpus_per_worker,
    )
    evaluate_benchmark(options, sampling, judges)


@app.command()
def variance(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, such as runs/quickstart/sft/model")],
    rollouts: Annotated[
        str | None, typer.Option(help="folder of a run whose completions are taken; else sampled")
    ] = None,
    step: Annotated[int | None, typer.Option(help="with --rollouts: of this step, from 0; else the newest")] = None,
    data: Annotated[str | None, typer.Option(help="file of problems to sample; else microcode's held-out ones")] = None,
    format: Annotated[
        str, typer.Option(help="of --data: problems, acecode, mbpp, humaneval, p3 or stdin")
    ] = "problems",
    problems: Annotated[int, typer.Option(help="how many, evenly spread")] = 4,
    samples: Annotated[int, typer.Option(help="completions of each problem: siblings")] = 4,
    tokens: Annotated[int | None, typer.Option(help="of a completion; else 34")] = None,
    steps: Steps = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    algorithm: AlgorithmName = "entropy",
    estimators: Annotated[str, typer.Option(help="names, with commas between")] = (
        "coupled,decoupled,coupled_normalized,monte_carlo,full_mask"
    ),
    lambdas: Annotated[str, typer.Option(help="pairs of masks; monte_carlo takes twice as many masks")] = "1,2,4",
    t_range: Annotated[
        list[str] | None,
        typer.Option(help="LOW:HIGH; the first is the truth's, others are compared at the first lambda"),
    ] = None,
    t_distribution: Annotated[
        list[str] | None, typer.Option(help="uniform, triangular or cosine, as --t-range")
    ] = None,
    draws: Annotated[int, typer.Option(help="of masks, over which variances are")] = 64,
    masks: Annotated[int, typer.Option(help="of each completion, from which the truth is found")] = 2048,
    seed: int = 0,
    json_file: Annotated[str | None, typer.Option("--json", help="write all numbers to this file")] = None,
    out: Annotated[str | None, typer.Option(help="folder for variance.svg and variance.png")] = None,
) -> None:
    """Bias, variance and cost of each estimator's log-probs on a model's completions, against a many-sample truth."""
    from actors.commands import SampleOptions
    from actors.laboratory import LaboratoryOptions, laboratory

    laboratory(
        SampleOptions(
            model=model,
            tokens=tokens,
            steps=steps,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            algorithm=algorithm,
            seed=seed,
        ),
        None if data is None else problem_source(data, format, "all", 1, 0),
        LaboratoryOptions(
            problems=problems,
            samples=samples,
            estimators=estimators,
            lambdas=lambdas,
            t_ranges=t_range or ["0.2:0.8"],
            t_distributions=t_distribution or ["uniform"],
            draws=draws,
            masks=masks,
            json_file=json_file,
            out=out,
        ),
        rollouts=rollouts,
        step=step,
    )


@app.command()
def judge(
    solution: Annotated[str | None, typer.Option(help="Python file to judge")] = None,
    tests: Annotated[
        str | None, typer.Option(help="asserts, check(candidate), TestCase classes, or stdin JSONL")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="asserts, check_function, unittest, stdin; else found out")] = None,
    entry_point: Annotated[str | None, typer.Option(help="the function that check(candidate) gets")] = None,
    corpus: Annotated[str | None, typer.Option(help="JSONL of name, code, tests, accept: measures the judge")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="of a corpus: one JSON object on stdout")] = False,
    backend: Backend = "auto",
    image: Image = DEFAULT_IMAGE,
    address: Address = None,
    token_file: TokenFile = None,
    allow_unisolated: AllowUnisolated = False,
    cpu_s: Annotated[float, typer.Option(help="CPU seconds per test", min=0.01)] = 1.0,
    wall_s: Annotated[float, typer.Option(help="wall-clock seconds per test", min=0.01)] = 5.0,
) -> None:
    """Judge one program with its tests, or a corpus of programs. Exit status 0 only if all tests, or the judge, are right."""
    from actors.judge_commands import judge_file, judge_solution

    options = backend_options(backend, image, address, token_file, allow_unisolated)
    limits = Limits(cpu_s=cpu_s, wall_s=max(wall_s, cpu_s))
    if corpus is not None and solution is None and tests is None:
        right = judge_file(corpus, options, limits, as_json=as_json)
    elif corpus is None and solution is not None and tests is not None:
        right = judge_solution(solution, tests, mode, entry_point, options, limits)
    else:
        raise ConfigError("judge: give --solution and --tests, or --corpus")
    raise typer.Exit(0 if right else 1)


@sandbox.command()
def build(
    variant: Annotated[str, typer.Option(help="base, or full: with numpy, pandas and others")] = "base",
    tag: Annotated[str | None, typer.Option(help="name of the image; else diffrl-sandbox:VARIANT")] = None,
    mirror: Annotated[str, typer.Option(help="where Debian's packages come from")] = MIRROR,
) -> None:
    """Build the judge image into the local container engine, without a registry."""
    from actors.judge_commands import build_sandbox

    build_sandbox(variant, tag, mirror)


@data.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="folder for the shards, which all nodes see")] = "data/prepared",
    workers: Annotated[int | None, typer.Option(help="tasks at a time; else one per CPU of the cluster", min=1)] = None,
) -> None:
    """Make the training rows of a supervised stage once, with Ray Data; train from them with
    data: {source: shards, path: FOLDER}."""
    from diffrl.config import RLConfig
    from diffrl.config_file import load_config

    resolved = load_config(config, overrides or [])
    if isinstance(resolved, RLConfig):
        raise ConfigError(f"stage: {resolved.stage!r} must be pretrain, midtrain or sft: RL has problems, no rows")
    from actors.data_prepare import PrepareOptions, prepare_data

    prepare_data(resolved, out, PrepareOptions(workers=workers))


ProblemFile = Annotated[str, typer.Argument(help="file of problems; of acecode also a folder or a name on the hub")]
FormatName = Annotated[str, typer.Option(help="problems, acecode, mbpp, humaneval, p3 or stdin")]
DifficultyName = Annotated[str, typer.Option(help="of acecode: hard, medium, easy or all")]
ShownTests = Annotated[int, typer.Option(help="tests shown in the prompt and not graded: 0 or 1")]


@data.command()
def show(
    path: ProblemFile,
    format: FormatName = "problems",
    difficulty: DifficultyName = "all",
    num_prompt_tests: ShownTests = 1,
    limit: Annotated[int, typer.Option(help="how many", min=1)] = 1,
    id: Annotated[str | None, typer.Option(help="this problem alone")] = None,
) -> None:
    """Print problems: the prompt, the graded tests, the solution."""
    from itertools import islice

    from diffrl.data.describe import chosen, shown_problem

    for problem in islice(chosen(problem_items(path, format, difficulty, num_prompt_tests), id), limit):
        print(shown_problem(problem))


@data.command()
def validate(
    path: ProblemFile,
    format: FormatName = "problems",
    num_prompt_tests: ShownTests = 1,
    max_bad_rows: Annotated[int, typer.Option(help="so many are all right", min=0)] = 0,
) -> None:
    """List every row that cannot be used: row, field, reason. Exit status 1 if there are more than --max-bad-rows."""
    from diffrl.data.row_files import BadRow

    bad = good = 0
    for item in problem_items(path, format, "all", num_prompt_tests):
        if isinstance(item, BadRow):
            bad += 1
            print(f"{item.place}\t{item.field or '-'}\t{' '.join(item.reason.split())}")
        else:
            good += 1
    print(f"{path}: {good} problems, {bad} bad rows")
    raise typer.Exit(0 if bad <= max_bad_rows else 1)


@data.command()
def stats(
    path: ProblemFile,
    format: FormatName = "problems",
    difficulty: DifficultyName = "all",
    num_prompt_tests: ShownTests = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Count problems, tests, families, licences, and what cannot be used."""
    import json

    from diffrl.data.describe import stats_of, stats_text

    found = stats_of(problem_items(path, format, difficulty, num_prompt_tests))
    print(json.dumps(found) if as_json else stats_text(found))


@data.command()
def clean(
    path: ProblemFile,
    out: Annotated[
        str, typer.Option(help="file for what stays: .jsonl or .parquet; OUT.findings.jsonl says what was found")
    ],
    format: FormatName = "problems",
    difficulty: DifficultyName = "all",
    num_prompt_tests: ShownTests = 1,
    against: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE of a benchmark that must not be trained on")
    ] = None,
    min_share: Annotated[float, typer.Option(help="share of a benchmark's item", min=0.0, max=1.0)] = 0.3,
    threshold: Annotated[float, typer.Option(help="similarity of near duplicates", min=0.1, max=1.0)] = 0.8,
    runs: Annotated[int, typer.Option(help="of each problem's own solution; 0: nothing is judged", min=0)] = 3,
    max_bad_rows: Annotated[int, typer.Option(help="rows that may be left out", min=0)] = 0,
    backend: Backend = "auto",
    image: Image = DEFAULT_IMAGE,
    address: Address = None,
    token_file: TokenFile = None,
    allow_unisolated: AllowUnisolated = False,
    slots: Annotated[int, typer.Option(help="programs judged at the same time", min=1)] = 2,
) -> None:
    """Leave out problems that copy a benchmark or each other, that are flaky, or whose own solution fails."""
    from actors.hygiene import CleanOptions
    from actors.hygiene import clean as clean_problems

    pairs = [entry.partition("=") for entry in against or ()]
    if wrong := [entry for entry, (name, _, file) in zip(against or (), pairs, strict=True) if not (name and file)]:
        raise ConfigError(f"--against: {wrong[0]!r} must be NAME=FILE")
    clean_problems(
        problem_source(path, format, difficulty, num_prompt_tests, max_bad_rows),
        out,
        CleanOptions(
            against={name: file for name, _, file in pairs}, min_share=min_share, threshold=threshold, runs=runs
        ),
        backend_options(backend, image, address, token_file, allow_unisolated, slots=slots),
    )


@data.command()
def add_tokens(
    model: Annotated[str, typer.Argument(help="Hugging Face folder of a Qwen2 model")],
    out: Annotated[str, typer.Argument(help="new folder for the copy")],
) -> None:
    """Copy an autoregressive model and give the copy a mask and a padding token, which diffusion needs."""
    from diffrl.models.added_tokens import add_tokens as add

    print(add(model, out))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, such as runs/quickstart/rl/model")],
    prompt: Annotated[
        str | None, typer.Argument(help="what the program should do; with --infill, a text with holes <fill:N>")
    ] = None,
    file: Annotated[str | None, typer.Option(help="read the prompt from this file")] = None,
    infill: Annotated[
        bool, typer.Option("--infill", help="fill the holes <fill:N> (N tokens) of the prompt, without a chat template")
    ] = False,
    tokens: Annotated[int | None, typer.Option(help="tokens to fill; else 34, with --infill as the holes say")] = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.95,
    top_k: TopK = 50,
    algorithm: AlgorithmName = "entropy",
    samples: int = 1,
    seed: int = 0,
    save_svg: Annotated[str | None, typer.Option(help="animated picture of the denoising, of the first sample")] = None,
    save_html: Annotated[str | None, typer.Option(help="page with a slider over its steps")] = None,
) -> None:
    """Sample completions of one prompt, or fill the holes of a text, in this process.

    On a terminal a single one is shown while it is denoised; elsewhere only the text is printed. What it took goes to
    stderr.
    """
    from actors.commands import SampleOptions, generate_texts

    sampling = SampleOptions(
        model=model,
        tokens=tokens,
        steps=steps,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        algorithm=algorithm,
        seed=seed,
    )
    generate_texts(sampling, prompt, file=file, infill=infill, samples=samples, save_svg=save_svg, save_html=save_html)


def problem_source(
    path: str, format: str, difficulty: str, num_prompt_tests: int, max_bad_rows: int
) -> "ProblemsConfig":
    """The command line's words for a `data` section."""
    from pydantic import ValidationError

    from diffrl.config import ProblemsConfig
    from diffrl.config_file import describe

    raw = {"source": format, "path": path, "difficulty": difficulty, "num_prompt_tests": num_prompt_tests}
    try:
        return ProblemsConfig.model_validate(raw | {"max_bad_rows": max_bad_rows})
    except ValidationError as error:
        name, _, rest = describe(error, ProblemsConfig).partition(":")
        option = {"source": "format"}.get(name, name.replace("_", "-"))
        raise ConfigError(f"--{option}:{rest}") from error


def problem_items(path: str, format: str, difficulty: str, num_prompt_tests: int) -> Iterator["Problem | BadRow"]:
    from typing import cast, get_args

    from diffrl.data.acecode import Difficulty
    from diffrl.data.problems import ReadOptions, read_problems

    if difficulty not in get_args(Difficulty):
        raise ConfigError(f"--difficulty: {difficulty!r} must be one of {', '.join(get_args(Difficulty))}")
    try:
        options = ReadOptions(num_prompt_tests=num_prompt_tests, difficulty=cast(Difficulty, difficulty))
        yield from read_problems(format, path, options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def backend_options(
    backend: str,
    image: str,
    addresses: list[str] | None,
    token_file: str | None,
    allow_unisolated: bool,
    slots: int = 1,
) -> BackendOptions:
    try:
        return BackendOptions(
            backend=backend,
            slots=slots,
            image=image,
            addresses=tuple(addresses or ()),
            token=read_token(token_file) if backend == "pod" else "",
            allow_unisolated=allow_unisolated,
        )
    except (ValueError, SandboxError) as error:
        raise ConfigError(str(error)) from error


def main() -> None:
    try:
        app()
    except (ConfigError, RunStoppedError) as error:
        print(f"diffrl: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
