"""Completions of problems by whatever model: one interface, and the backends `transformers` and `diffusion`.

A sampler is opened with all that can be checked before work starts, without reading weights. `sample` takes problems as it has
room for them. What a completion holds depends on (seed, model's name, problem, sample) alone, not on what was done before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import PreTrainedTokenizerFast

from actors.calls import Done
from actors.commands import context_length
from actors.placement import ask, make_room
from actors.pool import WorkerPool, next_outcome
from actors.rollout import RolloutWorker
from actors.system import cluster, spawner
from actors.weights import put_folder
from diffrl.causal_sampler import (
    Prompt,
    batches_of,
    end_tokens,
    open_causal_model,
    open_causal_tokenizer,
    sample_causal,
)
from diffrl.config import ModelConfig, SupervisionConfig
from diffrl.config.curate import CurateConfig, CurateModel
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.models.loading import check_policy, load_policy_tokenizer
from diffrl.prompts import chat_ids
from diffrl.seeds import derive_seed
from diffrl.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Completion(text="```python\\ndef f(x): ...", num_tokens=23)"""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A problem's completions, or why there can be none. Sampled(problem=Problem(...), completions=(Completion(...), ...))"""

    problem: Problem
    completions: tuple[Completion, ...] = ()
    skipped: str = ""


class Sampler(Protocol):
    def sample(self, problems: Iterable[Problem]) -> Iterator[Sampled]:
        """Every problem once, in whatever order. Raises RunStoppedError where sampling cannot go on."""
        ...

    def close(self) -> None: ...


def seeds_of(config: CurateConfig, name: str, problem: Problem) -> tuple[int, ...]:
    return tuple(
        derive_seed(config.seed, "curate", name, problem.id, n) for n in range(config.models[name].num_samples)
    )


def too_long(num_prompt: int, model: CurateModel, context: int) -> str:
    """Why a prompt cannot be answered; "" where it can."""
    if num_prompt + model.max_tokens <= context:
        return ""
    return f"{num_prompt} tokens of prompt and max_tokens {model.max_tokens} are more than the model's {context}"


