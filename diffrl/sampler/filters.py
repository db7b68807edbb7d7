"""From logits to confidences and tokens: temperature, top_p, top_k, and draws from what they leave.

Shapes: N positions, V vocabulary, n some rows of an N, K candidates kept for a position, most probable first.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffrl.sampler.params import SamplingParams

# Elements of [n, V] that are filtered at a time, which bounds the temporaries: 4 MB each in float32, on a GPU 0.5 GB.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
# Sorted candidates looked at beyond top_k, for ties with the k-th; and for a nucleus without top_k. Rows that
# need more are done again with more, in the end the whole vocabulary, so no number changes a result.
TIE_ROOM = 8
NUCLEUS_ROOMS = (64, 512)
BLOCK = 64  # tokens whose maximum is looked at first
SURELY = 0.999  # of a sum in float32, to call it larger than another


def allowed_tokens(vocabulary: int, never: Sequence[int], vocab_size: int | None, device: torch.device) -> Tensor:
    """allowed_V: False for what must not be drawn."""
    allowed_V = torch.arange(vocabulary, device=device) < (vocabulary if vocab_size is None else vocab_size)
    allowed_V[list(never)] = False
    return allowed_V


def confidences(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """Confidence of each position, from its filtered distribution alone."""
    confidence_N = torch.empty(logits_NV.shape[0], device=logits_NV.device)
    for rows, probs_nK, _ in filtered_distributions(logits_NV, params, tokens=False):
        if params.algorithm == "entropy":
            confidence_N[rows] = torch.linalg.vecdot(probs_nK, (probs_nK + 1e-10).log_())
        else:
            top_n2 = probs_nK.topk(2, dim=-1).values
            confidence_N[rows] = top_n2[:, 0] - top_n2[:, 1]
    return confidence_N


def draw_tokens(
    logits_NV: Tensor, uniform_N: Tensor | None, allowed_V: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """A token for each position, from one number in [0, 1) each, and (maskgit_plus only) its probability.

    At temperature 0 the most probable allowed token, whatever the numbers.
    """
    num, device = logits_NV.shape[0], logits_NV.device
    confidence_N = torch.empty(num, device=device)
    if params.temperature == 0:
        ids_N = logits_NV.masked_fill(~allowed_V, -torch.inf).argmax(-1)
        if params.algorithm == "maskgit_plus":
            for rows, probs_nK, ids_nK in filtered_distributions(logits_NV, params):
                confidence_N[rows] = probability_of(ids_N[rows], probs_nK, ids_nK)
        return ids_N, confidence_N
    ids_N = torch.empty(num, dtype=torch.long, device=device)
    assert uniform_N is not None
    for rows, probs_nK, ids_nK in filtered_distributions(logits_NV, params):
        allowed_nK = allowed_V if ids_nK is None else allowed_V[ids_nK]
        cdf_nK = (probs_nK * allowed_nK).cumsum(-1, dtype=torch.float64)
        total_n = cdf_nK[:, -1]
        # The first entry above the target has weight; rounding must not lift the target to the last entry.
        below_n = torch.nextafter(total_n, torch.zeros_like(total_n))
        target_n = torch.minimum(uniform_N[rows] * total_n, below_n)
        index_n = torch.searchsorted(cdf_nK, target_n[:, None], right=True).clamp_(max=cdf_nK.shape[1] - 1)
        drawn_n = index_n[:, 0] if ids_nK is None else ids_nK.gather(1, index_n)[:, 0]
        if not bool(total_n.all()):  # the filters left nothing but tokens that must not be drawn
            best_n = logits_NV[rows].masked_fill(~allowed_V, -torch.inf).argmax(-1)
            drawn_n = torch.where(total_n > 0, drawn_n, best_n)
        ids_N[rows] = drawn_n
        if params.algorithm == "maskgit_plus":
            confidence_N[rows] = probability_of(drawn_n, probs_nK, ids_nK)
    return ids_N, confidence_N


def probability_of(drawn_n: Tensor, probs_nK: Tensor, ids_nK: Tensor | None) -> Tensor:
    """Probability of each row's drawn token; 0 where the filters had removed it."""
    if ids_nK is None:
        return probs_nK.gather(1, drawn_n[:, None])[:, 0]
    return (probs_nK * (ids_nK == drawn_n[:, None])).sum(-1)


