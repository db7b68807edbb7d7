"""Denoising: start from [MASK]s; at each step, choose positions to reveal and tokens for them.

This is Dream's `diffusion_generate`, exact: schedule, filters and confidences are the release's, in fewer operations.
Only hidden positions go through the last layer's queries and MLP and through the vocabulary head, whose logits exist a few
rows at a time; a step that reveals nothing makes no forward pass; equal canvases are one input until their first tokens
appear; a token is drawn only where it is needed (`entropy`, `topk_margin` and `origin` choose positions without looking at
one, so they draw at the revealed positions alone); top_k and top_p look at the sorted head of the vocabulary; finished
rows leave the batch and waiting ones take their places.

THE CONTRACT
- At temperature 0: token for token and step for step what the reference algorithm gives.
- Above: the same distribution as the reference algorithm's, of whole completions.
- A row's tokens, steps and probabilities depend on its canvas, its seed, the parameters and the model alone. On a CPU,
  without approximations, to the last bit, whatever else is in the batch, in any order, however wide, whenever rows come
  and go. (On a GPU a matrix product of another shape may round differently: near-ties, gaps under about 1e-5, can then go
  the other way.)
- [MASK], `banned_ids` and ids from `vocab_size` on are never drawn, so no row falls out of step and every row is complete
  at the end. This departs from the release. They are left out of the draw only: filters and confidences are those of the
  model's own distribution, by which the release ranks positions. Where the filters leave nothing else, the most probable
  allowed token is taken.

Further departures from the release: a [MASK] inside a prompt stays what it is; random numbers come from one stream per
row, seeded by the caller; filters and confidences are computed in float32 whatever the model's dtype.

The release's schedule is kept: with as many steps as tokens it reveals none at the first, two at the last.

params.py: the options and the schedule. filters.py: from logits to tokens. rows.py: what goes in and comes out.
engine.py: rows in, rows filled. approximate.py, windows.py: caches and other short cuts, off by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.sampler.engine import Denoiser, Engine
from diffrl.sampler.params import SamplingParams
from diffrl.sampler.rows import Canvas, Filled, Noise

__all__ = ["Canvas", "Denoiser", "Engine", "Filled", "Noise", "SampleResult", "SamplingParams", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """SampleResult(completion_ids_BC=tensor([[412, 9, ...], ...]), step_map_BC=tensor([[4, 0, ...], ...]),
    probability_BC=tensor([[0.9, 0.4, ...], ...]))"""

    completion_ids_BC: Tensor  # int64, the whole window, no [MASK] left
    step_map_BC: Tensor  # int64, the denoising step (from 0) at which each position was revealed
    probability_BC: Tensor  # float32, the model's own probability of each token when it was revealed


def sample(
    model: Denoiser,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    *,
    num_tokens: int,
    params: SamplingParams,
    seeds: Sequence[int],
    banned_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    noise: Noise | None = None,
    max_tokens: int = 1 << 62,
) -> SampleResult:
    """Fill a window of `num_tokens` positions after every (left-padded) prompt. `seeds` holds one number per row; the rest
    is Engine's."""
    batch, prompt_length = prompt_ids_BP.shape
    if num_tokens < 1:
        raise ValueError(f"num_tokens: {num_tokens} must be at least 1")
    if len(seeds) != batch:
        raise ValueError(f"seeds: {len(seeds)} given for {batch} rows")
    engine = Engine(
        model,
        params,
        max_tokens=max_tokens,
        vocab_size=vocab_size,
        banned_ids=banned_ids,
        end_ids=end_ids,
        noise=noise,
        device=prompt_ids_BP.device,
    )
    ids_BL = F.pad(prompt_ids_BP.long(), (0, num_tokens), value=model.mask_token_id)
    shown_BL = F.pad(prompt_mask_BP.bool(), (0, num_tokens), value=True)
    hidden_L = torch.arange(prompt_length + num_tokens, device=prompt_ids_BP.device) >= prompt_length
    for ids_L, shown_L, seed in zip(ids_BL, shown_BL, seeds, strict=True):
        engine.add(Canvas(ids_L=ids_L[shown_L], hidden_L=hidden_L[shown_L], seed=seed))
    filled = engine.run()
    return SampleResult(
        completion_ids_BC=torch.stack([row.ids_L[-num_tokens:] for row in filled]),
        step_map_BC=torch.stack([row.step_map_L[-num_tokens:] for row in filled]),
        probability_BC=torch.stack([row.probability_L[-num_tokens:] for row in filled]),
    )
