"""Text with holes, and the canvas it becomes.

A hole is written `<fill:N>`: N tokens to fill, at least one. A text has any number of holes, wherever they stand:

    def area(radius):
        return <fill:8>

Each part between holes is tokenized by itself, without a chat template and without a token in front, and stays as it is;
special tokens written in it are read as such. A hole may come out shorter than N tokens: end and padding tokens in it are
no text, wherever in the hole they stand.

Shapes: L positions of the row.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from diffrl.models.tokens import decode, end_ids
from diffrl.sampler import Canvas, Filled

HOLE = re.compile(r"<fill:(\d+)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class HoledText:
    """What stands around the holes, and the tokens of each. HoledText(parts=("def f(x):\\n    return ", "\\n"), holes=(8,))"""

    parts: tuple[str, ...]  # one more than there are holes; may be empty
    holes: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to fill."""
        return sum(self.holes)


def parse_holes(text: str) -> HoledText:
    """Raises ValueError for a text without holes, and for one that is not written as it should be."""
    parts = HOLE.split(text)
    holes = tuple(int(number) for number in parts[1::2])
    stray = next((part for part in parts[::2] if "<fill:" in part), None)
    if stray is not None:
        wrong = stray[stray.index("<fill:") :][:20].partition("\n")[0]
        raise ValueError(f"hole: {wrong!r} must be <fill:N> with a number of tokens, such as <fill:8>")
    if not holes:
        raise ValueError("hole: the text has none; write <fill:N> where N tokens are to be filled, such as <fill:8>")
    if min(holes) < 1:
        raise ValueError("hole: <fill:0> fills nothing; N must be at least 1")
    return HoledText(parts=tuple(parts[::2]), holes=holes)


def canvas_of(holed: HoledText, tokenizer: PreTrainedTokenizerFast, *, seed: int, context: int) -> Canvas:
    """Raises ValueError for a text that is longer than `context`, the most positions that the model has."""
    known = [tokenizer.encode(part, add_special_tokens=False) for part in holed.parts]
    check_length(sum(map(len, known)), holed.num_tokens, context)
    ids: list[int] = []
    hidden: list[bool] = []
    for part, size in zip(known, (*holed.holes, 0), strict=True):
        ids += [*part, *[0] * size]
        hidden += [*[False] * len(part), *[True] * size]
    return Canvas(ids_L=torch.tensor(ids), hidden_L=torch.tensor(hidden), seed=seed)


def check_length(num_given: int, num_hidden: int, context: int) -> None:
    """Raises ValueError when a row would have more positions than the model."""
    if num_given + num_hidden > context:
        raise ValueError(
            f"the prompt: its {num_given} tokens and {num_hidden} to fill are {num_given + num_hidden}, more than the "
            f"{context} of the model's context (max_position_embeddings); shorten it, or fill fewer"
        )


def hole_texts(holed: HoledText, filled: Filled, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """What was filled into each hole."""
    ids = filled.ids_L[filled.step_map_L >= 0].cpu().numpy()
    pieces = np.split(ids, np.cumsum(holed.holes)[:-1])
    return tuple(decode(tokenizer, piece, end_ids(tokenizer)) for piece in pieces)


def filled_text(holed: HoledText, filled: Filled, tokenizer: PreTrainedTokenizerFast) -> str:
    """The whole text: its parts, to the letter, and what was filled in between."""
    holes = (*hole_texts(holed, filled, tokenizer), "")
    return "".join(part + hole for part, hole in zip(holed.parts, holes, strict=True))
