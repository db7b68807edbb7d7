"""Problems in the format of LiveCodeBench (arXiv 2403.07974) whose programs read stdin and write stdout; rows that call a
function instead are left out.

Private tests may be packed as the releases do it: base64 of zlib of a pickled JSON text. A pickle can run code, so none is
loaded: the text is read out of it.
"""

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from diffrl.benchmarks.task import Task
from diffrl.data.puzzles import check_stdin_test
from diffrl.data.row_files import Row, RowError, identifier_of, text_of
from diffrl.types import Problem

_MOST_BYTES = 1 << 30  # of unpacked tests


_AROUND_A_TEXT = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}  # opcodes that do nothing to it


def livecodebench_task(row: Row) -> Task | None:
    cases = [case for field in ("public_test_cases", "private_test_cases") for case in _cases(row, field)]
    if any(case.get("testtype") != "stdin" for case in cases):
        return None
    tests = tuple(json.dumps({"stdin": case.get("input"), "stdout": case.get("output")}) for case in cases)
    for test in tests:
        check_stdin_test(test, "public_test_cases")
    if not tests:
        raise RowError("fields 'public_test_cases' and 'private_test_cases' hold no test", "public_test_cases")
    question = (
        f"{text_of(row, 'question_content').strip()}\n\nWrite a Python program that reads stdin and writes stdout."
    )
    problem = Problem(
        id=f"livecodebench/{identifier_of(row, 'question_id')}",
        prompt=f"{question} Give the whole program in one markdown code block.",
        prompt_tests=(),
        reward_tests=tests,
        test_mode="stdin",
        solution=text_of(row, "solution", "") or None,
        family="livecodebench",
    )
    return Task(problem=problem, prefix=f"{question}\n\n```python\n", stops=("\n```",))


def _cases(row: Row, field: str) -> list[dict[str, Any]]:
    text = text_of(row, field)
    try:
        cases = json.loads(text)
    except ValueError:
        cases = _unpacked(text, field)
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise RowError(f"field {field!r} must be a JSON list of {{input, output, testtype}}", field)
    return cases


def _unpacked(text: str, field: str) -> object:
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
        if unpacker.unconsumed_tail:
            raise RowError(f"field {field!r} unpacks to more than a gigabyte: remove the row", field)
        return json.loads(_text_of_pickle(packed))
    except (binascii.Error, zlib.error, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(
            f"field {field!r} is neither JSON nor JSON packed as the releases do it ({error})", field
        ) from None


def _text_of_pickle(packed: bytes) -> str:
    """Raises ValueError for a pickle of anything but one text."""
    codes = [(code.name, argument) for code, argument, _ in pickletools.genops(packed)]
    texts = [argument for name, argument in codes if "UNICODE" in name and isinstance(argument, str)]
    others = {name for name, _ in codes if "UNICODE" not in name} - _AROUND_A_TEXT
    if len(texts) != 1 or others:
        raise ValueError(f"a pickle of more than a text: {', '.join(sorted(others)) or f'{len(texts)} texts'}")
    return texts[0]