def filtered_distributions(
    logits_NV: Tensor, params: SamplingParams, *, tokens: bool = True
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """The candidates' probabilities after temperature, then top_p, then top_k, a few rows at a time.

    Yields (rows, probs_nK, ids_nK): which of the N rows, their probabilities, and the tokens these belong to
    (None: the whole vocabulary in its own order, or `tokens` were not asked for). Every row comes exactly once.
    """
    num, vocabulary = logits_NV.shape
    top_p = params.top_p if params.top_p is not None and params.top_p < 1 else None
    top_k = params.top_k if params.top_k is not None and params.top_k < vocabulary else None
    chunk = max(1, CHUNK_ELEMENTS[logits_NV.device.type] // vocabulary)
    for start in range(0, num, chunk):
        rows = slice(start, min(start + chunk, num))
        logits_nV = logits_NV[rows].float()
        if params.temperature not in (0, 1):
            logits_nV = logits_nV / params.temperature
        if top_p is None and top_k is None:
            yield rows, logits_nV.softmax(-1), None
            continue
        rooms = NUCLEUS_ROOMS if top_k is None else (top_k + TIE_ROOM,)
        left_n = torch.arange(rows.start, rows.stop, device=logits_NV.device)
        for width in (*(room for room in rooms if room < vocabulary), vocabulary):
            probs_nK, ids_nK, decided_n = filtered_head(logits_nV, width, top_p, top_k, tokens=tokens)
            if bool(decided_n.all()):
                yield left_n, probs_nK, ids_nK
                break
            yield left_n[decided_n], probs_nK[decided_n], None if ids_nK is None else ids_nK[decided_n]
            left_n, logits_nV = left_n[~decided_n], logits_nV[~decided_n]


def filtered_head(
    logits_nV: Tensor, width: int, top_p: float | None, top_k: int | None, *, tokens: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Filters on the `width` most probable tokens: (probs_nK, ids_nK, decided_n).

    The nucleus is measured by the probabilities of the whole vocabulary, as if top_p came first. A row is
    decided when the filters end inside the width, that is, when its last token is removed.
    """
    ids_nK, best_nT = None, None
    if tokens:
        values_nK, ids_nK = largest(logits_nV, width)
    else:
        values_nK, best_nT = largest_values(logits_nV, width)
    keep_nK = torch.ones_like(values_nK, dtype=torch.bool)
    if top_k is not None:
        keep_nK = values_nK >= values_nK[:, top_k - 1 : top_k]  # ties with the k-th stay
    if top_p is not None:
        sum_nK = (values_nK - values_nK[:, :1]).exp_().cumsum(-1)
        # Where they are a small part of the blocks' maxima alone, they all belong to the nucleus, whatever the rest adds.
        floor_n = None if best_nT is None else (best_nT - values_nK[:, :1]).exp_().sum(-1)
        if floor_n is None or bool((sum_nK[:, -1] > SURELY * top_p * floor_n).any()):
            most_n1 = logits_nV.softmax(-1).amax(-1, keepdim=True)  # the quickest kernel that knows the normalizer
            keep_nK[:, 1:] &= sum_nK[:, :-1] * most_n1 <= top_p  # the token that crosses top_p stays
    decided_n = ~keep_nK[:, -1] if width < logits_nV.shape[-1] else torch.ones_like(keep_nK[:, 0])
    return values_nK.masked_fill_(~keep_nK, -torch.inf).softmax(-1), ids_nK, decided_n


def largest(logits_nV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row in falling order, and their indices: torch.topk, quick on CPUs too.

    For a small part of the row, see `near_top`. For much of it, numpy's vectorised sort is 5 to 8 times faster than torch's,
    but sorts values only: float32 value and index are packed into one integer whose order is that of (-value, index).
    """
    vocabulary = logits_nV.shape[-1]
    if logits_nV.device.type != "cpu":
        values_nK, ids_nK = logits_nV.topk(width, dim=-1)
        return values_nK, ids_nK
    if small_part(width, vocabulary):
        near_nM, block_nW, _ = near_top(logits_nV, width)
        values_nK, place_nK = near_nM.topk(width, dim=-1)
        ids_nK = block_nW.gather(1, (place_nK // BLOCK).clamp(max=width - 1)) * BLOCK + place_nK % BLOCK
        behind_nK = place_nK - width * BLOCK  # among the last tokens, that fill no block
        return values_nK, torch.where(behind_nK < 0, ids_nK, behind_nK + vocabulary // BLOCK * BLOCK)
    bits_nV = logits_nV.contiguous().view(torch.int32)
    falling_nV = ~(bits_nV ^ ((bits_nV >> 31) & 0x7FFFFFFF))  # integers that fall as the floats rise
    index_V = torch.arange(vocabulary)
    packed = ((falling_nV.long() << 32) | index_V).numpy()
    if width < packed.shape[1]:
        packed.partition(width - 1, axis=1)
        packed = packed[:, :width].copy()
    packed.sort(axis=1)
    ids_nK = torch.from_numpy(packed) & 0xFFFFFFFF
    return logits_nV.gather(1, ids_nK), ids_nK


def largest_values(logits_nV: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The `width` largest of each row in falling order; and, if it looked at them, the maxima of blocks."""
    vocabulary, best_nT = logits_nV.shape[-1], None
    if logits_nV.device.type != "cpu":
        return logits_nV.topk(width, dim=-1).values, None
    if small_part(width, vocabulary):
        near_nM, _, best_nT = near_top(logits_nV, width)
    else:
        near_nM = logits_nV.clone()
    rising = near_nM.numpy()
    rising.partition(rising.shape[1] - width, axis=1)
    rising = rising[:, -width:]
    rising.sort(axis=1)
    return torch.from_numpy(rising).flip(1), best_nT


def small_part(width: int, vocabulary: int) -> bool:
    return 4 * width * BLOCK <= vocabulary


def near_top(logits_nV: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(near_nM, block_nW, best_nT): the maxima of all blocks; the numbers of the `width` blocks with the largest, which hold
    the `width` largest values; these blocks end to end, and behind them the last tokens, that fill no block."""
    num, vocabulary = logits_nV.shape
    blocks = vocabulary // BLOCK
    whole_nTK = logits_nV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best_nT = whole_nTK.amax(-1)
    block_nW = best_nT.topk(width, dim=-1).indices
    first_n1 = torch.arange(0, num * blocks, blocks)[:, None]
    near_nM = whole_nTK.flatten(0, 1).index_select(0, (first_n1 + block_nW).flatten()).view(num, -1)
    if blocks * BLOCK < vocabulary:
        near_nM = torch.cat([near_nM, logits_nV[:, blocks * BLOCK :]], 1)
    return near_nM, block_nW, best_nT
