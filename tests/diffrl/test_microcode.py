"""The generated problems: solutions pass, mistakes fail, splits are disjoint, no training text gives an answer away."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType

import pytest

from diffrl.config import AnyConfig, PretrainConfig, RLConfig, SftConfig
from diffrl.config_file import load_config
from diffrl.data.microcode import (
    FAMILIES,
    NUM_TESTS,
    SPLITS,
    compile_f,
    exercise_tests,
    microcode_exercises,
    microcode_problems,
    solves_reserved,
)
from diffrl.data.records import Chat, Document
from diffrl.data.sft import sft_rows
from diffrl.data.sources import problems_of
from diffrl.data.units import units_of
from diffrl.models.loading import tokenizer_texts
from diffrl.prompts import extract_code, format_score
from diffrl.types import Problem


def passed(program: str, tests: tuple[str, ...]) -> list[bool]:
    results = []
    for test in tests:
        try:
            exec(test, {"f": compile_f(program)})
            results.append(True)
        except Exception:
            results.append(False)
    return results


ALL = [exercise for split in SPLITS for exercise in microcode_exercises(split)]


def test_every_solution_passes_its_tests():
    for exercise in ALL:
        assert len(exercise_tests(exercise)) == NUM_TESTS
        assert all(passed(exercise.solution, exercise_tests(exercise))), exercise.id


def test_every_mistake_and_slip_fails_a_test_that_is_graded_even_when_one_is_shown():
    for exercise in ALL:
        for wrong in (*exercise.mistakes, *exercise.slips):
            assert not all(passed(wrong, exercise_tests(exercise)[1:])), (exercise.id, wrong)


def test_splits_share_no_prompt_and_no_solution_and_are_balanced():
    assert len({e.prompt for e in ALL}) == len({e.solution for e in ALL}) == len({e.id for e in ALL}) == len(ALL)
    for split in SPLITS[1:]:
        assert Counter(e.family for e in microcode_exercises(split)) == {f.name: 9 for f in FAMILIES}
    # 92 each, less the few that are a reserved problem in other words
    counts = Counter(e.family for e in microcode_exercises("train"))
    assert sum(counts.values()) == 3016
    fewer = {family: 92 - count for family, count in counts.items() if count < 92}
    assert fewer == {"affine": 1, "at_most": 6, "divisible": 10, "quotient": 1, "scaled_sum": 2}


def test_the_split_depends_on_the_seed_alone():
    """The first problems by name: another machine or Python version must report on the same ones."""
    assert [e.id for e in microcode_exercises("held_out")[:3]] == [
        "microcode/at_most-4-11",
        "microcode/digits-6-9",
        "microcode/largest-4-11",
    ]
    assert {e.id for e in microcode_exercises("held_out", 1)} != {e.id for e in microcode_exercises("held_out", 0)}


def test_problems_show_the_first_test_and_grade_the_rest():
    exercise = microcode_exercises("train")[0]
    blind, shown = microcode_problems("train")[0], microcode_problems("train", num_prompt_tests=1)[0]
    assert (blind.prompt_tests, blind.reward_tests) == ((), exercise_tests(exercise))
    assert (shown.prompt_tests, shown.reward_tests) == (exercise_tests(exercise)[:1], exercise_tests(exercise)[1:])
    assert shown.entry_point == "f" and shown.solution == exercise.solution and shown.family == exercise.family


def test_an_unknown_split_names_the_splits():
    with pytest.raises(ValueError, match="train, validation, held_out"):
        microcode_problems("test")


def quickstart_config(stage: str, *overrides: str) -> AnyConfig:
    return load_config(Path(__file__).parents[2] / "configs" / f"quickstart{stage}.yaml", overrides)


@cache
def reserved() -> list[Problem]:
    return microcode_problems("validation") + microcode_problems("held_out")


def test_reserved_problems_are_in_no_text_that_is_trained_on():
    """Of the quickstart as it is configured: pre-training text, and what the tokenizer is trained on."""
    config = quickstart_config("_pretrain")
    assert isinstance(config, PretrainConfig)
    documents = [r.text for unit in units_of(config.data, seed=0) for r in unit.records if isinstance(r, Document)]
    text = "\n\n".join([*documents, *tokenizer_texts()])
    assert all(e.solution in text and e.prompt in text for e in microcode_exercises("train"))
    assert not [p.id for p in reserved() if p.prompt in text or contains_program(text, str(p.solution))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reserved_problems_are_in_no_instruction_row(seed: int):
    """Of the quickstart as it is configured: no prompt, no solution, and no program that would pass a reserved problem's
    tests, after all corruption."""
    config = quickstart_config("_sft", f"seed={seed}")
    assert isinstance(config, SftConfig)
    chats = [r for unit in units_of(config.data, seed=config.seed) for r in unit.records if isinstance(r, Chat)]
    rows = [(chat.messages[0]["content"], chat.completion) for chat in chats]
    assert not {prompt for prompt, _ in rows} & {p.prompt for p in reserved()}
    argument = {e.prompt: e.argument for e in microcode_exercises("train")}
    programs = {(argument[prompt], completion.strip("`\n").removeprefix("python\n")) for prompt, completion in rows}
    assert len(programs) > 3000
    assert not programs & {(a, str(p.solution)) for p in reserved() for a in ("x", "xs", "s")}
    passing = [
        (program, problem_id)
        for name, program in programs
        for problem_id in solved(program, [p for p in reserved() if p.prompt.startswith(f"Write f({name})")])
    ]
    assert not passing


def test_reserved_problems_are_not_among_those_of_rl():
    config = quickstart_config("")
    assert isinstance(config, RLConfig) and config.report is not None
    trained = problems_of(config.data)
    assert problems_of(config.report.problems) == microcode_problems("held_out")
    assert not {p.prompt for p in trained} & {p.prompt for p in reserved()}
    assert not {p.solution for p in trained} & {p.solution for p in reserved()}


def test_the_check_for_leaks_finds_one():
    """(x + 2) * 3 and x * 3 + 6 are one solution."""
    held_out = next(p for p in reserved() if p.family == "affine")
    assert held_out.solution is not None and solves_reserved(held_out.solution, "x")
    first, second = (int(n) for n in re.findall(r"\d+", held_out.solution.split("return")[1]))
    assert solves_reserved(f"def f(x):\n    return {first} * x - -{second}", "x")
    assert not solves_reserved("def f(x):\n    return 0 * x - 77", "x")
    assert contains_program(f"# text\n{held_out.solution}\n", held_out.solution)


@cache
def compiled_tests(problem_id: str, tests: tuple[str, ...]) -> list[CodeType]:
    return [compile(test, problem_id, "exec") for test in tests]


def solved(program: str, problems: list[Problem]) -> list[str]:
    """Ids of the problems whose tests the program passes, all of them."""
    space: dict = {}
    exec(program, space)

    def passes(test: CodeType) -> bool:
        try:
            exec(test, space)
        except Exception:
            return False
        return True

    return [p.id for p in problems if all(passes(test) for test in compiled_tests(p.id, p.reward_tests))]


def contains_program(text: str, program: str) -> bool:
    """Whether `program` stands in `text` as a whole: `... + 1` inside `... + 12` is another program."""
    start = text.find(program)
    while start >= 0:
        if text[start + len(program) : start + len(program) + 1] in ("", "\n"):
            return True
        start = text.find(program, start + 1)
    return False


def test_noise_has_the_asked_shares_and_is_uneven_over_families():
    rows = sft_rows(seed=0, num_copies=4, wrong_share=0.4, broken_share=0.1)
    by_prompt = {e.prompt: e for e in microcode_exercises("train")}
    fenced = [(by_prompt[p], c) for p, c in rows if format_score(c) == 1.0]
    assert 1 - len(fenced) / len(rows) == pytest.approx(0.1, abs=0.01)
    wrong = [extract_code(c).rstrip("\n") != e.solution for e, c in fenced]
    assert sum(wrong) / len(wrong) == pytest.approx(0.4, abs=0.02)
    for third, share in enumerate((0.5, 0.4, 0.3)):
        names = {family.name for family in FAMILIES[third::3]}
        of_third = [w for w, (e, _) in zip(wrong, fenced, strict=True) if e.family in names]
        assert sum(of_third) / len(of_third) == pytest.approx(share, abs=0.025)


def test_clean_rows_are_all_right_and_rows_repeat_exactly():
    clean = sft_rows(seed=0, num_copies=1, wrong_share=0.0, broken_share=0.0)
    assert sorted(clean) == sorted((e.prompt, f"```python\n{e.solution}\n```") for e in microcode_exercises("train"))
    assert sft_rows(seed=2, num_copies=1) == sft_rows(seed=2, num_copies=1) != sft_rows(seed=3, num_copies=1)
