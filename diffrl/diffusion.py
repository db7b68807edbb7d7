"""The forward process of masked diffusion and the loss of pre-training, mid-training and instruction tuning.

Linear schedule, absorbing state: at mask ratio t every maskable token is replaced by [MASK] independently with
probability t. The loss at t is (1/t) * sum over masked k of -log p(x0_k | x_t), whose mean over t in (0, 1] bounds the
negative log-likelihood from above.

Shapes: B rows, L positions, V vocabulary, N scored positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedRows:
    """Rows of one optimizer step, all of them or a share.

    NoisedRows(ids_BL=tensor([[5, 9, 7, 0]]), noised_ids_BL=tensor([[5, 9, 2, 0]]), document_BL=tensor([[1, 1, 1, 0]]),
               hidden_BL=tensor([[False, False, True, False]]), weight_BL=tensor([[0.0, 0.0, 2.5, 0.0]]),
               t_B=tensor([0.4]), num_weight=3.0, hidden_weight=1.0, opened_LL=None)
    """

    ids_BL: Tensor  # int64, clean
    noised_ids_BL: Tensor
    document_BL: Tensor  # int64, 0 on padding, see SupervisedRows
    hidden_BL: Tensor  # bool
    weight_BL: Tensor  # float32: loss weight / t, 0 where not hidden
    t_B: Tensor  # float32, the mask ratio of each row
    num_weight: float  # loss weight of all tokens of the step, hidden or not
    hidden_weight: float  # and of those that are hidden
    opened_LL: Tensor | None  # bool: which later positions each position sees; None: all

    def __len__(self) -> int:
        return len(self.ids_BL)

    def take(self, rows: slice) -> "NoisedRows":
        """A worker's share, or a micro-batch: the sums over the whole step stay as they are."""
        names = ("ids_BL", "noised_ids_BL", "document_BL", "hidden_BL", "weight_BL", "t_B")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def to(self, device: str | torch.device) -> "NoisedRows":
        tensors = {name: getattr(self, name) for name in self.__slots__}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def draw_mask_ratios(num_rows: int, generator: torch.Generator, *, t_min: float = 1e-3) -> Tensor:
    """t_B, each uniform on (t_min, 1], spread evenly over the batch by one common offset, which lowers the variance."""
    offset = torch.rand(1, generator=generator)
    order_B = torch.randperm(num_rows, generator=generator)
    u_B = (offset + order_B / num_rows) % 1.0
    return 1.0 - (1.0 - t_min) * u_B


def forward_process(maskable_BL: Tensor, t_B: Tensor, generator: torch.Generator) -> Tensor:
    """hidden_BL, which of the maskable tokens x_t hides: each independently with its row's probability t."""
    return (torch.rand(maskable_BL.shape, generator=generator) < t_B[:, None]) & maskable_BL


def noised_rows(
    ids_BL: Tensor,
    document_BL: Tensor,
    loss_weight_BL: Tensor,
    hidden_BL: Tensor,
    t_B: Tensor,
    *,
    mask_token_id: int,
    opened_LL: Tensor | None = None,
) -> NoisedRows:
    """The rows of a whole step with what is hidden of them. loss_weight_BL: 0 leaves a token out, 1 counts it in full."""
    hidden_weight_BL = loss_weight_BL * hidden_BL
    return NoisedRows(
        ids_BL=ids_BL,
        noised_ids_BL=ids_BL.masked_fill(hidden_BL, mask_token_id),
        document_BL=document_BL,
        hidden_BL=hidden_BL,
        weight_BL=hidden_weight_BL / t_B[:, None],
        t_B=t_B,
        num_weight=float(loss_weight_BL.double().sum()),
        hidden_weight=float(hidden_weight_BL.double().sum()),
        opened_LL=opened_LL,
    )


def batch_loss(model: nn.Module, batch: NoisedRows) -> tuple[Tensor, Metrics]:
    """(1/t)-weighted cross-entropy of the hidden tokens, per unit of loss weight in the step.

    Losses, gradients and metrics of shares of a step add up to those of the step. Only tokens with weight go through the
    vocabulary head, which keeps no logits (models/head.py); a share may be without any, and the model is called all the
    same, since it may be divided over workers. `model` is a PolicyModel, or an engine around it.
    """
    scored_BL = batch.weight_BL != 0
    targets_N = batch.ids_BL[scored_BL]
    logprobs_N = model(
        batch.noised_ids_BL,
        batch.document_BL,
        scored_BL,
        torch.arange(len(targets_N), device=targets_N.device),
        targets_N,
        opened_LL=batch.opened_LL,
    )
    weight_N = batch.weight_BL[scored_BL].to(logprobs_N.dtype)
    loss = -(weight_N * logprobs_N).sum() / batch.num_weight
    with torch.no_grad():
        loss_weight_N = weight_N * batch.t_B[:, None].expand_as(scored_BL)[scored_BL]
        hidden_weight = loss_weight_N.sum()
        sums = torch.stack(
            [
                loss,
                -(loss_weight_N * logprobs_N).sum() / max(batch.hidden_weight, 1e-9),
                hidden_weight / batch.num_weight,
                (batch.document_BL != 0).sum().to(loss.dtype),
            ]
        )
    names = ("loss/diffusion", "loss/nll", "loss/hidden_frac", "data/tokens")
    return loss, dict(zip(names, sums.tolist(), strict=True))
