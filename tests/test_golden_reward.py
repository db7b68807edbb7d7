"""Format, code extraction and AR-ness against golden values.

Where `format_score` differs from the release on purpose, the difference is predicted from the text alone, by
`reason_to_differ`; every other case must agree.
"""

import ast
import re
import warnings

from diffrl.analysis import global_ar_ness, local_ar_ness
from diffrl.prompts import extract_code, format_score
from tests.golden_files import golden_json

BLANKS = " \t\r\n"
END_TOKEN = re.compile(r"<\|(im_end|endoftext|dlm_pad|eot_id)\|>")


def reason_to_differ(text: str) -> str | None:
    """Why the release gives 0 to a text that has one python block and nothing after it but blanks and end tokens."""
    parts = text.split("```")
    if len(parts) != 3 or not parts[1].startswith("python\n"):
        return None
    tail = parts[2]
    if tail == "\n" or END_TOKEN.sub("", tail).strip(BLANKS):
        return None
    if tail == "":
        return "text ends in ``` without a newline"
    return "end token after the closing fence" if END_TOKEN.search(tail) else "blanks after the closing fence"


def parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def reward_cases() -> list[dict]:
    cases = golden_json("reward/cases.json")["format_and_extract"]
    assert cases
    return cases


def test_golden_extract_python(subtests):
    for index, case in enumerate(reward_cases()):
        with subtests.test(f"case {index}: {case['text'][:60]!r}"):
            assert extract_code(case["text"]) == case["extract_python"]


def test_golden_format_reward_python(subtests):
    for index, case in enumerate(reward_cases()):
        reason = reason_to_differ(case["text"])
        with subtests.test(f"case {index}: {case['text'][:60]!r}: {reason or 'as the release'}"):
            if reason is None:
                assert format_score(case["text"]) == case["format_reward_python"]
            else:
                assert case["format_reward_python"] == 0.0  # the release's flaw, or there is nothing to differ from
                assert format_score(case["text"]) == (1.0 if parses(case["extract_python"]) else 0.5)


def test_golden_ar_ness(subtests):
    cases = golden_json("arness/cases.json")["cases"]
    assert cases
    for case in cases:
        with subtests.test(case["name"]):
            for k, expected in case["local"].items():
                assert local_ar_ness(case["order"], int(k)) == expected
            for k, expected in case["global"].items():
                assert global_ar_ness(case["order"], int(k)) == expected
