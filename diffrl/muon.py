"""Muon (Jordan et al. 2024) as torch has it, fast on any CPU too.

torch orthogonalises in bfloat16. A CPU without units for it computes such products one number at a time, which took six of
seven seconds of the small models here; in float32 they are ordinary matrix products, and more exact.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's, with the update's size adjusted to AdamW's (arXiv 2502.16982); parameters on a CPU are updated in float32."""

    def __init__(self, params: Any, *, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param.grad)
                momentum = state["momentum_buffer"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])  # Nesterov's
                orthogonal = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonal, alpha=-0.2 * group["lr"] * math.sqrt(max(param.shape)))
        return None


def orthogonalised(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix with the singular vectors of `update` and singular values near 1 (between 0.6 and 1.3, unless they were tiny
    beside the largest): the quintic Newton-Schulz iteration of Muon, in the dtype of `update`."""
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
