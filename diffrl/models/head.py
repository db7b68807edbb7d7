"""The vocabulary head, and log-probs through it that never hold all logits at once.

Plain torch on every device. Fused kernels such as Liger's linear cross-entropy compute the gradient in the forward pass,
from a loss that they know. Here a token's gradient depends on its ratio and KL, which are known when all views of a
completion have been scored, and one hidden state is asked about several tokens: so logits are computed twice instead,
but for a fixed small amount that is kept.

Shapes: X selected positions, D hidden size, V vocabulary, N scored tokens (several may share a position).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits alive at once: 64 MB in float32. On a GPU larger pieces keep it busy: 1 GB.
CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}
# Exponentials that the forward pass keeps for the backward pass: 256 MB in float32, whatever the batch. On a GPU, where
# the head is a smaller part of the work and memory is dearer: none.
KEPT_LOGITS = {"cpu": 1 << 26, "cuda": 0}
# Tokens of a float32 product on a CPU: a strip of the logits stays in its cache while it is added up.
STRIP = 1 << 10


class VocabularyHead(nn.Linear):
    """A linear layer without bias that gives logits, or only the log-probs that are asked for."""

    def __init__(self, weight_VD: nn.Parameter):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_VD.shape
        self.weight = weight_VD
        self.register_parameter("bias", None)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        position_N: Tensor | None = None,
        token_N: Tensor | None = None,
        *,
        vocab_size: int | None = None,
        chunked: bool = True,
    ) -> Tensor:
        """Logits [..., V] of hidden states; with `token_N` the log-probs [N] of those tokens at the hidden states
        `input[position_N]`, where `input` is [X, D] and `position_N` ascends.

        `vocab_size`: the tokens that exist; embeddings beyond them are padding and have probability 0.
        `chunked`: logits in pieces, computed again in the backward pass, instead of all at once.
        """
        if token_N is None:
            if input.dim() == 2 and not torch.is_grad_enabled():
                return _logits(input, self.weight, input.new_empty(len(input), self.out_features))
            return nn.functional.linear(input, self.weight)
        assert position_N is not None
        hidden_XD, weight_VD = input, self.weight
        if torch.is_autocast_enabled(input.device.type):  # inside a Function it would hold in the forward pass only
            dtype = torch.get_autocast_dtype(input.device.type)
            hidden_XD, weight_VD = hidden_XD.to(dtype), weight_VD.to(dtype)
        if chunked:
            return cast(Tensor, ChunkedLogprobs.apply(hidden_XD, weight_VD, position_N, token_N, vocab_size))
        logits_XV = _wide(hidden_XD @ weight_VD[:vocab_size].T)
        return logits_XV[position_N, token_N] - logits_XV.logsumexp(-1)[position_N]


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at given (position, token) pairs, in float32 or wider.

    With g_n the gradient of pair n, the gradient of a position's logits is
    sum_n g_n (onehot(token_n) - softmax), so one pass over the chunks serves any number of tokens per position.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_XD: Tensor, whole_VD: Tensor, position_N: Tensor, token_N: Tensor, vocab_size: int | None
    ) -> Tensor:
        weight_VD = whole_VD[:vocab_size]
        room = KEPT_LOGITS[hidden_XD.device.type] if any(ctx.needs_input_grad) else 0
        kept, target_N = [], hidden_XD.new_empty(token_N.shape, dtype=_wide_type(hidden_XD))
        normalizer_X = hidden_XD.new_empty(len(hidden_XD), dtype=target_N.dtype)
        chunks = _chunks(hidden_XD, weight_VD, position_N)
        buffer_XV = _buffer(chunks, hidden_XD, weight_VD)
        for (start, stop), pairs in chunks:
            room -= (stop - start) * len(weight_VD)
            out_XV = torch.empty_like(buffer_XV) if room >= 0 else buffer_XV
            logits_XV = _logits(hidden_XD[start:stop], weight_VD, out_XV)
            target_N[pairs] = logits_XV[position_N[pairs] - start, token_N[pairs]]
            largest_X1 = logits_XV.amax(-1, keepdim=True)
            sum_X = logits_XV.sub_(largest_X1).exp_().sum(-1)
            normalizer_X[start:stop] = sum_X.log().add_(largest_X1[:, 0])
            if room >= 0:
                kept += [logits_XV, sum_X]
        # The parameter itself, not a view of it: ZeRO 3 frees it after the forward pass and gathers it again.
        ctx.save_for_backward(hidden_XD, whole_VD, position_N, token_N, normalizer_X, *kept)
        ctx.chunks, ctx.vocab_size = chunks, vocab_size
        return target_N - normalizer_X[position_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_XD, whole_VD, position_N, token_N, normalizer_X, *kept = ctx.saved_tensors
        weight_VD = whole_VD[: ctx.vocab_size]
        sum_X = torch.zeros_like(normalizer_X).index_add_(0, position_N, grad_N)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_XD = torch.empty_like(hidden_XD) if needs_hidden else None
        # Of many chunks, so summed in float32 whatever the weights are.
        sum_VD = torch.zeros_like(whole_VD, dtype=normalizer_X.dtype) if needs_weight else None
        grad_VD = None if sum_VD is None else sum_VD[: ctx.vocab_size]
        buffer_XV = _buffer(ctx.chunks, hidden_XD, weight_VD)
        for number, ((start, stop), pairs) in enumerate(ctx.chunks):
            if 2 * number < len(kept):
                exp_XV, total_X = kept[2 * number : 2 * number + 2]
                grad_logits_XV = torch.mul(
                    exp_XV, (-sum_X[start:stop] / total_X)[:, None], out=buffer_XV[: stop - start]
                )
            else:
                grad_logits_XV = _logits(hidden_XD[start:stop], weight_VD, buffer_XV)
                grad_logits_XV.sub_(normalizer_X[start:stop, None]).exp_().mul_(-sum_X[start:stop, None])
            grad_logits_XV.index_put_((position_N[pairs] - start, token_N[pairs]), grad_N[pairs], accumulate=True)
            grad_logits_XV = grad_logits_XV.to(weight_VD.dtype)
            if grad_XD is not None:
                grad_XD[start:stop] = grad_logits_XV @ weight_VD
            if grad_VD is not None:
                if grad_VD.dtype == weight_VD.dtype:
                    grad_VD.addmm_(grad_logits_XV.T, hidden_XD[start:stop])
                else:
                    grad_VD += grad_logits_XV.T @ hidden_XD[start:stop]
        return grad_XD, None if sum_VD is None else sum_VD.to(weight_VD.dtype), None, None, None


def _chunks(hidden_XD: Tensor, weight_VD: Tensor, position_N: Tensor) -> list[tuple[tuple[int, int], slice]]:
    """[((first position, last position + 1), its pairs), ...]"""
    rows = max(CHUNK_LOGITS[hidden_XD.device.type] // len(weight_VD), 1)
    edges = [*range(0, len(hidden_XD), rows), len(hidden_XD)]
    cuts = torch.searchsorted(position_N, torch.tensor(edges, device=position_N.device)).tolist()
    return [((edges[i], edges[i + 1]), slice(cuts[i], cuts[i + 1])) for i in range(len(edges) - 1)]


def _buffer(chunks: list[tuple[tuple[int, int], slice]], hidden_XD: Tensor, weight_VD: Tensor) -> Tensor:
    """Where the logits of one chunk after the other are put: fresh memory for each costs as much as the sums."""
    rows = chunks[0][0][1] if chunks else 0
    return hidden_XD.new_empty((rows, len(weight_VD)), dtype=_wide_type(hidden_XD))


def _logits(hidden_XD: Tensor, weight_VD: Tensor, buffer_XV: Tensor) -> Tensor:
    out_XV = buffer_XV[: len(hidden_XD)]
    if out_XV.dtype != hidden_XD.dtype:
        return out_XV.copy_(hidden_XD @ weight_VD.T)
    strip = STRIP if out_XV.device.type == "cpu" and out_XV.dtype == torch.float32 else len(weight_VD)
    for start in range(0, len(weight_VD), strip):
        torch.mm(hidden_XD, weight_VD[start : start + strip].T, out=out_XV[:, start : start + strip])
    return out_XV


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_type(tensor))
