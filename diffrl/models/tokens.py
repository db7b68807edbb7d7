"""Ids of the special tokens that masked diffusion needs. A policy's tokenizer has been checked to have them."""

from transformers import PreTrainedTokenizerFast


def special_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Id of the `mask`, `eos` or `pad` token."""
    token_id = getattr(tokenizer, f"{name}_token_id")
    assert isinstance(token_id, int), f"the tokenizer has no {name} token"
    return token_id


def end_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Tokens at which a completion ends."""
    return special_id(tokenizer, "eos"), special_id(tokenizer, "pad")
