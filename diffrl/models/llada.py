"""LLaDA-type masked diffusion models (LLaDA-8B, LLaDA 1.5): a stock Llama with full attention and no shift.

LLaDA's blocks of type "llama" are Llama's, under names that come from OLMo: RMSNorm, rotary embeddings of rotated
halves, grouped queries, SwiGLU. The logits at position i are about token i. In bfloat16 the stock rotation rounds cosines
and sines where LLaDA's own code rotates in float32; in float32 the two are the same.

The folder keeps LLaDA's config.json and tensor names. Keys that config.json leaves out have the defaults of LLaDA's own
configuration class, which describe another architecture and are then refused like any other value.
"""

import re
from typing import Any, cast

from transformers import LlamaConfig, LlamaForCausalLM

from diffrl.models.base import PolicyModel

BLOCK_NAMES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
STOCK_BLOCK_NAMES = {own: stock for stock, own in BLOCK_NAMES.items()}
STOCK_OTHER_NAMES = {own: stock for stock, own in OTHER_NAMES.items()}

# key: (LLaDA's default, the values that a Llama can stand for)
SUPPORTED: dict[str, tuple[Any, tuple]] = {
    "block_type": ("sequential", ("llama",)),
    "block_group_size": (1, (1,)),
    "activation_type": ("swiglu", ("silu",)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "bias_for_layer_norm": (None, (False, None)),
    "attention_layer_norm": (False, (False,)),
    "include_bias": (True, (False,)),
    "include_qkv_bias": (False, (False, None)),
    "rope": (False, (True,)),
    "rope_scaling": (None, (None,)),
    "alibi": (False, (False,)),
    "input_emb_norm": (False, (False,)),
    "scale_logits": (False, (False,)),
    "clip_qkv": (None, (None,)),
    "attention_dropout": (0.1, (0.0,)),
    "residual_dropout": (0.1, (0.0,)),
    "embedding_dropout": (0.1, (0.0,)),
}


class LladaModel(PolicyModel):
    """A Llama backbone that denoises."""

    shifted = False
    model_types = ("llada",)
    backbone_class = LlamaForCausalLM

    @property
    def config(self) -> LlamaConfig:
        return cast(LlamaConfig, self.backbone.config)

    @staticmethod
    def stock_config(hf_config: dict) -> LlamaConfig:
        return llama_config(hf_config)

    @staticmethod
    def config_dict(config: LlamaConfig, mask_token_id: int) -> dict:
        return llada_config_dict(config, mask_token_id)

    @staticmethod
    def own_name(stock: str) -> str:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", stock)
        if match and match[2] in BLOCK_NAMES:
            return f"model.transformer.blocks.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
        return OTHER_NAMES.get(stock, stock)

    @staticmethod
    def stock_name(own: str) -> str:
        match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(.+)\.weight", own)
        if match and match[2] in STOCK_BLOCK_NAMES:
            return f"model.layers.{match[1]}.{STOCK_BLOCK_NAMES[match[2]]}.weight"
        return STOCK_OTHER_NAMES.get(own, own)


def llada_config_dict(config: LlamaConfig, mask_token_id: int) -> dict:
    """A config.json in LLaDA's keys, those of the released checkpoints."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **{key: allowed[0] for key, (_, allowed) in SUPPORTED.items() if allowed[0] is not None},
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "mlp_hidden_size": config.intermediate_size,
        "max_sequence_length": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rope_full_precision": True,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        "mask_token_id": mask_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
    }


def llama_config(raw: dict) -> LlamaConfig:
    """The stock config behind a LLaDA config.json. Raises ValueError for what a Llama cannot stand for."""
    for key, (default, allowed) in SUPPORTED.items():
        value = raw.get(key, default)
        if value not in allowed:
            where = "" if key in raw else " (LLaDA's default, since config.json leaves it out)"
            raise ValueError(
                f"{key}: {value!r}{where} is not supported; take a checkpoint that has {allowed[0]!r}, as LLaDA-8B does"
            )
    d_model, num_heads = positive(raw, "d_model"), positive(raw, "n_heads")
    num_kv_heads = 1 if raw.get("multi_query_attention") else num_heads
    if raw.get("n_kv_heads") is not None:
        num_kv_heads = positive(raw, "n_kv_heads")
    if d_model % num_heads:
        raise ValueError(f"d_model: {d_model} is no multiple of n_heads {num_heads}; correct config.json")
    if num_heads % num_kv_heads:
        raise ValueError(f"n_heads: {num_heads} is no multiple of n_kv_heads {num_kv_heads}; correct config.json")
    mlp_size = raw.get("mlp_hidden_size")
    config = LlamaConfig(
        hidden_size=d_model,
        num_hidden_layers=positive(raw, "n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=positive(raw, "mlp_ratio") * d_model
        if mlp_size is None
        else positive(raw, "mlp_hidden_size"),
        # The embeddings may have been padded to a round number of rows.
        vocab_size=positive(raw, "vocab_size" if raw.get("embedding_size") is None else "embedding_size"),
        max_position_embeddings=positive(raw, "max_sequence_length"),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        tie_word_embeddings=bool(raw.get("weight_tying", True)),
        initializer_range=raw.get("init_std", 0.02),
        # LLaDA pads with the end token, whose embedding is trained; a Llama would leave out its padding's.
        pad_token_id=None,
        eos_token_id=raw.get("eos_token_id"),
        bos_token_id=None,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10000.0))}
    config._attn_implementation = "sdpa"  # eager with a boolean 4D mask is silently wrong
    return config


def positive(raw: dict, key: str) -> int:
    """A size that config.json must name. Raises ValueError."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: {value!r} is no positive integer; copy the checkpoint's own config.json")
    return value
