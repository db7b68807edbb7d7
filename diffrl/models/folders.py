"""Hugging Face folders of every model family: read, built, checked, written under the family's own config and names.

Safetensors only, never a pickle, never remote code.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrl.models.base import PolicyModel, restore_rotary
from diffrl.models.causal import NO_MASK, CausalModel
from diffrl.models.dream import DreamModel
from diffrl.models.llada import LladaModel
from diffrl.models.lora import adapter_state, base_state, merged_state

FAMILIES: tuple[type[PolicyModel], ...] = (DreamModel, LladaModel)
SHARD_BYTES = 4 << 30


def family_of(hf_config: dict) -> type[PolicyModel]:
    """The family that config.json's model_type belongs to; a Qwen2 without [MASK] is autoregressive. Raises ValueError."""
    model_type = hf_config.get("model_type", "Dream")
    if model_type in CausalModel.model_types and hf_config.get("mask_token_id") is None:
        return CausalModel
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ValueError(
        f"model_type {model_type!r} is not supported; supported: Dream, DiffuCoder, Qwen2, LLaDA; give a folder of one"
    )


def load_state_dict(path: Path, *, meta: bool = False) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder; safetensors only, never a pickle. Raises ValueError for a missing file.

    With `meta` only the headers are read: the tensors have shapes and no contents.
    """
    try:
        read = read_shapes if meta else load_file
        return {k: v for file in weight_files(path) for k, v in read(file).items()}
    except SafetensorError as error:  # a download that was cut off
        raise ValueError(f"a safetensors file cannot be read ({error}); download it again") from None


def read_config(path: Path) -> dict:
    """config.json. Raises ValueError for one that is damaged."""
    try:
        raw = json.loads((path / "config.json").read_text())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except ValueError as error:  # of JSON or UTF-8
        raise ValueError(
            f"model.path: {path}/config.json cannot be read ({' '.join(str(error).split())}); download it again"
        ) from None
    return raw


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """What is wrong with a model becomes a ValueError that names its folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model.path: {path}: {error}") from None
    except (TypeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:  # of transformers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"model.path: {path}: no model has such a config.json ({reason}); download it again"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ValueError for a missing one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{index.name} cannot be read ({error}); download it again") from None
    elif (path / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise ValueError("no model.safetensors in the folder; convert the weights to safetensors first")
    lacking = [name for name in files if not (path / name).exists()]
    if lacking:
        raise ValueError(f"no {lacking[0]} in the folder, which {index.name} names; download it")
    return [path / name for name in files]


def read_shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the meta device."""
    with safe_open(file, "pt") as tensors:
        return {k: torch.empty(tensors.get_slice(k).get_shape(), device="meta") for k in tensors.keys()}  # noqa: SIM118


def load_model(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
    meta: bool = False,
) -> PolicyModel:
    """Load a folder into its family's stock backbone; with `meta` check it without its weights.

    `mask_token_id` is needed for folders whose config.json does not name one (plain Qwen2). `causal`: a plain Qwen2 stays
    the autoregressive model that it is; otherwise it gets full attention.
    Raises ValueError naming the file when the folder is not one, lacks tensors or has others.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"model.path: {path} holds no config.json; give a Hugging Face model folder")
    raw = read_config(path)
    if not causal:
        mask_id = mask_token_id if raw.get("mask_token_id") is None else raw["mask_token_id"]
        if not isinstance(mask_id, int):
            raise ValueError(
                f"model.path: {path}/config.json names no mask_token_id; add it, or use a tokenizer with a mask token"
            )
        raw = {**raw, "mask_token_id": mask_id}
    elif family_of(raw) is not CausalModel:
        raise ValueError(
            f"model.family: 'causal' must be diffusion for {path}, whose config.json is one of a diffusion model; or give the "
            "folder of a Qwen2"
        )
    with errors_of(path):
        model = build_model(raw, load_state_dict(path, meta=meta))
    return model.to(dtype) if dtype is not None else model


def build_model(hf_config: dict, state: Mapping[str, Tensor], *, num_tokens: int | None = None) -> PolicyModel:
    """A model that takes over the tensors of `state` (the family's names). Raises ValueError when they do not fit."""
    family = family_of(hf_config)
    config = family.stock_config(hf_config)
    backbone = family.empty_backbone(config)
    stock = {family.stock_name(name): tensor for name, tensor in state.items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in stock:
        stock = {"lm_head.weight": stock["model.embed_tokens.weight"], **stock}
    expected = backbone.state_dict()
    missing = [family.own_name(name) for name in expected if name not in stock]
    unexpected = [family.own_name(name) for name in stock if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"the tensors do not fit config.json: missing {missing[:3]}, unexpected {unexpected[:3]}; "
            "take both from one checkpoint"
        )
    for name, tensor in stock.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"the tensors do not fit config.json: {family.own_name(name)} is {list(tensor.shape)} and would be "
                f"{list(expected[name].shape)}; take both from one checkpoint"
            )
    backbone.load_state_dict(stock, assign=True)
    backbone.tie_weights()
    restore_rotary(backbone)
    mask_token_id = NO_MASK if family is CausalModel else hf_config["mask_token_id"]
    return family(backbone, mask_token_id=mask_token_id, hf_config=hf_config, num_tokens=num_tokens)


def state_dict_for_export(
    model: PolicyModel, backbone_state: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor]:
    """Tensors under the family's own names, adapters merged in; a tied head is left out, as transformers does.

    Each merged tensor is computed when it is read. `backbone_state` replaces `model.backbone.state_dict()` where its
    tensors are sharded over ranks and have been gathered.
    """
    state = base_state(model, backbone_state)
    if model.lora is None:
        return state
    return merged_state(state, adapter_state(model, backbone_state), model.lora.scale, type(model))


def save_model(model: PolicyModel, path: str | Path) -> None:
    """Write a Hugging Face folder that `load_model` round-trips bit for bit, adapters merged in."""
    save_folder(model.hf_config, state_dict_for_export(model), path)


def save_folder(hf_config: dict, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write config.json and safetensors (sharded above 4 GiB); of a lazy `state` one shard is in memory at a time."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob("model*.safetensors*"):  # of an earlier save: an old index would win over a new single file
        stale.unlink()
    weight_files: list[Path] = []
    weight_map: dict[str, int] = {}
    total, dtype = 0, None
    for shard in shards_of(state.items()):
        weight_files.append(path / f"model-{len(weight_files) + 1:05d}.safetensors.part")
        save_file(shard, weight_files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, len(weight_files) - 1)
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = dtype or str(next(iter(shard.values())).dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**hf_config, "torch_dtype": dtype}, indent=2) + "\n")
    if len(weight_files) == 1:
        weight_files[0].rename(path / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(weight_files):05d}.safetensors" for i in range(len(weight_files))]
    for file, name in zip(weight_files, names, strict=True):
        file.rename(path / name)
    index = {"metadata": {"total_size": total}, "weight_map": {key: names[i] for key, i in weight_map.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def shards_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """Consecutive tensors, up to SHARD_BYTES together (a larger one by itself)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def check_attention(model: PolicyModel) -> None:
    """Start-up probe: the last token must reach the first position's logits, of a causal model it must not, with and
    without padding.

    Guards against attention paths that drop the mask silently. Raises RuntimeError.
    """
    length, pad = 6, 2
    ids = torch.arange(length) % (model.vocab_size - 1)
    device = next(model.parameters()).device
    with torch.no_grad():
        for padding in (0, pad):
            row = torch.cat([torch.zeros(padding, dtype=torch.long), ids])[None].to(device)
            mask = torch.arange(padding + length, device=device)[None] >= padding
            changed = row.clone()
            changed[0, -1] += 1
            delta = (model(row, mask) - model(changed, mask))[0, padding + 1].abs().max()
            if not (delta == 0 if model.family == "causal" else delta > 0):
                seen = "does not attend" if delta == 0 else "attends"
                raise RuntimeError(f"the {model.family} model {seen} to later tokens (padding {padding})")
