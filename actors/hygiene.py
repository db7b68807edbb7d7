"""`diffrl data clean`: what should not be trained on, by text (diffrl/data/hygiene.py) and by the judge, is left out and listed.

The judge runs every problem's own solution several times. `broken`: it never passes all tests, so the problem pays nobody.
`flaky`: the verdicts differ, so a reward would be luck. A test that an empty program passes is told (`passes_empty`), and so is
a problem on which the judge itself failed (`unjudged`): neither says that the problem is bad.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

from actors.reward import submission
from diffrl.config import ProblemsConfig
from diffrl.data.hygiene import (
    LEFT_OUT,
    Contamination,
    Finding,
    NgramOptions,
    benchmark_items,
    contaminated,
    duplicates,
)
from diffrl.data.problems import problem_table
from diffrl.data.sources import check_ids, problems_of
from diffrl.errors import ConfigError
from diffrl.files import write_lines
from diffrl.types import Problem
from sandbox.backends import BackendOptions, open_sandbox, pods_for
from sandbox.pool import Pool
from sandbox.types import Limits, SandboxError, TestStatus

EMPTY = "pass\n"  # the judge has nothing to run in a blank program
MAX_TOLD = 3  # of each kind, on stdout
LIMITS = Limits(cpu_s=2.0, wall_s=20.0, memory_mb=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanOptions:
    """CleanOptions(against={"humaneval": "HumanEval.jsonl.gz"}, runs=3)"""

    against: Mapping[str, str]  # benchmark -> its file
    min_share: float = 0.3  # of an item, that a contaminated problem holds
    threshold: float = 0.8  # of near duplicates
    runs: int = 3  # of each solution; 0: the judge is not asked


def clean(source: ProblemsConfig, out: str, options: CleanOptions, sandbox: BackendOptions) -> Counter[str]:
    """Write the problems that stay to `out` (.jsonl or .parquet, our own format) and all findings to `out`.findings.jsonl.
    Prints what was found. Raises ConfigError for input that cannot be used."""
    if not out.endswith((".jsonl", ".parquet")):
        raise ConfigError(f"--out: {out} has an unknown ending; give a .jsonl or .parquet file")
    if not Path(out).parent.is_dir():
        raise ConfigError(f"--out: {out} is in a folder that does not exist; make it")
    index = contamination_of(options)
    problems = problems_of(source)
    check_ids(problems)
    findings = [*contaminated(problems, index, options.min_share), *duplicates(problems, options.threshold)]
    gone = {finding.problem_id for finding in findings}
    if options.runs:
        rest = [problem for problem in problems if problem.id not in gone]
        try:
            with pods_for(sandbox) as opened, open_sandbox(opened) as pool:
                findings += judged(rest, pool, options.runs)
        except SandboxError as error:
            raise ConfigError(f"sandbox: {error}") from error
    gone = {finding.problem_id for finding in findings if finding.kind in LEFT_OUT}
    kept = [problem for problem in problems if problem.id not in gone]
    write_problems(Path(out), kept)
    write_lines(Path(f"{out}.findings.jsonl"), map(asdict, findings))
    tell(problems, kept, findings, out)
    return Counter(finding.kind for finding in findings)


def contamination_of(options: CleanOptions) -> Contamination:
    ngrams = NgramOptions()
    items = []
    for name, path in options.against.items():
        try:
            items += benchmark_items(name, path, ngrams)
        except ValueError as error:
            raise ConfigError(f"--against: {name}: {error}") from error
    unseen = sum(not item.ngrams for item in items)
    if unseen:
        print(f"--against: {unseen} of {len(items)} texts are too short to be looked for", file=sys.stderr)
    return Contamination(items)


def judged(problems: Sequence[Problem], pool: Pool, runs: int) -> Iterator[Finding]:
    """In the order of the problems."""
    with ThreadPoolExecutor(pool.slots) as threads:
        for found in threads.map(lambda problem: findings_of(problem, pool, runs), problems):
            yield from found


def findings_of(problem: Problem, pool: Pool, runs: int) -> list[Finding]:
    try:
        found = [] if problem.solution is None else solution_findings(problem, problem.solution, pool, runs)
        empty = pool.judge(submission(problem, EMPTY, f"{problem.id}/empty", LIMITS))
    except SandboxError as error:
        return [Finding(problem_id=problem.id, kind="unjudged", detail=str(error))]
    passing = [test for test, status in zip(problem.reward_tests, empty.statuses, strict=True) if status == "passed"]
    if passing:
        share = len(passing) / len(problem.reward_tests)
        found.append(Finding(problem_id=problem.id, kind="passes_empty", share=share, detail=passing[0][:200]))
    return found


def solution_findings(problem: Problem, solution: str, pool: Pool, runs: int) -> list[Finding]:
    """Raises SandboxError."""
    verdicts = [pool.judge(submission(problem, solution, f"{problem.id}/{run}", LIMITS)) for run in range(runs)]
    every = {verdict.statuses for verdict in verdicts}
    if len(every) > 1:
        seen = "; ".join(", ".join(statuses) for statuses in sorted(every))
        return [Finding(problem_id=problem.id, kind="flaky", detail=seen[:200])]
    if set(verdicts[0].statuses) == {TestStatus.PASSED}:
        return []
    detail = next((text for text in verdicts[0].details if text), "")
    share = sum(status != TestStatus.PASSED for status in verdicts[0].statuses) / len(verdicts[0].statuses)
    return [Finding(problem_id=problem.id, kind="broken", share=share, detail=detail[:200])]


def write_problems(out: Path, problems: Sequence[Problem]) -> None:
    """In our own format."""
    if out.suffix == ".jsonl":
        write_lines(out, map(asdict, problems))
        return
    part = out.with_name(f"{out.name}.part")
    pq.write_table(problem_table(problems), part)
    part.rename(out)


def tell(problems: Sequence[Problem], kept: Sequence[Problem], findings: Sequence[Finding], out: str) -> None:
    counts = Counter(finding.kind for finding in findings)
    for kind, count in counts.items():
        print(f"{kind}: {count}" + ("" if kind in LEFT_OUT else " (kept)"))
        for finding in [f for f in findings if f.kind == kind][:MAX_TOLD]:
            other = f" of {finding.other} ({finding.share:.0%})" if finding.other else ""
            print(f"  {finding.problem_id}{other}: {' '.join(finding.detail.split())[:100]}")
    unchecked = sum(problem.solution is None for problem in kept)
    words = f"; {unchecked} of them have no solution that could be judged" if unchecked else ""
    print(f"{len(kept)} of {len(problems)} problems kept -> {out}{words}")
