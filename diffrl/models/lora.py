"""Low-rank adapters (LoRA, arXiv 2106.09685) inside the blocks of a stock backbone, by peft.

Adapters begin as nothing: B is 0, so the model equals its base exactly; A is drawn from a generator. Training touches
adapters alone. What leaves the process is either the merged weights W + scale * B A under the family's own names, or the
adapters under peft's names, which stock peft loads onto the stock backbone. The sum is taken in float64 and rounded once,
so that learner and workers get the same bits, whichever of them merges.

Shapes: R rank, I inputs, O outputs of a linear layer.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import peft
import torch
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import save_file
from torch import Tensor, nn

from diffrl.config import LoraConfig
from diffrl.errors import suggestion
from diffrl.models.base import PolicyModel

ADAPTER = "default"  # peft's name for the only adapter
PEFT_PREFIX = "base_model.model."  # of tensor names in peft's files
BLOCKS = "model.layers."


def target_layers(model: PolicyModel, targets: Sequence[str] | None) -> list[str]:
    """Names of the linear layers of the blocks that `targets` choose, in the backbone's order (None: all of them).

    A target is a name or the end of one, as in peft. Raises ValueError for one that chooses nothing.
    """
    layers = [
        name for name, layer in model.backbone.named_modules() if name.startswith(BLOCKS) and type(layer) is nn.Linear
    ]
    if targets is None:
        return layers
    for target in targets:
        if not any(chooses(target, name) for name in layers):
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise ValueError(
                f"model.lora.targets: {target!r} is no linear layer of the blocks{suggestion(target, known)}; "
                f"known: {', '.join(known)}"
            )
    return [name for name in layers if any(chooses(target, name) for target in targets)]


def chooses(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_adapters(model: PolicyModel, config: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters into the backbone, in the dtype of its weights, and freeze everything else. Raises ValueError."""
    assert model.lora is None
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]: annotated int, only divided by the rank
        lora_dropout=config.dropout,
        target_modules=target_layers(model, config.targets),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws first weights from the global generator
        peft.inject_adapter_in_model(peft_config, model.backbone, ADAPTER)
    for layer in adapted_layers(model):
        a_RI, b_OR = (cast(Tensor, side[ADAPTER].weight) for side in (layer.lora_A, layer.lora_B))
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(b_OR)
    model.lora = config


def adapted_layers(model: PolicyModel) -> list[AdaptedLinear]:
    return [layer for layer in model.backbone.modules() if isinstance(layer, AdaptedLinear)]


@contextmanager
def adapters_off(model: PolicyModel) -> Iterator[None]:
    """Within it the model is its base: the reference policy of a run that trains adapters."""
    layers = adapted_layers(model)
    assert layers, "a model without adapters has no base to go back to"
    for layer in layers:
        # peft's own switch also turns `requires_grad` off and on, under the optimizer's feet.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_state(model: PolicyModel, backbone_state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of the base under the family's own names; a tied head is left out, as transformers does.

    `backbone_state` replaces `model.backbone.state_dict()` where its tensors are sharded and have been gathered.
    """
    state = model.backbone.state_dict() if backbone_state is None else backbone_state
    stock = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    if model.config.tie_word_embeddings:
        stock.pop("lm_head.weight", None)
    return {model.own_name(name): tensor for name, tensor in stock.items()}


def adapter_state(model: PolicyModel, backbone_state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of the adapters under peft's names, such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
    state = model.backbone.state_dict() if backbone_state is None else backbone_state
    return {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items() if ".lora_" in name
    }


class MergedState(Mapping[str, Tensor]):
    """A state dict with adapters added in. A tensor is computed when it is read, and not kept."""

    def __init__(
        self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, names: Mapping[str, str]
    ):
        """`names`: from a tensor of `base` to the layer in `adapter`."""
        self.base, self.adapter, self.scale, self.names = base, adapter, scale, names

    def __getitem__(self, name: str) -> Tensor:
        weight_OI = self.base[name]
        layer = self.names.get(name)
        if layer is None:
            return weight_OI
        a_RI, b_OR = (self.adapter[f"{layer}.lora_{side}.weight"] for side in "AB")
        return merge(weight_OI, a_RI, b_OR, self.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def merged_state(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, family: type[PolicyModel]
) -> MergedState:
    """`base` under the family's names with `adapter` (peft's names) added in, tensor by tensor."""
    layers = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    names = {family.own_name(f"{layer.removeprefix(PEFT_PREFIX)}.weight"): layer for layer in layers}
    assert names.keys() <= base.keys(), "an adapter for a layer that the base does not have"
    return MergedState(base, adapter, scale, names)


@torch.no_grad()
def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """weight + scale * B A, in the dtype of the weight and on its device."""
    a_RI, b_OR = (t.to(weight_OI.device, torch.float64) for t in (a_RI, b_OR))
    return torch.addmm(weight_OI.double(), b_OR, a_RI, alpha=scale).to(weight_OI.dtype)


def save_adapter(
    adapter: Mapping[str, Tensor], config: LoraConfig, path: str | Path, *, base_path: str | None = None
) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained(stock backbone, path)` reads."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    layers = (name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter)
    fields = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        base_model_name_or_path=base_path,
        inference_mode=True,
    ).to_dict()
    fields["target_modules"] = sorted(set(layers)) if config.targets is None else list(config.targets)
    (path / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
