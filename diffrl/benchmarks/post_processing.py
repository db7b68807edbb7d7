"""What is taken of the text that a model wrote. Frozen: a change of any rule here is a new POST_PROCESSING, which every result
names, for scores of different rules cannot be compared.

Version 1.
- Continuations of base models end before the first stop sequence of the benchmark, wherever it stands. Nothing else is cut,
  dedented or mended.
- Of a chat answer the first block is taken that is fenced and marked python, py or python3 (in any case); without one the
  first fenced block; without any the whole text. A fence is a line that begins, after up to three spaces, with three
  backticks or more; the block ends before the next such line that has nothing else on it, or with the text: a window that
  ran out before the fence closed still counts.
- Of an answer in numbers the last number is taken: thousands may be grouped by commas; a currency sign, a full stop behind
  and zeros behind the point do not count.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

POST_PROCESSING = "1"

_OPENING = re.compile(r"^ {0,3}(`{3,})[ \t]*([^\s`]*)[^\n`]*\n", re.MULTILINE)
_PYTHON = ("python", "py", "python3")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Up to the first of the stop sequences."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def chat_code(text: str) -> str:
    text = text.replace("\r\n", "\n")
    blocks = fenced_blocks(text)
    marked = (code for language, code in blocks if language.lower() in _PYTHON)
    return next(marked, blocks[0][1] if blocks else text)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(what the fence is marked with, what is inside)."""
    blocks, place = [], 0
    while opening := _OPENING.search(text, place):
        closing = re.compile(rf"^ {{0,3}}{opening[1]}`*[ \t]*$", re.MULTILINE).search(text, opening.end())
        blocks.append((opening[2], text[opening.end() : closing.start() if closing else len(text)]))
        if closing is None:
            break
        place = closing.end()
    return blocks


def last_number(text: str) -> str | None:
    """In the one way in which a number is written here: "-1200", "0.5"; None without any."""
    found = _NUMBER.findall(text.replace("$", ""))
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    number = Decimal(text.replace(",", ""))
    return f"{number.normalize():f}" if number else "0"
