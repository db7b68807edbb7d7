"""The judge against the shared collections: hostile programs, reference solutions that must all pass, mutants of them."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from sandbox.container import ContainerSandbox
from sandbox.corpus import judge_corpus, read_corpus, summary
from sandbox.image.build import build_image
from sandbox.image.fingerprint import judge_fingerprint
from sandbox.process import ProcessSandbox
from sandbox.types import Limits, Sandbox, SandboxUnavailableError, Submission, TestStatus, Verdict
from tests import container_engine as engines
from tests.sandbox import corpora
from tests.sandbox.mutants import mutants, plain_execution
from tests.shared_files import shared_file

pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # in the data sets' own code


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ProcessSandbox]:
    with ProcessSandbox() as sandbox:
        yield sandbox


def not_passed(sandbox: Sandbox, submissions: Iterable[Submission], count: int) -> list[Verdict]:
    """Verdicts that are not what a right program deserves: every test passed, away from the program."""
    verdicts = [sandbox.judge(submission) for submission in submissions]
    assert len(verdicts) == count
    return [v for v in verdicts if set(v.statuses) != {TestStatus.PASSED} or v.trust != "high"]


def test_attacks_get_only_what_a_correct_judge_may_give(any_sandbox: Sandbox) -> None:
    programs = read_corpus(shared_file("attacks/public.jsonl"), Limits(cpu_s=0.5, wall_s=3))
    outcomes = list(judge_corpus(lambda: any_sandbox, programs))
    found = summary(outcomes)
    assert found.pop("programs") == found.pop("next_clean_ok") == 42
    assert found == {"false_rewards": [], "lost": [], "wrong": [], "hung": [], "survivors": []}
    assert [o for o in outcomes if o.verdict is None or o.verdict.trust != "high"] == []


def test_all_of_humaneval_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.humaneval(), 164) == []


def test_a_part_of_mbpp_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.mbpp()[::5], 195) == []


def test_a_part_of_humaneval_plus_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.humaneval_plus(every=16), 11) == []


def test_a_part_of_mbpp_plus_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.mbpp_plus(every=20), 19) == []


def test_results_in_another_shape_fail(sandbox: ProcessSandbox) -> None:
    wrong = "\n_right = {0}\ndef {0}(*args): return (_right(*args),)\n"
    for submission in (*corpora.humaneval_plus(every=16), *corpora.mbpp_plus(every=20)):
        code = submission.code + wrong.format(submission.entry_point)
        assert TestStatus.PASSED not in sandbox.judge(replace(submission, code=code)).statuses, submission.id


@pytest.mark.slow
def test_all_of_mbpp_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.mbpp(), 974) == []


@pytest.mark.slow
def test_all_of_humaneval_plus_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.humaneval_plus(), 164) == []


@pytest.mark.slow
def test_all_of_mbpp_plus_passes(sandbox: ProcessSandbox) -> None:
    assert not_passed(sandbox, corpora.mbpp_plus(), 378) == []


@pytest.mark.slow
@pytest.mark.docker
def test_bigcodebench_hard_passes_as_far_as_its_libraries_are_there(container_engine: str) -> None:
    image = f"diffrl-sandbox:test-full-{judge_fingerprint()[:12]}"
    try:
        build_image("full", image, engine_url=container_engine)
    except SandboxUnavailableError as error:
        engines.unavailable(str(error))
    with ContainerSandbox(image=image, slots=1, memory_mb=3072, engine_url=container_engine) as sandbox:
        verdicts = {s.id: sandbox.judge(s) for s in corpora.bigcodebench_hard()}
    assert len(verdicts) == 148
    failed = {name: v.details[0] for name, v in verdicts.items() if v.statuses != (TestStatus.PASSED,)}
    missing = {name for name, detail in failed.items() if "ModuleNotFoundError" in detail}
    assert set(failed) - missing == set(corpora.BIGCODEBENCH_CANNOT_PASS), failed
    assert len(verdicts) - len(failed) >= 100
    assert {name for name, v in verdicts.items() if v.trust == "high"} == corpora.BIGCODEBENCH_ACROSS


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_mutants_fare_as_in_plain_execution(sandbox: ProcessSandbox, count: int) -> None:
    problems = [
        [problem for problem in problems if len(mutants(problem, 5)) == 5][:: 200 // count][: count // 2]
        for problems in (corpora.humaneval(), corpora.mbpp()[:300])
    ]
    tally: collections.Counter[bool] = collections.Counter()
    disagreements = []
    for problem in itertools.chain(*problems):
        for mutant in mutants(problem, 5):
            verdict, truth = sandbox.judge(mutant), plain_execution(mutant)
            assert len(truth) == len(mutant.tests)
            tally[all(truth)] += 1
            if [status is TestStatus.PASSED for status in verdict.statuses] != truth:
                disagreements.append((mutant.id, truth, verdict, mutant.code))
    assert disagreements == []
    assert tally.total() == 5 * count
    assert tally[False] > 0.7 * tally.total()  # the rest are mutants that the data set's own tests let through
