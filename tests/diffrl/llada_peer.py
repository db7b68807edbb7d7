"""LLaDA's forward pass written out, from the tensors and the config.json of a folder: nothing of transformers in it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def llada_logits(raw: dict, state: dict[str, Tensor], ids_BL: Tensor, keep_BL: Tensor) -> Tensor:
    """[B, L, V]; keys that keep_BL leaves out are seen by nobody, positions count padding too (rotary is relative)."""
    hidden = state["model.transformer.wte.weight"][ids_BL]
    for layer in range(raw["n_layers"]):
        prefix = f"model.transformer.blocks.{layer}."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        hidden = block(raw, weights, hidden, keep_BL)
    hidden = rms_norm(hidden, state["model.transformer.ln_f.weight"], raw["rms_norm_eps"])
    name = "wte" if raw["weight_tying"] else "ff_out"
    return hidden @ state[f"model.transformer.{name}.weight"].T


def block(raw: dict, weights: dict[str, Tensor], x_BLD: Tensor, keep_BL: Tensor) -> Tensor:
    rows, length, dim = x_BLD.shape
    heads, kv_heads, size = raw["n_heads"], raw["n_kv_heads"], dim // raw["n_heads"]
    normed = rms_norm(x_BLD, weights["attn_norm.weight"], raw["rms_norm_eps"])
    q, k, v = (
        (normed @ weights[f"{name}_proj.weight"].T).view(rows, length, count, size).transpose(1, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = rotate(q, raw["rope_theta"]), rotate(k, raw["rope_theta"])
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(~keep_BL[:, None, None, :], -torch.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, dim)
    x_BLD = x_BLD + attended @ weights["attn_out.weight"].T
    normed = rms_norm(x_BLD, weights["ff_norm.weight"], raw["rms_norm_eps"])
    gated = F.silu(normed @ weights["ff_proj.weight"].T) * (normed @ weights["up_proj.weight"].T)
    return x_BLD + gated @ weights["ff_out.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x_BHLS: Tensor, theta: float) -> Tensor:
    """Position p turns the pair (x_i, x_{i + S/2}) by the angle p * theta^(-2i/S)."""
    length, size = x_BHLS.shape[-2:]
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    first, second = x_BHLS[..., : size // 2], x_BHLS[..., size // 2 :]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)
