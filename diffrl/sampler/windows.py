"""Passes over a part of the row: keys and values of the rest are those of an earlier pass (see `cache` in approximate.py).

Shapes: as in engine.py; r some rows of an R, Q columns of a window, n the positions that these rows look at; N heads and H
their size in a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffrl.sampler.params import SamplingParams


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """KeyValueShape(num_layers=28, heads=4, head_size=128, dtype=torch.bfloat16, device=torch.device("cpu"))"""

    num_layers: int
    heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, num_rows: int, width: int) -> Tensor:
        return torch.zeros(num_rows, self.heads, width, self.head_size, dtype=self.dtype, device=self.device)


class WindowModel(Protocol):
    """What windows need of a model; `diffrl.models.base.PolicyModel` has it."""

    shifted: bool

    def key_value_shape(self) -> KeyValueShape: ...

    def window_states(
        self,
        ids_BQ: Tensor,
        column_BQ: Tensor,
        positions_BQ: Tensor,
        attended_BW: Tensor,
        select_BQ: Tensor,
        caches: list[tuple[Tensor, Tensor]],
    ) -> Tensor: ...


@dataclass(slots=True)
class Window:
    """What a pass computes of a row. Window(first=31, last=64, refresh=False)"""

    first: int  # column in the batch
    last: int  # the one behind
    refresh: bool  # a whole pass


class Windows:
    """The caches of the active rows, and what of each row its next pass computes."""

    def __init__(self, model: WindowModel, params: SamplingParams):
        assert params.block_size is not None
        self.model = model
        self.size, self.to_the_end, self.refresh_every = (
            params.block_size,
            params.cache == "prefix",
            params.refresh_every,
        )
        self.layers: list[tuple[Tensor, Tensor]] = []  # [R, N, W, H] each
        self.made_for: dict[int, tuple[int, int]] = {}  # by ticket: the block, and the passes since

    def plan(self, ticket: int, length: int, block: tuple[int, int], width: int) -> Window:
        """For a row whose first block with hidden positions is at these columns. A refresh comes with a new block."""
        made_for, passes = self.made_for.get(ticket, (None, 0))
        start, end = block
        if made_for != end - width or passes + 1 == self.refresh_every:  # counted from the right: widths change
            self.made_for[ticket] = (end - width, 0)
            return Window(width - length, width, refresh=True)
        self.made_for[ticket] = (end - width, passes + 1)
        first = max(width - length, start - int(self.model.shifted))
        return Window(first, width if self.to_the_end else end, refresh=False)

    def look(
        self,
        windows: Sequence[Window],
        index_R: Tensor,
        ids_RW: Tensor,
        attended_RW: Tensor,
        select_RW: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(states_XD, place_N), as Engine.look: whole passes for the rows that need one, windows for the others."""
        device = ids_RW.device
        place_RW = torch.zeros_like(select_RW, dtype=torch.long)
        states: list[Tensor] = []
        for refresh in (True, False):
            chosen = [number for number, window in enumerate(windows) if window.refresh == refresh]
            if not chosen:
                continue
            chosen_r = torch.tensor(chosen, device=device)
            index_r = index_R[chosen_r]
            first_r = torch.tensor([windows[number].first for number in chosen], device=device)
            last_r = torch.tensor([windows[number].last for number in chosen], device=device)
            slot_Q = torch.arange(int((last_r - first_r).max()), device=device)
            column_rQ = torch.minimum(first_r[:, None] + slot_Q, last_r[:, None] - 1)  # the last one is repeated
            attended_rW = attended_RW[index_r]
            positions_rW = (attended_rW.long().cumsum(1) - 1).clamp(min=0)
            # Each selected position's hidden state, as a slot of the window.
            row_n, column_n = select_RW[chosen_r].nonzero(as_tuple=True)
            slot_n = (column_n - int(self.model.shifted) - first_r[row_n]).clamp(min=0)
            select_rQ = torch.zeros_like(column_rQ, dtype=torch.bool)
            select_rQ[row_n, slot_n] = True
            place_rQ = (select_rQ.flatten().cumsum(0) - 1).view_as(column_rQ) + sum(map(len, states))
            place_RW[chosen_r[row_n], column_n] = place_rQ[row_n, slot_n]
            layers = self.of(index_r, *ids_RW.shape)
            ids_rQ, positions_rQ = ids_RW[index_r].gather(1, column_rQ), positions_rW.gather(1, column_rQ)
            states.append(self.model.window_states(ids_rQ, column_rQ, positions_rQ, attended_rW, select_rQ, layers))
            self.put(index_r, layers)
        return torch.cat(states), place_RW[select_RW]

    def of(self, index_r: Tensor, num_rows: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """The caches of some rows; those of all rows at once are not copied."""
        if not self.layers:
            shape = self.model.key_value_shape()
            self.layers = [(shape.zeros(0, width), shape.zeros(0, width)) for _ in range(shape.num_layers)]
        if self.layers[0][0].shape[:3:2] != (num_rows, width):
            self.layers = [
                (fitted(keys, num_rows, width), fitted(values, num_rows, width)) for keys, values in self.layers
            ]
        if len(index_r) == num_rows:
            return self.layers
        return [(keys[index_r], values[index_r]) for keys, values in self.layers]

    def put(self, index_r: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Give back what `of` copied."""
        for (keys, values), (new_keys, new_values) in zip(self.layers, layers, strict=True):
            if keys is not new_keys:
                keys[index_r], values[index_r] = new_keys, new_values

    def keep(self, stay_R: Tensor, gone: Sequence[int]) -> None:
        """Rows have left the batch; `gone` are their tickets."""
        self.layers = [(keys[stay_R], values[stay_R]) for keys, values in self.layers]
        for ticket in gone:
            self.made_for.pop(ticket, None)


def fitted(old_RNWH: Tensor, num_rows: int, width: int) -> Tensor:
    """Further rows and columns: rows come at the end, columns on the left."""
    rows, heads, columns, size = old_RNWH.shape
    new_RNWH = old_RNWH.new_zeros(num_rows, heads, width, size)
    common = min(width, columns)
    new_RNWH[:rows, :, width - common :] = old_RNWH[:, :, columns - common :]
    return new_RNWH
