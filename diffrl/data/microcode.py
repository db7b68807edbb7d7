"""Small function-writing problems, made on the spot: what the quickstart trains and is measured on.

A family is one row of `FAMILIES`: what the function returns in words, the right body, and the mistakes people make in
it. Two slots are filled from eleven values each, never twice the same: 110 bodies a family, 3,630 in all. `{a}` and
`{b}` are numbers 2 to 12; `{p}` and `{q}` are letters, which take the same places.

The splits are `train`, `validation` (settings are chosen on it) and `held_out` (reported). The last two hold every family
in the same number. No training problem shares its prompt with them, and no training solution passes the tests of one of
them, however it is written: (x + 2) * 3 would solve a reserved x * 3 + 6.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import CodeType

from diffrl.types import Problem

SPLITS = ("train", "validation", "held_out")
NUMBERS = tuple(str(n) for n in range(2, 13))
LETTERS = tuple("abcdefghijk")
HELD_OUT_PER_FAMILY = 9  # as many again are for validation; the other 92 are for training
NUM_TESTS = 6


@dataclass(frozen=True, slots=True)
class Family:
    """Family("affine", "x", "x times {a}, plus {b}", "return x * {a} + {b}", wrong=("return x * {a} - {b}",))"""

    name: str
    argument: str  # x: an integer, xs: a list of integers, s: a string
    returns: str  # what the prompt says
    body: str
    wrong: tuple[str, ...]  # typical mistakes, the most frequent one first


# fmt: off
FAMILIES = (
    # numbers
    Family("affine", "x", "x times {a}, plus {b}", "return x * {a} + {b}",
           ("return x * {a} - {b}", "return x + {a} * {b}")),
    Family("scaled_sum", "x", "the sum of x and {a}, times {b}", "return (x + {a}) * {b}",
           ("return x + {a} * {b}", "return (x - {a}) * {b}")),
    Family("remainder", "x", "the remainder of x divided by {a}, plus {b}", "return x % {a} + {b}",
           ("return x // {a} + {b}", "return x % {a} - {b}")),
    Family("quotient", "x", "x divided by {a}, rounded down, minus {b}", "return x // {a} - {b}",
           ("return x / {a} - {b}", "return x % {a} - {b}")),
    Family("distance", "x", "the distance between x and {a}, times {b}", "return abs(x - {a}) * {b}",
           ("return (x - {a}) * {b}", "return abs(x + {a}) * {b}")),
    Family("at_most", "x", "{a} times x, but at most {b}", "return min({a} * x, {b})",
           ("return max({a} * x, {b})", "return min({a} + x, {b})")),
    Family("at_least", "x", "x minus {a}, but at least {b}", "return max(x - {a}, {b})",
           ("return min(x - {a}, {b})", "return max(x + {a}, {b})")),
    Family("above", "x", "{b} if x is above {a}, otherwise 0", "return {b} if x > {a} else 0",
           ("return {b} if x < {a} else 0", "return {a} if x > {b} else 0")),
    Family("divisible", "x", "x times {b} if x is divisible by {a}, otherwise x",
           "return x * {b} if x % {a} == 0 else x",
           ("return x * {b} if x // {a} == 0 else x", "return x * {b} if x % {a} else x")),
    Family("stepping", "x", "the sum of the numbers from {a} to x in steps of {b}",
           "return sum(range({a}, x + 1, {b}))",
           ("return sum(range({a}, x, {b}))", "return sum(range(x, {a}, {b}))")),
    Family("digits", "x", "the number of digits of x times {a}, minus {b}", "return len(str(x)) * {a} - {b}",
           ("return len(x) * {a} - {b}", "return len(str(x)) * {a} + {b}")),
    Family("branch", "x", "x plus {b} if x is below {a}, otherwise x minus {b}",
           "if x < {a}:\n        return x + {b}\n    return x - {b}",
           ("if x < {a}:\n        return x - {b}\n    return x + {b}",
            "if x <= {a}:\n        return x + {b}\n    return x - {b}")),
    Family("repeated", "x", "x after doubling it and adding {b}, {a} times over",
           "for i in range({a}):\n        x = x * 2 + {b}\n    return x",
           ("for i in range({b}):\n        x = x * 2 + {a}\n    return x",
            "for i in range({a}):\n        x = x * 2 - {b}\n    return x")),
    # lists
    Family("scaled_list", "xs", "each element of xs times {a}, minus {b}", "return [v * {a} - {b} for v in xs]",
           ("return [v * {a} + {b} for v in xs]", "return [v - {a} * {b} for v in xs]")),
    Family("kept", "xs", "the elements of xs above {a}, each plus {b}", "return [v + {b} for v in xs if v > {a}]",
           ("return [v + {b} for v in xs if v >= {a}]", "return [v + {b} for v in xs if v < {a}]")),
    Family("every", "xs", "every {b}-th element of xs from index {a} on", "return xs[{a}::{b}]",
           ("return xs[{a}:{b}]", "return xs[:{a}:{b}]")),
    Family("swapped", "xs", "xs with every {a} replaced by {b}", "return [{b} if v == {a} else v for v in xs]",
           ("return [{a} if v == {b} else v for v in xs]", "return [{b} if v != {a} else v for v in xs]")),
    Family("head_sum", "xs", "the sum of the first {a} elements of xs, times {b}", "return sum(xs[:{a}]) * {b}",
           ("return sum(xs[{a}:]) * {b}", "return sum(xs[:{a}]) + {b}")),
    Family("scaled_total", "xs", "the sum of xs times {a}, minus {b}", "return sum(xs) * {a} - {b}",
           ("return len(xs) * {a} - {b}", "return sum(xs) * {a} + {b}")),
    Family("counted", "xs", "how many elements of xs are above {a}, plus {b}",
           "return sum(v > {a} for v in xs) + {b}",
           ("return sum(v < {a} for v in xs) + {b}", "return sum(v >= {a} for v in xs) + {b}")),
    Family("extremes", "xs", "{a} times the largest element of xs plus {b} times the smallest",
           "return {a} * max(xs) + {b} * min(xs)",
           ("return {a} * max(xs) - {b} * min(xs)", "return {a} * min(xs) - {b} * max(xs)")),
    Family("extended", "xs", "xs with {a} and {b} added at the end", "return xs + [{a}, {b}]",
           ("return xs + [{a} + {b}]", "return [{a}, {b}] + xs")),
    Family("difference", "xs", "the element of xs at index {a} minus the one at index {b}",
           "return xs[{a}] - xs[{b}]",
           ("return xs[{a}] + xs[{b}]", "return xs[{a} - 1] - xs[{b} - 1]")),
    Family("largest", "xs", "the {a} largest elements of xs, rising, then {b}", "return sorted(xs)[-{a}:] + [{b}]",
           ("return sorted(xs)[:{a}] + [{b}]", "return sorted(xs)[{a}:] + [{b}]")),
    Family("running", "xs", "{a} plus {b} times each element of xs",
           "total = {a}\n    for v in xs:\n        total += v * {b}\n    return total",
           ("total = {a}\n    for v in xs:\n        total += v + {b}\n    return total",
            "total = {a}\n    for v in xs:\n        total = v * {b}\n    return total")),
    # strings
    Family("length", "s", "the length of s times {a}, plus {b}", "return len(s) * {a} + {b}",
           ("return len(s) + {a} * {b}", "return len(s) * {a} - {b}")),
    Family("times", "s", "s repeated {a} times, then '{q}'", "return s * {a} + '{q}'",
           ("return (s + '{q}') * {a}", "return '{q}' + s * {a}")),
    Family("tail", "s", "s without its first {a} characters, then '{q}'", "return s[{a}:] + '{q}'",
           ("return s[:{a}] + '{q}'", "return s[-{a}:] + '{q}'")),
    Family("inserted", "s", "s with '{q}' put in at index {a}", "return s[:{a}] + '{q}' + s[{a}:]",
           ("return s[{a}:] + '{q}' + s[:{a}]", "return s[:{a}] + '{q}'")),
    Family("letters", "s", "how often '{q}' occurs in s, plus {a}", "return s.count('{q}') + {a}",
           ("return s.find('{q}') + {a}", "return s.count('{q}') - {a}")),
    Family("padded", "s", "s filled on the left with '{q}' to length {a}", "return s.rjust({a}, '{q}')",
           ("return s.ljust({a}, '{q}')", "return s.zfill({a})")),
    Family("shouted", "s", "s in upper case, then '{q}' {a} times", "return s.upper() + '{q}' * {a}",
           ("return s.lower() + '{q}' * {a}", "return '{q}' * {a} + s.upper()")),
    Family("replaced", "s", "s with every '{p}' replaced by '{q}'", "return s.replace('{p}', '{q}')",
           ("return s.replace('{q}', '{p}')", "return s.strip('{p}', '{q}')")),
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """A filled-in family with the ways to get it wrong, which the noisy instruction data is made from.

    Exercise(id="microcode/affine-3-5", family="affine", argument="x", values=("3", "5"),
             prompt="Write f(x) that returns x times 3, plus 5.", solution="def f(x):\\n    return x * 3 + 5",
             mistakes=("def f(x):\\n    return x * 3 - 5", ...), slips=("def f(x):\\n    return x * 4 + 5", ...))
    """

    id: str
    family: str
    argument: str
    values: tuple[str, str]
    prompt: str
    solution: str
    mistakes: tuple[str, ...]  # wrong structure, right constants
    slips: tuple[str, ...]  # right structure, one constant off by one: often the solution of ANOTHER problem


def microcode_problems(split: str, seed: int = 0, *, num_prompt_tests: int = 0) -> list[Problem]:
    """The problems of a split, in a fixed order; the first `num_prompt_tests` tests are shown, the rest graded."""
    problems = []
    for exercise in microcode_exercises(split, seed):
        tests = exercise_tests(exercise)
        problem = Problem(
            id=exercise.id,
            prompt=exercise.prompt,
            prompt_tests=tests[:num_prompt_tests],
            reward_tests=tests[num_prompt_tests:],
            entry_point="f",
            solution=exercise.solution,
            family=exercise.family,
        )
        problems.append(problem)
    return problems


def microcode_exercises(split: str, seed: int = 0) -> tuple[Exercise, ...]:
    """The exercises of a split, families mixed. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"microcode has no split '{split}'; choose one of {', '.join(SPLITS)}")
    return _all_splits(seed)[split]


