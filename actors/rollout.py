"""The rollout worker: problems in, groups of sampled completions out."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.batcher import Batcher, RolloutStats
from actors.reference import logprobs_under
from actors.weights import PolicyHolder, Weights
from diffrl.causal_sampler import CausalEngine, engine_for
from diffrl.models.tokens import decode, end_ids, length_with_end
from diffrl.prompts import chat_ids
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams
from diffrl.types import Problem, Rollout, RolloutGroup, ScoringBatch


class RolloutWorker:
    """Samples groups, for as many threads as call it: their rows share forward passes of up to `max_tokens` positions.

    What a group holds depends on its own call alone (the sampler's contract), not on what is sampled beside it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        completion_tokens: int,
        max_tokens: int,
        threads: int,
        dtype: Literal["float32", "bfloat16"] | None = None,
        compile: bool = False,
    ):
        torch.set_num_threads(threads)
        self.tokenizer = tokenizer
        self.completion_tokens = completion_tokens
        self.max_tokens = max_tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.holder = PolicyHolder(device, None if dtype is None else getattr(torch, dtype), compile=compile)
        self.batcher = Batcher()

    @ray.method
    def pull(self, weights: Weights) -> int:
        """Load a version ahead of the work; the returned version is the acknowledgement."""
        with self.batcher.idle:
            self.holder.at(weights)
        return weights.version

    @ray.method
    def logprobs(self, batch: ScoringBatch, weights: Weights, attend_padding: bool) -> torch.Tensor:
        """float32 [I, B, C]: what this worker's model, whatever its dtype, gives to a batch."""
        with self.batcher.idle:
            return logprobs_under(self.holder.at(weights), batch, attend_padding=attend_padding)

    @ray.method
    def stats(self) -> RolloutStats:
        return self.batcher.stats

    @ray.method
    def generate(
        self,
        problem: Problem,
        ordinal: int,
        seeds: tuple[int, ...],
        params: SamplingParams,
        weights: Weights,
        guarded: tuple[int, ...] = (),
    ) -> RolloutGroup:
        """One group: len(seeds) completions of `problem` under exactly this version of the policy. Those at the indices
        `guarded` are sampled without approximations too, with the same seeds."""
        prompt_P = np.asarray(chat_ids(self.tokenizer, problem), dtype=np.int32)
        rollouts = self.sample(prompt_P, seeds, range(len(seeds)), params, weights)
        twins = self.sample(prompt_P, seeds, guarded, params.exactly(), weights)
        return RolloutGroup(
            problem=problem,
            ordinal=ordinal,
            policy_version=weights.version,
            prompt_ids_P=prompt_P,
            rollouts=rollouts,
            twins=twins,
        )

    def sample(
        self,
        prompt_P: np.ndarray,
        seeds: Sequence[int],
        indices: Sequence[int],
        params: SamplingParams,
        weights: Weights,
    ) -> tuple[Rollout, ...]:
        """The completions of these indices."""

        def engine() -> Engine | CausalEngine:
            return engine_for(
                self.holder.at(weights),
                params,
                max_tokens=self.max_tokens,
                vocab_size=len(self.tokenizer),
                end_ids=end_ids(self.tokenizer),
                device=self.holder.device,
            )

        canvases = canvases_of(prompt_P, self.completion_tokens, [seeds[index] for index in indices])
        filled = self.batcher.fill((weights.version, params), engine, canvases)
        return tuple(
            rollout_of(self.tokenizer, row, completion_tokens=self.completion_tokens, index=index, seed=seeds[index])
            for index, row in zip(indices, filled, strict=True)
        )


def canvases_of(prompt_P: np.ndarray, completion_tokens: int, seeds: Sequence[int]) -> list[Canvas]:
    """A prompt and its hidden window, once for each seed."""
    ids_L = torch.from_numpy(np.pad(prompt_P.astype(np.int64), (0, completion_tokens)))
    hidden_L = torch.arange(len(ids_L)) >= len(prompt_P)
    return [Canvas(ids_L=ids_L, hidden_L=hidden_L, seed=seed) for seed in seeds]


def sampled_groups(
    engine: Engine | CausalEngine,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    completion_tokens: int,
    seeds: Sequence[Sequence[int]],
) -> list[RolloutGroup]:
    """A group of each problem, with a completion for each of its seeds, from an engine that has nothing else to do."""
    prompts = [np.asarray(chat_ids(tokenizer, problem), dtype=np.int32) for problem in problems]
    for prompt_P, own in zip(prompts, seeds, strict=True):
        for canvas in canvases_of(prompt_P, completion_tokens, own):
            engine.add(canvas)
    rows = iter(engine.run())
    return [
        RolloutGroup(
            problem=problem,
            ordinal=ordinal,
            policy_version=0,
            prompt_ids_P=prompt_P,
            rollouts=tuple(
                rollout_of(tokenizer, next(rows), completion_tokens=completion_tokens, index=index, seed=seed)
                for index, seed in enumerate(own)
            ),
        )
        for ordinal, (problem, prompt_P, own) in enumerate(zip(problems, prompts, seeds, strict=True))
    ]


def rollout_of(
    tokenizer: PreTrainedTokenizerFast, row: Filled, *, completion_tokens: int, index: int, seed: int
) -> Rollout:
    """A filled canvas as a rollout; the completion is its last `completion_tokens` positions."""
    ids_C, step_map_C, probability_C = (
        tensor[-completion_tokens:].cpu().numpy() for tensor in (row.ids_L, row.step_map_L, row.probability_L)
    )
    ends = end_ids(tokenizer)
    num_tokens = length_with_end(ids_C, ends)
    return Rollout(
        sample_index=index,
        seed=seed,
        completion_ids_C=ids_C.astype(np.int32),
        step_map_C=step_map_C.astype(np.int32),
        probability_C=probability_C.astype(np.float16),
        num_tokens=num_tokens,
        text=decode(tokenizer, ids_C[:num_tokens], ends),
    )
