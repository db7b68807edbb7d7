"""The denoising engine: rows with holes in, filled rows out, a forward pass for whatever is active.

A row needs nothing but its own tokens, so every pass builds its batch anew: finished rows leave, waiting ones take their
places, and rows of one batch may be at different steps, of different lengths and with holes in different places.

Shapes: R active rows, W width of the batch (rows are padded on the left), U distinct inputs among them, X positions that
go through the last layer and the head, N positions that the rows look at (row-major; siblings may share an X), V vocabulary.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from diffrl.sampler.approximate import after_end, certainties, how_many
from diffrl.sampler.filters import allowed_tokens, confidences, draw_tokens
from diffrl.sampler.params import SamplingParams
from diffrl.sampler.rows import Canvas, Filled, Noise, Row, RowNoise, exact_passes, turns
from diffrl.sampler.windows import WindowModel, Windows

# Widths are multiples of this, and matrix products have at least this many rows: then CPU kernels add up a row's numbers
# in the same order whatever else is in the batch.
ALIGNMENT = 16
# Elements of the logits that exist at a time: 256 MB in float32, for products of few rows are slow; on a GPU 1 GB.
HEAD_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}


class Denoiser(Protocol):
    """What the engine needs of a model; `diffrl.models.base.PolicyModel` has it."""

    @property
    def mask_token_id(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Of the logits."""
        ...

    def selected_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, select_BL: Tensor, *, packed: bool) -> Tensor:
        """[X, D]: what the head needs to know about the selected positions, in row-major order. `packed` rows do not
        depend on each other's lengths and number by a single bit."""
        ...

    def logits(self, states_XD: Tensor) -> Tensor:
        """[X, V]"""
        ...


