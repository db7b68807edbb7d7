"""A copy of an autoregressive model that has the two tokens of masked diffusion: what is hidden, and what follows an end.

A Qwen2 folder has no mask token, and no padding token that is not also an end token. The copy gets `<|mask|>` and
`<|dlm_pad|>`, the names of Dream and DiffuCoder; their rows of the embedding and of the head begin as the mean of the
rows of all other tokens. Rows that a padded vocabulary has to spare are used first, then the matrices are enlarged.

Shapes: V rows of the vocabulary, D hidden size.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffrl.errors import ConfigError
from diffrl.models.folders import save_folder, weight_files
from diffrl.models.tiny import MASK, PAD, load_tokenizer

MODEL_TYPES = ("qwen2",)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COPIED = ("generation_config.json", "LICENSE", "NOTICE")  # beside what is written anew


class GrownState(Mapping[str, Tensor]):
    """The tensors of a folder with rows for new tokens. A tensor is read when it is asked for, and not kept."""

    def __init__(self, folder: Path, *, num_rows: int, num_tokens: int, new_ids: tuple[int, ...]):
        """`num_tokens`: rows that belong to tokens, of which the mean is taken; the embedding and head get `num_rows`."""
        self.num_rows, self.num_tokens, self.new_ids = num_rows, num_tokens, new_ids
        self.files: dict[str, Path] = {}
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as tensors:
            tensor = tensors.get_tensor(name)
        return self.grown(tensor) if name in (EMBEDDING, HEAD) else tensor

    def grown(self, weight_VD: Tensor) -> Tensor:
        mean_D = weight_VD[: self.num_tokens].double().mean(0).to(weight_VD.dtype)
        spare = torch.zeros(max(self.num_rows - len(weight_VD), 0), weight_VD.shape[1], dtype=weight_VD.dtype)
        grown_VD = torch.cat([weight_VD, spare])
        grown_VD[list(self.new_ids)] = mean_D
        return grown_VD

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def add_tokens(model: str | Path, out: str | Path) -> str:
    """Write the copy and say what was added. Raises ConfigError for a folder that is no Qwen2 model, needs nothing, or an
    `out` that is there already."""
    model, out = Path(model), Path(out)
    raw = read_config(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {out} is not empty; name a new folder")
    try:
        tokenizer = load_tokenizer(model)
        weight_files(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"MODEL_FOLDER: {model} cannot be read ({reason}); give a whole model folder") from error
    before = len(tokenizer)
    added = new_tokens(tokenizer, model)
    ids = tuple(tokenizer.get_vocab()[token] for token in added)
    num_rows = max(int(raw["vocab_size"]), *(i + 1 for i in ids))
    try:
        state = GrownState(model, num_rows=num_rows, num_tokens=before, new_ids=ids)
        names = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
        save_folder({**raw, "vocab_size": num_rows, **names}, state, out)
    except SafetensorError as error:
        raise ConfigError(
            f"MODEL_FOLDER: {model} has a damaged safetensors file ({error}); download it again"
        ) from error
    tokenizer.save_pretrained(out)
    for name in COPIED:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    enlarged = num_rows - int(raw["vocab_size"])
    where = f"{enlarged} new rows, {num_rows} in all" if enlarged else f"spare rows, still {num_rows}"
    given = ", ".join(f"{token} {i}" for token, i in zip(added, ids, strict=True))
    return f"{out}: added {given} ({where}); mask_token_id is {tokenizer.mask_token_id}"


def new_tokens(tokenizer: PreTrainedTokenizerFast, model: Path) -> list[str]:
    """Give the tokenizer what it lacks, and say what that was. A padding token that ends texts too is none."""
    lacking = {}
    if tokenizer.mask_token_id is None:
        lacking["mask_token"] = MASK
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token == "<|endoftext|>":
        lacking["pad_token"] = PAD
    known = [token for token in lacking.values() if token in tokenizer.get_vocab()]
    if not lacking or known:
        why = f"already has the token {known[0]}" if known else "has a mask and a padding token"
        raise ConfigError(f"MODEL_FOLDER: the tokenizer of {model} {why}; use the folder as it is")
    tokenizer.add_special_tokens(lacking)
    return list(lacking.values())


def read_config(model: Path) -> dict:
    file = model / "config.json"
    if not file.is_file():
        raise ConfigError(f"MODEL_FOLDER: {model} holds no config.json; give a Hugging Face model folder")
    raw = json.loads(file.read_text())
    if raw.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"MODEL_FOLDER: model_type {raw.get('model_type')!r} of {file} is not supported; supported: "
            f"{', '.join(MODEL_TYPES)} (diffusion models have their tokens already)"
        )
    return raw
