"""How a judge is measured: by scripted judges that go wrong in each way, and by the real one; and tests from files."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox import corpus
from sandbox.corpus import Program, bound_s, is_clean, judge_corpus, read_corpus, summary, table_row
from sandbox.process import ProcessSandbox
from sandbox.programs import infer_mode, read_submission, split_tests, verdict_lines
from sandbox.types import Limits, SandboxError, Submission, TestMode, TestStatus, Verdict

LIMITS = Limits(cpu_s=0.5, wall_s=3.0)
PASSED, FAILED = TestStatus.PASSED, TestStatus.FAILED


def row(name: str, code: str, accept: list[float], **more: object) -> dict[str, object]:
    tests = ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"]
    return {"name": name, "code": code, "tests": tests, "accept": accept, **more}


def write_corpus(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def programs(*names: str, accept: tuple[float, ...] = (0.5,)) -> list[Program]:
    return [Program(submission=Submission(id=n, code="", tests=("", ""), limits=LIMITS), accept=accept) for n in names]


class Judge:
    """A judge that is right about canaries and passes one test of two, but for what `on` says about a program."""

    name = "scripted"
    slots = 1

    def __init__(self, on: Callable[[str], Verdict | None] = lambda name: None) -> None:
        self.on = on
        self.judged: list[str] = []
        self.left: list[str] = []

    def judge(self, submission: Submission) -> Verdict:
        self.judged.append(submission.id)
        special = self.on(submission.id)
        if special is not None:
            return special
        return statuses(PASSED, PASSED) if submission.id == "canary/right" else statuses(PASSED, FAILED)

    def survivors(self) -> list[str]:
        return self.left

    def close(self) -> None:
        self.judged.append("closed")


def statuses(*values: TestStatus) -> Verdict:
    return Verdict(id="", statuses=values, details=("",) * len(values), beside=(False,) * len(values), cpu_s=0.0)


def test_the_real_judge_is_clean_on_right_wrong_and_hostile_programs(tmp_path: Path) -> None:
    path = write_corpus(
        tmp_path / "corpus.jsonl",
        row("right", "def f(x): return x * x", [1.0]),
        row("two of three", "def f(x): return x * x if x > 0 else 7", [0.66666]),
        row("leaver", "import os\ndef f(x): os._exit(0)", [0]),
        row("hangs", "def f(x):\n    while True: pass", [0]),
        row(
            "daemon",
            "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\ndef f(x): return x * x",
            [1],
        ),
        {
            "name": "checked",
            "code": "def g(x): return x + 1",
            "tests": ["def check(candidate):\n    assert candidate(one) == 2"],
            "accept": [1],
            "mode": "check_function",
            "entry_point": "g",
            "setup": "one = 1",
        },
    )
    outcomes = list(judge_corpus(ProcessSandbox, read_corpus(path, LIMITS)))
    found = summary(outcomes)
    assert found["programs"] == found["next_clean_ok"] == 6 and is_clean(found), found
    assert [outcome.rate for outcome in outcomes] == [1.0, 0.6667, 0.0, 0.0, 1.0, 1.0]
    assert "3 timeout" in table_row(outcomes[3]) and "NOT ACCEPTED" not in table_row(outcomes[3])


def test_each_kind_of_mistake_is_named() -> None:
    def on(name: str) -> Verdict | None:
        if name == "broken":
            raise SandboxError("the sandbox left")
        return {"paid": statuses(PASSED, PASSED), "robbed": statuses(FAILED, FAILED)}.get(name)

    outcomes = list(judge_corpus(lambda: Judge(on), programs("fine", "paid", "robbed", "broken")))
    found = summary(outcomes)
    assert found == {
        "programs": 4,
        "false_rewards": ["paid"],
        "lost": ["robbed", "broken"],
        "wrong": ["paid", "robbed", "broken"],
        "hung": ["broken"],
        "survivors": [],
        "next_clean_ok": 4,
    }
    assert not is_clean(found)
    assert "the sandbox left" in table_row(outcomes[3])


def test_a_rate_between_two_accepted_ones_is_wrong_but_neither_paid_nor_lost() -> None:
    found = summary(judge_corpus(Judge, programs("between", accept=(0.0, 1.0))))
    assert (found["wrong"], found["false_rewards"], found["lost"]) == (["between"], [], [])
    assert not is_clean(found)


def test_survivors_and_spoilt_canaries_belong_to_the_program_before_them() -> None:
    judge = Judge()

    def on(name: str) -> Verdict | None:
        judge.left = ["pid 77 of uid 20003"] if name == "stayer" else []
        if name == "canary/wrong" and "poisoner" in judge.judged[-3:]:
            return statuses(PASSED, PASSED)
        return None

    judge.on = on
    outcomes = list(judge_corpus(lambda: judge, programs("before", "stayer", "poisoner", "after")))
    found = summary(outcomes)
    assert (found["survivors"], found["next_clean_ok"], found["wrong"]) == (["stayer"], 3, [])
    assert [bool(outcome.canary) for outcome in outcomes] == [False, False, True, False]
    assert "pid 77" in table_row(outcomes[1]) and "the wrong canary" in table_row(outcomes[2])
    assert judge.judged[-1] == "closed"


def test_every_program_is_followed_by_a_canary_in_the_same_sandbox() -> None:
    made: list[Judge] = []

    def start() -> Judge:
        made.append(Judge())
        return made[-1]

    list(judge_corpus(start, programs("a", "b")))
    canary = ["canary/right", "canary/wrong"]
    assert [judge.judged for judge in made] == [[*canary, "a", *canary, "b", *canary, "closed"]]


def test_a_judge_that_hangs_is_given_up_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_SLACK_S", 0.1)
    for_ever = threading.Event()
    made: list[Judge] = []

    def on(name: str) -> None:
        if name == "hangs":
            for_ever.wait(60)

    def start() -> Judge:
        made.append(Judge(on))
        return made[-1]

    short = Limits(cpu_s=0.01, wall_s=0.01)
    hanging = Program(submission=Submission(id="hangs", code="", tests=("",), limits=short), accept=(0.0,))
    found = summary(judge_corpus(start, [hanging, *programs("fine")]))
    for_ever.set()
    assert (found["hung"], found["lost"], found["next_clean_ok"]) == (["hangs"], ["hangs"], 2)
    assert len(made) == 2 and "fine" in made[1].judged


def test_a_judge_whose_first_canary_is_wrong_measures_nothing() -> None:
    with pytest.raises(SandboxError, match="canary"):
        list(judge_corpus(lambda: Judge(lambda name: statuses(PASSED, PASSED)), programs("a")))


def test_the_bound_covers_all_tests() -> None:
    limits = Limits(cpu_s=2.0, wall_s=20.0)
    assert bound_s(Submission(id="", code="", tests=("",) * 5, limits=limits)) == 40 + 10 + 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no programs"),
        ("{}\n", ":1: KeyError 'tests'"),
        ("[]\n", ":1: TypeError"),
        ("{\n", ":1: JSONDecodeError"),
        ('{"name": "a", "code": "", "tests": [], "accept": [1]}', "without tests or accept"),
        ('{"name": "a", "code": "", "tests": ["x"], "accept": ["x"]}', ":1: ValueError"),
        (
            '{"name": "a", "code": "", "tests": ["x"], "accept": [1], "mode": "guess"}',
            "'guess' is not a valid TestMode",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^corpus: {path}") as caught:
        read_corpus(path, LIMITS)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_corpus(tmp_path / "nowhere", LIMITS)


# Tests from files


def test_asserts_are_split_and_keep_what_stands_before_them() -> None:
    source = """
