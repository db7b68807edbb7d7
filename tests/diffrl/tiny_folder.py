"""A model folder with a tokenizer, made in a second; the weights are random."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from diffrl.models.folders import save_model
from diffrl.models.tiny import tiny_model, train_tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 3\n"] * 3, 300)


def tiny_folder(path: Path, *, max_positions: int = 64) -> Path:
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "max_positions": max_positions}
    save_model(tiny_model(tokenizer, generator=torch.Generator().manual_seed(0), **sizes), path)
    tokenizer.save_pretrained(path)
    return path
