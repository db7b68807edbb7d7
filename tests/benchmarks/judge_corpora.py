"""`python -m tests.benchmarks.judge_corpora`: the judge over whole data sets, their own solutions, as a Markdown table.

Needs the shared data (DIFFRL_SHARED) and, for BigCodeBench-Hard, a container engine, where the image `diffrl-sandbox:full`
is brought up to date. One submission at a time; the seconds are those of judging, without the making of EvalPlus's results.
"""

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable

from sandbox.container import ContainerSandbox
from sandbox.image.build import build_image
from sandbox.process import ProcessSandbox
from sandbox.types import Sandbox, Submission, TestStatus
from tests.sandbox import corpora

FULL_IMAGE = "diffrl-sandbox:full"


failures: dict[str, list[str]] = defaultdict(list)  # detail -> ids


def table_row(name: str, sandbox: Sandbox, submissions: Iterable[Submission]) -> str:
    problems = tests = passes = low = 0
    seconds = cpu_s = 0.0
    for submission in submissions:
        started = time.perf_counter()
        verdict = sandbox.judge(submission)
        seconds += time.perf_counter() - started
        cpu_s += verdict.cpu_s
        problems += 1
        tests += len(verdict.statuses)
        low += verdict.trust == "low"
        if set(verdict.statuses) == {TestStatus.PASSED}:
            passes += 1
        else:
            failures[next(filter(None, verdict.details))].append(submission.id)
    return f"| {name} | {sandbox.name} | {problems} | {tests} | {passes} | {low / problems:.0%} | {seconds:.0f} | {cpu_s:.0f} |"


def main() -> None:
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    print(
        "| data set | backend | problems | tests | own solutions that pass | low trust | seconds | CPU seconds of programs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with ProcessSandbox() as sandbox:
        print(table_row("MBPP", sandbox, corpora.mbpp()))
        print(table_row("MBPP+", sandbox, corpora.mbpp_plus()))
        print(table_row("HumanEval", sandbox, corpora.humaneval()))
        print(table_row("HumanEval+", sandbox, corpora.humaneval_plus()))
    build_image("full", FULL_IMAGE)
    with ContainerSandbox(image=FULL_IMAGE, slots=1, memory_mb=3072) as sandbox:
        print(table_row("BigCodeBench-Hard", sandbox, corpora.bigcodebench_hard()))
    print("\nDo not pass:")
    for detail, names in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"- {', '.join(names)}: {detail}")


if __name__ == "__main__":
    main()
