"""Dream-type masked diffusion models (Dream, DiffuCoder, Dream-Coder, converted Qwen2): a stock Qwen2 with full attention.

Dream's weights ARE Qwen2 weights, key for key, so they are loaded into transformers' own Qwen2 and no remote code runs.
Two things differ from Qwen2: every position attends to every other one that is not padding, and the model keeps the shift
of its autoregressive parent: the hidden state at position i-1 predicts token i.

Shapes: B rows, L positions, D hidden size, V vocabulary, N selected positions.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffrl.models.head import VocabularyHead

MODEL_TYPES = ("dream", "Dream", "qwen2")
SHARD_BYTES = 4 << 30


class DreamModel(nn.Module):
    """A Qwen2 backbone that denoises: logits at position i are about token i, given the whole noised row."""

    def __init__(self, backbone: Qwen2ForCausalLM, *, mask_token_id: int, hf_config: dict | None = None):
        super().__init__()
        self.backbone = backbone
        backbone.lm_head = VocabularyHead(cast(nn.Parameter, backbone.lm_head.weight))
        self.mask_token_id = mask_token_id
        self.hf_config = hf_config or dream_config_dict(backbone.config, mask_token_id)

    @classmethod
    def from_config(cls, config: Qwen2Config, *, mask_token_id: int, generator: torch.Generator) -> "DreamModel":
        """Random weights drawn from `generator` alone (normal, std = initializer_range; norms 1, biases 0)."""
        with torch.device("meta"):
            backbone = Qwen2ForCausalLM(config)
        backbone.to_empty(device="cpu")
        restore_rotary(backbone, config)
        for name, parameter in backbone.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        backbone.tie_weights()
        return cls(backbone, mask_token_id=mask_token_id)

    @property
    def config(self) -> Qwen2Config:
        return cast(Qwen2Config, self.backbone.config)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def _apply(self, fn, recurse=True):
        """Casts leave the rotary frequencies in float32: rounded to bfloat16, angles at position 256 are off by up to
        half a radian, and the learner would see another model than the workers that rebuild it from its tensors."""
        rotary = self.backbone.model.rotary_emb
        exact = dict(rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(rotary, name, buffer.to(getattr(rotary, name).device))
        return self

    def forward(
        self,
        ids_BL: Tensor,
        attention_mask_BL: Tensor,
        select_BL: Tensor | None = None,
        position_N: Tensor | None = None,
        token_N: Tensor | None = None,
        **head_options: Any,
    ) -> Tensor:
        """Logits about the tokens AT the given positions (the shift is already undone).

        attention_mask_BL is bool, False on padding. With `select_BL` (bool) only those positions go through the
        vocabulary head and the result is [X, V] in row-major order; without it, [B, L, V]. With `token_N` the result
        is [N], the log-probs of those tokens at the selected positions of index `position_N`; see VocabularyHead.
        """
        hidden_BLD = self.hidden_states(ids_BL, attention_mask_BL)
        selected = hidden_BLD if select_BL is None else hidden_BLD[select_BL]
        return self.backbone.lm_head(selected, position_N, token_N, **head_options)

    def hidden_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, attend_BLL: Tensor | None = None) -> Tensor:
        """Last hidden states, shifted so that row i belongs to token i. `attend_BLL` (bool) replaces full attention."""
        mask_BL = attention_mask_BL.bool()
        positions_BL = (mask_BL.long().cumsum(-1) - 1).masked_fill(~mask_BL, 1)
        if attend_BLL is None:
            attend_BLL = mask_BL[:, :, None] & mask_BL[:, None, :]
        # A padding row that attends to nothing would be NaN; let it see itself, nobody looks at it.
        eye_LL = torch.eye(ids_BL.shape[1], dtype=torch.bool, device=ids_BL.device)
        attend_B1LL = (attend_BLL | eye_LL)[:, None]
        hidden_BLD = self.backbone.model(
            input_ids=ids_BL, attention_mask=attend_B1LL, position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        return torch.cat([hidden_BLD[:, :1], hidden_BLD[:, :-1]], dim=1)


def restore_rotary(backbone: Qwen2ForCausalLM, config: Qwen2Config) -> None:
    """Recompute the rotary tables, which are buffers outside the state dict and empty after `to_empty`."""
    rotary = backbone.model.rotary_emb
    backbone.model.rotary_emb = type(rotary)(config)


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
    """The stock config behind a Dream or Qwen2 config.json. Raises ValueError for another family."""
    model_type = raw.get("model_type", "Dream")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: Dream, DiffuCoder, Qwen2")
    rope = raw.get("rope_parameters") or {}  # where transformers 5 writes rope_theta
    if raw.get("rope_scaling") is not None or rope.get("rope_type", "default") != "default":
        raise ValueError("rope_scaling is set, which is not supported; set it to null in config.json")
    theta = raw.get("rope_theta", rope.get("rope_theta", 10000.0))
    keys = set(dream_config_dict(Qwen2Config(), 0)) - {"architectures", "model_type", "mask_token_id", "rope_theta"}
    config = Qwen2Config(**{k: v for k, v in raw.items() if k in keys})
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
    config._attn_implementation = "sdpa"  # eager with a boolean 4D mask is silently wrong
    return config


def load_state_dict(path: Path, *, meta: bool = False) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder; safetensors only, never a pickle. Raises ValueError for a missing file.

    With `meta` only the headers are read: the tensors have shapes and no contents.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (path / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise ValueError("no model.safetensors in the folder; convert the weights to safetensors first")
    lacking = [name for name in files if not (path / name).exists()]
    if lacking:
        raise ValueError(f"no {lacking[0]} in the folder, which {index.name} names; download it")
    try:
        read = read_shapes if meta else load_file
        return {k: v for name in files for k, v in read(path / name).items()}
    except SafetensorError as error:  # a download that was cut off
        raise ValueError(f"a safetensors file cannot be read ({error}); download it again") from None


def read_shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the meta device."""
    with safe_open(file, "pt") as tensors:
        return {k: torch.empty(tensors.get_slice(k).get_shape(), device="meta") for k in tensors.keys()}  # noqa: SIM118


