"""EvalPlus (arXiv 2305.01210): HumanEval+ and MBPP+ with their own inputs.

A row has inputs and no results: a result is right when it is what the reference solution gives. The reference runs beside the
tests, in the sandbox, on a copy of each input. Results are compared as EvalPlus 0.3.1 compares them: equality, with a
tolerance for floats and flat sequences of floats (which stays on for the inputs that follow), and an oracle of their own for
the problems that have several right results. A problem has two tests, its base inputs and its further inputs; a program is
right on HumanEval or MBPP when it passes the first, on HumanEval+ or MBPP+ when it passes both.

Departures. Values are compared across processes: an instance of a class that the program defines never equals anything.
CPU seconds are limited for all inputs of a test together, not wall seconds for each.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from diffrl.benchmarks.task import Task
from diffrl.data.problems import humaneval_row
from diffrl.data.row_files import Row, RowError, identifier_of, text_of
from diffrl.types import Problem

HUMANEVAL_STOPS = tuple(
    f"\n{word}" for word in ("def ", "class ", "import ", "from ", "assert ", "if __name__", "print(")
)
MBPP_STOPS = ('\n"""', "\nassert", "\nif __name__", "\ndef main(", "\nprint(")

# What a test of these compares instead of equality; `out`, `exp`, `args` and `atol` are at hand.
_SETS = "equal = set(out) == set(exp)"
_FOUND = "exp = exp is not None; equal = out == exp if isinstance(out, bool) else exp == (out is not None)"
_ORACLES = {
    "HumanEval/32": "assert abs(sum(c * math.pow(out, i) for i, c in enumerate(args[0]))) <= atol, number; continue",
    **{f"Mbpp/{number}": _SETS for number in (2, 7, 111, 140, 232, 249, 579, 769)},
    **{f"Mbpp/{number}": _FOUND for number in (284, 434, 737)},
    "Mbpp/164": "equal = True",
    "Mbpp/295": "equal = equal or out == 0",
    "Mbpp/558": "equal = equal or out == digit_distance(*args)",
    "Mbpp/581": "equal = equal or abs(out - pyramid(*args)) <= atol",
}
_SETUP = """
import copy, json, math
space = {{}}
exec({code!r}, space)
reference = space[{entry_point!r}]

def is_floats(value):
    return type(value) is float or (type(value) in (list, tuple) and bool(value) and all(type(x) is float for x in value))

def close(out, exp, atol):
    if type(out) in (list, tuple) and type(exp) in (list, tuple):
        return len(out) == len(exp) and all(close(*pair, atol) for pair in zip(out, exp))
    number = (bool, int, float, complex)
    if type(out) not in number or type(exp) not in number:
        raise TypeError("no numbers")
    return out == exp or (abs(exp) != math.inf and abs(out - exp) <= atol + 1e-7 * abs(exp))

def digit_distance(a, b):
    a, b = str(a), str(b)
    size = max(len(a), len(b))
    return sum(abs(int(x) - int(y)) for x, y in zip(a.zfill(size), b.zfill(size)))

def pyramid(edge, height):
    return round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))
"""
_TEST = """
def check(candidate):
    atol = {atol!r}
    for number, args in enumerate({inputs}):
        exp = reference(*copy.deepcopy(args))
        given = copy.deepcopy(args)
        out = candidate(*given)
        equal = out == exp
        {oracle}
        if atol == 0 and is_floats(exp):
            atol = 1e-6
        if not equal and atol != 0:
            assert type(out) == type(exp), number
            if isinstance(exp, (list, tuple)):
                assert len(out) == len(exp), number
            equal = close(out, exp, atol)
        assert equal, number
"""


def humaneval_plus_task(row: Row) -> Task:
    """HumanEvalPlus.jsonl.gz of EvalPlus's releases, also Mini and NoExtreme."""
    base = humaneval_row({**row, "test": text_of(row, "test", "")}, 0)
    prompt = text_of(row, "prompt")
    return Task(
        problem=plus_problem(row, base.prompt, prompt + text_of(row, "canonical_solution"), "humaneval_plus"),
        prefix=prompt.strip() + "\n",
        before=prompt.strip() + "\n",
        stops=HUMANEVAL_STOPS,
        given=base.setup,
        num_base_tests=1,
    )


def mbpp_plus_task(row: Row) -> Task:
    """MbppPlus.jsonl.gz of EvalPlus's releases. The prompt is a docstring with the instruction and one of the asserts."""
    prompt = text_of(row, "prompt").strip() + "\n"
    return Task(
        problem=plus_problem(
            row, mbpp_question(prompt), prompt + text_of(row, "canonical_solution"), "mbpp_plus", MBPP_TYPES
        ),
        prefix=prompt,
        before=prompt,
        stops=MBPP_STOPS,
        num_base_tests=1,
    )


