"""The judge against the shared collections: hostile programs, and reference solutions that must all pass."""

import gzip
import json

import pytest

from sandbox.process import ProcessSandbox
from sandbox.types import Limits, Submission, TestMode, TestStatus
from tests.shared_files import shared_file


def test_attacks_get_only_what_a_correct_judge_may_give() -> None:
    rows = [json.loads(line) for line in shared_file("attacks/public.jsonl").read_text().splitlines()]
    assert len(rows) == 42
    wrong = []
    with ProcessSandbox() as sandbox:
        for row in rows:
            submission = Submission(
                id=row["name"], code=row["code"], tests=tuple(row["tests"]), limits=Limits(cpu_s=0.5, wall_s=3)
            )
            verdict = sandbox.judge(submission)
            rate = round(verdict.statuses.count(TestStatus.PASSED) / len(verdict.statuses), 4)
            if rate not in row["accept"] or verdict.trust != "high":
                wrong.append((row["name"], rate, verdict))
    assert not wrong


def test_all_of_humaneval_passes() -> None:
    with gzip.open(shared_file("data/humaneval/HumanEval.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    with ProcessSandbox() as sandbox:
        verdicts = [
            sandbox.judge(
                Submission(
                    id=row["task_id"],
                    code=row["prompt"] + row["canonical_solution"],
                    tests=(row["test"],),
                    mode=TestMode.CHECK_FUNCTION,
                    entry_point=row["entry_point"],
                )
            )
            for row in rows
        ]
    assert [v for v in verdicts if v.statuses != (TestStatus.PASSED,) or v.trust != "high"] == []


@pytest.mark.slow
def test_all_of_mbpp_passes() -> None:
    rows = [json.loads(line) for line in shared_file("data/mbpp/mbpp.jsonl").read_text().splitlines()]
    assert len(rows) == 974
    with ProcessSandbox() as sandbox:
        verdicts = [
            sandbox.judge(
                Submission(
                    id=str(row["task_id"]),
                    code=row["code"],
                    tests=tuple(row["test_list"]),
                    setup=row["test_setup_code"],
                    limits=Limits(cpu_s=10, wall_s=60),
                )
            )
            for row in rows
        ]
    assert [v for v in verdicts if set(v.statuses) != {TestStatus.PASSED} or v.trust != "high"] == []
