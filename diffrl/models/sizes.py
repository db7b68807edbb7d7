"""How large a model is, without its weights: from its config.json, or from its name where it is one that is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from diffrl.config import LoraConfig, ModelConfig
from diffrl.errors import one_of
from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import errors_of, family_of, read_config
from diffrl.models.lora import target_layers

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "mask_token_id": 151666,
}
# config.json of published models, by the name of their folder: they can be estimated where they are not.
KNOWN_MODELS: Mapping[str, dict[str, Any]] = dict.fromkeys(
    (
        "Qwen2.5-Coder-7B",
        "DiffuCoder-7B-Base",
        "DiffuCoder-7B-Instruct",
        "DiffuCoder-7B-cpGRPO",
        "Dream-v0-Base-7B",
        "Dream-Coder-v0-Base-7B",
    ),
    QWEN_7B,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes(hidden=3584, mlp=18944, layers=28, vocab=152064, parameters=7615616512, trained=7615616512,
    matrices=6525288448, multiplied=7070619136)"""

    hidden: int
    mlp: int
    layers: int
    vocab: int
    parameters: int
    trained: int
    matrices: int  # trained ones of the blocks with two dimensions, which Muon would take
    multiplied: int  # in a forward pass, per token


def sizes_of(config: ModelConfig) -> Sizes | None:
    """From config.json of `model.path`, from the sizes of a tiny model, or from a known name; None when there is none of
    these. Raises ValueError for a config.json that is not supported and for a `model.known_as` that is not known."""
    if config.path is None:
        tiny = config.tiny
        raw: dict[str, Any] = {
            "hidden_size": tiny.hidden_size,
            "intermediate_size": tiny.intermediate_size,
            "num_hidden_layers": tiny.num_layers,
            "num_attention_heads": tiny.num_heads,
            "num_key_value_heads": tiny.num_kv_heads,
            "vocab_size": tiny.vocab_size,
            "tie_word_embeddings": True,
        }
        return sizes(DreamModel.empty_backbone(Qwen2Config(**raw)), DreamModel, config.lora)
    file = Path(config.path) / "config.json"
    if config.known_as is not None:
        one_of("model.known_as", config.known_as, KNOWN_MODELS)
    name = config.known_as or Path(config.path).name
    known = read_config(file.parent) if file.is_file() else KNOWN_MODELS.get(name)
    if known is None:
        return None
    with errors_of(file.parent):
        family = family_of(known)
        backbone = family.empty_backbone(family.stock_config({"mask_token_id": 0, **known}))
    return sizes(backbone, family, config.lora)


def sizes(backbone: Any, family: type[PolicyModel], lora: LoraConfig | None) -> Sizes:
    """Of a stock backbone, which may have no contents."""
    config = backbone.config
    named = dict(backbone.named_parameters())  # a tied head once
    parameters = sum(p.numel() for p in named.values())
    matrices = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    shapes = [(int(p.shape[0]), int(p.shape[1])) for p in matrices]
    trained, in_blocks = parameters, sum(rows * columns for rows, columns in shapes)
    multiplied = parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    if lora is not None:
        layers = dict(backbone.named_modules())
        chosen = [layers[name] for name in target_layers(family(backbone, mask_token_id=0), lora.targets)]
        trained = in_blocks = sum(lora.rank * (layer.in_features + layer.out_features) for layer in chosen)
        parameters, multiplied = parameters + trained, multiplied + trained
    return Sizes(
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        parameters=parameters,
        trained=trained,
        matrices=in_blocks,
        multiplied=multiplied,
    )
