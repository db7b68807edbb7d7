"""Everything that a user can get wrong is found here, before the first actor starts."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from actors.reward import backend_options
from diffrl.config import PretrainConfig, RLConfig, SandboxConfig, SftConfig
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError
from diffrl.estimators import ESTIMATORS
from diffrl.models.base import PolicyModel
from diffrl.models.loading import check_policy, load_policy_tokenizer
from diffrl.prompts import chat_ids
from diffrl.run_folder import check_run_folder
from diffrl.types import Problem
from sandbox.backends import choose_backend, require_available
from sandbox.types import SandboxUnavailableError

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
    try:
        check_run_folder(Path(config.run_dir), config.model.path)
        check_devices(config)
        sandbox, sandbox_reason = choose_sandbox(config.sandbox)
        tokenizer = load_policy_tokenizer(config.model)
        check_estimator_family(config.method.estimator, type(check_policy(config.model, tokenizer)))
        problems = problems_of(config.data)
        fitting = [p for p in problems if len(chat_ids(tokenizer, p)) <= config.data.max_prompt_tokens]
        if not fitting:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} is less than every prompt of the data needs "
                f"(the shortest has {min(len(chat_ids(tokenizer, p)) for p in problems)} tokens); raise it"
            )
        held_out = [
            [] if section is None else problems_of(section)
            for section in (config.eval.problems, config.report.problems if config.report else None)
        ]
    except SandboxUnavailableError as error:
        raise ConfigError(f"sandbox: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
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


def choose_sandbox(config: SandboxConfig) -> tuple[SandboxConfig, str]:
    """The config with one backend for all reward workers, which can be used here; and why that one."""
    reasons: list[str] = []
    options = backend_options(config)
    backend = choose_backend(options, reasons.append)
    require_available(replace(options, backend=backend))
    return config.model_copy(update={"backend": backend}), "; ".join(reasons)


def check_devices(config: RLConfig) -> None:
    check_gpus("rollout, reference and learner", config.num_gpus, config.ray.address)


def check_gpus(who: str, needed: float, address: str | None) -> None:
    """A cluster that is not there yet may grow; this machine will not."""
    if needed > torch.cuda.device_count() and not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"{who}: {needed:g} GPUs are asked for and this machine has {torch.cuda.device_count()}; join a cluster "
            "(ray.address) or set the gpus keys to 0"
        )


def check_estimator_family(name: str, model: type[PolicyModel]) -> None:
    """An estimator hides tokens, or not, as the model was trained to see them."""
    if ESTIMATORS[name].family != model.family:
        known = sorted(other for other, estimator in ESTIMATORS.items() if estimator.family == model.family)
        raise ConfigError(
            f"method.estimator: {name!r} must be one for {model.family} models, as {model.__name__} is: {', '.join(known)}"
        )


def absolute_model_path(config: Config) -> Config:
    """Actors may start in another folder than the driver."""
    if config.model.path is None:
        return config
    model = config.model.model_copy(update={"path": str(Path(config.model.path).resolve())})
    return config.model_copy(update={"model": model})
