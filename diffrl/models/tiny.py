"""A Dream-type model small enough for a CPU, and a tokenizer trained on the spot: the quickstart needs no download.

The architecture is the one of the 7B models (a Qwen2 backbone, bidirectional, shifted), only narrow and shallow, so
every line of the pipeline runs as it would there. Text is byte-level BPE; numbers are tokens of one or two digits.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config

from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.tokens import special_id

MASK, END, PAD = "<|mask|>", "<|im_end|>", "<|dlm_pad|>"
# Header and role are one token each, so a chat costs three tokens and not nine.
USER, ASSISTANT, SYSTEM = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>system\n"
SPECIAL_TOKENS = (PAD, END, MASK, USER, ASSISTANT, SYSTEM)

Family = TypeVar("Family", bound=PolicyModel)

EMBEDDING_STD = 0.1  # of the tied embeddings; the usual 0.02 learns more slowly here

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# A fence with its line break · a line break with its indent · a word · one or two digits · operators · other blanks.
# Blanks stick to the word or operator before a number and never to the number itself: "3" is one token everywhere.
PIECES = r"\n?```(?:python)?\n?|\n *| ?[A-Za-z_]+(?: (?=\d))?|\d{1,2}| ?[^\sA-Za-z_\d`]+(?: (?=\d))?| +|.|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly the merges that `texts` give; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer folder: local files only, and never code that comes with them."""
    return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    max_positions: int = 512,
) -> Qwen2Config:
    """Qwen2 in miniature. Input and output embeddings are tied: copying a token is then the easy case."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=special_id(tokenizer, "pad"),
        eos_token_id=special_id(tokenizer, "eos"),
        bos_token_id=None,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config._attn_implementation = "sdpa"
    return config


def tiny_model(tokenizer: PreTrainedTokenizerFast, *, generator: torch.Generator, **sizes: int) -> DreamModel:
    """A tiny model with weights drawn from `generator` that is quick to learn copying; `sizes`: see `tiny_config`."""
    return tiny_of(DreamModel, tokenizer, generator=generator, **sizes)


def tiny_of(
    family: type[Family], tokenizer: PreTrainedTokenizerFast, *, generator: torch.Generator, **sizes: int
) -> Family:
    """The same of any family with a Qwen2 backbone."""
    config = tiny_config(tokenizer, **sizes)
    model = family.from_config(config, mask_token_id=special_id(tokenizer, "mask"), generator=generator)
    nn.init.normal_(model.backbone.model.embed_tokens.weight, std=EMBEDDING_STD, generator=generator)
    start_as_copier(model, generator)
    return model


@torch.no_grad()
def start_as_copier(model: PolicyModel, generator: torch.Generator, strength: float = 0.7) -> None:
    """Let every attention head begin by passing on what it looks at: o_proj is the transpose of an orthogonal v_proj.

    Constants must be copied from the prompt, which is learned in fewer steps from this start ("mimetic initialization",
    arXiv 2305.09828). K key-value heads of size H (X = K * H) are each shared by `sharing` query heads (Y = X * sharing);
    D is the hidden size.
    """
    weights = dict(model.backbone.model.layers.named_parameters())
    for layer in range(len(model.backbone.model.layers)):
        value_XD = weights[f"{layer}.self_attn.v_proj.weight"]
        output_DY = weights[f"{layer}.self_attn.o_proj.weight"]
        dim, sharing = output_DY.shape[0], output_DY.shape[1] // value_XD.shape[0]
        square_DD = torch.randn(dim, dim, generator=generator)
        value_XD.copy_(strength * torch.linalg.qr(square_DD).Q[: value_XD.shape[0]])
        value_KHD = value_XD.reshape(model.config.num_key_value_heads or 1, -1, dim)
        shared_YD = value_KHD.repeat_interleave(sharing, dim=0).reshape(-1, dim)
        output_DY.copy_(shared_YD.T / sharing)
