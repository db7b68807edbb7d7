"""Planted contamination, copies, flaky and broken problems are all found, and nothing else is."""

import json
import random
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from actors.hygiene import CleanOptions, clean
from diffrl.config import ProblemsConfig
from diffrl.data.hygiene import Contamination, NgramOptions, benchmark_items, contaminated, duplicates
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.data.row_files import read_rows
from diffrl.types import Problem
from sandbox.backends import BackendOptions
from tests.actors.conftest import Called, one_line
from tests.shared_files import shared_file

ASIDE = "Note: the function is called by a web service, so take care. "
BENCHMARKS = {
    "humaneval": "data/humaneval/HumanEval.jsonl.gz",
    "humaneval+": "data/humanevalplus/HumanEvalPlus.jsonl.gz",
    "mbpp": "data/mbpp/mbpp.jsonl",
    "mbpp+": "data/mbppplus/MbppPlus.jsonl.gz",
    "bigcodebench": "data/bigcodebench/BigCodeBench_Hard.jsonl",
}


def benchmark_rows() -> dict[str, list[dict]]:
    return {name: [dict(row) for _, row in read_rows(shared_file(path))] for name, path in BENCHMARKS.items()}


def plant(seed: int) -> tuple[list[Problem], dict[str, set[str]]]:
    """Clean problems with planted ones among them, and which those are."""
    rng = random.Random(seed)
    clean_ = rng.sample(microcode_problems("train"), 40)
    planted: dict[str, set[str]] = defaultdict(set)
    extra: list[Problem] = []

    def add(kind: str, problem: Problem) -> None:
        planted[kind].add(problem.id)
        extra.append(problem)

    for name, rows in benchmark_rows().items():
        for row in rng.sample(rows, 3):
            words = str(row.get("prompt") or row.get("text") or row.get("instruct_prompt")).split()
            number = len(extra)
            tests = tuple(f"assert f({1000 * number + n}) == {rng.random()}" for n in range(6))
            base = Problem(id="", prompt="", prompt_tests=(), reward_tests=tests)
            whole = " ".join(words).upper() if number % 2 else "\n".join(words)
            add("contaminated", replace(base, id=f"{name}/whole/{number}", prompt=f"{ASIDE}{whole}"))
            if len(words) > 40:  # half a statement is enough where there is enough of it
                half = " ".join(words[: len(words) // 2])
                add("contaminated", replace(base, id=f"{name}/half/{number}", prompt=f"{half} {ASIDE}"))
            solution = row.get("canonical_solution") or row["code"]
            if len(solution) > 150:
                tabs = solution.replace("    ", "\t").replace("  ", "\t")
                prompt = f"Task number {number}, with other words around it. {ASIDE}"
                add("contaminated", replace(base, id=f"{name}/code/{number}", prompt=prompt, solution=tabs))
    for problem in rng.sample(clean_, 6):
        add("duplicate", replace(problem, id=f"copy of {problem.id}", prompt=problem.prompt.upper() + "\n"))
    for problem in rng.sample(clean_, 6):
        tests = (*problem.reward_tests, "assert callable(f)")
        prompt = f"Please {problem.prompt}"
        add("near_duplicate", replace(problem, id=f"like {problem.id}", prompt=prompt, reward_tests=tests))
    for number in range(4):
        tests = tuple(f"assert f({n}) == {n}" for n in range(100 * number, 100 * number + 8))
        dice = f"import random\ndef f(x):\n    return x + (random.random() < 0.5) * {number + 1}"
        words = f"Return x when the dice of game {number} allow it, and player {number} agrees."
        add("flaky", Problem(id=f"dice {number}", prompt=words, prompt_tests=(), reward_tests=tests, solution=dice))
        wrong = replace(
            clean_[number], id=f"wrong {number}", prompt=f"Task {number}. Say {number} hellos to all {number} guests."
        )
        add(
            "broken",
            replace(wrong, solution="def f(x):\n    return None", reward_tests=(f"assert f({number}) == 'hi'",)),
        )
    easy = replace(clean_[9], id="empty", prompt="Define whatever comes to mind on this fine day.", prompt_tests=())
    add("passes_empty", replace(easy, reward_tests=("assert True", "assert f"), solution="f = 1"))
    problems = [*clean_, *extra]
    order = [*clean_, *rng.sample(extra, len(extra))]  # a copy comes after what it is a copy of
    assert len({problem.id for problem in problems}) == len(problems)
    return order, planted


def test_everything_planted_is_found_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems, planted = plant(seed=0)
    source = tmp_path / "problems.jsonl"
    source.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))
    out = tmp_path / "clean.jsonl"
    counts = clean(
        ProblemsConfig(source="problems", path=str(source)),
        str(out),
        CleanOptions(against={name: str(shared_file(path)) for name, path in BENCHMARKS.items()}, runs=3),
        BackendOptions(backend="process", slots=2),
    )
    findings = [json.loads(line) for line in Path(f"{out}.findings.jsonl").read_text().splitlines()]
    found: dict[str, set[str]] = defaultdict(set)
    for finding in findings:
        found[finding["kind"]].add(finding["problem_id"])
    said = capsys.readouterr().out
    with capsys.disabled():
        for kind, ids in planted.items():
            right = len(found[kind] & ids)
            print(f"\n{kind}: recall {right / len(ids):.2f}, precision {right / max(len(found[kind]), 1):.2f}", end="")
    assert found == planted and sum(counts.values()) == len(findings)
    kept = {problem.id for problem in load_problems("problems", out)}
    assert kept == {p.id for p in problems} - set().union(*(planted[k] for k in planted if k != "passes_empty"))
    assert "passes_empty: 1 (kept)" in said and f"{len(kept)} of {len(problems)} problems kept -> {out}" in said


