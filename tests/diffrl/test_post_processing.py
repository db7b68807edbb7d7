"""Each rule by cases. A changed expectation here is a new POST_PROCESSING."""

import pytest

from diffrl.benchmarks.post_processing import POST_PROCESSING, chat_code, cut_at, last_number


def test_the_version_of_these_rules():
    assert POST_PROCESSING == "1"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\n", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```Python3\nx = 1\n```", "x = 1\n"),
        ("```python title=a.py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),  # not marked
        ("```bash\nls\n```\n```python\nx = 1\n```", "x = 1\n"),  # the marked one goes first
        ("```bash\nls\n```", "ls\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),  # the window ran out
        ("```python\n", ""),
        ("```python\ns = '''\n```x\n'''\n```\n", "s = '''\n```x\n'''\n"),  # not alone on its line
        ("````python\nx = '''\n```\n'''\n````\n", "x = '''\n```\n'''\n"),  # a longer fence
        ("   ```python\nx = 1\n  ```\n", "x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("def f(x):\n    return x\n", "def f(x):\n    return x\n"),  # no fence
        ("Use `x` and ```y```.", "Use `x` and ```y```."),
        ("    x = 1\n", "    x = 1\n"),  # nothing is dedented
        ("", ""),
    ],
)
def test_code_of_a_chat_answer(text: str, code: str):
    assert chat_code(text) == code


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return x\n\ndef g(): pass", "    return x\n"),
        ("    return x\nif __name__ == 1: pass\ndef g(): pass", "    return x"),
        ("def g(): pass", "def g(): pass"),  # a stop sequence begins with a line break
        ("    def g(): pass\n", "    def g(): pass\n"),
        ("", ""),
    ],
)
def test_continuations_end_before_the_first_stop(text: str, kept: str):
    assert cut_at(text, ("\ndef ", "\nif __name__")) == kept


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = 18.\n#### 18", "18"),
        ("She makes $1,234,567.50 a day.", "1234567.5"),
        ("18.00", "18"),
        ("It is -3.", "-3"),
        ("5-3", "-3"),  # a sign right before a number is one
        ("1,2", "2"),  # no group of thousands
        ("1000000", "1000000"),
        ("0.0", "0"),
        ("-$4", "-4"),
        (".5 liters", "0.5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None):
    assert last_number(text) == number
