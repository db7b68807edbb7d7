"""What all model families have in common: a stock transformers decoder, called as a denoiser.

A family is a subclass of a few lines: how its config.json and its tensor names translate to those of the stock backbone,
and whether its hidden states are shifted. Its weights run in transformers' own implementation, never in remote code.

An attention mask is bool, False on padding; or integers, where documents share a row: 0 on padding, else a number that the
positions of one document have in common. A position attends to its own document, and nobody to padding. A shift ends at a
document's edge: its first token is predicted from its own hidden state, as the first token of a row is.

Shapes: B rows, L positions, D hidden size, V vocabulary, X selected positions, N scored tokens; in a layer N heads
of size H, and Q the most positions that are selected in one row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from diffrl.compat import DiffusionOutput, diffusion_generate
from diffrl.config import LoraConfig
from diffrl.models.head import VocabularyHead
from diffrl.sampler.windows import KeyValueShape

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
            part.is_causal = self.family == "causal"  # where a call has no mask
        self.mask_token_id = mask_token_id
        self.hf_config = hf_config or self.config_dict(self.config, mask_token_id)
        self.num_tokens = num_tokens
        self.lora: LoraConfig | None = None  # of the adapters inside the backbone, see models/lora.py

    @classmethod
    def from_config(cls, config: BackboneConfig, *, mask_token_id: int, generator: torch.Generator) -> Self:
        """Random weights drawn from `generator` alone, on its device (normal, std = initializer_range; norms 1, biases 0)."""
        backbone = cls.empty_backbone(config)
        backbone.to_empty(device=generator.device)
        with generator.device:
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
        *,
        opened_LL: Tensor | None = None,
        **head_options: Any,
    ) -> Tensor:
        """Logits about the tokens AT the given positions (a shift is already undone).

        With `select_BL` (bool) only those positions go through the vocabulary head and the result is [X, V] in row-major
        order; without it, [B, L, V]. With `token_N` the result is [N], the log-probs of those tokens at the selected
        positions of index `position_N`, among the `num_tokens` that exist; see VocabularyHead. With `opened_LL` (bool)
        position i sees its past and itself, and j > i only where opened_LL[i, j].
        """
        if select_BL is None:
            selected = self.hidden_states(ids_BL, attention_mask_BL, opened_LL)
        else:
            selected = self.selected_states(ids_BL, attention_mask_BL, select_BL, packed=False, opened_LL=opened_LL)
        if token_N is not None:
            head_options = {"vocab_size": self.num_tokens, **head_options}
        return self.backbone.lm_head(selected, position_N, token_N, **head_options)

    def logits(self, states_XD: Tensor) -> Tensor:
        """The vocabulary head on (some of) `selected_states`: [X, V]."""
        return self.backbone.lm_head(states_XD)

    def diffusion_generate(
        self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor | DiffusionOutput:
        """Under the name, options and defaults of the releases; see diffrl/compat.py."""
        return diffusion_generate(self, inputs, attention_mask, **options)

    def hidden_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, opened_LL: Tensor | None = None) -> Tensor:
        """Last hidden states; row i belongs to token i."""
        positions_BL, attend_BLL = attention(attention_mask_BL, opened_LL)
        hidden_BLD = self.backbone.model(
            input_ids=ids_BL,
            attention_mask=None if attend_BLL is None else attend_BLL[:, None],
            position_ids=positions_BL,
            use_cache=False,
        ).last_hidden_state
        if not self.shifted:
            return hidden_BLD
        return torch.where(starts(attention_mask_BL)[:, :, None], hidden_BLD, hidden_BLD.roll(1, 1))

    def selected_states(
        self,
        ids_BL: Tensor,
        attention_mask_BL: Tensor,
        select_BL: Tensor,
        *,
        packed: bool,
        opened_LL: Tensor | None = None,
    ) -> Tensor:
        """`hidden_states(...)[select_BL]`, [X, D], by less work: nothing looks at other positions of the last layer, so
        it computes keys and values for all, and queries, attention and MLP for the selected ones alone.

        `packed`: rows, of one document each, lie end to end without padding, and attention goes row by row. On a CPU a row's
        states are then the same to the last bit whatever the other rows are. No padding may be selected.
        """
        if packed:
            assert opened_LL is None
            return self.packed_states(ids_BL, attention_mask_BL.bool(), select_BL)
        positions_BL, attend_BLL = attention(attention_mask_BL, opened_LL)
        body: Any = self.backbone.model
        hidden_BLD = body.embed_tokens(ids_BL)
        rotary = body.rotary_emb(hidden_BLD, positions_BL)
        *layers, last = body.layers
        for layer in layers:
            hidden_BLD = layer(
                hidden_BLD,
                attention_mask=None if attend_BLL is None else attend_BLL[:, None],
                position_ids=positions_BL,
                position_embeddings=rotary,
            )
        row_X, column_X = select_BL.nonzero(as_tuple=True)
        if self.shifted:
            column_X = column_X - (~starts(attention_mask_BL)[select_BL]).long()
        return body.norm(layer_at(last, hidden_BLD, attend_BLL, rotary, row_X, column_X))

    def packed_states(self, ids_BL: Tensor, mask_BL: Tensor, select_BL: Tensor) -> Tensor:
        body: Any = self.backbone.model
        length_B, count_B = mask_BL.sum(1), select_BL.sum(1)
        start_B = length_B.cumsum(0) - length_B
        row_X, _ = select_BL.nonzero(as_tuple=True)
        place_BL = mask_BL.long().cumsum(1) - 1
        index_X = start_B[row_X] + (place_BL[select_BL] - int(self.shifted)).clamp(min=0)
        hidden_TD = body.embed_tokens(ids_BL[mask_BL])
        cos_1TH, sin_1TH = body.rotary_emb(hidden_TD[None], place_BL[mask_BL][None])
        rotary, lengths = (cos_1TH[0], sin_1TH[0]), length_B.tolist()
        *layers, last = body.layers
        for layer in layers:
            hidden_TD = packed_layer(layer, hidden_TD, rotary, lengths)
        return body.norm(packed_layer(last, hidden_TD, rotary, lengths, index_X, count_B.tolist()))

    def key_value_shape(self) -> KeyValueShape:
        """Of the caches of `window_states`."""
        attn: Any = self.backbone.model.layers[0].self_attn
        weight = attn.k_proj.weight
        return KeyValueShape(
            num_layers=len(self.backbone.model.layers),
            heads=weight.shape[0] // attn.head_dim,
            head_size=attn.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def window_states(
        self,
        ids_BQ: Tensor,
        column_BQ: Tensor,
        positions_BQ: Tensor,
        attended_BW: Tensor,
        select_BQ: Tensor,
        caches: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Last hidden states [X, D] AT the selected positions (a shift is not undone) of a window of each row, which sees
        keys and values of the rest of its row as they were when they were computed last.

        column_BQ: where the window's tokens stand in the row of width W; columns may be repeated. `caches`: of each layer
        keys and values [B, N, W, H], in which the window's own are replaced.
        """
        body: Any = self.backbone.model
        hidden_BQD = body.embed_tokens(ids_BQ)
        rotary = body.rotary_emb(hidden_BQD, positions_BQ)
        attend_BQW = None
        if not bool(attended_BW.all()):
            attend_BQW = attended_BW[:, None].expand(-1, ids_BQ.shape[1], -1)
        everywhere = torch.ones_like(ids_BQ, dtype=torch.bool)
        for number, (layer, cache) in enumerate(zip(body.layers, caches, strict=True), 1):
            last = number == len(caches)
            row_X, slot_X = (select_BQ if last else everywhere).nonzero(as_tuple=True)
            hidden_XD = layer_at(layer, hidden_BQD, attend_BQW, rotary, row_X, slot_X, cache=cache, column_BQ=column_BQ)
            hidden_BQD = hidden_XD if last else hidden_XD.view_as(hidden_BQD)
        return body.norm(hidden_BQD)


