"""The denoising loop: start from all [MASK]; at each step, choose positions to reveal and tokens for them.

This is Dream's `diffusion_generate`, exact: schedule, filters and confidences are the release's, in fewer
operations. Only hidden positions go through the vocabulary head; a step that reveals nothing makes no forward
pass; a token is drawn only where it is needed (`entropy`, `topk_margin` and `origin` choose positions without
looking at one, so they draw at the revealed positions alone); top_k and top_p look at the sorted head of the
vocabulary.

Departures from the release:
- [MASK], `banned_ids` and ids from `vocab_size` on are never drawn, so no row falls out of step and every row
  is complete at the end. They are left out of the draw only: filters and confidences are those of the model's
  own distribution, by which the release ranks positions. Where the filters leave nothing else, the most
  probable allowed token is taken.
- Only completion positions are denoised; a [MASK] inside a prompt stays what it is.
- Random numbers come from one stream per row, seeded by the caller: a row's tokens do not depend on its batch
  mates (beyond the rounding of matrix products of another shape).
- Filters and confidences are computed in float32 whatever the model's dtype.

The release's schedule is kept: with as many steps as tokens it reveals none at the first, two at the last.

Shapes: B rows, P prompt, C completion, L = P + C, V vocabulary, N hidden positions of the batch (row-major),
R of them revealed now, n some rows of an N or R, K candidates kept for a position, most probable first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

# Elements of [n, V] that are filtered at a time, which bounds the temporaries.
CHUNK_ELEMENTS = 1 << 20
# Sorted candidates looked at beyond top_k, for ties with the k-th; and for a nucleus without top_k. Rows that
# need more are done again with the whole vocabulary, so neither number changes a result.
TIE_ROOM = 8
NUCLEUS_ROOM = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to denoise. Raises ValueError on values outside their range.

    SamplingParams(algorithm="entropy", steps=256, temperature=1.2, top_p=0.95, top_k=50)
    """

    algorithm: Algorithm = "entropy"  # how positions are chosen
    steps: int
    temperature: float  # 0: the most probable token
    top_p: float | None
    top_k: int | None
    alg_temp: float = 0.0  # above 0: positions drawn from softmax(confidence / alg_temp)
    eps: float = 1e-3  # the last timestep

    def __post_init__(self) -> None:
        checks = {
            "algorithm": (self.algorithm in get_args(Algorithm), f"one of {', '.join(get_args(Algorithm))}"),
            "steps": (self.steps >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "null or in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 1, "null or at least 1"),
            "alg_temp": (self.alg_temp >= 0, "at least 0"),
            "eps": (0 < self.eps < 1, "in (0, 1)"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"sampling.{name}: {getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """SampleResult(completion_ids_BC=tensor([[412, 9, ...], ...]), step_map_BC=tensor([[4, 0, ...], ...]))"""

    completion_ids_BC: Tensor  # int64, the whole window, no [MASK] left
    step_map_BC: Tensor  # int64, the denoising step (from 0) at which each position was revealed


class Denoiser(Protocol):
    """What the loop needs of a model; `diffrl.models.base.PolicyModel.forward` states the contract."""

    @property
    def mask_token_id(self) -> int: ...

    def __call__(self, ids_BL: Tensor, attention_mask_BL: Tensor, select_BL: Tensor) -> Tensor: ...


class Noise(Protocol):
    """A source of uniform numbers in [0, 1)."""

    def uniform(self, where_BC: Tensor) -> Tensor:
        """One number for every True position, in row-major order."""
        ...


class RowNoise:
    """One stream per row: what a row gets depends on its seed and on its own earlier requests alone."""

    def __init__(self, seeds: Sequence[int]):
        # numpy, since torch's CPU generator looks at the low 32 bits of a seed only.
        self.generators = [np.random.Generator(np.random.Philox(seed & (1 << 64) - 1)) for seed in seeds]

    def uniform(self, where_BC: Tensor) -> Tensor:
        counts = where_BC.sum(1).tolist()
        draws = [generator.random(n) for generator, n in zip(self.generators, counts, strict=True)]
        return torch.from_numpy(np.concatenate(draws)).to(where_BC.device)


def reveal_fractions(steps: int, eps: float) -> Tensor:
    """Share of the hidden positions that each step reveals: 1 - s/t in float32; 1 at the last step."""
    timesteps = torch.linspace(1, eps, steps + 1)
    fractions = 1 - timesteps[1:] / timesteps[:-1]
    fractions[-1] = 1
    return fractions


def reveal_counts(num_tokens: int, steps: int, eps: float) -> list[int]:
    """Positions of a row that each step reveals: floor(hidden * (1 - s/t)) in float32; at the last, all."""
    hidden, counts = num_tokens, []
    for fraction in reveal_fractions(steps, eps):
        counts.append(int(torch.tensor(float(hidden)) * fraction))
        hidden -= counts[-1]
    return counts


@torch.no_grad()
def sample(
    model: Denoiser,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    *,
    num_tokens: int,
    params: SamplingParams,
    seeds: Sequence[int],
    banned_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    noise: Noise | None = None,
) -> SampleResult:
    """Fill a window of `num_tokens` positions after every (left-padded) prompt.

    `seeds` holds one number per row. `vocab_size` is the tokenizer's size where the model's vocabulary is
    padded beyond it. `noise` replaces the rows' own random streams, to replay another implementation's.
    """
    batch, prompt_length = prompt_ids_BP.shape
    device = prompt_ids_BP.device
    if num_tokens < 1:
        raise ValueError(f"num_tokens: {num_tokens} must be at least 1")
    if len(seeds) != batch:
        raise ValueError(f"seeds: {len(seeds)} given for {batch} rows")
    noise = RowNoise(seeds) if noise is None else noise
    ids_BL = F.pad(prompt_ids_BP.long(), (0, num_tokens), value=model.mask_token_id)
    attention_mask_BL = F.pad(prompt_mask_BP.bool(), (0, num_tokens), value=True)
    select_BL = torch.zeros_like(attention_mask_BL)
    ids_BC, select_BC = ids_BL[:, prompt_length:], select_BL[:, prompt_length:]  # views
    hidden_BC = torch.ones_like(select_BC)
    step_map_BC = torch.zeros_like(ids_BC)
    fractions = reveal_fractions(params.steps, params.eps).tolist()
    counts = reveal_counts(num_tokens, params.steps, params.eps)
    never = (model.mask_token_id, *banned_ids)
    allowed_V: Tensor | None = None

    for step in range(params.steps):
        select_BC.copy_(hidden_BC)
        if params.algorithm == "origin":
            select_BC[hidden_BC] = noise.uniform(hidden_BC) < fractions[step]
            if not select_BC.any():
                continue
        elif counts[step] == 0:
            continue
        logits_NV = model(ids_BL, attention_mask_BL, select_BL)
        if allowed_V is None:
            allowed_V = allowed_tokens(logits_NV.shape[-1], never, vocab_size, device)
        if params.algorithm == "origin" or step == params.steps - 1:  # every selected position is revealed
            reveal_BC = select_BC
            ids_R, _ = draw_tokens(logits_NV, noise, reveal_BC, allowed_V, params)
        elif params.algorithm == "maskgit_plus":  # ranks positions by the probability of what was drawn
            ids_N, confidence_N = draw_tokens(logits_NV, noise, hidden_BC, allowed_V, params)
            reveal_BC = choose_positions(confidence_N, hidden_BC, counts[step], noise, params)
            ids_R = ids_N[reveal_BC[hidden_BC]]
        else:
            confidence_N = confidences(logits_NV, params)
            reveal_BC = choose_positions(confidence_N, hidden_BC, counts[step], noise, params)
            ids_R = draw_tokens(logits_NV[reveal_BC[hidden_BC]], noise, reveal_BC, allowed_V, params)[0]
        ids_BC[reveal_BC] = ids_R
        step_map_BC[reveal_BC] = step
        hidden_BC = hidden_BC & ~reveal_BC
    return SampleResult(completion_ids_BC=ids_BC.clone(), step_map_BC=step_map_BC)


def allowed_tokens(vocabulary: int, never: Sequence[int], vocab_size: int | None, device: torch.device) -> Tensor:
    """allowed_V: False for what must not be drawn."""
    allowed_V = torch.arange(vocabulary, device=device) < (vocabulary if vocab_size is None else vocab_size)
    allowed_V[list(never)] = False
    return allowed_V


def choose_positions(
    confidence_N: Tensor, hidden_BC: Tensor, count: int, noise: Noise, params: SamplingParams
) -> Tensor:
    """reveal_BC: `count` hidden positions of each row, the highest confidences or drawn by them."""
    score_N = confidence_N
    if params.alg_temp > 0:
        # The largest of score + Gumbel noise are a draw without replacement from softmax(score).
        gumbel_N = -torch.log(-torch.log(noise.uniform(hidden_BC).double().clamp(min=1e-300)))
        score_N = confidence_N.double() / params.alg_temp + gumbel_N
    score_BC = torch.full(hidden_BC.shape, -torch.inf, dtype=score_N.dtype, device=score_N.device)
    score_BC[hidden_BC] = score_N
    return torch.zeros_like(hidden_BC).scatter_(1, score_BC.topk(count, dim=1).indices, True)


def confidences(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """Confidence of each position, from its filtered distribution alone."""
    confidence_N = torch.empty(logits_NV.shape[0], device=logits_NV.device)
    for rows, probs_nK, _ in filtered_distributions(logits_NV, params):
        if params.algorithm == "entropy":
            confidence_N[rows] = torch.linalg.vecdot(probs_nK, (probs_nK + 1e-10).log_())
        else:
            top_n2 = probs_nK.topk(2, dim=-1).values
            confidence_N[rows] = top_n2[:, 0] - top_n2[:, 1]
    return confidence_N


def draw_tokens(
    logits_NV: Tensor, noise: Noise, where_BC: Tensor, allowed_V: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """A token for each of the N True positions of where_BC, and (maskgit_plus only) its probability.

    At temperature 0 the most probable allowed token, and no randomness is used.
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
    uniform_N = noise.uniform(where_BC)
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
    logits_NV: Tensor, params: SamplingParams
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """The candidates' probabilities after temperature, then top_p, then top_k, a few rows at a time.

    Yields (rows, probs_nK, ids_nK): which of the N rows, their probabilities, and the tokens these belong to
    (None: the whole vocabulary in its own order). Every row comes exactly once.
    """
    num, vocabulary = logits_NV.shape
    top_p = params.top_p if params.top_p is not None and params.top_p < 1 else None
    top_k = params.top_k if params.top_k is not None and params.top_k < vocabulary else None
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, num, chunk):
        rows = slice(start, min(start + chunk, num))
        logits_nV = logits_NV[rows].float()
        if params.temperature not in (0, 1):
            logits_nV = logits_nV / params.temperature
        if top_p is None and top_k is None:
            yield rows, logits_nV.softmax(-1), None
            continue
        width = min(vocabulary, NUCLEUS_ROOM if top_k is None else top_k + TIE_ROOM)
        probs_nK, ids_nK, decided_n = filtered_head(logits_nV, width, top_p, top_k)
        if bool(decided_n.all()):
            yield rows, probs_nK, ids_nK
            continue
        every_n = torch.arange(rows.start, rows.stop, device=logits_NV.device)
        yield every_n[decided_n], probs_nK[decided_n], ids_nK[decided_n]
        probs_nV, ids_nV, _ = filtered_head(logits_nV[~decided_n], vocabulary, top_p, top_k)
        yield every_n[~decided_n], probs_nV, ids_nV


def filtered_head(
    logits_nV: Tensor, width: int, top_p: float | None, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Filters on the `width` most probable tokens: (probs_nK, ids_nK, decided_n).

    The nucleus is measured by the probabilities of the whole vocabulary, as if top_p came first. A row is
    decided when the filters end inside the width, that is, when its last token is removed.
    """
    values_nK, ids_nK = largest(logits_nV, width)
    keep_nK = torch.ones_like(ids_nK, dtype=torch.bool)
    if top_k is not None:
        keep_nK = values_nK >= values_nK[:, top_k - 1 : top_k]  # ties with the k-th stay
    if top_p is not None:
        cumulative_nK = (values_nK - logits_nV.logsumexp(-1, keepdim=True)).exp_().cumsum(-1)
        keep_nK[:, 1:] &= cumulative_nK[:, :-1] <= top_p  # the token that crosses top_p stays
    decided_n = ~keep_nK[:, -1] if width < logits_nV.shape[-1] else torch.ones_like(keep_nK[:, 0])
    return values_nK.masked_fill_(~keep_nK, -torch.inf).softmax(-1), ids_nK, decided_n


def largest(logits_nV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row in falling order, and their indices: torch.topk, quick on CPUs too.

    For more than a small part of the row, numpy's vectorised sort is 5 to 8 times faster than torch's, but sorts
    values only. So float32 value and index are packed into one integer whose order is that of (-value, index).
    """
    if logits_nV.device.type != "cpu" or 64 * width <= logits_nV.shape[-1]:
        values_nK, ids_nK = logits_nV.topk(width, dim=-1)
        return values_nK, ids_nK
    bits_nV = logits_nV.contiguous().view(torch.int32)
    falling_nV = ~(bits_nV ^ ((bits_nV >> 31) & 0x7FFFFFFF))  # integers that fall as the floats rise
    index_V = torch.arange(logits_nV.shape[-1])
    packed = ((falling_nV.long() << 32) | index_V).numpy()
    if width < packed.shape[1]:
        packed.partition(width - 1, axis=1)
        packed = packed[:, :width].copy()
    packed.sort(axis=1)
    ids_nK = torch.from_numpy(packed) & 0xFFFFFFFF
    return logits_nV.gather(1, ids_nK), ids_nK
