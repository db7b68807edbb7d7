"""Sampling of a small autoregressive model: batched, padded on the left, every row with a seed of its own.

Rows draw from their own generators, so that a batch's other rows change nothing but the last bits of the logits. Greedy
sampling gives the tokens of transformers' `generate(do_sample=False)`.

Shapes: B rows, P prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffrl.models.tiny import load_tokenizer
from diffrl.sampler.filters import draw_tokens
from diffrl.sampler.params import SamplingParams
from diffrl.sampler.rows import RowNoise


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Prompt(ids=[1, 17, 4], seed=812...)"""

    ids: Sequence[int]
    seed: int


def open_causal_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Raises ValueError for a folder that is not one of an autoregressive model with a chat template."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model folder, it holds no config.json; give a local Hugging Face folder")
    try:
        tokenizer = load_tokenizer(path)
        kind = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False).model_type
    except (OSError, ValueError, TypeError, LookupError) as error:  # transformers' own, none of which names the folder
        raise ValueError(
            f"{path} cannot be read as a model ({' '.join(str(error).split())[:200]}); give another"
        ) from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{path} is of type {kind!r}, which transformers does not sample from left to right; give another"
        )
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {path} has no chat template; add one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no eos token; add `eos_token` to its tokenizer_config.json")
    return tokenizer


def open_causal_model(path: str | Path, dtype: torch.dtype | None, device: str) -> PreTrainedModel:
    """Safetensors of a local folder, never remote code. `dtype` None: that of the weights."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype or "auto"
    )
    return cast(Any, model.eval()).to(device)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Where a completion ends: the tokenizer's own end, and those that the model's generation_config.json names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return tuple(sorted({int(i) for i in (tokenizer.eos_token_id, *named) if isinstance(i, int)}))


@torch.no_grad()
def sample_causal(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    params: SamplingParams,
    ends: Sequence[int],
    vocab_size: int,
) -> list[list[int]]:
    """The completion of each prompt, up to and including its end token. Of `params` temperature, top_p and top_k count."""
    device, num = model.device, len(prompts)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids_BP = torch.tensor([[0] * (longest - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    mask_BP = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    noise, seeds = RowNoise(), [prompt.seed for prompt in prompts]
    one_each_B1 = torch.ones(num, 1, dtype=torch.bool, device=device)
    completions: list[list[int]] = [[] for _ in prompts]
    allowed_V: Tensor | None = None
    done_B = torch.zeros(num, dtype=torch.bool)
    cache, ids, positions = None, ids_BP, (mask_BP.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_tokens):
        out = model(
            input_ids=ids, attention_mask=mask_BP, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache, logits_BV = out.past_key_values, out.logits[:, -1].float()
        if allowed_V is None:
            allowed_V = torch.arange(logits_BV.shape[-1], device=device) < vocab_size
        uniform_B = noise.uniform(seeds, range(num), one_each_B1)
        drawn_B, _ = draw_tokens(logits_BV, uniform_B, allowed_V, params)
        for row in torch.nonzero(~done_B)[:, 0].tolist():
            completions[row].append(int(drawn_B[row]))
            done_B[row] = completions[row][-1] in ends
        if bool(done_B.all()):
            break
        ids, positions = drawn_B[:, None], positions[:, -1:] + 1
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(num, 1)], 1)
    return completions


def batches_of(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Places of the prompts, batch by batch, the longest first: rows of a batch have about the same length."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]
