"""The forward process of masked diffusion and the loss of pre-training, mid-training and instruction tuning.

Linear schedule, absorbing state: at mask ratio t every maskable token is replaced by [MASK] independently with
probability t. The loss at t is (1/t) * sum over masked k of -log p(x0_k | x_t), whose mean over t in (0, 1] bounds the
negative log-likelihood from above.

Shapes: B rows, L positions, V vocabulary, N hidden positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch:
    """NoisedBatch(noised_ids_BL=tensor([[5, 9, 2]]), hidden_BL=tensor([[False, False, True]]), t_B=tensor([0.4]))"""

    noised_ids_BL: Tensor
    hidden_BL: Tensor  # bool
    t_B: Tensor  # float32, the mask ratio of each row


def draw_mask_ratios(num_rows: int, generator: torch.Generator, *, t_min: float = 1e-3) -> Tensor:
    """t_B, each uniform on (t_min, 1], spread evenly over the batch by one common offset, which lowers the variance."""
    offset = torch.rand(1, generator=generator)
    order_B = torch.randperm(num_rows, generator=generator)
    u_B = (offset + order_B / num_rows) % 1.0
    return 1.0 - (1.0 - t_min) * u_B


def forward_process(
    ids_BL: Tensor, maskable_BL: Tensor, t_B: Tensor, *, mask_token_id: int, generator: torch.Generator
) -> NoisedBatch:
    """Draw x_t from q(x_t | x_0): hide each maskable token independently with its row's probability t."""
    hidden_BL = (torch.rand(ids_BL.shape, generator=generator) < t_B[:, None]) & maskable_BL
    noised_ids_BL = ids_BL.masked_fill(hidden_BL, mask_token_id)
    return NoisedBatch(noised_ids_BL=noised_ids_BL, hidden_BL=hidden_BL, t_B=t_B)


def diffusion_loss(
    model: nn.Module, ids_BL: Tensor, attention_mask_BL: Tensor, loss_weight_BL: Tensor, noised: NoisedBatch
) -> tuple[Tensor, dict[str, float]]:
    """(1/t)-weighted cross-entropy of the hidden tokens, per unit of loss weight in the batch.

    loss_weight_BL: 0 leaves a token out, 1 counts it in full. `model` returns logits for the hidden positions, [N, V].
    """
    logits_NV = model(noised.noised_ids_BL, attention_mask_BL, noised.hidden_BL).float()
    targets_N = ids_BL[noised.hidden_BL]
    nll_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    weight_N = loss_weight_BL[noised.hidden_BL]
    inverse_t_N = (1.0 / noised.t_B)[:, None].expand_as(ids_BL)[noised.hidden_BL]
    loss = (nll_N * weight_N * inverse_t_N).sum() / loss_weight_BL.sum()
    with torch.no_grad():
        counted = weight_N.sum().clamp_min(1e-9)
        hits_N = (logits_NV.argmax(-1) == targets_N).float()
        metrics = {
            "loss/diffusion": loss.item(),
            "loss/nll": ((nll_N * weight_N).sum() / counted).item(),
            "loss/accuracy": ((hits_N * weight_N).sum() / counted).item(),
            "loss/hidden_frac": noised.hidden_BL.float().mean().item(),
        }
    return loss, metrics
