"""Everything that a user can get wrong is found here, before the first actor starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from actors.placement import asks_of, check_cluster, check_labels
from actors.reward import backend_options
from actors.sinks import check_sinks
from diffrl.config import AnyConfig, PretrainConfig, RLConfig, SandboxConfig, SftConfig
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError, shown
from diffrl.mirror import Mirror
from diffrl.models.loading import check_policy, load_policy_tokenizer
from diffrl.prompts import chat_ids
from diffrl.resume import fields_of
from diffrl.run_folder import check_run_folder
from diffrl.types import Problem
from sandbox.backends import choose_backend, require_available
from sandbox.types import SandboxUnavailableError

MIN_SHARE, MAX_SHARE = 1e-4, 1e6  # CPUs or GPUs of an actor, for Ray

Config = TypeVar("Config", bound=RLConfig | PretrainConfig | SftConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run needs, checked and loaded."""

    config: RLConfig  # with an absolute model.path, and the sandbox.backend that was chosen
    sandbox_reason: str  # why that one; "" when the config names it
    tokenizer: PreTrainedTokenizerFast
    problems: list[Problem]
    eval_problems: list[Problem]
    report_problems: list[Problem]
    num_left_out: int  # training problems whose prompt does not fit
    num_steps: int


def prepare(config: RLConfig) -> Prepared:
    """Load tokenizer and problems, check that they and the model go together. Raises ConfigError; starts nothing."""
    with said_in_a_line(config):
        check_run_folder(Path(config.run_dir), config.model.path)
        check_devices(config)
        check_sinks(config.telemetry)
        if config.checkpoint.copy_to is not None:
            Mirror(config.checkpoint.copy_to)
        sandbox, sandbox_reason = choose_sandbox(config.sandbox)
        tokenizer = load_policy_tokenizer(config.model)
        model = check_policy(config.model, tokenizer)
        check_context(config, model.config.max_position_embeddings)
        check_cluster(asks_of(config), config.ray.address)
        problems = problems_of(config.data)
        fitting = [p for p in problems if len(chat_ids(tokenizer, p)) <= config.data.max_prompt_tokens]
        if not fitting:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} is less than every prompt of the data needs "
                f"(the shortest has {min(len(chat_ids(tokenizer, p)) for p in problems)} tokens); raise it"
            )
        sections = {"eval": config.eval.problems, "report": config.report and config.report.problems}
        held_out = [
            [] if section is None else problems_of(section, f"{name}.problems") for name, section in sections.items()
        ]
    for problem in (p for split in held_out for p in split):
        if len(chat_ids(tokenizer, problem)) > config.data.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} is too small for the held-out problem "
                f"{problem.id}; raise it"
            )
    prompts = config.train.prompts_per_step
    return Prepared(
        config=absolute_model_path(config).model_copy(update={"sandbox": sandbox}),
        sandbox_reason=sandbox_reason,
        tokenizer=tokenizer,
        problems=fitting,
        eval_problems=held_out[0],
        report_problems=held_out[1],
        num_left_out=len(problems) - len(fitting),
        num_steps=config.train.steps or max(1, config.train.epochs * len(fitting) // prompts),
    )


@contextmanager
def said_in_a_line(config: BaseModel) -> Iterator[None]:
    """ValueErrors, and errors about files that the config names, become ConfigErrors."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except OSError as error:  # a name that is too long, a file that may not be read, a disk that is full
        file = str(error.filename)
        named = {name: v for name, v in fields_of(config.model_dump()) if isinstance(v, str) and v and v in file}
        if not named:
            raise
        field = max(named, key=lambda name: len(named[name]))
        raise ConfigError(f"{field}: {shown(named[field])} cannot be used ({error.strerror}); name another") from error


def choose_sandbox(config: SandboxConfig, field: str = "sandbox") -> tuple[SandboxConfig, str]:
    """The config with one backend for all reward workers, which can be used here; and why that one. `field`: the section,
    as errors name it. Raises ConfigError."""
    reasons: list[str] = []
    try:
        options = backend_options(config)
        backend = choose_backend(options, reasons.append)
        require_available(replace(options, backend=backend))
    except SandboxUnavailableError as error:  # begins with the option
        raise ConfigError(f"{field}.{error}") from error
    return config.model_copy(update={"backend": backend}), "; ".join(reasons)


def check_devices(config: AnyConfig) -> None:
    check_shares(config)
    check_gpus(config, num_gpus(config), config.ray.address)
    check_labels(asks_of(config), config.ray.address)


def num_gpus(config: AnyConfig) -> float:
    if isinstance(config, RLConfig):
        return config.num_gpus
    return config.workers.num_workers * config.workers.gpus_per_worker


def check_shares(config: BaseModel, prefix: str = "") -> None:
    """Ray's own rules about CPUs and GPUs of an actor, which it would only state when it starts one."""
    for field, value in fields_of(config.model_dump(), prefix):
        name = field.rpartition(".")[2]
        if name.startswith(("cpus", "gpus")) and value != 0:
            if not MIN_SHARE <= value <= MAX_SHARE:
                raise ConfigError(f"{field}: {value:g} must be 0, or at least {MIN_SHARE:g} and at most {MAX_SHARE:g}")
            if name.startswith("gpus") and value > 1 and value != int(value):
                raise ConfigError(f"{field}: {value:g} must be a whole number, or at most 1: parts are of one GPU")


def check_gpus(config: BaseModel, needed: float, address: str | None, prefix: str = "") -> None:
    """A cluster that is not there yet may grow; this machine will not."""
    if needed > torch.cuda.device_count() and not (address or os.environ.get("RAY_ADDRESS")):
        fields = {
            field: value
            for field, value in fields_of(config.model_dump(), prefix)
            if field.rpartition(".")[2].startswith("gpus") and value
        }
        raise ConfigError(
            f"{', '.join(f'{field}: {value:g}' for field, value in fields.items())} ask for {needed:g} GPUs and this machine "
            f"has {torch.cuda.device_count()}; join a cluster (ray.address) or set {' and '.join(fields)} to 0"
        )


def check_context(config: RLConfig, max_positions: int) -> None:
    prompt, completion = config.data.max_prompt_tokens, config.sampling.completion_tokens
    if prompt + completion > max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.completion_tokens: {prompt} + {completion} positions, more than the model's "
            f"context of {max_positions}; lower one of them"
        )


def absolute_model_path(config: Config) -> Config:
    """Actors may start in another folder than the driver."""
    if config.model.path is None:
        return config
    model = config.model.model_copy(update={"path": str(Path(config.model.path).resolve())})
    return config.model_copy(update={"model": model})
