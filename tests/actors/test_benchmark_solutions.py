"""The data sets' own solutions must pass: with less, what is measured would be the judge. A part of each here, all of it slow."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from tests.actors.conftest import Called
from tests.diffrl.test_benchmarks import LIVE
from tests.diffrl.test_problems import write_jsonl
from tests.shared_files import shared_file

FILES = {  # benchmark: (file, problems, problems of the fast test)
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164, 20),
    "humaneval_plus": ("humanevalplus/HumanEvalPlus.jsonl.gz", 164, 5),
    "mbpp": ("mbpp/mbpp.jsonl", 500, 20),
    "mbpp_plus": ("mbppplus/MbppPlus.jsonl.gz", 378, 5),
    "gsm8k": ("gsm8k/test.jsonl", 1319, 1319),
}
# Of those that need the standard library alone; the sandbox has no network.
NEEDS_THE_NETWORK = {"BigCodeBench/101", "BigCodeBench/1012"}


def passes(called: Called, benchmark: str, data: Path, number: int) -> None:
    options = ("--limit", str(number), "--backend", "process")
    status, stdout, stderr = called("eval", "--benchmark", benchmark, "--data", str(data), *options)
    assert status == 0, stderr
    assert stdout.splitlines()[-1] == f"{benchmark}: {number} of {number} canonical solutions pass", stdout


@pytest.mark.parametrize("benchmark", FILES)
def test_a_part_of_the_solutions_passes(benchmark: str, called: Called):
    file, _, number = FILES[benchmark]
    passes(called, benchmark, shared_file(f"data/{file}"), number)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FILES)
def test_all_solutions_pass(benchmark: str, called: Called):
    file, number, _ = FILES[benchmark]
    passes(called, benchmark, shared_file(f"data/{file}"), number)


@pytest.mark.parametrize("number", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_bigcodebench_passes_where_the_standard_library_is_enough(number: int | None, called: Called, tmp_path: Path):
    """The others need the image `full`: tests/sandbox/test_corpora.py."""
    text = shared_file("data/bigcodebench/BigCodeBench_Hard.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    plain = [
        row
        for row in rows
        if set(ast.literal_eval(row["libs"])) <= sys.stdlib_module_names and row["task_id"] not in NEEDS_THE_NETWORK
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", *plain[:number])
    for benchmark in ("bigcodebench_complete", "bigcodebench_instruct"):
        passes(called, benchmark, data, len(plain[:number]))


def test_a_script_passes_in_the_format_of_livecodebench(called: Called, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", {**LIVE, "solution": "print(sum(map(int, input().split())))\n"})
    passes(called, "livecodebench", data, 1)
    write_jsonl(data, {**LIVE, "solution": "print(4)\n"})
    status, stdout, _ = called("eval", "--benchmark", "livecodebench", "--data", str(data), "--backend", "process")
    assert status == 0 and re.search(r"^livecodebench: 0 of 1 canonical", stdout, re.MULTILINE)
