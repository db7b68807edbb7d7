"""`EVALPLUS_PYTHON=PATH python -m tests.benchmarks.evalplus_agreement [--every N] [--mutants N]`: our verdicts beside those of
EvalPlus's own checker on HumanEval+ and MBPP+, as Markdown: a table, and every disagreement.

Programs: the canonical solution of each N-th problem, and mutants of it (an operator swapped, a constant off by one, a
condition negated, arguments in another order, a statement left out, a result replaced by None). EVALPLUS_PYTHON is a Python of
its own with evalplus 0.3.1, which is needed for nothing else:

    python3 -m venv .venv-evalplus
    .venv-evalplus/bin/pip install --no-deps evalplus==0.3.1
    .venv-evalplus/bin/pip install numpy psutil appdirs tempdir wget tqdm multipledispatch
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actors.commands import LIMITS
from actors.reward import submission
from diffrl.benchmarks import Task, benchmark_tasks, canonical_code
from sandbox.backends import BackendOptions, open_sandbox
from sandbox.types import Verdict
from tests.sandbox.mutants import mutants
from tests.shared_files import shared_file

CHECKER = Path(__file__).with_name("evalplus_checker.py")
FILES = {"humaneval": "humanevalplus/HumanEvalPlus.jsonl.gz", "mbpp": "mbppplus/MbppPlus.jsonl.gz"}
Program = tuple[str, str, Task, str]  # data set, canonical or mutant, task, code


def programs_of(every: int, num_mutants: int) -> list[Program]:
    programs: list[Program] = []
    for dataset, file in FILES.items():
        for task in benchmark_tasks(f"{dataset}_plus", shared_file(f"data/{file}")).tasks[::every]:
            whole = submission(task.problem, canonical_code(task.problem), task.problem.id, LIMITS)
            programs.append((dataset, "canonical", task, whole.code))
            programs += [(dataset, "mutant", task, mutant.code) for mutant in mutants(whole, num_mutants)]
    return programs


def their_verdicts(programs: list[Program]) -> list[tuple[bool, bool]]:
    """(base, base and plus)."""
    job = {
        "data": {dataset: str(shared_file(f"data/{file}")) for dataset, file in FILES.items()},
        "programs": [{"dataset": d, "task_id": task.problem.id, "code": code} for d, _, task, code in programs],
    }
    done = subprocess.run(
        [os.environ["EVALPLUS_PYTHON"], str(CHECKER)],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(programs)
    return [(line["base"] == "pass", line["base"] == line["plus"] == "pass") for line in lines]


def our_verdicts(programs: list[Program]) -> list[Verdict]:
    def judge(program: Program) -> Verdict:
        _, _, task, code = program
        return pool.judge(submission(task.problem, code, task.problem.id, LIMITS))

    with open_sandbox(BackendOptions(backend="process", slots=2)) as pool, ThreadPoolExecutor(2) as threads:
        return list(threads.map(judge, programs))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--mutants", type=int, default=3)
    options = parser.parse_args()
    if "EVALPLUS_PYTHON" not in os.environ:
        sys.exit("EVALPLUS_PYTHON: name a Python with evalplus 0.3.1")
    programs = programs_of(options.every, options.mutants)
    ours, theirs = our_verdicts(programs), their_verdicts(programs)
    counts: Counter[tuple[str, str, str]] = Counter()
    disagreements = []
    for (dataset, kind, task, code), verdict, (base, plus) in zip(programs, ours, theirs, strict=True):
        right = [status == "passed" for status in verdict.statuses]
        counts[dataset, kind, "programs"] += 1
        counts[dataset, kind, "pass"] += all(right)
        counts[dataset, kind, "base only"] += right[0] and not all(right)
        counts[dataset, kind, "low"] += verdict.trust == "low"
        if (right[0], all(right)) != (base, plus):
            counts[dataset, kind, "disagree"] += 1
            disagreements.append((task.problem.id, kind, verdict, base, plus, code))
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    print(f"Each {options.every}. problem, {options.mutants} mutants of each at most.\n")
    print("| data set | programs | number | pass all | pass the base inputs alone | low trust | disagree |")
    print("|---|---|---|---|---|---|---|")
    for dataset in FILES:
        for kind in ("canonical", "mutant"):
            cells = [counts[dataset, kind, name] for name in ("programs", "pass", "base only", "low", "disagree")]
            print(f"| {dataset}+ | {kind} | {' | '.join(map(str, cells))} |")
    print("\nDisagreements:" if disagreements else "\nNo disagreement.")
    for name, kind, verdict, base, plus, code in disagreements:
        said = ", ".join(verdict.statuses) + " " + next((detail for detail in verdict.details if detail), "")
        print(f"\n- {name} ({kind}): ours {said}; EvalPlus: base {base}, plus {plus}\n\n```python\n{code}\n```")


if __name__ == "__main__":
    main()