def attention(attention_mask_BL: Tensor, opened_LL: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(positions_BL, attend_BLL): positions count what is not padding, over all documents of a row, for only distances
    matter; None where everything attends to everything, for kernels of full attention are faster than those that look
    at a mask."""
    mask_BL, length = attention_mask_BL.bool(), attention_mask_BL.shape[1]
    positions_BL = (mask_BL.long().cumsum(-1) - 1).masked_fill(~mask_BL, 1)
    if opened_LL is None and bool((mask_BL & (attention_mask_BL == attention_mask_BL[:, :1])).all()):
        return positions_BL, None
    attend_BLL = (attention_mask_BL[:, :, None] == attention_mask_BL[:, None, :]) & mask_BL[:, None, :]
    if opened_LL is not None:
        attend_BLL &= torch.ones_like(opened_LL).tril() | opened_LL
    # A padding row that attends to nothing would be NaN; let it see itself, nobody looks at it.
    return positions_BL, attend_BLL | torch.eye(length, dtype=torch.bool, device=mask_BL.device)


def starts(attention_mask_BL: Tensor) -> Tensor:
    """Where a document, or padding, begins."""
    start_BL = torch.ones_like(attention_mask_BL, dtype=torch.bool)
    start_BL[:, 1:] = attention_mask_BL[:, 1:] != attention_mask_BL[:, :-1]
    return start_BL


def layer_at(
    layer: Any,
    hidden_BLD: Tensor,
    attend_BLW: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    row_X: Tensor,
    column_X: Tensor,
    *,
    cache: tuple[Tensor, Tensor] | None = None,
    column_BQ: Tensor | None = None,
) -> Tensor:
    """A stock decoder layer's output [X, D] at positions (row_X, column_X), in row-major order.

    Rows have different numbers of them: their queries lie at the front of [B, Q], and nobody reads what is behind. With a
    `cache` of keys and values [B, N, W, H], those of hidden_BLD are written to its columns `column_BQ`, and all are seen.
    """
    attn, (cos_BLH, sin_BLH) = layer.self_attn, rotary
    batch = len(hidden_BLD)
    count_B = torch.bincount(row_X, minlength=batch)
    slot_X = torch.arange(len(row_X), device=row_X.device) - (count_B.cumsum(0) - count_B)[row_X]
    width = max(int(count_B.max()), 1)
    normed_BLD = layer.input_layernorm(hidden_BLD)
    query_XNH = attn.q_proj(normed_BLD[row_X, column_X]).unflatten(-1, (-1, attn.head_dim))
    key_BNLH = attn.k_proj(normed_BLD).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
    value_BNLH = attn.v_proj(normed_BLD).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
    query_XNH = rotate(query_XNH, cos_BLH[row_X, column_X, None], sin_BLH[row_X, column_X, None])
    key_BNLH = rotate(key_BNLH, cos_BLH[:, None], sin_BLH[:, None])
    if cache is not None:
        assert column_BQ is not None
        index = column_BQ[:, None, :, None].expand_as(key_BNLH)
        key_BNLH, value_BNLH = cache[0].scatter_(2, index, key_BNLH), cache[1].scatter_(2, index, value_BNLH)
    query_BQNH = query_XNH.new_zeros(batch, width, *query_XNH.shape[1:]).index_put((row_X, slot_X), query_XNH)
    attend_B1QW = None
    if attend_BLW is not None:
        attend_B1QW = attend_BLW.new_ones(batch, 1, width, attend_BLW.shape[-1])
        attend_B1QW[row_X, 0, slot_X] = attend_BLW[row_X, column_X]
    seen_BNQH = nn.functional.scaled_dot_product_attention(
        query_BQNH.transpose(1, 2),
        key_BNLH.repeat_interleave(attn.num_key_value_groups, 1),
        value_BNLH.repeat_interleave(attn.num_key_value_groups, 1),
        attend_B1QW,
        dropout_p=attn.attention_dropout if attn.training else 0.0,
        scale=attn.scaling,
    )
    seen_XD = seen_BNQH.transpose(1, 2)[row_X, slot_X].flatten(1)
    hidden_XD = hidden_BLD[row_X, column_X] + attn.o_proj(seen_XD)
    return hidden_XD + layer.mlp(layer.post_attention_layernorm(hidden_XD))


def packed_layer(
    layer: Any,
    hidden_TD: Tensor,
    rotary: tuple[Tensor, Tensor],
    lengths: list[int],
    index_X: Tensor | None = None,
    counts: list[int] | None = None,
) -> Tensor:
    """A stock decoder layer on rows of `lengths` end to end, T tokens together; its output at all of them, [T, D], or at
    `index_X` (ascending; `counts` of them in each row), [X, D]."""
    attn, (cos_TH, sin_TH) = layer.self_attn, rotary

    def at(tensor_T: Tensor) -> Tensor:
        return tensor_T if index_X is None else tensor_T[index_X]

    def heads(projected_TD: Tensor) -> Tensor:
        return projected_TD.unflatten(-1, (-1, attn.head_dim)).transpose(0, 1)

    def output(hidden_XD: Tensor, seen_XD: Tensor) -> Tensor:
        hidden_XD = hidden_XD + attn.o_proj(seen_XD)
        return hidden_XD + layer.mlp(layer.post_attention_layernorm(hidden_XD))

    normed_TD = layer.input_layernorm(hidden_TD)
    query_NXH = rotate(heads(wide(attn.q_proj, at(normed_TD))), at(cos_TH), at(sin_TH))
    key_NTH = rotate(heads(wide(attn.k_proj, normed_TD)), cos_TH, sin_TH)
    value_NTH = heads(wide(attn.v_proj, normed_TD))
    repeats = attn.num_key_value_groups
    seen = [
        nn.functional.scaled_dot_product_attention(
            query_NQH[None],
            key_NLH[None].repeat_interleave(repeats, 1),
            value_NLH[None].repeat_interleave(repeats, 1),
            scale=attn.scaling,
        )[0]
        for query_NQH, key_NLH, value_NLH in zip(
            query_NXH.split(counts or lengths, 1), key_NTH.split(lengths, 1), value_NTH.split(lengths, 1), strict=True
        )
    ]
    return wide(output, at(hidden_TD), torch.cat(seen, 1).transpose(0, 1).flatten(1))


# Products of matrices with fewer rows may add up their numbers in another order on CPUs.
FEWEST_ROWS = 16


def wide(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of rows, of never too few of them."""
    num = len(tensors[0])
    if num >= FEWEST_ROWS:
        return function(*tensors)
    return function(*(nn.functional.pad(tensor, (0, 0, 0, FEWEST_ROWS - num)) for tensor in tensors))[:num]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, eq. 34), with transformers' order of the halves."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def restore_rotary(backbone: Backbone) -> None:
    """Recompute the rotary tables, which are buffers outside the state dict and empty after `to_empty`."""
    body: Any = backbone.model
    body.rotary_emb = type(body.rotary_emb)(backbone.config)
