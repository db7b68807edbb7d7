"""What `diffrl judge` and `diffrl sandbox` do: no Ray, no torch."""

import json
import sys

from diffrl.errors import ConfigError
from sandbox.backends import BackendOptions, open_sandbox, pods_for, starter
from sandbox.corpus import Outcome, is_clean, judge_corpus, read_corpus, summary, table_row
from sandbox.image.build import build_image
from sandbox.programs import read_submission, verdict_lines
from sandbox.types import Limits, SandboxError, TestMode, TestStatus


def judge_file(path: str, options: BackendOptions, limits: Limits, *, as_json: bool) -> bool:
    """Judge a corpus of programs whose acceptable pass rates are known. True when the judge did nothing wrong."""
    outcomes: list[Outcome] = []
    try:
        programs = read_corpus(path, limits)
        with pods_for(options) as options:
            for outcome in judge_corpus(starter(options), programs):
                outcomes.append(outcome)
                print(table_row(outcome), file=sys.stderr if as_json else sys.stdout, flush=True)
    except (ValueError, SandboxError) as error:
        raise ConfigError(str(error)) from error
    found = summary(outcomes)
    if as_json:
        print(json.dumps(found))
    else:
        counts = {key: len(value) if isinstance(value, list) else value for key, value in found.items()}
        print(", ".join(f"{key} {count}" for key, count in counts.items()))
    return is_clean(found)


def judge_solution(
    solution: str, tests: str, mode: str | None, entry_point: str | None, options: BackendOptions, limits: Limits
) -> bool:
    """Judge one program, with a line per test. True when all of them pass."""
    try:
        submission = read_submission(solution, tests, mode_of(mode), entry_point, limits)
        with pods_for(options) as options, open_sandbox(options) as pool:
            verdict = pool.judge(submission)
    except (ValueError, SandboxError) as error:
        raise ConfigError(str(error)) from error
    print("\n".join(verdict_lines(submission, verdict)) + f", {pool.name} backend")
    return set(verdict.statuses) == {TestStatus.PASSED}


def mode_of(name: str | None) -> TestMode | None:
    if name is not None and name not in set(TestMode):
        raise ConfigError(f"--mode: {name!r} must be one of {', '.join(TestMode)}")
    return None if name is None else TestMode(name)


def build_sandbox(variant: str, tag: str | None, mirror: str) -> None:
    """Build the judge image into the local engine and print its id."""
    if variant not in ("base", "full"):
        raise ConfigError(f"--variant: {variant!r} must be base or full")
    try:
        print(build_image(variant, tag or f"diffrl-sandbox:{variant}", mirror=mirror))
    except SandboxError as error:
        raise ConfigError(str(error)) from error
