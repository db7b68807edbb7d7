"""`diffusion_generate` as the releases of Dream and DiffuCoder have it, on our sampler.

The code of their model cards runs with another loader:

```python
from diffrl.config import ModelConfig
from diffrl.models.loading import load_policy, load_policy_tokenizer

config = ModelConfig(path="runs/quickstart/rl/model")
tokenizer = load_policy_tokenizer(config)
model = load_policy(config, tokenizer, seed=0).eval()
inputs = tokenizer("def f(x):", return_tensors="pt")
output = model.diffusion_generate(
    inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=16,
    output_history=True,
    return_dict_in_generate=True,
    steps=16,
    temperature=0.3,
    top_p=0.95,
    alg="entropy",
    alg_temp=0.0,
)
print(tokenizer.decode(output.sequences[0]))
```

Options that are not given have the values that the release uses: temperature 1.0 and top_k 50 (from the model's config, not
from its DreamGenerationConfig, whose own are 0 and none), no top_p, alg "origin", 512 steps. None switches a filter off.

Departures: those of `diffrl.sampler`; `max_new_tokens` must be given (the release falls back on 20 tokens in all);
randomness comes from `seed` and not from torch's global generator, so equal calls give equal rows; a row that is longer
than the model's context is refused (the release warns); no hooks, no generation_config.

Shapes: B rows, P prompt, C completion, L = P + C.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffrl.infilling import check_length
from diffrl.sampler import Noise, SamplingParams, sample
from diffrl.sampler.params import Algorithm
from diffrl.seeds import derive_seed

if TYPE_CHECKING:  # which has this as a method
    from diffrl.models.base import PolicyModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionOutput:
    """DiffusionOutput(sequences=tensor([[412, 9, 31, 5]]), history=[tensor([[412, 9, 0, 5]]), tensor([[412, 9, 31, 5]])])"""

    sequences: Tensor  # [B, L] int64, the prompts as they were given and their completions
    history: list[Tensor] | None  # [B, L] after each step; None unless asked for


def diffusion_generate(
    model: "PolicyModel",
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    steps: int = 512,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = 50,
    alg: Algorithm = "origin",
    alg_temp: float | None = None,
    eps: float = 1e-3,
    num_return_sequences: int = 1,
    output_history: bool = False,
    return_dict_in_generate: bool = False,
    seed: int = 0,
    noise: Noise | None = None,
) -> Tensor | DiffusionOutput:
    """`max_new_tokens` tokens after every prompt of `inputs` [B, P]; `attention_mask` [B, P] is 0 on padding.

    `sequences` alone, or with `return_dict_in_generate` all of DiffusionOutput. Of `num_return_sequences` completions of a
    prompt each has a row, side by side. `noise` as in `sample`. Raises ValueError for values outside their range.
    """
    params = SamplingParams(
        algorithm=alg,
        steps=steps,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp or 0.0,
        eps=eps,
    )
    prompt_ids_BP = inputs.repeat_interleave(num_return_sequences, 0)
    mask_BP = torch.ones_like(inputs) if attention_mask is None else attention_mask
    mask_BP = mask_BP.bool().repeat_interleave(num_return_sequences, 0)
    check_length(int(mask_BP.sum(1).max()), max_new_tokens, int(model.config.max_position_embeddings))
    result = sample(
        model,
        prompt_ids_BP,
        mask_BP,
        num_tokens=max_new_tokens,
        params=params,
        seeds=[derive_seed(seed, "diffusion_generate", row) for row in range(len(prompt_ids_BP))],
        vocab_size=model.num_tokens,
        noise=noise,
    )
    sequences_BL = torch.cat([prompt_ids_BP, result.completion_ids_BC], dim=1)
    if not return_dict_in_generate:
        return sequences_BL
    history = None
    if output_history:
        step_map_BL = torch.cat([torch.full_like(prompt_ids_BP, -1), result.step_map_BC], dim=1)
        history = [sequences_BL.masked_fill(step_map_BL > step, model.mask_token_id) for step in range(steps)]
    return DiffusionOutput(sequences=sequences_BL, history=history)
