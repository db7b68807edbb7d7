import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffrl.prompts import build_prompt, chat_ids, extract_code, format_score, parse_python
from diffrl.types import Problem

GOOD = "```python\nx = 1\n```"
BAD = "```python\nx = \n```"


def problem(**changes) -> Problem:
    fields = {
        "id": "p",
        "prompt": "Square x.",
        "prompt_tests": ("assert f(2) == 4",),
        "reward_tests": ("assert f(3) == 9",),
    }
    return Problem(**{**fields, **changes})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (GOOD, "x = 1\n"),
        (f"{GOOD}\n```python\ny = 2\n```\n", "x = 1\n"),
        ("```\nother\n```\n" + GOOD, "x = 1\n"),
        ("```python\n```", ""),
        ("```python\nx = 1\n", ""),
        ("```python3\nx = 1\n```", ""),
        ("```python\r\nx = 1\n```", ""),
        ("```cpp\nint x;\n```", ""),
        ("", ""),
    ],
)
def test_extract_code_takes_the_first_closed_block(text, code):
    assert extract_code(text) == code


def test_extract_code_takes_the_language_literally():
    assert extract_code("```c++\nint x;\n```", "c++") == "int x;\n"
    assert extract_code("```cc\nint x;\n```", "c+") == ""


@pytest.mark.parametrize(
    "tail", ["", "\n", "\r\n", " \n", "\n\n \t\n", "<|im_end|>", "\n<|im_end|>\n<|dlm_pad|><|dlm_pad|>"]
)
def test_format_ignores_blanks_and_end_tokens_after_the_block(tail):
    assert format_score(GOOD + tail) == 1.0
    assert format_score(f"Here it is.\n{GOOD}{tail}") == 1.0
    assert format_score(BAD + tail) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1",
        "```python\nx = 1",
        "```\nx = 1\n```",
        "````python\nx = 1\n````",
        f"{GOOD}\nThat is it.",
        f"{GOOD}\n<|im_start|>",
        f"{GOOD}\n<|im_end|>more",
        f"{GOOD}\n{GOOD}",
        f"{GOOD}`",
        "```python```",
        "```python x = 1\n```",
    ],
)
def test_format_is_zero_for_anything_but_one_python_block(text):
    assert format_score(text) == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "x = '\x00'",
        "x = '\ud800'",
        "x = " + "9" * 5000,
        "(" * 5000,
        "-" * 100_000 + "1",
        "a" + ".b" * 100_000,
        "lambda:" * 5000 + "1",
        "if a:\n  b\n" + "elif a:\n  b\n" * 5000,
        "def f(:\n",
    ],
    ids=["null", "surrogate", "huge_int", "brackets", "unary", "attributes", "lambdas", "elifs", "syntax"],
)
def test_code_that_python_cannot_take_scores_half(code):
    assert format_score(f"```python\n{code}\n```") == 0.5


@pytest.mark.parametrize("code", [r'x = "\d"', "x = 1 is 1", "assert (1, 'always')", "x = 0x1for x in y"])
def test_warnings_about_the_code_do_not_leak(code):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert format_score(f"```python\n{code}\n```") in (0.5, 1.0)
    assert caught == []
    assert format_score('```python\nx = "\\d"\n```') == 1.0  # here warnings are errors; the code still parses


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["```", "`", "python", "\n", "\r\n", " ", "x = 1", "def f(", "\x00", "\ud800", "<|im_end|>"])
    )
)
def test_any_text_has_a_score_and_code_comes_from_the_text(parts):
    text = "".join(parts)
    score = format_score(text)
    assert score in (0.0, 0.5, 1.0)
    assert f"```python\n{extract_code(text)}```" in text or extract_code(text) == ""
    if score:
        assert text.count("```") == 2
        assert score == (1.0 if parse_python(extract_code(text)) else 0.5)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_any_block_has_a_score(code):
    assert format_score(f"```python\n{code}\n```") in (0.0, 0.5, 1.0)
    assert extract_code(f"```python\n{code}\n```") == (code + "\n").partition("```")[0]


def test_prompt_shows_the_prompt_tests_and_nothing_graded():
    assert build_prompt(problem()) == "Square x.\nYour code should pass this test:\nassert f(2) == 4"
    assert build_prompt(problem(prompt_tests=())) == "Square x."
    two = problem(prompt=" Square x.\n", prompt_tests=("assert f(2) == 4\r\n", "assert f(0) == 0"))
    assert build_prompt(two) == "Square x.\nYour code should pass these tests:\nassert f(2) == 4\nassert f(0) == 0"


def test_chat_ids_end_where_the_completion_begins():
    words = ["?", "user:", "assistant:", "Square", "x."]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert chat_ids(tokenizer, problem(prompt_tests=())) == [1, 3, 4, 2]


def test_reading_completions_does_not_import_transformers():
    code = "import sys, diffrl.rewards; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
