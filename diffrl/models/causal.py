"""Autoregressive models (Qwen2, Qwen2.5-Coder): the baseline that diffusion is compared with, in the same learner and workers.

The stock Qwen2 with the attention that it was made for. It has the interface of the denoisers, so that scoring, weights,
adapters and export are the same code: logits at position i are about token i, given what stands to its left. Hiding
tokens has no meaning here; the estimator `causal` hides none, and its log-probs are exact.
"""

import torch
from torch import Tensor
from transformers import Qwen2Config

from diffrl.models.dream import DreamModel, dream_config_dict

NO_MASK = -1  # no embedding: a row in which anything is hidden fails


class CausalModel(DreamModel):
    """Dream's backbone as its parent uses it: each token is predicted from those before it. The first of a row sees itself,
    and is never scored."""

    family = "causal"
    model_types = ("qwen2",)

    @staticmethod
    def config_dict(config: Qwen2Config, mask_token_id: int) -> dict:
        keys = {**dream_config_dict(config, mask_token_id), "model_type": "qwen2"}
        del keys["mask_token_id"]
        return {**keys, "architectures": ["Qwen2ForCausalLM"]}

    def hidden_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, opened_LL: Tensor | None = None) -> Tensor:
        assert opened_LL is None
        return super().hidden_states(ids_BL, attention_mask_BL, closed(ids_BL))

    def selected_states(
        self,
        ids_BL: Tensor,
        attention_mask_BL: Tensor,
        select_BL: Tensor,
        *,
        packed: bool,
        opened_LL: Tensor | None = None,
    ) -> Tensor:
        assert opened_LL is None and not packed
        return super().selected_states(ids_BL, attention_mask_BL, select_BL, packed=False, opened_LL=closed(ids_BL))


def closed(ids_BL: Tensor) -> Tensor:
    """opened_LL of an attention that sees no later position."""
    length = ids_BL.shape[1]
    return torch.zeros(length, length, dtype=torch.bool, device=ids_BL.device)
