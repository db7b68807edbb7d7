"""From tokens to training rows: text packed into rows, instructions in one of three layouts.

Packing is by best fit: a piece goes into the fullest open row that has room for it, so short documents share rows and stay
whole. Only a document that is longer than a row is cut, into windows and a rest that is packed like a short document.
Nothing is dropped: a row that nothing fits any more is shorter than the others.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffrl.data.shards import Row


@dataclass(frozen=True, slots=True)
class Piece:
    """Piece(ids=(7, 5, 9, 1), given=2): the prompt [7 5] and the completion [9] with the end token 1; of text, given is 0."""

    ids: Sequence[int]
    given: int = 0


def pack(pieces: Iterable[Piece], length: int) -> list[Row]:
    """Rows of up to `length` tokens. Every piece must fit into one."""
    bins: list[list[Piece]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in pieces:
        size = len(piece.ids)
        assert 0 < size <= length
        index = bisect_left(open_rows, (size, 0))
        room, row = open_rows.pop(index) if index < len(open_rows) else (length, len(bins))
        if row == len(bins):
            bins.append([])
        bins[row].append(piece)
        if room > size:
            insort(open_rows, (room - size, row))
    return [
        Row(
            ids=[token for piece in row for token in piece.ids],
            lengths=[len(piece.ids) for piece in row],
            prompts=[piece.given for piece in row],
        )
        for row in bins
    ]


def text_rows(documents: Iterable[Sequence[int]], length: int, *, end_token_id: int) -> list[Row]:
    """Documents, each closed by an end token, in rows of up to `length` tokens."""
    closed = ([*document, end_token_id] for document in documents)
    return pack((Piece(ids[i : i + length]) for ids in closed for i in range(0, len(ids), length)), length)


def window_row(prompt: Sequence[int], completion: Sequence[int], *, prompt_length: int, length: int, pad: int) -> Row:
    """[prompt, padded on the left | completion, padded on the right]: what the sampler fills. `completion` has its end."""
    left, fill = prompt_length - len(prompt), length - prompt_length - len(completion)
    assert left >= 0 and fill >= 0
    return Row(
        ids=[*[pad] * left, *prompt, *completion, *[pad] * fill],
        lengths=[length - left],
        prompts=[len(prompt)],
        left=left,
        fill=fill,
    )


def padded_row(prompt: Sequence[int], completion: Sequence[int], *, length: int, pad: int) -> Row:
    """[prompt, completion, padding]. `completion` has its end token."""
    return window_row(prompt, completion, prompt_length=len(prompt), length=length, pad=pad)
