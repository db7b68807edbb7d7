"""Measures a judge: programs whose acceptable pass rates are known, one after another in one warm sandbox.

After every program the sandbox must hold nothing of it, and judge a right and a wrong program of ours (canary.py) as if
nothing had been there before.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sandbox.canary import require_canary
from sandbox.types import Limits, Sandbox, SandboxError, Submission, TestMode, TestStatus, Verdict

_SLACK_S = 10.0  # on top of the time that a submission's own limits allow
_OWN_WORK_S = 300.0  # for canaries and for counting survivors
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A row of a corpus.

    Program(accept=(0.0, 0.6667), submission=Submission(id="always_eq", code="...", tests=("assert f(2) == 4", ...)))
    """

    submission: Submission
    accept: tuple[float, ...]  # pass rates that a correct judge may give


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a program.

    Outcome(program=Program(...), verdict=Verdict(...), error="", seconds=0.02, survivors=(), canary="")
    """

    program: Program
    verdict: Verdict | None
    error: str  # why there is no verdict
    seconds: float
    survivors: tuple[str, ...]
    canary: str  # what was wrong with the clean programs afterwards; "" when nothing was

    @property
    def rate(self) -> float | None:
        """Share of tests that passed, to 4 digits; None without a verdict."""
        if self.verdict is None:
            return None
        return round(self.verdict.statuses.count(TestStatus.PASSED) / len(self.verdict.statuses), 4)


def read_corpus(path: str | Path, limits: Limits) -> list[Program]:
    """Rows of JSON with name, code, tests, accept and perhaps mode, entry_point, setup; ValueError names a bad one."""
    programs = []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"corpus: {path} cannot be read ({error}): give a JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                programs.append(_program(json.loads(line), limits))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"corpus: {path}:{number}: {type(error).__name__} {error}: mend the row") from None
    if not programs:
        raise ValueError(f"corpus: {path} holds no programs")
    return programs


def _program(row: dict[str, Any], limits: Limits) -> Program:
    tests = tuple(test if isinstance(test, str) else json.dumps(test) for test in row["tests"])
    submission = Submission(
        id=str(row["name"]),
        code=row["code"],
        tests=tests,
        mode=TestMode(row.get("mode") or TestMode.ASSERTS),
        entry_point=row.get("entry_point"),
        setup=row.get("setup") or "",
        limits=limits,
    )
    accept = tuple(round(float(rate), 4) for rate in row["accept"])
    if not tests or not accept:
        raise ValueError("without tests or accept")
    return Program(submission=submission, accept=accept)


def judge_corpus(start: Callable[[], Sandbox], programs: Iterable[Program]) -> Iterator[Outcome]:
    """Judges each program, counts what it left behind, judges the canary: all in one sandbox, which is replaced only
    when it hangs. SandboxError when not even the first canary is judged as it must be."""
    sandbox = start()
    try:
        _within(_OWN_WORK_S, require_canary, sandbox)
        for program in programs:
            verdict, error, hangs = None, "", False
            started = time.monotonic()
            try:
                verdict = _within(bound_s(program.submission), sandbox.judge, program.submission)
            except TimeoutError:
                error, hangs = "no verdict in time", True
            except SandboxError as failure:
                error = str(failure) or type(failure).__name__
            seconds = time.monotonic() - started
            if hangs:
                _abandon(sandbox)
                sandbox = start()
            yield Outcome(
                program=program,
                verdict=verdict,
                error=error,
                seconds=seconds,
                survivors=_survivors(sandbox),
                canary=_canary(sandbox),
            )
    finally:
        _abandon(sandbox)


def bound_s(submission: Submission) -> float:
    """Seconds within which there must be a verdict."""
    limits = submission.limits
    return 2 * limits.wall_s + limits.cpu_s * len(submission.tests) + _SLACK_S


def summary(outcomes: Iterable[Outcome]) -> dict[str, int | list[str]]:
    """Counts of programs and of right canaries after them, and the names of those that something is wrong with:
    paid too much, too little (or not judged), not as accepted, without a verdict, not gone when judged."""
    found: dict[str, list[str]] = {key: [] for key in ("false_rewards", "lost", "wrong", "hung", "survivors")}
    programs = clean = 0
    for outcome in outcomes:
        rate, accept = outcome.rate, outcome.program.accept
        wrong = {
            "false_rewards": rate is not None and rate > max(accept),
            "lost": rate is None or rate < min(accept),
            "wrong": rate not in accept,
            "hung": rate is None,
            "survivors": bool(outcome.survivors),
        }
        for key in (key for key, holds in wrong.items() if holds):
            found[key].append(outcome.program.submission.id)
        programs += 1
        clean += not outcome.canary
    return {"programs": programs, **found, "next_clean_ok": clean}


def is_clean(found: dict[str, int | list[str]]) -> bool:
    """Whether a summary has nothing to complain of."""
    return found["programs"] == found["next_clean_ok"] and not any(
        value for value in found.values() if isinstance(value, list)
    )


def table_row(outcome: Outcome) -> str:
    """One line for a person; what is wrong stands at its end."""
    verdict, accept = outcome.verdict, outcome.program.accept
    remarks = [
        "" if outcome.rate in accept else f"NOT ACCEPTED, may be {' or '.join(f'{rate:g}' for rate in accept)}",
        f"survivors: {', '.join(outcome.survivors)}" if outcome.survivors else "",
        f"next clean programs: {outcome.canary}" if outcome.canary else "",
    ]
    counts = Counter(verdict.statuses) if verdict else {}
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or outcome.error
    rate, trust = ("-", "-") if verdict is None else (f"{outcome.rate:.4f}", verdict.trust)
    line = f"{outcome.program.submission.id:<28} {rate:>6}  {trust:<4}  {outcome.seconds:6.2f} s  {said}"
    return "  ".join([line, *filter(None, remarks)])


def _survivors(sandbox: Sandbox) -> tuple[str, ...]:
    try:
        return tuple(_within(_OWN_WORK_S, sandbox.survivors))
    except (SandboxError, TimeoutError) as error:
        return (f"unknown: {error or type(error).__name__}",)


def _canary(sandbox: Sandbox) -> str:
    try:
        _within(_OWN_WORK_S, require_canary, sandbox)
    except (SandboxError, TimeoutError) as error:
        return str(error) or type(error).__name__
    return ""


def _abandon(sandbox: Sandbox) -> None:
    """Ends a sandbox, but waits no longer for one that hangs than for one that works."""
    try:
        _within(_SLACK_S, sandbox.close)
    except (SandboxError, TimeoutError):
        return


def _within(seconds: float, function: Callable[..., T], *args: Any) -> T:
    """The function's result; TimeoutError when it takes longer, and then it may hang for as long as it likes."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)
