"""Special tokens of masked diffusion, and where a completion ends. A policy's tokenizer has been checked to have them."""

import numpy as np
from transformers import PreTrainedTokenizerFast


def special_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Id of the `mask`, `eos` or `pad` token."""
    token_id = getattr(tokenizer, f"{name}_token_id")
    assert isinstance(token_id, int), f"the tokenizer has no {name} token"
    return token_id


def end_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Tokens at which a completion ends."""
    return special_id(tokenizer, "eos"), special_id(tokenizer, "pad")


def length_with_end(ids_C: np.ndarray, ends: tuple[int, ...]) -> int:
    """Number of tokens up to and including the first end token; the whole window when there is none."""
    positions = np.flatnonzero(np.isin(ids_C, ends))
    return int(positions[0]) + 1 if len(positions) else len(ids_C)


def decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, ends: tuple[int, ...]) -> str:
    body = [int(i) for i in ids if int(i) not in ends]
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
