"""What `diffrl variance` does: completions, sampled or a run's own, scored under every estimator. No Ray, one process."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from actors.commands import (
    DEFAULT_TOKENS,
    MAX_TOKENS,
    SampleOptions,
    chat_canvas,
    check_folder,
    context_length,
    device_of,
    open_policy,
    open_tokenizer,
    policy_of,
)
from actors.rollout import sampled_groups
from diffrl.config import ProblemsConfig
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError, one_of
from diffrl.estimators import ESTIMATORS
from diffrl.files import write_json
from diffrl.infilling import check_length
from diffrl.laboratory import PARTS, Scorer, batch_of, find_truth, measure, variants
from diffrl.laboratory_report import Findings, as_json, as_text, draw, weights_by_variant
from diffrl.models.tokens import end_ids, special_id
from diffrl.prompts import build_prompt
from diffrl.rollout_store import read_step, scored_groups, step_file
from diffrl.sampler import Engine
from diffrl.scoring import to_device
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup
from diffrl.views import T_DISTRIBUTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class LaboratoryOptions:
    """The command's, as they are typed.

    LaboratoryOptions(problems=4, samples=4, estimators="coupled,full_mask", lambdas="1,2,4", t_ranges=("0.2:0.8",),
                      t_distributions=("uniform",), draws=64, masks=2048, json_file=None, out=None)
    """

    problems: int
    samples: int  # of each problem
    estimators: str
    lambdas: str
    t_ranges: Sequence[str]
    t_distributions: Sequence[str]
    draws: int
    masks: int  # of the truth
    json_file: str | None
    out: str | None


def laboratory(
    sampling: SampleOptions,
    source: ProblemsConfig | None,
    options: LaboratoryOptions,
    *,
    rollouts: str | None = None,
    step: int | None = None,
) -> None:
    """Compare estimators on completions of `source`'s problems (None: held-out microcode), or on those that a run stored.
    Everything that can be checked without the weights is checked before they are read. Raises ConfigError."""
    names = names_of(options.estimators)
    ranges = [range_of(text) for text in options.t_ranges]
    for distribution in options.t_distributions:
        known("--t-distribution", distribution, T_DISTRIBUTIONS)
    compared, left_out = variants(
        names, pairs=counts_of(options.lambdas), ranges=ranges, distributions=options.t_distributions
    )
    if len(compared) == 1 and left_out:  # the unit alone
        raise ConfigError(f"--estimators: {options.estimators!r} leaves nothing to compare: {left_out[0]}")
    least = {"--problems": 1, "--samples": 2, "--draws": 2, "--masks": 128 * PARTS, "--step": 0}
    asked = {"--problems": options.problems, "--samples": options.samples, "--draws": options.draws}
    for option, value in (asked | {"--masks": options.masks, "--step": step or 0}).items():
        if value < least[option]:
            raise ConfigError(f"{option}: {value} must be at least {least[option]}")
    if step is not None and rollouts is None:
        raise ConfigError(f"--step: {step} given without --rollouts, of which it is a step; give both")
    if source is not None and rollouts is not None:
        raise ConfigError("--data: given with --rollouts, which have their problems; leave one out")
    check_outputs(options)
    folder = check_folder(sampling.model)
    tokenizer = open_tokenizer(folder)
    if policy_of(folder).family == "causal":
        raise ConfigError(f"MODEL: {folder} is autoregressive, its log-probs need no estimate; give a diffusion model")
    num_tokens = DEFAULT_TOKENS if sampling.tokens is None else sampling.tokens
    params = sampling.params(num_tokens)
    if rollouts is not None:
        groups = stored_groups(Path(rollouts), step, tokenizer, options)
        for group in groups:
            fits(len(group.prompt_ids_P), len(group.rollouts[0].completion_ids_C), folder)
        model = open_policy(folder, tokenizer)
    else:
        problems = chosen_problems(source, options.problems)
        for problem in problems:
            chat_canvas(build_prompt(problem), num_tokens, tokenizer, folder)  # refuses what does not fit
        model = open_policy(folder, tokenizer)
        engine = Engine(
            model,
            params,
            max_tokens=MAX_TOKENS,
            vocab_size=len(tokenizer),
            end_ids=end_ids(tokenizer),
            device=device_of(model),
        )
        seeds = [[derive_seed(sampling.seed, "variance", p.id, s) for s in range(options.samples)] for p in problems]
        groups = sampled_groups(engine, tokenizer, problems, completion_tokens=num_tokens, seeds=seeds)
    batch = to_device(batch_of(groups, special_id(tokenizer, "pad")), device_of(model))
    scorer = Scorer(model, batch)
    progress(f"{len(batch.completion_ids_BC)} completions; the truth from {options.masks} masks of each")
    truth = find_truth(scorer, t_range=ranges[0], num_masks=options.masks, seed=sampling.seed)
    found = []
    for number, variant in enumerate(compared, start=1):
        progress(
            f"{number} of {len(compared)}: {variant.estimator} {variant.size}, {variant.masks} masks, t {variant.t}"
        )
        found.append(measure(scorer, truth, variant, draws=options.draws, seed=sampling.seed))
    settings = {
        "problems": [group.problem.id for group in groups],
        "samples": batch.group_size,
        "rollouts": None if rollouts is None else f"{rollouts}, step {step_of(Path(rollouts), step)}",
        "completion_tokens": batch.completion_ids_BC.shape[1],
        "temperature": sampling.temperature if rollouts is None else None,
        "draws": options.draws,
        "seed": sampling.seed,
    }
    findings = Findings(model=sampling.model, settings=settings, truth=truth, found=found, left_out=left_out)
    tell(findings, options)


def tell(findings: Findings, options: LaboratoryOptions) -> None:
    weights = weights_by_variant(findings)
    print(as_text(findings, weights))
    if options.json_file is not None:
        write_json(Path(options.json_file), as_json(findings, weights))
    if options.out is not None:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        for path in draw(findings, Path(options.out)):
            print(path)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


# Completions


def chosen_problems(source: ProblemsConfig | None, count: int) -> list[Problem]:
    """So many, evenly spread."""
    if source is None:
        source = ProblemsConfig(source="microcode", split="held_out", num_prompt_tests=0)
    try:
        found = problems_of(source, "--data")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if len(found) < count:
        raise ConfigError(f"--problems: {count} must be at most {len(found)}, as many as there are")
    return [found[index * len(found) // count] for index in range(count)]


def stored_groups(
    run: Path, step: int | None, tokenizer: PreTrainedTokenizerFast, options: LaboratoryOptions
) -> list[RolloutGroup]:
    """The first groups of a step of a run, each with its first completions."""
    step = step_of(run, step)
    try:
        table = read_step(step_file(run / "rollouts", step))
        # The prompts as they were shown are all that scoring needs of the problems.
        shown = {row["problem_id"]: row["prompt"] for row in table.select(["problem_id", "prompt"]).to_pylist()}
        problems = {id: Problem(id=id, prompt=text, prompt_tests=(), reward_tests=()) for id, text in shown.items()}
        groups = [scored.group for scored in scored_groups(table, problems, tokenizer)]
    except ValueError as error:
        raise ConfigError(f"--rollouts: {error}") from error
    sizes = {"--problems": (options.problems, len(groups))}
    sizes["--samples"] = (options.samples, min(len(group.rollouts) for group in groups))
    for option, (asked, there) in sizes.items():
        if asked > there:
            raise ConfigError(f"{option}: {asked} must be at most {there}, as many as step {step} of {run} has")
    largest = max(int(r.completion_ids_C.max()) for group in groups for r in group.rollouts)
    if largest >= len(tokenizer):
        raise ConfigError(
            f"--rollouts: {run} has token {largest} and MODEL {len(tokenizer)} tokens; give the run's own model"
        )
    return [replace(g, rollouts=g.rollouts[: options.samples]) for g in groups[: options.problems]]


def step_of(run: Path, step: int | None) -> int:
    """The newest one, if none is asked for."""
    steps = sorted(int(file.stem.removeprefix("step_")) for file in (run / "rollouts").glob("step_*.parquet"))
    if not steps:
        raise ConfigError(f"--rollouts: {run} has no rollouts/step_*.parquet; give the folder of an RL run")
    if step is not None and step not in steps:
        raise ConfigError(f"--step: {step} must be one of those of {run}, {steps[0]} to {steps[-1]}")
    return steps[-1] if step is None else step


def fits(prompt: int, completion: int, folder: Path) -> None:
    try:
        check_length(prompt, completion, context_length(folder))
    except ValueError as error:
        raise ConfigError(f"--rollouts: {error}") from error


# What was typed


def names_of(text: str) -> list[str]:
    diffusion = {name: e for name, e in ESTIMATORS.items() if e.family == "diffusion"}
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        known("--estimators", name, diffusion)
    return names


def known(option: str, name: str, names: Mapping[str, object]) -> None:
    try:
        one_of(option, name, names)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def counts_of(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 64:
        raise ConfigError(f"--lambdas: {text!r} must be numbers from 1 to 64, such as 1,2,4")
    return counts


def range_of(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = 0.0, 0.0
    if not 0 < found[0] <= found[1] < 1:
        raise ConfigError(f"--t-range: {text!r} must be LOW:HIGH between 0 and 1, such as 0.2:0.8")
    return found


def check_outputs(options: LaboratoryOptions) -> None:
    if options.json_file is not None and (
        Path(options.json_file).is_dir() or not Path(options.json_file).parent.is_dir()
    ):
        raise ConfigError(f"--json: {options.json_file} cannot be written; name a file in a folder that exists")
    if options.out is not None:
        nearest = next(path for path in (Path(options.out), *Path(options.out).absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise ConfigError(f"--out: {options.out} cannot be made, {nearest} is a file; name a folder")
