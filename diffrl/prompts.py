"""Text around the model: the question it is asked, and the code and the format read from its completion.

The format of the published recipe: a completion is free text without three backticks, then ONE block that
opens with the line "```python", then nothing more. `extract_code` agrees with the release
(apple/ml-diffucoder f735e01) on all golden texts. `format_score` departs from it on purpose in what may
follow the closing fence. The release wants exactly one newline, so a model that stops right after the fence
loses its format reward; ours allows any run of
- nothing at all (the text ends in three backticks),
- spaces, tabs, blank lines, CRLF,
- end tokens that a decoder left in (`END_TOKENS`).
Text after the block, a second block, "```python3", "``` " before the code and four backticks stay 0, as in
the release.
"""

import ast
import re
import threading
import warnings
from typing import TYPE_CHECKING, cast

from diffrl.types import Problem

if TYPE_CHECKING:  # importing transformers takes seconds, and reward workers only need the text functions
    from transformers import PreTrainedTokenizerBase

FENCE = "```"
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|dlm_pad|>", "<|eot_id|>")  # of Dream and Qwen, and of LLaDA

_TAIL = re.compile(rf"(?:[ \t\r\n]|{'|'.join(map(re.escape, END_TOKENS))})*")
# warning filters belong to the whole process: two threads would restore each other's
_PARSE_LOCK = threading.Lock()


def extract_code(text: str, language: str = "python") -> str:
    """The inside of the first closed block that opens with the line "```<language>"; "" without one."""
    _, _, rest = text.partition(f"{FENCE}{language}\n")
    code, closing, _ = rest.partition(FENCE)
    return code if closing else ""


def format_score(text: str) -> float:
    """1.0: one fenced python block that parses; 0.5: fenced, but it does not parse; 0.0: anything else.

    Any text has a score. A block parses when `ast.parse` takes it, even if the compiler would not (a bare
    `return`).
    """
    _, _, rest = text.partition(FENCE)
    header, newline, body = rest.partition("\n")
    code, closing, tail = body.partition(FENCE)
    if header != "python" or not newline or not closing or not _TAIL.fullmatch(tail):
        return 0.0
    return 0.5 if parse_python(code) is None else 1.0


def build_prompt(problem: Problem) -> str:
    """The user message: the instruction, then the shown tests. Graded tests are never in it."""
    instruction = problem.prompt.strip()
    if not problem.prompt_tests:
        return instruction
    noun = "this test" if len(problem.prompt_tests) == 1 else "these tests"
    tests = "\n".join(test.strip() for test in problem.prompt_tests)
    return f"{instruction}\nYour code should pass {noun}:\n{tests}"


def chat_ids(tokenizer: "PreTrainedTokenizerBase", problem: Problem) -> list[int]:
    """Token ids of the prompt, up to where the completion begins; the system message is the template's."""
    messages = [{"role": "user", "content": build_prompt(problem)}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert isinstance(ids, list)
    return cast(list[int], ids)


def parse_python(code: str) -> ast.Module | None:
    """The syntax tree of untrusted code, None where it does not parse; no warning and no error gets out."""
    with _PARSE_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a "\d" in the code; where warnings are errors it would not parse
        try:
            return ast.parse(code)
        # ValueError: null bytes, lone surrogates; the last two: nesting deeper than the parser's stack
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
