"""The shared data sets as submissions of their own reference solutions, which an honest judge must pass.

EvalPlus gives inputs only: what is expected comes from the reference solution, run here. As in EvalPlus, results are
compared exactly, floats and flat sequences of floats with a tolerance of at least 1e-6.
"""

import copy
import gzip
import json
from collections.abc import Iterable, Iterator
from typing import Any

from sandbox.types import Limits, Submission, TestMode
from tests.shared_files import shared_file

PATIENT = Limits(cpu_s=100, wall_s=500, memory_mb=2048)
BIGCODEBENCH_CANNOT_PASS = {  # apart from those whose libraries the image does not have
    "BigCodeBench/101": "reads its table from the network",
    "BigCodeBench/302": "the pandas of Debian 12 does not refuse its malformed table",
    "BigCodeBench/1012": "downloads an archive",
}
BIGCODEBENCH_ACROSS = {
    f"BigCodeBench/{number}" for number in (854, 928, 990, 1077)
}  # the others run beside the program
_CHUNK_CASES, _CHUNK_CHARS = 200, 100_000
_LONG = 10_000
_SAME = """
import json
def same(out, expected, atol):
    if type(expected) in (list, tuple) and type(out) in (list, tuple) and len(out) == len(expected):
        return out == expected or all(close(*pair, atol) for pair in zip(out, expected))
    return close(out, expected, atol)
def close(out, expected, atol):
    if type(expected) is float and type(out) in (int, float):
        return out == expected or abs(out - expected) <= (atol or 1e-6) + 1e-7 * abs(expected)
    return out == expected
"""
_CHECK = "def check(candidate):\n    for args, expected in {cases}:\n        assert {condition}, args\n"


def read_rows(name: str) -> list[dict[str, Any]]:
    path = shared_file(f"data/{name}")
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def humaneval() -> list[Submission]:
    return [
        Submission(
            id=row["task_id"],
            code=row["prompt"] + row["canonical_solution"],
            tests=(row["test"],),
            mode=TestMode.CHECK_FUNCTION,
            entry_point=row["entry_point"],
            limits=PATIENT,
        )
        for row in read_rows("humaneval/HumanEval.jsonl.gz")
    ]


def mbpp() -> list[Submission]:
    return [
        Submission(
            id=f"Mbpp/{row['task_id']}",
            code=row["code"],
            tests=tuple(row["test_list"]),
            setup=row["test_setup_code"],
            limits=PATIENT,
        )
        for row in read_rows("mbpp/mbpp.jsonl")
    ]


def humaneval_plus(every: int = 1) -> Iterator[Submission]:
    """Each `every`-th problem with all its inputs."""
    for row in read_rows("humanevalplus/HumanEvalPlus.jsonl.gz")[::every]:
        code = row["prompt"] + row["canonical_solution"]
        condition = f"same(candidate(*args), expected, {row['atol']})"
        yield _plus(row["task_id"], code, row["entry_point"], row["base_input"] + row["plus_input"], condition)


def mbpp_plus(every: int = 1) -> Iterator[Submission]:
    """Each `every`-th problem with all its inputs, whose tuples and sets only the file with whole tests keeps."""
    entry_points = {row["task_id"]: row["entry_point"] for row in read_rows("mbppplus/MbppPlus.jsonl.gz")}
    for row in read_rows("mbppplus/MbppPlus-OriginFmt.jsonl.gz")[::every]:
        test = row["test"]
        assignment = next(line for line in test.splitlines() if line.startswith("inputs = "))
        inputs = eval(assignment.partition("=")[2], {"inf": float("inf")})
        if row["task_id"] == 255:  # the other five results have 6 to 128 million parts, and a frame has 32 MB
            inputs = [args for args in inputs if args[1] < 70]
        if "exp == (out is not None)" in test:
            condition = "(candidate(*args) is not None) == bool(expected)"
        elif "exp = set(exp)" in test:
            condition = "set(candidate(*args)) == set(expected)"
        else:
            condition = f"same(candidate(*args), expected, {1e-4 if test.rstrip().endswith('0.0001)') else 0})"
        task_id = f"Mbpp/{row['task_id']}"
        yield _plus(task_id, row["code"], entry_points[task_id], inputs, condition)


def _plus(task_id: str, code: str, entry_point: str, inputs: Iterable[Any], condition: str) -> Submission:
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    reference = namespace[entry_point]
    tests: list[str] = []
    chunk: list[str] = []
    for args in inputs:
        expected = reference(*copy.deepcopy(args))
        if "is not None" in condition:
            expected = expected is not None
        chunk.append(f"({literal(args)}, {literal(expected)})")
        if len(chunk) == _CHUNK_CASES or sum(map(len, chunk)) > _CHUNK_CHARS:
            tests.append(_CHECK.format(cases=f"[{', '.join(chunk)}]", condition=condition))
            chunk = []
    if chunk:
        tests.append(_CHECK.format(cases=f"[{', '.join(chunk)}]", condition=condition))
    return Submission(
        id=task_id,
        code=code,
        tests=tuple(tests),
        mode=TestMode.CHECK_FUNCTION,
        entry_point=entry_point,
        setup=_SAME,
        limits=PATIENT,
    )


def literal(value: Any) -> str:
    """Source of a value, as exact as `repr`, also for infinities, NaN and integers of thousands of digits."""
    kind = type(value)
    if kind is float and value - value != 0:
        return f"float('{value}')"
    if kind is int:
        return repr(value) if abs(value) < 10**1000 else hex(value)
    if isinstance(value, dict):  # a Counter equals the dict of the same items
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if kind is list and len(value) > _LONG and {type(item) for item in value} <= {int, float}:
        return f"json.loads('{json.dumps(value)}')"  # a display of so many items takes the compiler a gigabyte
    if kind in (list, tuple, set, frozenset):
        items = f"[{', '.join(map(literal, value))}]"
        return items if kind is list else f"{kind.__name__}({items})"
    assert kind in (type(None), bool, str, bytes, float, complex), kind
    return repr(value)


def bigcodebench_hard() -> list[Submission]:
    return [
        Submission(
            id=row["task_id"],
            code=row["complete_prompt"] + "\n" + row["canonical_solution"],
            tests=(row["test"],),
            mode=TestMode.UNITTEST,
            entry_point=row["entry_point"],
            limits=PATIENT,
        )
        for row in read_rows("bigcodebench/BigCodeBench_Hard.jsonl")
    ]