def test_a_benchmark_contaminates_itself_and_microcode_nothing():
    """Every item of HumanEval+ is found among HumanEval's; no generated problem is."""
    items = benchmark_items("humaneval+", shared_file(BENCHMARKS["humaneval+"]), NgramOptions())
    index = Contamination(items)
    humaneval = load_problems("humaneval", shared_file(BENCHMARKS["humaneval"]))
    found = list(contaminated(humaneval, index, 0.3))
    assert [finding.problem_id for finding in found] == [problem.id for problem in humaneval]
    others = [f.problem_id for f in found if f.other != f"humaneval+ {f.problem_id}"]
    assert others == ["HumanEval/61"]  # another item's program solves it, word for word
    assert list(contaminated(microcode_problems("train")[::10], index, 0.3)) == []


def test_near_duplicates_are_counted_exactly_and_prompts_of_one_problem_are_none():
    tests = tuple(f"assert f({n}) == {n * n}" for n in range(20))
    first = Problem(id="a", prompt="Square x.", prompt_tests=(), reward_tests=tests)
    near = replace(first, id="b", prompt="Square  x !", reward_tests=tests[:-1])
    other = replace(
        first, id="c", reward_tests=tuple(f"assert f({n}) == {n * n + 1}" for n in range(90, 110)), prompt="Add."
    )
    copy = replace(first, id="a/signature")
    (found,) = duplicates([first, near, other, copy])
    assert (found.problem_id, found.kind, found.other) == ("b", "near_duplicate", "a") and 0.8 <= found.share < 1
    assert list(duplicates([first, near], threshold=0.99)) == []


def test_the_command_and_its_bad_input(called: Called, tmp_path: Path):
    rows = [asdict(problem) for problem in microcode_problems("train")[:3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | {"license": "MIT"}) + "\n" for row in rows))
    source, out = str(tmp_path / "a.jsonl"), str(tmp_path / "out.parquet")
    status, said, _ = called("data", "clean", source, "--out", out, "--runs", "0")
    assert status == 0 and said == f"3 of 3 problems kept -> {out}\n"
    assert [problem.license for problem in load_problems("problems", out)] == ["MIT"] * 3
    one_line(called("data", "clean", source, "--out", "a.csv"), ["--out: a.csv has an unknown ending"])
    one_line(called("data", "clean", source, "--out", "no/a.jsonl"), ["--out: no/a.jsonl is in a folder that does not"])
    one_line(called("data", "clean", source, "--out", out, "--against", "x"), ["--against: 'x' must be NAME=FILE"])
    one_line(
        called("data", "clean", source, "--out", out, "--against", "x=no.jsonl"), ["--against: x: no file at no.jsonl"]
    )
    one_line(called("data", "clean", source, "--out", out, "--format", "mpbb"), ["--format: 'mpbb'"])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[0])))
    one_line(called("data", "clean", str(tmp_path / "b.jsonl"), "--out", out), ["two problems have the id"])
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n')
    wrong = ["--against", f"x={tmp_path / 'c.jsonl'}"]
    one_line(called("data", "clean", source, "--out", out, *wrong), ["c.jsonl line 1: no benchmark row"])