def completed(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], ends: Sequence[int]) -> Completion:
    """What was sampled, without the end token."""
    text = tokenizer.decode([i for i in ids if i not in ends], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Completion(text=text, num_tokens=len(ids))


def chunks(problems: Iterable[Problem], size: int) -> Iterator[list[Problem]]:
    waiting = iter(problems)
    while chunk := list(islice(waiting, size)):
        yield chunk


class TransformersSampler:
    """A small autoregressive model in this process."""

    def __init__(self, config: CurateConfig, name: str):
        """Raises ConfigError."""
        self.config, self.name, self.model = config, name, config.models[name]
        try:
            self.tokenizer = open_causal_tokenizer(cast(str, self.model.path))
        except ValueError as error:
            raise ConfigError(f"models.{name}.path: {error}") from error

    def sample(self, problems: Iterable[Problem]) -> Iterator[Sampled]:
        torch.set_num_threads(self.model.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if self.model.dtype is None else getattr(torch, self.model.dtype)
        model = open_causal_model(cast(str, self.model.path), dtype, device)
        ends = end_tokens(model, self.tokenizer)
        context = int(getattr(model.config, "max_position_embeddings", 1 << 62))
        for chunk in chunks(problems, max(1, self.model.batch_size // self.model.num_samples)):
            asked: list[Problem] = []
            prompts: list[Prompt] = []
            for problem in chunk:
                ids = chat_ids(self.tokenizer, problem)
                if words := too_long(len(ids), self.model, context):
                    yield Sampled(problem=problem, skipped=words)
                    continue
                asked.append(problem)
                prompts += [Prompt(ids=ids, seed=seed) for seed in seeds_of(self.config, self.name, problem)]
            sampled: dict[int, list[int]] = {}
            for places in batches_of(prompts, self.model.batch_size):
                rows = sample_causal(
                    model,
                    [prompts[place] for place in places],
                    max_tokens=self.model.max_tokens,
                    params=self.model.params(),
                    ends=ends,
                    vocab_size=len(self.tokenizer),
                )
                sampled |= dict(zip(places, rows, strict=True))
            completions = iter(completed(self.tokenizer, sampled[place], ends) for place in range(len(prompts)))
            for problem in asked:
                yield Sampled(problem=problem, completions=tuple(islice(completions, self.model.num_samples)))

    def close(self) -> None:
        """Nothing is held beyond `sample`."""


@contextmanager
def cluster_for(config: CurateConfig, name: str) -> Iterator[None]:
    """Ray, with room for a model's workers."""
    model = config.models[name]
    with cluster(config.ray.address, model.num_workers * model.cpus_per_worker):
        asked = ask(f"models.{name}", "num_workers", "per_worker", model)
        make_room([asked], SupervisionConfig().start_s, f"models.{name}.num_workers")
        yield


class DiffusionSampler:
    """Our sampler, in the rollout workers of RL."""

    def __init__(self, config: CurateConfig, name: str):
        """Raises ConfigError."""
        self.config, self.name, self.model = config, name, config.models[name]
        policy = ModelConfig(path=self.model.path)
        try:
            self.tokenizer = load_policy_tokenizer(policy)
            check_policy(policy, self.tokenizer)
            self.context = context_length(Path(cast(str, self.model.path)))
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"models.{name}.path: {' '.join(str(error).split()).removeprefix('model.path: ')}"
            ) from error
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"models.{name}.path: the tokenizer of {self.model.path} has no chat template; add one")
        self.stack = ExitStack()

    def sample(self, problems: Iterable[Problem]) -> Iterator[Sampled]:
        model = self.model
        self.stack.enter_context(cluster_for(self.config, self.name))
        pool = WorkerPool(
            spawner(
                RolloutWorker,
                {
                    "num_cpus": model.cpus_per_worker,
                    "num_gpus": model.gpus_per_worker,
                    "max_concurrency": model.concurrency,
                    "label_selector": dict(model.labels),
                },
                self.tokenizer,
                completion_tokens=model.max_tokens,
                max_tokens=model.max_tokens_per_batch,
                threads=model.threads,
                dtype=model.dtype,
            ),
            model.num_workers,
            role="rollout",
            in_flight=model.concurrency,
            concurrency=model.concurrency,
        )
        self.stack.callback(pool.close)
        weights = put_folder(Path(cast(str, model.path)).resolve(), 0, len(self.tokenizer))
        room, ended = model.num_workers * model.concurrency, False
        waiting, ordinal, under_way = iter(problems), 0, 0
        while not ended or under_way:
            while not ended and under_way < room:
                if (problem := next(waiting, None)) is None:
                    ended = True
                elif words := too_long(len(chat_ids(self.tokenizer, problem)), model, self.context):
                    yield Sampled(problem=problem, skipped=words)
                else:
                    seeds = seeds_of(self.config, self.name, problem)
                    pool.submit(ordinal, "generate", problem, ordinal, seeds, model.params(), weights)
                    ordinal, under_way = ordinal + 1, under_way + 1
            if (found := next_outcome([pool])) is None:
                continue
            under_way -= 1
            outcome = found[1]
            if not isinstance(outcome, Done):
                raise RunStoppedError(
                    f"models.{self.name}: a problem broke the workers it was given to: {outcome.reason}"
                )
            completions = tuple(Completion(text=r.text, num_tokens=r.num_tokens) for r in outcome.value.rollouts)
            yield Sampled(problem=outcome.value.problem, completions=completions)

    def close(self) -> None:
        self.stack.close()


def openai_sampler(config: CurateConfig, name: str) -> Sampler:
    from actors.openai_sampler import OpenAISampler

    return OpenAISampler(config, name)


def vllm_sampler(config: CurateConfig, name: str) -> Sampler:
    from actors.vllm_sampler import VllmSampler

    return VllmSampler(config, name)


SAMPLERS: dict[str, Callable[[CurateConfig, str], Sampler]] = {
    "transformers": TransformersSampler,
    "diffusion": DiffusionSampler,
    "openai": openai_sampler,
    "vllm": vllm_sampler,
}