@lru_cache(maxsize=2)
def _all_splits(seed: int) -> dict[str, tuple[Exercise, ...]]:
    splits: dict[str, list[Exercise]] = {split: [] for split in SPLITS}
    for family in FAMILIES:
        values = slot_values(family)
        random.Random(f"{seed}/{family.name}").shuffle(values)
        for rank, (first, second) in enumerate(values):
            split = "held_out" if rank < HELD_OUT_PER_FAMILY else "validation"
            split = "train" if rank >= 2 * HELD_OUT_PER_FAMILY else split
            splits[split].append(make_exercise(family, first, second))
    tests = reserved_tests([*splits["validation"], *splits["held_out"]])
    splits["train"] = [e for e in splits["train"] if not passes_any(e.solution, tests[e.argument])]
    for split, exercises in splits.items():
        random.Random(f"{seed}/{split}").shuffle(exercises)
    return {split: tuple(exercises) for split, exercises in splits.items()}


@cache
def solves_reserved(program: str, argument: str, seed: int = 0) -> bool:
    """Whether a program of our own templates passes all tests of a validation or held-out problem with that argument."""
    return passes_any(program, _reserved_tests_of(seed)[argument])


@cache
def _reserved_tests_of(seed: int) -> dict[str, list[list[CodeType]]]:
    splits = _all_splits(seed)
    return reserved_tests([*splits["validation"], *splits["held_out"]])


