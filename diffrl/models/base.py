"""What all model families have in common: a stock transformers decoder, called as a denoiser.

A family is a subclass of a few lines: how its config.json and its tensor names translate to those of the stock backbone,
and whether its hidden states are shifted. Its weights run in transformers' own implementation, never in remote code.

Shapes: B rows, L positions, D hidden size, V vocabulary, X selected positions, N scored tokens.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from diffrl.config import LoraConfig
from diffrl.models.head import VocabularyHead

Backbone = Qwen2ForCausalLM | LlamaForCausalLM
BackboneConfig = Qwen2Config | LlamaConfig


class PolicyModel(nn.Module, ABC):
    """Logits at position i are about token i, given the whole noised row.

    `num_tokens` is the tokenizer's size where the vocabulary may be larger: embeddings from there on are padding.
    """

    family: ClassVar[Literal["diffusion", "causal"]] = "diffusion"
    shifted: ClassVar[bool]  # the hidden state at position i - 1 predicts token i
    model_types: ClassVar[tuple[str, ...]]  # of config.json
    backbone_class: ClassVar[type[Backbone]]

    def __init__(
        self,
        backbone: Backbone,
        *,
        mask_token_id: int,
        hf_config: dict | None = None,
        num_tokens: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        backbone.lm_head = VocabularyHead(cast(nn.Parameter, backbone.lm_head.weight))
        parts: list[Any] = [backbone.config, *(layer.self_attn for layer in backbone.model.layers)]
        for part in parts:
            part.is_causal = False  # where a call has no mask
        self.mask_token_id = mask_token_id
        self.hf_config = hf_config or self.config_dict(self.config, mask_token_id)
        self.num_tokens = num_tokens
        self.lora: LoraConfig | None = None  # of the adapters inside the backbone, see models/lora.py

    @classmethod
    def from_config(cls, config: BackboneConfig, *, mask_token_id: int, generator: torch.Generator) -> Self:
        """Random weights drawn from `generator` alone (normal, std = initializer_range; norms 1, biases 0)."""
        backbone = cls.empty_backbone(config)
        backbone.to_empty(device="cpu")
        restore_rotary(backbone)
        for name, parameter in backbone.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        backbone.tie_weights()
        return cls(backbone, mask_token_id=mask_token_id)

    @classmethod
    def empty_backbone(cls, config: BackboneConfig) -> Backbone:
        """The stock model with shapes and no contents."""
        with torch.device("meta"):
            return cls.backbone_class(cast(Any, config))

    @staticmethod
    @abstractmethod
    def stock_config(hf_config: dict) -> BackboneConfig:
        """The stock config behind the family's config.json. Raises ValueError for what is not supported."""

    @staticmethod
    @abstractmethod
    def config_dict(config: Any, mask_token_id: int) -> dict:
        """A config.json in the family's own keys."""

    @staticmethod
    def own_name(stock: str) -> str:
        """The family's name of a tensor of the stock backbone."""
        return stock

    @staticmethod
    def stock_name(own: str) -> str:
        """The inverse of `own_name`; a name that the family does not know stays as it is."""
        return own

    @property
    def config(self) -> BackboneConfig:
        return cast(BackboneConfig, self.backbone.config)

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
        """Logits about the tokens AT the given positions (a shift is already undone).

        attention_mask_BL is bool, False on padding. With `select_BL` (bool) only those positions go through the
        vocabulary head and the result is [X, V] in row-major order; without it, [B, L, V]. With `token_N` the result
        is [N], the log-probs of those tokens at the selected positions of index `position_N`, among the `num_tokens`
        that exist; see VocabularyHead.
        """
        hidden_BLD = self.hidden_states(ids_BL, attention_mask_BL)
        selected = hidden_BLD if select_BL is None else hidden_BLD[select_BL]
        if token_N is not None:
            head_options = {"vocab_size": self.num_tokens, **head_options}
        return self.backbone.lm_head(selected, position_N, token_N, **head_options)

    def hidden_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, attend_BLL: Tensor | None = None) -> Tensor:
        """Last hidden states; row i belongs to token i. `attend_BLL` (bool) replaces full attention."""
        mask_BL = attention_mask_BL.bool()
        positions_BL = (mask_BL.long().cumsum(-1) - 1).masked_fill(~mask_BL, 1)
        if attend_BLL is None and bool(mask_BL.all()):
            attend_B1LL = None  # kernels of full attention are faster than those that look at a mask
        else:
            if attend_BLL is None:
                attend_BLL = mask_BL[:, :, None] & mask_BL[:, None, :]
            # A padding row that attends to nothing would be NaN; let it see itself, nobody looks at it.
            eye_LL = torch.eye(ids_BL.shape[1], dtype=torch.bool, device=ids_BL.device)
            attend_B1LL = (attend_BLL | eye_LL)[:, None]
        hidden_BLD = self.backbone.model(
            input_ids=ids_BL, attention_mask=attend_B1LL, position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        return torch.cat([hidden_BLD[:, :1], hidden_BLD[:, :-1]], dim=1) if self.shifted else hidden_BLD


def restore_rotary(backbone: Backbone) -> None:
    """Recompute the rotary tables, which are buffers outside the state dict and empty after `to_empty`."""
    body: Any = backbone.model
    body.rotary_emb = type(body.rotary_emb)(backbone.config)
