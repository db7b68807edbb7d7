"""The generated problems: solutions pass, mistakes fail, splits are disjoint, no training text gives an answer away."""

from collections import Counter

import pytest

from diffrl.data.corpus import microcode_text, stdlib_text
from diffrl.data.microcode import (
    FAMILIES,
    NUM_TESTS,
    SPLITS,
    compile_f,
    exercise_tests,
    microcode_exercises,
    microcode_problems,
    reserved_solutions,
)
from diffrl.data.sft import sft_rows
from diffrl.prompts import extract_code, format_score


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
    assert (
        len({e.prompt for e in ALL}) == len({e.solution for e in ALL}) == len({e.id for e in ALL}) == len(ALL) == 3630
    )
    for split, per_family in zip(SPLITS, (92, 9, 9), strict=True):
        assert Counter(e.family for e in microcode_exercises(split)) == {f.name: per_family for f in FAMILIES}


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


def test_no_reserved_solution_in_the_corpus():
    text = microcode_text(seed=3) + stdlib_text(300_000)
    assert all(e.solution in text for e in microcode_exercises("train"))
    assert not [solution for solution in reserved_solutions() if contains_program(text, solution)]


def test_no_reserved_solution_in_noisy_instruction_rows():
    rows = sft_rows(seed=5, num_copies=3, wrong_share=0.7, broken_share=0.3)
    programs = {line.strip("`\n").removeprefix("python\n") for _, line in rows}
    assert not programs & reserved_solutions()
    text = "\n\n".join(completion for _, completion in rows)
    assert not [solution for solution in reserved_solutions() if contains_program(text, solution)]
    assert not {prompt for prompt, _ in rows} & {e.prompt for s in SPLITS[1:] for e in microcode_exercises(s)}


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