def reserved_tests(exercises: Sequence[Exercise]) -> dict[str, list[list[CodeType]]]:
    """Argument -> compiled tests of each exercise that takes it."""
    tests: dict[str, list[list[CodeType]]] = {}
    for exercise in exercises:
        compiled = [compile(test, exercise.id, "exec") for test in exercise_tests(exercise)]
        tests.setdefault(exercise.argument, []).append(compiled)
    return tests


def passes_any(program: str, tests: Sequence[Sequence[CodeType]]) -> bool:
    """Whether the program passes all tests of at least one problem."""

    def holds(test: CodeType) -> bool:
        try:
            exec(test, namespace)  # our own templates, nothing from outside
        except Exception:  # a wrong program may raise anything
            return False
        return True

    namespace = {"f": compile_f(program)}
    return any(all(holds(test) for test in problem) for problem in tests)


def slot_values(family: Family) -> list[tuple[str, str]]:
    """The 110 fillings of a family's two slots."""
    first = LETTERS if "{p}" in family.body else NUMBERS
    second = LETTERS if "{q}" in family.body else NUMBERS
    return [(first[i], second[j]) for i in range(11) for j in range(11) if i != j]


def make_exercise(family: Family, first: str, second: str) -> Exercise:
    def fill(text: str, first: str = first, second: str = second) -> str:
        return text.format(a=first, b=second, p=first, q=second)

    def program(body: str, first: str = first, second: str = second) -> str:
        return f"def f({family.argument}):\n    {fill(body, first, second)}"

    solution = program(family.body)
    mistakes = tuple(program(body) for body in family.wrong)
    slips = {program(family.body, neighbour, second) for neighbour in neighbours(first)}
    slips |= {program(family.body, first, neighbour) for neighbour in neighbours(second)}
    return Exercise(
        id=f"microcode/{family.name}-{first}-{second}",
        family=family.name,
        argument=family.argument,
        values=(first, second),
        prompt=f"Write f({family.argument}) that returns {fill(family.returns)}.",
        solution=solution,
        mistakes=mistakes,
        slips=tuple(sorted(slips)),
    )


