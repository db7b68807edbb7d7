"""Sampling of an autoregressive model: batched, padded on the left, every row with a seed of its own.

Rows draw from their own generators, so that a batch's other rows change nothing but the last bits of the logits. Greedy
sampling gives the tokens of transformers' `generate(do_sample=False)`.

Shapes: B rows, P prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffrl.models.base import PolicyModel
from diffrl.models.tiny import load_tokenizer
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams
from diffrl.sampler.filters import allowed_tokens, draw_tokens
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
    completions: list[list[int]] = [[] for _ in prompts]
    for drawn_B, _ in islice(continued(model, prompts, params=params, vocab_size=vocab_size), max_tokens):
        for completion, token in zip(completions, drawn_B.tolist(), strict=True):
            if not completion or completion[-1] not in ends:
                completion.append(token)
        if all(completion[-1] in ends for completion in completions):
            break
    return completions


@torch.no_grad()
def continued(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, params: SamplingParams, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(token_B, probability_B) of one position behind the prompts after the other, without end; the probability is the
    model's own, at temperature 1 and unfiltered."""
    device, num = model.device, len(prompts)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    mask_BP = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    noise, seeds = RowNoise(), [prompt.seed for prompt in prompts]
    one_each_B1 = torch.ones(num, 1, dtype=torch.bool, device=device)
    allowed_V: Tensor | None = None
    cache, positions = None, (mask_BP.cumsum(-1) - 1).clamp(min=0)
    while True:
        out = model(
            input_ids=ids,
            attention_mask=mask_BP,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits_BV = out.past_key_values, out.logits[:, -1].float()
        if allowed_V is None:
            allowed_V = allowed_tokens(logits_BV.shape[-1], (), vocab_size, logits_BV.device)
        uniform_B = noise.uniform(seeds, range(num), one_each_B1)
        drawn_B, _ = draw_tokens(logits_BV, uniform_B, allowed_V, params)
        yield drawn_B, logits_BV.log_softmax(-1).gather(1, drawn_B[:, None])[:, 0].exp()
        ids, positions = drawn_B[:, None], positions[:, -1:] + 1
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(num, 1)], 1)


class CausalEngine:
    """An autoregressive policy in the place of the diffusion engine: canvases whose holes are their ends, filled rows.

    A batch is what one call asks about one prompt: rows that are added one after the other with the same `ids_L`. So nobody
    is padded, and what a row holds depends on its own call alone. Position i of a completion has step i. Behind its first
    end token a completion is filled with the last of `end_ids`. Of `params` temperature, top_p and top_k count.
    """

    def __init__(
        self,
        model: PolicyModel,
        params: SamplingParams,
        *,
        max_tokens: int,
        vocab_size: int,
        end_ids: Sequence[int],
        device: str | torch.device = "cpu",
    ):
        self.model, self.params, self.max_tokens = model, params, max_tokens
        self.vocab_size, self.end_ids, self.device = vocab_size, tuple(end_ids), torch.device(device)
        self.waiting: list[list[Canvas]] = []  # batches
        self.num_added = self.num_filled = 0
        self.num_passes = self.num_tokens_passed = self.num_useful_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def add(self, canvas: Canvas) -> int:
        """Queue a canvas; the returned ticket comes back with the filled row."""
        start = int(canvas.hidden_L.long().argmax())
        if start == 0 or not bool(canvas.hidden_L[start:].all()):
            raise ValueError(
                "an autoregressive model fills only what stands behind a prompt: give a prompt and no infilling"
            )
        last = self.waiting[-1] if self.waiting else []
        if last and last[0].ids_L is canvas.ids_L and (len(last) + 1) * len(canvas.ids_L) <= self.max_tokens:
            last.append(canvas)
        else:
            self.waiting.append([canvas])
        self.num_added += 1
        return self.num_added - 1

    def step(self) -> list[tuple[int, Filled]]:
        """The next batch, whole, by ticket."""
        canvases = self.waiting.pop(0)
        first = canvases[0]
        prompt = first.ids_L[~first.hidden_L].tolist()
        prompts = [Prompt(ids=prompt, seed=canvas.seed) for canvas in canvases]
        backbone = cast(PreTrainedModel, self.model.backbone)
        window, num = int(first.hidden_L.sum()), len(canvases)
        ids_BL = torch.stack([canvas.ids_L.long() for canvas in canvases])
        ids_BL[:, len(prompt) :] = self.end_ids[-1]
        probability_BL = torch.ones(ids_BL.shape)
        length_B = torch.full((num,), window)  # with the end token
        tokens = continued(backbone, prompts, params=self.params, vocab_size=self.vocab_size)
        for place, (drawn_B, drawn_probability_B) in enumerate(islice(tokens, window)):
            active_B = length_B > place
            ids_BL[active_B, len(prompt) + place] = drawn_B.cpu()[active_B]
            probability_BL[active_B, len(prompt) + place] = drawn_probability_B.cpu()[active_B]
            self.num_passes += 1
            self.num_tokens_passed += num * (1 if place else len(prompt))
            self.num_useful_tokens += int(active_B.sum()) * (1 if place else len(prompt))
            ended_B = torch.isin(drawn_B.cpu(), torch.tensor(self.end_ids))
            length_B[active_B & ended_B] = place + 1
            if int(length_B.max()) == place + 1:
                break
        step_map_L = torch.full_like(first.ids_L, -1)
        step_map_L[len(prompt) :] = torch.arange(window)
        self.num_filled += num
        return [
            (
                self.num_filled - num + row,
                Filled(
                    ids_L=ids_BL[row],
                    step_map_L=step_map_L,
                    probability_L=probability_BL[row],
                    passes=float(length_B[row]),
                    exact_passes=int(length_B[row]),
                ),
            )
            for row in range(num)
        ]

    def run(self) -> list[Filled]:
        """Everything that was added, in that order."""
        return [row for _ in range(len(self.waiting)) for _, row in self.step()]


def engine_for(
    model: PolicyModel,
    params: SamplingParams,
    *,
    max_tokens: int,
    vocab_size: int,
    end_ids: Sequence[int],
    device: str | torch.device = "cpu",
) -> Engine | CausalEngine:
    """What samples a policy of its family."""
    make = CausalEngine if model.family == "causal" else Engine
    return make(model, params, max_tokens=max_tokens, vocab_size=vocab_size, end_ids=end_ids, device=device)


def batches_of(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Places of the prompts, batch by batch, the longest first: rows of a batch have about the same length."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]
