"""The entropy sink: how sure a model is of every hidden position when it looks for the first times.

A state of the denoising follows from the finished completion and its step map, so each costs one forward pass and the sampler is
not asked. Confidence is that of the model's own distribution, before temperature and filters.

Shapes: K looks, C window, L prompt and window, X hidden positions of all looks, V vocabulary.
"""

import numpy as np
import torch

from diffrl.analysis.samples import Looks
from diffrl.sampler import Denoiser

LOGITS_AT_ONCE = 128  # rows of logits


@torch.no_grad()
def first_looks(
    model: Denoiser,
    prompt_P: np.ndarray,
    ids_C: np.ndarray,
    step_map_C: np.ndarray,
    *,
    num_looks: int,
    device: str | torch.device,
) -> Looks:
    """Before each of the first `num_looks` steps that reveal something; NaN beyond the last of these."""
    steps = np.unique(step_map_C)[:num_looks]
    hidden_KC = step_map_C[None, :] >= steps[:, None]
    ids_KC = np.where(hidden_KC, model.mask_token_id, ids_C[None, :])
    ids_KL = np.concatenate([np.broadcast_to(prompt_P, (len(steps), len(prompt_P))), ids_KC], axis=1)
    ids = torch.as_tensor(ids_KL.astype(np.int64), device=device)
    select_KL = torch.as_tensor(np.pad(hidden_KC, ((0, 0), (len(prompt_P), 0))), device=device)
    states_XD = model.selected_states(ids, torch.ones_like(ids, dtype=torch.bool), select_KL, packed=False)
    found = []
    for states_nD in states_XD.split(LOGITS_AT_ONCE):
        logprob_nV = model.logits(states_nD).float().log_softmax(-1)
        entropy_n = -(logprob_nV.exp() * logprob_nV.clamp(min=-1e4)).sum(-1)  # 0 * -inf
        found.append(torch.stack([logprob_nV.amax(-1).exp(), entropy_n]))
    probability_X, entropy_X = torch.cat(found, 1).cpu().numpy()
    out = np.full((2, num_looks, len(ids_C)), np.nan, dtype=np.float32)
    for kind, value_X in enumerate((probability_X, entropy_X)):
        out[kind, : len(steps)][hidden_KC] = value_X
    return Looks(probability_KC=out[0], entropy_KC=out[1])
