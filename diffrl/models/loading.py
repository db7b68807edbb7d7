"""From a config's `model` section to a model and its tokenizer. Local files only, safetensors only, never remote code."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from diffrl.config import ModelConfig
from diffrl.data.corpus import microcode_text, stdlib_text
from diffrl.data.microcode import microcode_exercises
from diffrl.data.sft import fenced
from diffrl.models.base import PolicyModel
from diffrl.models.causal import CausalModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import check_attention, load_model, read_config
from diffrl.models.llada import LladaModel
from diffrl.models.lora import add_adapters
from diffrl.models.tiny import load_tokenizer, tiny_of, train_tokenizer
from diffrl.models.tokens import special_id
from diffrl.seeds import derive_seed


def load_policy_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.path`, or one trained on the spot on microcode text. Raises ValueError."""
    if config.path is None:
        return train_tokenizer(tokenizer_texts(), config.tiny.vocab_size)
    if not Path(config.path).is_dir():
        raise ValueError(f"model.path: {config.path} is not a folder; give a local Hugging Face folder or leave it out")
    try:
        tokenizer = load_tokenizer(config.path)
    except (OSError, ValueError, TypeError, LookupError) as error:  # transformers' own, none of which names the folder
        raise ValueError(
            f"model.path: {config.path} holds no tokenizer that can be read; add its tokenizer.json"
        ) from error
    raw = read_config(Path(config.path)) if (Path(config.path) / "config.json").exists() else {}
    if tokenizer.mask_token_id is None and raw.get("model_type") in LladaModel.model_types:
        named = raw.get("mask_token_id")  # the released tokenizer does not say it
        if isinstance(named, int) and 0 <= named < len(tokenizer):
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(named)
    for name in ("eos", "pad") if config.family == "causal" else ("mask", "eos", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            way_out = f"add `{name}_token` to its tokenizer_config.json"
            if name != "eos":
                way_out += (
                    f", or of an autoregressive model make a copy with `diffrl data add-tokens {config.path} OUT`"
                )
            raise ValueError(f"model.path: the tokenizer of {config.path} has no {name} token; {way_out}")
    return tokenizer


def tokenizer_texts() -> list[str]:
    """What the tiny tokenizer is trained on: programs, and instructions with fenced completions as SFT will show them."""
    exercises = microcode_exercises("train")
    return [microcode_text(), stdlib_text(300_000), "\n".join(f"{e.prompt}\n{fenced(e.solution)}" for e in exercises)]


def load_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PolicyModel:
    """The model of `model.path`, or a tiny one with random weights drawn from `seed`; with `model.lora` it has adapters,
    also drawn from `seed`, and only they require gradients. Raises ValueError."""
    if config.path is not None:
        model = load_folder(config, tokenizer)
    else:
        tiny = config.tiny
        model = tiny_of(
            CausalModel if config.family == "causal" else DreamModel,
            tokenizer,
            generator=torch.Generator().manual_seed(derive_seed(seed, "weights")),
            hidden_size=tiny.hidden_size,
            intermediate_size=tiny.intermediate_size,
            num_layers=tiny.num_layers,
            num_heads=tiny.num_heads,
            num_kv_heads=tiny.num_kv_heads,
            max_positions=tiny.max_length,
        ).to(getattr(torch, config.dtype))
    model.num_tokens = len(tokenizer)
    check_attention(model)
    if config.lora is not None:
        add_adapters(model, config.lora, torch.Generator().manual_seed(derive_seed(seed, "adapters")))
    return model


def check_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PolicyModel:
    """Whether `load_policy` will find what it needs, without reading any weights: a model of which only the shapes are
    real. Raises ValueError."""
    if config.path is None:
        return load_policy(config, tokenizer, seed=0)  # tiny
    model = load_folder(config, tokenizer, meta=True)
    if config.lora is not None:
        add_adapters(model, config.lora, torch.Generator())
    return model


def load_folder(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, meta: bool = False) -> PolicyModel:
    """The model of `model.path`, checked against its tokenizer."""
    assert config.path is not None
    causal = config.family == "causal"
    mask_token_id = None if causal else special_id(tokenizer, "mask")
    dtype = getattr(torch, config.dtype)
    model = load_model(config.path, mask_token_id=mask_token_id, causal=causal, dtype=dtype, meta=meta)
    if model.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.path: {config.path} has {model.vocab_size} embeddings for a tokenizer of {len(tokenizer)} tokens; "
            "give it the tokenizer it was trained with"
        )
    return model
