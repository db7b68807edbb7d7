"""What the engine is given and gives back, a row on its way, its random numbers and its turns.

Shapes: L positions of a row, R rows, W width of a batch, n hidden positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffrl.sampler.params import SamplingParams, reveal_counts, reveal_fractions


class Noise(Protocol):
    """A source of uniform numbers in [0, 1)."""

    def uniform(self, seeds: Sequence[int], tickets: Sequence[int], where_RW: Tensor) -> Tensor:
        """One number for every True position, in row-major order; `seeds` and `tickets` name the rows."""
        ...


class RowNoise:
    """One stream per row: what a row gets depends on its seed and on its own earlier requests alone."""

    def __init__(self):
        self.generators: dict[int, np.random.Generator] = {}

    def uniform(self, seeds: Sequence[int], tickets: Sequence[int], where_RW: Tensor) -> Tensor:
        draws = [
            self.of(ticket, seed).random(count)
            for ticket, seed, count in zip(tickets, seeds, where_RW.sum(1).tolist(), strict=True)
        ]
        return torch.from_numpy(np.concatenate(draws)).to(where_RW.device)

    def of(self, ticket: int, seed: int) -> np.random.Generator:
        if ticket not in self.generators:  # numpy, since torch's CPU generator looks at the low 32 bits of a seed only
            self.generators[ticket] = np.random.Generator(np.random.Philox(seed & (1 << 64) - 1))
        return self.generators[ticket]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A row to fill. Canvas(ids_L=tensor([412, 9, 0, 0]), hidden_L=tensor([False, False, True, True]), seed=17)"""

    ids_L: Tensor  # int64; what stands at hidden positions does not matter
    hidden_L: Tensor  # bool: the positions to fill, at least one
    seed: int  # of 64 bits
    steps: int | None = None  # instead of the parameters'


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A row without holes; positions that were given have step -1 and probability 1.

    Filled(ids_L=tensor([412, 9, 31, 5]), step_map_L=tensor([-1, -1, 1, 0]), probability_L=tensor([1, 1, .4, .9]),
           passes=2.0, exact_passes=2)
    """

    ids_L: Tensor  # int64
    step_map_L: Tensor  # int64, the denoising step (from 0) at which each position was revealed
    probability_L: Tensor  # float32, what the model gave each token when it was revealed, at temperature 1, unfiltered
    passes: float  # forward passes that the row took part in; a window counts as its share of the row
    exact_passes: int  # what the schedule makes without approximations; of `origin` the most it can make


@dataclass(slots=True)
class Row:
    """A row on its way."""

    ticket: int
    canvas: Canvas
    turns: Iterator[tuple[int, float]]  # (step, how many positions it reveals; of `origin`, the share)
    key: bytes  # equal for rows with equal inputs
    first_hidden: int  # position
    step: int = -1
    reveal: float = 0.0
    passes: float = 0.0

    @property
    def length(self) -> int:
        return len(self.canvas.ids_L)


def turns(params: SamplingParams, canvas: Canvas) -> Iterator[tuple[int, float]]:
    """(step, how much it reveals) of the steps that can reveal something: a share of the hidden positions for `origin`,
    else a number of them."""
    steps = canvas.steps or params.steps
    if params.rule is not None:
        return enumerate(repeat(params.tokens_per_step or 1))
    if params.algorithm == "origin":
        return enumerate(reveal_fractions(steps, params.eps).tolist())
    counts: list[int] = []
    for num_hidden in hidden_of_blocks(params, canvas):
        share = max(1, round(steps * num_hidden / int(canvas.hidden_L.sum())))
        counts += reveal_counts(num_hidden, share, params.eps)
    return ((step, count) for step, count in enumerate(counts) if count)


def hidden_of_blocks(params: SamplingParams, canvas: Canvas) -> list[int]:
    """Numbers of hidden positions of the blocks that have any; one block when there is no `block_size`."""
    position_n = canvas.hidden_L.nonzero().flatten()
    size = params.block_size or len(canvas.hidden_L)
    return [count for count in torch.bincount((position_n - position_n[0]) // size).tolist() if count]


def exact_passes(params: SamplingParams, canvas: Canvas) -> int:
    steps = canvas.steps or params.steps
    if params.algorithm == "origin":
        return steps
    return sum(count > 0 for count in reveal_counts(int(canvas.hidden_L.sum()), steps, params.eps))
