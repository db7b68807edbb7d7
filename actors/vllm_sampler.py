"""The backend `vllm`: an autoregressive model in vLLM's AsyncLLM, one engine in each of several Ray actors.

vLLM is an extra (`pip install 'diffrl[vllm]'`) and is imported by the actors alone.
"""

import asyncio
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import ray
from ray.exceptions import RayError

from actors.completions import Completion, Sampled, cluster_for, seeds_of, too_long
from diffrl.causal_sampler import open_causal_tokenizer
from diffrl.config.curate import CurateConfig
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.prompts import chat_ids
from diffrl.types import Problem

MAX_SEED = 2**31 - 1


class VllmWorker:
    """One engine, for many requests at a time."""

    def __init__(self, path: str, *, dtype: str, tensor_parallel: int):
        engine_args = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
        engine = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        self.params = importlib.import_module("vllm").SamplingParams
        self.engine: Any = engine.from_engine_args(
            engine_args(model=path, dtype=dtype, tensor_parallel_size=tensor_parallel, enforce_eager=True)
        )
        self.number = 0

    def context(self) -> int:
        return int(self.engine.model_config.max_model_len)

    async def generate(
        self, ids: Sequence[int], seeds: Sequence[int], options: dict[str, Any]
    ) -> list[tuple[str, int]]:
        """(text, number of tokens) for each seed."""
        return list(await asyncio.gather(*(self.one(list(ids), self.params(seed=s, **options)) for s in seeds)))

    async def one(self, ids: list[int], params: Any) -> tuple[str, int]:
        self.number += 1
        answers: Any = self.engine.generate({"prompt_token_ids": ids}, params, str(self.number))
        last = [answer.outputs[0] async for answer in answers][-1]  # each holds all so far
        return last.text, len(last.token_ids)


class VllmSampler:
    def __init__(self, config: CurateConfig, name: str):
        """Raises ConfigError."""
        self.config, self.name, self.model = config, name, config.models[name]
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"models.{name}.backend: vllm is not installed; pip install 'diffrl[vllm]', or use backend openai with the url "
                "of a server, or transformers for a small model"
            )
        try:
            self.tokenizer = open_causal_tokenizer(cast(str, self.model.path))
        except ValueError as error:
            raise ConfigError(f"models.{name}.path: {error}") from error
        self.stack = ExitStack()

    def sample(self, problems: Iterable[Problem]) -> Iterator[Sampled]:
        model = self.model
        self.stack.enter_context(cluster_for(self.config, self.name))
        remote = cast(Any, ray.remote(VllmWorker)).options(
            num_cpus=model.cpus_per_worker,
            num_gpus=model.gpus_per_worker,
            label_selector=dict(model.labels),
            max_concurrency=2 * model.concurrency,
        )
        workers = [
            remote.remote(model.path, dtype=model.dtype or "auto", tensor_parallel=model.tensor_parallel)
            for _ in range(model.num_workers)
        ]
        self.stack.callback(lambda: [ray.kill(worker) for worker in workers])
        options = {"temperature": model.temperature, "max_tokens": model.max_tokens}
        options |= {
            key: value for key, value in {"top_p": model.top_p, "top_k": model.top_k}.items() if value is not None
        }
        under_way: dict[Any, tuple[int, Problem]] = {}
        loads = [0] * len(workers)

        def completed() -> Sampled:
            (ref,), _ = ray.wait(list(under_way))
            slot, problem = under_way.pop(ref)
            loads[slot] -= 1
            completions = tuple(Completion(text=text, num_tokens=number) for text, number in ray.get(ref))
            return Sampled(problem=problem, completions=completions)

        try:
            context = min(ray.get([worker.context.remote() for worker in workers]))
            for problem in problems:
                ids = chat_ids(self.tokenizer, problem)
                if words := too_long(len(ids), model, context):
                    yield Sampled(problem=problem, skipped=words)
                    continue
                seeds = [seed % MAX_SEED for seed in seeds_of(self.config, self.name, problem)]
                slot = loads.index(min(loads))
                under_way[workers[slot].generate.remote(ids, seeds, options)] = slot, problem
                loads[slot] += 1
                while len(under_way) >= model.num_workers * model.concurrency:
                    yield completed()
            while under_way:
                yield completed()
        except RayError as error:
            reason = next(iter(str(error).strip().splitlines()[::-1]), type(error).__name__)
            raise RunStoppedError(f"models.{self.name}: a worker of vLLM failed: {reason}") from error

    def close(self) -> None:
        self.stack.close()