def load_model(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    dtype: torch.dtype | None = None,
    meta: bool = False,
) -> DreamModel:
    """Load a Dream or Qwen2 folder into a stock Qwen2 with full attention; with `meta` check it without its weights.

    `mask_token_id` is needed for folders whose config.json does not name one (plain Qwen2).
    Raises ValueError naming the file when the folder is not one, lacks tensors or has others.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"model.path: {path} holds no config.json; give a Hugging Face model folder")
    raw = json.loads((path / "config.json").read_text())
    mask_id = mask_token_id if raw.get("mask_token_id") is None else raw["mask_token_id"]
    if mask_id is None:
        raise ValueError(
            f"model.path: {path}/config.json names no mask_token_id; add it, or use a tokenizer with a mask token"
        )
    try:
        model = build_model({**raw, "mask_token_id": int(mask_id)}, load_state_dict(path, meta=meta))
    except ValueError as error:
        raise ValueError(f"model.path: {path}: {error}") from None
    return model.to(dtype) if dtype is not None else model


def build_model(hf_config: dict, state: dict[str, Tensor]) -> DreamModel:
    """A model that takes over the tensors of `state` (Dream's key names). Raises ValueError when they do not fit."""
    config = qwen2_config(hf_config)
    with torch.device("meta"):
        backbone = Qwen2ForCausalLM(config)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state = {"lm_head.weight": state["model.embed_tokens.weight"], **state}
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors do not fit config.json: {' '.join(str(error).split())[:300]}") from None
    if missing or unexpected:
        raise ValueError(f"the tensors do not fit config.json: missing {missing[:3]}, unexpected {unexpected[:3]}")
    backbone.tie_weights()
    restore_rotary(backbone, config)
    return DreamModel(backbone, mask_token_id=hf_config["mask_token_id"], hf_config=hf_config)


def state_dict_for_export(model: DreamModel) -> dict[str, Tensor]:
    """Tensors under Dream's (= Qwen2's) key names; a tied head is left out, as transformers does."""
    state = model.backbone.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def save_model(model: DreamModel, path: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder (config.json + safetensors, sharded above 4 GiB) that `load_model` round-trips bit for bit."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob("model*.safetensors*"):  # of an earlier save: an old index would win over a new single file
        stale.unlink()
    state = state_dict_for_export(model) if state is None else state
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**model.hf_config, "torch_dtype": dtype}, indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(t.nbytes for t in state.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


def check_bidirectional(model: DreamModel) -> None:
    """Start-up probe: the last token must reach the first position's logits, with and without padding.

    Guards against attention paths that drop the mask silently (causal fallbacks). Raises RuntimeError.
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
            if not delta > 0:
                raise RuntimeError(
                    f"the model does not attend to later tokens (padding {padding}): attention is causal"
                )
