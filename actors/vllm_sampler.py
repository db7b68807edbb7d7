"""The backend `vllm`: an autoregressive model in vLLM's AsyncLLM, one engine in each of several Ray actors.

vLLM is an extra (`pip install 'diffrl[vllm]'`) and is imported by the actors alone.
"""

import asyncio
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError

from actors.completions import Sampled, cluster_for, completed, seeds_of, too_long
from actors.weights import Weights, fetch
from diffrl.causal_sampler import open_causal_tokenizer
from diffrl.config.curate import CurateConfig
from diffrl.errors import ConfigError, RunStoppedError, shown
from diffrl.models.folders import load_state_dict
from diffrl.prompts import chat_ids
from diffrl.types import Problem

MAX_SEED = 2**31 - 1
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Generated(ids=(17, 4, 2), logprobs=(-0.1, -0.02, -0.7), ended=True)"""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # the model's own, before temperature, top_p and top_k; () if nobody asked for them
    ended: bool  # by an end token, the last of `ids`


class VllmWorker:
    """One engine, for many requests at a time."""

    def __init__(self, path: str, *, dtype: str, tensor_parallel: int):
        engine_args = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
        engine = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        self.params = importlib.import_module("vllm").SamplingParams
        self.engine: Any = engine.from_engine_args(
            engine_args(
                model=path,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel,
                enforce_eager=True,
                load_format="safetensors",  # never a pickle
                disable_log_stats=True,
                worker_extension_cls="actors.vllm_engine.Reloading",
            )
        )
        self.names = set(load_state_dict(Path(path), meta=True))
        self.number = 0

    def context(self) -> int:
        return int(self.engine.model_config.max_model_len)

    async def generate(
        self, ids: Sequence[int], seeds: Sequence[int], options: dict[str, Any], logprobs: bool = False
    ) -> list[Generated]:
        """A completion for each seed; `options` as vLLM calls them."""
        options = {
            **options,
            "detokenize": False,
            "logprobs": 0 if logprobs else None,
        }  # 0: of the sampled tokens alone
        return list(await asyncio.gather(*(self.one(list(ids), self.params(seed=s, **options)) for s in seeds)))

    async def one(self, ids: list[int], params: Any) -> Generated:
        self.number += 1
        answers: Any = self.engine.generate({"prompt_token_ids": ids}, params, str(self.number))
        last = [answer.outputs[0] async for answer in answers][-1]  # each holds all so far
        if last.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave up a completion after {len(last.token_ids)} tokens: {last.finish_reason}")
        return Generated(
            ids=tuple(last.token_ids),
            logprobs=tuple(row[token].logprob for token, row in zip(last.token_ids, last.logprobs or (), strict=False)),
            ended=last.finish_reason == "stop",
        )

    async def pull(self, weights: Weights) -> int:
        """Load a version, under the names of the folder; what is under way is finished with the old one. The returned version
        is the acknowledgement. Raises RuntimeError for weights that are not whole; the old ones are then kept."""
        state = await asyncio.to_thread(fetch, weights)
        if lacking := sorted(self.names - state.keys()):
            raise RuntimeError(f"weights version {weights.version} lack {shown(', '.join(lacking))}")
        if self.engine.model_config.hf_config.tie_word_embeddings:  # else a reload leaves the head its old, packed copy
            state = {**state, HEAD: state[EMBEDDINGS]}
        for name, tensor in state.items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            dtype = str(tensor.dtype).removeprefix("torch.")
            await self.engine.collective_rpc("stage_tensor", args=(name, dtype, list(tensor.shape), data))
        await self.engine.pause_generation(mode="wait")  # clears the cache of prefixes too
        try:
            await self.engine.collective_rpc("load_staged")
        except Exception:
            self.engine.shutdown()  # half of one version and half of another must not answer
            raise
        await self.engine.resume_generation()
        return weights.version


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
        path = str(Path(cast(str, model.path)).resolve())
        workers = [
            remote.remote(path, dtype=model.dtype or "auto", tensor_parallel=model.tensor_parallel)
            for _ in range(model.num_workers)
        ]
        self.stack.callback(lambda: [ray.kill(worker) for worker in workers])
        options = {"temperature": model.temperature, "max_tokens": model.max_tokens}
        options |= {
            key: value for key, value in {"top_p": model.top_p, "top_k": model.top_k}.items() if value is not None
        }
        under_way: dict[Any, tuple[int, Problem]] = {}
        loads = [0] * len(workers)

        def next_done() -> Sampled:
            (ref,), _ = ray.wait(list(under_way))
            slot, problem = under_way.pop(ref)
            loads[slot] -= 1
            found: list[Generated] = ray.get(ref)
            completions = tuple(completed(self.tokenizer, g.ids, g.ids[-1:] if g.ended else ()) for g in found)
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
                    yield next_done()
            while under_way:
                yield next_done()
        except RayError as error:
            reason = next(iter(str(error).strip().splitlines()[::-1]), type(error).__name__)
            raise RunStoppedError(f"models.{self.name}: a worker of vLLM failed: {reason}") from error

    def close(self) -> None:
        self.stack.close()