class Engine:
    """Fills canvases, as many at a time as `max_tokens` (rows times width) allows, at least one.

    `vocab_size` is the tokenizer's size where the model's vocabulary is padded beyond it. `noise` replaces the rows' own
    random streams, to replay another implementation's. `end_ids` are for `early_end`.
    """

    def __init__(
        self,
        model: Denoiser,
        params: SamplingParams,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        banned_ids: Sequence[int] = (),
        end_ids: Sequence[int] = (),
        noise: Noise | None = None,
        device: str | torch.device = "cpu",
    ):
        self.model = model
        self.params = params
        self.max_tokens = max_tokens
        self.end_ids = tuple(end_ids)
        if params.early_end and not end_ids:
            raise ValueError("sampling.early_end: needs the ids of end tokens; pass end_ids")
        self.windows = Windows(cast(WindowModel, model), params) if params.cache != "none" else None
        self.noise = RowNoise() if noise is None else noise
        self.device = torch.device(device)
        self.allowed_V = allowed_tokens(model.vocab_size, (model.mask_token_id, *banned_ids), vocab_size, self.device)
        self.waiting: list[tuple[int, int, Row]] = []  # longest first, then in order of arrival
        self.rows: list[Row] = []
        self.ids_RW = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.attended_RW = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self.hidden_RW = self.attended_RW
        self.step_map_RW = self.ids_RW
        self.probability_RW = torch.zeros(0, 0, device=self.device)
        self.num_added = 0
        self.num_passes = 0  # forward passes
        self.num_row_passes = 0  # rows in them, equal inputs counted once
        self.num_tokens_passed = 0  # positions in them, padding included
        self.num_useful_tokens = 0  # without padding

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def add(self, canvas: Canvas) -> int:
        """Queue a canvas; the returned ticket comes back with the filled row."""
        if not bool(canvas.hidden_L.any()):
            raise ValueError("nothing is hidden, so there is nothing to fill: leave at least one [MASK]")
        if self.params.early_end and not bool(canvas.hidden_L[canvas.hidden_L.long().argmax() :].all()):
            raise ValueError(
                "sampling.early_end: tokens are given behind a hole; set it to false to fill in the middle"
            )
        ids_L = canvas.ids_L.long().masked_fill(canvas.hidden_L, self.model.mask_token_id)
        row = Row(
            ticket=self.num_added,
            canvas=canvas,
            turns=turns(self.params, canvas),
            first_hidden=int(canvas.hidden_L.long().argmax()),
            key=ids_L.cpu().numpy().tobytes() + canvas.hidden_L.cpu().numpy().tobytes(),
        )
        insort(self.waiting, (-row.length, row.ticket, row))
        self.num_added += 1
        return row.ticket

    @torch.no_grad()
    def step(self) -> list[tuple[int, Filled]]:
        """Every active row takes its next step that can reveal something. The rows that are full now, by ticket."""
        self.admit()
        select_RW = self.take_turns()
        looking_R = select_RW.any(1)
        if bool(looking_R.any()):
            self.reveal(looking_R.nonzero().flatten(), select_RW[looking_R])
        return self.retire()

    def run(self) -> list[Filled]:
        """Everything that was added, in that order."""
        filled: dict[int, Filled] = {}
        while self.busy:
            filled.update(self.step())
        return [filled[ticket] for ticket in sorted(filled)]

    # What a step consists of.

    def admit(self) -> None:
        """Waiting rows take free places. The longest come first, so that rows of a batch are of similar lengths."""
        new: list[Row] = []
        width = max((aligned(row.length) for row in self.rows), default=0)
        while self.waiting:
            wider = max(width, aligned(self.waiting[0][2].length))
            count = len(self.rows) + len(new) + 1
            if count > 1 and count * wider > self.max_tokens:
                break
            width = wider
            new.append(self.waiting.pop(0)[2])
        if not new and width == self.ids_RW.shape[1]:
            return
        mask_id = self.model.mask_token_id
        hidden = [row.canvas.hidden_L for row in new]
        ids = [row.canvas.ids_L.long().masked_fill(row.canvas.hidden_L, mask_id) for row in new]
        self.rows += new
        self.ids_RW = stacked(self.ids_RW, ids, width)
        self.attended_RW = stacked(self.attended_RW, [torch.ones_like(hidden_L) for hidden_L in hidden], width)
        self.hidden_RW = stacked(self.hidden_RW, hidden, width)
        self.step_map_RW = stacked(self.step_map_RW, [torch.full_like(ids_L, -1) for ids_L in ids], width)
        self.probability_RW = stacked(self.probability_RW, [torch.ones(len(ids_L)) for ids_L in ids], width)

    def take_turns(self) -> Tensor:
        """select_RW: the positions that each row looks at in its next step."""
        for row in self.rows:
            row.step, row.reveal = next(row.turns)
        if self.params.block_size is not None:
            column_W = torch.arange(self.hidden_RW.shape[1], device=self.device)
            return self.hidden_RW & (column_W < self.blocks()[:, 1:])
        if self.params.algorithm != "origin":
            return self.hidden_RW
        share_R = torch.tensor([row.reveal for row in self.rows], dtype=torch.float64, device=self.device)
        select_RW = torch.zeros_like(self.hidden_RW)
        uniform_N = self.uniform(range(len(self.rows)), self.hidden_RW)
        select_RW[self.hidden_RW] = uniform_N < share_R.repeat_interleave(self.hidden_RW.sum(1))
        return select_RW

    def reveal(self, index_R: Tensor, select_RW: Tensor) -> None:
        """One forward pass for the rows `index_R`, which look at `select_RW`; some of these positions get their tokens."""
        rows = [self.rows[i] for i in index_R.tolist()]
        states_XD, place_N = self.look(rows, index_R, select_RW)
        count_R = torch.tensor([row.reveal for row in rows], device=self.device)
        by_schedule = self.params.rule in (None, "tokens_per_step")
        if self.params.algorithm == "origin" or (by_schedule and bool((count_R >= select_RW.sum(1)).all())):
            reveal_RW = select_RW
            ids_K, _, probability_K = self.draw(self.logits(states_XD[place_N]), index_R, reveal_RW)
        elif by_schedule and self.params.algorithm == "maskgit_plus":
            # Ranks positions by the probability of what was drawn.
            ids_N, score_N, probability_N = self.draw(self.logits(states_XD[place_N]), index_R, select_RW)
            reveal_RW = self.choose(score_N, index_R, select_RW, count_R)
            chosen_N = reveal_RW[select_RW]
            ids_K, probability_K = ids_N[chosen_N], probability_N[chosen_N]
        else:
            score = confidences if by_schedule else certainties
            scores, logits_nV = [], states_XD
            for logits_nV in self.logits(states_XD):
                scores.append(score(logits_nV, self.params))
            score_N = torch.cat(scores)[place_N]
            count_R = count_R if by_schedule else how_many(score_N, select_RW, self.params)
            reveal_RW = self.choose(score_N, index_R, select_RW, count_R)
            place_K = place_N[reveal_RW[select_RW]]
            pieces = [logits_nV[place_K]] if len(scores) == 1 else self.logits(states_XD[place_K])
            ids_K, _, probability_K = self.draw(pieces, index_R, reveal_RW)
        row_K, column_K = reveal_RW.nonzero(as_tuple=True)
        row_K = index_R[row_K]
        step_R = torch.tensor([row.step for row in self.rows], device=self.device)
        self.ids_RW[row_K, column_K] = ids_K
        self.hidden_RW[row_K, column_K] = False
        self.step_map_RW[row_K, column_K] = step_R[row_K]
        self.probability_RW[row_K, column_K] = probability_K
        if self.params.early_end:
            revealed_RW = (self.step_map_RW >= 0) & self.attended_RW  # padding has steps too, of no meaning
            fill_RW, token_R = after_end(self.ids_RW, revealed_RW, self.hidden_RW, self.end_ids)
            self.ids_RW = torch.where(fill_RW, token_R[:, None], self.ids_RW)
            self.hidden_RW = self.hidden_RW & ~fill_RW
            self.step_map_RW = torch.where(fill_RW, step_R[:, None], self.step_map_RW)
            self.probability_RW[fill_RW] = torch.nan

    def look(self, rows: list[Row], index_R: Tensor, select_RW: Tensor) -> tuple[Tensor, Tensor]:
        """(states_XD, place_N): the last hidden states at selected positions, and which of them each selected position of
        each row has. Rows that have not revealed anything yet, stand on equal canvases and look at the same positions are
        one input."""
        if self.windows is not None:
            return self.look_through(self.windows, rows, index_R, select_RW)
        # Of `origin` each row looks elsewhere, and attention from other positions beside it may round otherwise.
        alike = self.params.algorithm != "origin"
        first: dict[bytes, int] = {}
        source: list[int] = []  # the row behind each distinct input
        input_R: list[int] = []
        for number, row in enumerate(rows):
            if alike and row.passes == 0 and row.key in first:
                input_R.append(first[row.key])
                continue
            if row.passes == 0:
                first[row.key] = len(source)
            input_R.append(len(source))
            source.append(number)
        for row in rows:
            row.passes += 1
        self.num_passes += 1
        self.num_row_passes += len(source)
        self.num_tokens_passed += len(source) * select_RW.shape[1]
        self.num_useful_tokens += sum(rows[number].length for number in source)
        index_U = index_R[source]
        if len(source) == len(rows):
            states_XD = self.states(index_U, select_RW)
            return states_XD, torch.arange(len(states_XD), device=self.device)
        input = torch.tensor(input_R, device=self.device)
        select_UW = torch.zeros_like(select_RW[source]).index_put_((input,), select_RW, accumulate=True)
        states_XD = self.states(index_U, select_UW)
        place_UW = (select_UW.flatten().cumsum(0) - 1).reshape(select_UW.shape)
        return states_XD, place_UW[input][select_RW]

    def states(self, index_U: Tensor, select_UW: Tensor) -> Tensor:
        packed = self.device.type == "cpu"
        return self.model.selected_states(self.ids_RW[index_U], self.attended_RW[index_U], select_UW, packed=packed)

    def look_through(
        self, windows: Windows, rows: list[Row], index_R: Tensor, select_RW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `look`, at windows of the rows alone."""
        width = select_RW.shape[1]
        blocks = self.blocks()[index_R].tolist()
        planned = [windows.plan(row.ticket, row.length, block, width) for row, block in zip(rows, blocks, strict=True)]
        for refresh in {window.refresh for window in planned}:
            sizes = [window.last - window.first for window in planned if window.refresh == refresh]
            self.num_passes += 1
            self.num_row_passes += len(sizes)
            self.num_tokens_passed += len(sizes) * max(sizes)
            self.num_useful_tokens += sum(sizes)
        for row, window in zip(rows, planned, strict=True):
            row.passes += (window.last - window.first) / row.length
        return windows.look(planned, index_R, self.ids_RW, self.attended_RW, select_RW)

    def blocks(self) -> Tensor:
        """[R, 2]: the columns of the first block of each row that has hidden positions, and the one behind."""
        size, width = self.params.block_size, self.hidden_RW.shape[1]
        assert size is not None
        first_R = torch.tensor([width - row.length + row.first_hidden for row in self.rows], device=self.device)
        start_R = first_R + (self.hidden_RW.long().argmax(1) - first_R) // size * size
        return torch.stack([start_R, (start_R + size).clamp(max=width)], 1)

    def choose(self, score_N: Tensor, index_R: Tensor, select_RW: Tensor, count_R: Tensor) -> Tensor:
        """reveal_RW: of each row `count_R` selected positions, the highest scores or drawn by them."""
        num_R = select_RW.sum(1)
        # A row that reveals all it looks at has no choice, and asks for no numbers: alone it would not.
        free_R = count_R < num_R
        if self.params.alg_temp > 0 and bool(free_R.any()):
            free_N, score_N = free_R.repeat_interleave(num_R), score_N.double()
            uniform_n = self.uniform(index_R[free_R].tolist(), select_RW[free_R])
            score_N[free_N] = perturbed(score_N[free_N], uniform_n, self.params.alg_temp)
        return highest(score_N, select_RW, count_R)

    def retire(self) -> list[tuple[int, Filled]]:
        """Take the full rows out."""
        done_R = ~self.hidden_RW.any(1)
        if not bool(done_R.any()):
            return []
        full = []
        for number in done_R.nonzero().flatten().tolist():
            row = self.rows[number]
            ids_L, step_map_L, probability_L = (
                tensor[number, -row.length :].clone() for tensor in (self.ids_RW, self.step_map_RW, self.probability_RW)
            )
            filled = Filled(
                ids_L=ids_L,
                step_map_L=step_map_L,
                probability_L=probability_L,
                passes=row.passes,
                exact_passes=exact_passes(self.params, row.canvas),
            )
            full.append((row.ticket, filled))
        stay = (~done_R).nonzero().flatten()
        if self.windows is not None:
            self.windows.keep(stay, [ticket for ticket, _ in full])
        self.rows = [self.rows[i] for i in stay.tolist()]
        self.ids_RW, self.attended_RW, self.hidden_RW, self.step_map_RW, self.probability_RW = (
            tensor[stay]
            for tensor in (self.ids_RW, self.attended_RW, self.hidden_RW, self.step_map_RW, self.probability_RW)
        )
        return full

    # The head, in pieces, and random numbers.

    def draw(self, pieces_nV: Iterable[Tensor], index_R: Tensor, where_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens for the True positions of `where_RW`, whose logits come in pieces (no randomness at temperature 0); their
        probabilities after the filters (of maskgit_plus alone), and what the model itself gives them."""
        uniform_N = self.uniform(index_R.tolist(), where_RW) if self.params.temperature > 0 else None
        drawn, stop = [], 0
        for logits_nV in pieces_nV:
            start, stop = stop, stop + len(logits_nV)
            uniform_n = None if uniform_N is None else uniform_N[start:stop]
            ids_n, score_n = draw_tokens(logits_nV, uniform_n, self.allowed_V, self.params)
            wide_nV = logits_nV.float()
            logprob_n = wide_nV.gather(1, ids_n[:, None])[:, 0] - wide_nV.logsumexp(-1)
            drawn.append((ids_n, score_n, logprob_n.exp()))
        ids, score, probability = zip(*drawn, strict=True)
        return torch.cat(ids), torch.cat(score), torch.cat(probability)

    def logits(self, states_ND: Tensor) -> Iterator[Tensor]:
        """A few rows at a time; no more than that ever exists."""
        num = len(states_ND)
        if num < ALIGNMENT:
            states_ND = torch.cat([states_ND, states_ND[-1:].expand(ALIGNMENT - num, -1)])
        size = max(ALIGNMENT, HEAD_ELEMENTS[self.device.type] // self.model.vocab_size)
        start = 0
        while start < num:
            stop = start + size if start + size + ALIGNMENT <= num else len(states_ND)  # no small piece at the end
            yield self.model.logits(states_ND[start:stop])[: num - start]
            start = stop

    def uniform(self, index: Sequence[int], where_RW: Tensor) -> Tensor:
        rows = [self.rows[i] for i in index]
        return self.noise.uniform([row.canvas.seed for row in rows], [row.ticket for row in rows], where_RW)


def perturbed(score_N: Tensor, uniform_N: Tensor, temperature: float) -> Tensor:
    """With Gumbel noise: the largest of these are a draw without replacement from softmax(score / temperature)."""
    return score_N.double() / temperature - torch.log(-torch.log(uniform_N.double().clamp(min=1e-300)))


def highest(score_N: Tensor, select_RW: Tensor, count_R: Tensor) -> Tensor:
    """reveal_RW: of each row the `count_R` selected positions with the highest scores; of equal ones the first."""
    score_RW = torch.full(select_RW.shape, -torch.inf, dtype=score_N.dtype, device=score_N.device)
    score_RW[select_RW] = score_N
    most = int(count_R.max())
    # Not topk, which takes equal ones by the width of the batch; what is certain has confidence 1 exactly, so they occur.
    columns_RK = score_RW.sort(dim=1, descending=True, stable=True).indices[:, :most]
    wanted_RK = torch.arange(columns_RK.shape[1], device=count_R.device) < count_R[:, None]
    return torch.zeros_like(select_RW).scatter_(1, columns_RK, wanted_RK) & select_RW


def aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def stacked(old_RW: Tensor, new: list[Tensor], width: int) -> Tensor:
    """Rows under each other, at the right edge of `width` columns."""
    out_RW = old_RW.new_zeros(len(old_RW) + len(new), width)
    common = min(width, old_RW.shape[1])
    if common:
        out_RW[: len(old_RW), -common:] = old_RW[:, -common:]
    for number, row_L in enumerate(new, len(old_RW)):
        out_RW[number, -len(row_L) :] = row_L
    return out_RW
