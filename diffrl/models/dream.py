"""Dream-type masked diffusion models (Dream, DiffuCoder, Dream-Coder, converted Qwen2): a stock Qwen2 with full attention.

Dream's weights ARE Qwen2 weights, key for key, so they are loaded into transformers' own Qwen2 and no remote code runs.
Two things differ from Qwen2: every position attends to every other one that is not padding, and the model keeps the shift
of its autoregressive parent: the hidden state at position i-1 predicts token i.
"""

from typing import cast

from transformers import Qwen2Config, Qwen2ForCausalLM

from diffrl.models.base import PolicyModel


class DreamModel(PolicyModel):
    """A Qwen2 backbone that denoises."""

    shifted = True
    model_types = ("dream", "Dream", "qwen2")
    backbone_class = Qwen2ForCausalLM

    @property
    def config(self) -> Qwen2Config:
        return cast(Qwen2Config, self.backbone.config)

    @staticmethod
    def stock_config(hf_config: dict) -> Qwen2Config:
        return qwen2_config(hf_config)

    @staticmethod
    def config_dict(config: Qwen2Config, mask_token_id: int) -> dict:
        return dream_config_dict(config, mask_token_id)


def dream_config_dict(config: Qwen2Config, mask_token_id: int) -> dict:
    """A config.json in Dream's key names, which stock Qwen2 reads too."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "mask_token_id": mask_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
    }


def qwen2_config(raw: dict) -> Qwen2Config:
    """The stock config behind a Dream or Qwen2 config.json. Raises ValueError for what is not supported."""
    rope = raw.get("rope_parameters") or {}  # where transformers 5 writes rope_theta
    if raw.get("rope_scaling") is not None or rope.get("rope_type", "default") != "default":
        raise ValueError("rope_scaling is set, which is not supported; set it to null in config.json")
    theta = raw.get("rope_theta", rope.get("rope_theta", 10000.0))
    keys = set(dream_config_dict(Qwen2Config(), 0)) - {"architectures", "model_type", "mask_token_id", "rope_theta"}
    config = Qwen2Config(**{k: v for k, v in raw.items() if k in keys})
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
    config._attn_implementation = "sdpa"  # eager with a boolean 4D mask is silently wrong
    return config