import math
def twice(x):
    return 2 * x
assert f(1) == 1
base = twice(2)
assert f(base) == 16, "sixteen"; assert math.isclose(f(0.5), 0.25)
print("never reached")
"""
    setup, tests = split_tests(source, infer_mode(source))
    assert setup == "import math\ndef twice(x):\n    return 2 * x"
    assert tests == [
        "assert f(1) == 1",
        "base = twice(2)\nassert f(base) == 16, 'sixteen'",
        "base = twice(2)\nassert math.isclose(f(0.5), 0.25)",
    ]


@pytest.mark.parametrize(
    ("source", "mode"),
    [
        ("assert f(1) == 1", TestMode.ASSERTS),
        ("x = 1\ndef check(candidate):\n    assert candidate(1) == 1", TestMode.CHECK_FUNCTION),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self): pass", TestMode.UNITTEST),
        ("from unittest import TestCase as TestCase\nclass T(TestCase): pass", TestMode.UNITTEST),
        ('{"stdin": "1", "stdout": "2"}\n', TestMode.STDIN),
    ],
)
def test_the_mode_is_found_out(source: str, mode: TestMode) -> None:
    assert infer_mode(source) is mode
    assert len(split_tests(source, mode)[1]) == 1


@pytest.mark.parametrize(
    ("solution", "tests", "message"),
    [
        ("def f(x): return x", "x = 1", "tests: no top-level assert"),
        ("def f(x): return x", "assert f(", "tests: not valid Python"),
        ("def f(x): return x", '{"stdin": "1"}', "must be"),
        ("def f(x): return x", '{"stdin": ', "is not JSON"),
        ("def f(x): return x\ndef g(x): return x", "def check(candidate): pass", "2 top-level functions"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, solution: str, tests: str, message: str) -> None:
    (tmp_path / "s.py").write_text(solution)
    (tmp_path / "t.py").write_text(tests)
    with pytest.raises(ValueError, match=message):
        read_submission(tmp_path / "s.py", tmp_path / "t.py", None, None, LIMITS)
    with pytest.raises(ValueError, match=r"solution: .* cannot be read"):
        read_submission(tmp_path / "nowhere", tmp_path / "t.py", None, None, LIMITS)


def test_files_become_a_submission_and_the_verdict_lines(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "t.py").write_text("from s import add\none = 1\nassert add(one, 1) == 2\nassert add(one, 1) == 3\n")
    submission = read_submission(tmp_path / "s.py", tmp_path / "t.py", None, None, LIMITS)
    with ProcessSandbox() as sandbox:
        verdict = sandbox.judge(submission)
        lines = verdict_lines(submission, verdict)
        assert lines[0] == "passed         assert add(one, 1) == 2"
        assert lines[1].startswith("failed         assert add(one, 1) == 3  # ")
        assert lines[2].startswith("1 of 2 tests passed, high trust, 0.0")
        check = "from s import add\ndef check(candidate):\n    assert candidate(2, 2) == add(1, 3) == 4\n"
        (tmp_path / "t.py").write_text(check)
        submission = read_submission(tmp_path / "s.py", tmp_path / "t.py", None, None, LIMITS)
        assert (submission.entry_point, submission.mode) == ("add", TestMode.CHECK_FUNCTION)
        assert sandbox.judge(submission).statuses == (PASSED,)