def mbpp_question(prompt: str) -> str:
    return "Write a Python program in one markdown code block that solves this problem and passes its test.\n" + prompt


def plus_problem(
    row: Row, question: str, code: str, family: str, types: "Mapping[int, Callable[[list], Any]] | None" = None
) -> Problem:
    name, entry_point = identifier_of(row, "task_id"), text_of(row, "entry_point")
    atol = row.get("atol")
    if isinstance(atol, bool) or not isinstance(atol, int | float):
        raise RowError(
            "field 'atol' is missing: give EvalPlus's own file, with base_input, plus_input and atol", "atol"
        )
    typed = (types or {}).get(int(name.rpartition("/")[2]) if name.rpartition("/")[2].isdecimal() else -1, list)
    tests = []
    for field in ("base_input", "plus_input"):
        inputs = row.get(field)
        if inputs == {} and field == "plus_input":
            inputs = []
        if not isinstance(inputs, list) or not all(isinstance(args, list) for args in inputs):
            raise RowError(f"field {field!r} is missing: give EvalPlus's own file, with lists of arguments", field)
        if inputs:
            tests.append(
                _TEST.format(
                    atol=atol, inputs=literal([typed(args) for args in inputs]), oracle=_ORACLES.get(name, "pass")
                )
            )
    return Problem(
        id=name,
        prompt=question,
        prompt_tests=(),
        reward_tests=tuple(tests),
        test_mode="check_function",
        entry_point=entry_point,
        setup=_SETUP.format(code=code, entry_point=entry_point),
        solution=code,
        family=family,
    )


def literal(value: Any) -> str:
    """Source of a value, as exact as `repr`, also for infinities, NaN and integers of thousands of digits."""
    kind = type(value)
    if kind is list and plain(value):
        return f"json.loads({json.dumps(value)!r})"  # a display of many items takes the compiler a gigabyte
    if kind is float and value - value != 0:
        return f"float('{value}')"
    if kind is int:
        return repr(value) if abs(value) < 10**1000 else hex(value)
    if kind is complex:
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if kind is dict:
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if kind in (list, tuple, set):
        items = f"[{', '.join(map(literal, value))}]"
        return items if kind is list else f"{kind.__name__}({items})"
    assert kind in (type(None), bool, str, float), kind
    return repr(value)


def plain(value: Any) -> bool:
    """Whether JSON brings it back as it was."""
    if type(value) is list:
        return all(map(plain, value))
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    return (
        type(value) is not int or abs(value) < 10**1000 if type(value) in (type(None), bool, str, int, float) else False
    )


# JSON has no tuples, sets and complex numbers: which arguments of MBPP+ are some, by the number of the problem.


def each(convert: Callable[[Any], Any]) -> Callable[[list], list]:
    return lambda values: [convert(value) for value in values]


def first(convert: Callable[[Any], Any]) -> Callable[[list], list]:
    return lambda args: [convert(args[0]), *args[1:]]


def deep_tuple(value: Any) -> Any:
    return tuple(map(deep_tuple, value)) if isinstance(value, list) else value


def tuples_in(value: list) -> tuple:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _types() -> dict[int, Callable[[list], Any]]:
    every_one = (
        2,
        116,
        132,
        143,
        222,
        261,
        273,
        394,
        399,
        421,
        424,
        429,
        470,
        560,
        579,
        596,
        616,
        630,
        726,
        740,
        744,
        809,
    )
    items_of_every_one = (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)
    table: dict[int, Callable[[list], Any]] = dict.fromkeys(every_one, each(tuple))
    table |= dict.fromkeys(items_of_every_one, each(each(tuple)))
    table |= dict.fromkeys((75, 413, 444, 753), first(each(tuple)))
    table |= dict.fromkeys((250, 307, 405, 446, 617, 720, 763, 808), first(tuple))
    table |= dict.fromkeys((259, 401, 445), each(lambda value: tuple(map(tuple, value))))
    table |= dict.fromkeys((106, 750), lambda args: [args[0], tuple(args[1])])
    table |= dict.fromkeys((580, 615, 791), deep_tuple)
    table[115] = first(each(lambda item: set(item) if isinstance(item, list) and item else {}))
    table[124] = lambda args: [float(args[0]), complex(args[1])]
    table[252] = first(complex)
    table[278] = each(tuples_in)
    table[722] = first(lambda value: {key: tuple(item) for key, item in value.items()})
    return table


MBPP_TYPES = _types()