def neighbours(value: str) -> list[str]:
    """The values one below and one above, of the same kind."""
    values = LETTERS if value in LETTERS else NUMBERS
    index = values.index(value)
    return [values[i] for i in (index - 1, index + 1) if 0 <= i < len(values)]


def candidate_inputs(argument: str, first: str, second: str, rng: random.Random) -> list:
    """Arguments worth trying: the edges that the two constants make, and random ones."""
    numbers = [int(value) for value in (first, second) if value.isdigit()]
    if argument == "x":
        edges = [n + d for n in numbers for d in (-1, 0, 1)] + [3 * n for n in numbers] + [0, 1, -2, -7]
        edges += [numbers[0] + k * numbers[1] for k in (1, 2, 5)]
        return list(dict.fromkeys([*edges, *(rng.randrange(13, 200) for _ in range(6))]))
    if argument == "xs":
        lists = [[rng.randrange(0, 25) for _ in range(rng.randrange(14, 27))] for _ in range(6)]
        lists += [[rng.randrange(0, 15) for _ in range(rng.randrange(13, 16))] for _ in range(6)]
        edges = [n + d for n in numbers for d in (0, 1)]
        return [rng.sample(values + edges, len(values) + len(edges)) for values in lists]
    alphabet = "".join(value for value in (first, second) if not value.isdigit()) * 3 + "abcdefghijkXYZ"
    lengths = [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14, 16]
    return list(dict.fromkeys("".join(rng.choices(alphabet, k=k)) for k in lengths))


@cache
def exercise_tests(exercise: Exercise) -> tuple[str, ...]:
    """Six asserts that tell the solution from the wrong programs, the least telling one first (it may be shown)."""
    rng = random.Random(exercise.id)
    inputs = candidate_inputs(exercise.argument, *exercise.values, rng)
    rng.shuffle(inputs)
    solution, wrong = exercise.solution, (*exercise.mistakes, *exercise.slips)
    right = [outcome(compile_f(solution), value) for value in inputs]
    fails = []  # per input, which wrong programs it catches
    for program in wrong:
        f = compile_f(program)
        fails.append([outcome(f, value) != expected for value, expected in zip(inputs, right, strict=True)])
    caught = [0] * len(wrong)
    chosen: list[int] = []
    while len(chosen) < NUM_TESTS:
        rest = [i for i in range(len(inputs)) if i not in chosen]
        best = max(rest, key=lambda i: sum(fails[w][i] / (1 + caught[w]) ** 2 for w in range(len(wrong))))
        caught = [count + fails[w][best] for w, count in enumerate(caught)]
        chosen.append(best)
    return tuple(f"assert f({inputs[i]!r}) == {right[i]!r}" for i in reversed(chosen))


def compile_f(program: str) -> Callable:
    namespace: dict = {}
    exec(program, namespace)  # our own templates, nothing from outside
    return namespace["f"]


def outcome(f: Callable, value: object) -> object:
    """What f returns for a copy of `value`; the error's name when it raises (wrong programs may)."""
    try:
        return f(list(value) if isinstance(value, list) else value)
    except Exception as error:
        return type(error).__name__
