"""The rollout worker: problems in, groups of sampled completions out."""

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.weights import PolicyHolder, Weights
from diffrl.batches import pad_prompt
from diffrl.models.tokens import decode, end_ids, length_with_end, special_id
from diffrl.prompts import chat_ids
from diffrl.sampler import SamplingParams, sample
from diffrl.types import Problem, Rollout, RolloutGroup


class RolloutWorker:
    """Samples groups. Every forward pass has the same shape, [group size, max_prompt_tokens + completion_tokens],
    so a row never sees how the work was spread over workers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, max_prompt_tokens: int, completion_tokens: int, threads: int
    ):
        torch.set_num_threads(threads)
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.completion_tokens = completion_tokens
        self.holder = PolicyHolder("cuda" if torch.cuda.is_available() else "cpu")

    @ray.method
    def pull(self, weights: Weights) -> int:
        """Load a version ahead of the work; the returned version is the acknowledgement."""
        self.holder.at(weights)
        return weights.version

    @ray.method
    def generate(
        self, problem: Problem, ordinal: int, seeds: tuple[int, ...], params: SamplingParams, weights: Weights
    ) -> RolloutGroup:
        """One group: len(seeds) completions of `problem` under exactly this version of the policy."""
        model = self.holder.at(weights)
        prompt = np.asarray(chat_ids(self.tokenizer, problem), dtype=np.int32)
        prompt_ids_BP, prompt_mask_BP = pad_prompt(
            prompt, len(seeds), self.max_prompt_tokens, special_id(self.tokenizer, "pad")
        )
        result = sample(
            model,
            prompt_ids_BP.to(self.holder.device),
            prompt_mask_BP.to(self.holder.device),
            num_tokens=self.completion_tokens,
            params=params,
            seeds=seeds,
            vocab_size=len(self.tokenizer),
        )
        ids_BC = result.completion_ids_BC.cpu().numpy().astype(np.int32)
        steps_BC = result.step_map_BC.cpu().numpy().astype(np.int32)
        ends = end_ids(self.tokenizer)
        rollouts = []
        for index, seed in enumerate(seeds):
            num_tokens = length_with_end(ids_BC[index], ends)
            rollouts.append(
                Rollout(
                    sample_index=index,
                    seed=seed,
                    completion_ids_C=ids_BC[index],
                    step_map_C=steps_BC[index],
                    num_tokens=num_tokens,
                    text=decode(self.tokenizer, ids_BC[index][:num_tokens], ends),
                )
            )
        return RolloutGroup(
            problem=problem,
            ordinal=ordinal,
            policy_version=weights.version,
            prompt_ids_P=prompt,
            rollouts=tuple(rollouts),
        )
