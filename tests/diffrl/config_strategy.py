"""Raw configs drawn from the models themselves: mostly valid, with a few mistakes of every kind. A section or a key that is
added to a model is drawn too.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffrl.coupled_grpo import ADVANTAGES
from diffrl.estimators import ESTIMATORS
from diffrl.models.sizes import KNOWN_MODELS
from diffrl.objectives import OBJECTIVES
from diffrl.rewards import REWARDS
from diffrl.views import T_DISTRIBUTIONS

Draw = Any
REGISTRIES = (ADVANTAGES, ESTIMATORS, KNOWN_MODELS, OBJECTIVES, REWARDS, T_DISTRIBUTIONS)
NAMES = [name for registry in REGISTRIES for name in registry]
LOOKALIKES = [
    "5",
    "1e-3",
    "yes",
    "null",
    "~",
    "0x1F",
    "1_000",
    "1:30",
    "2026-01-01",
    ".inf",
    "=",
    "<<",
    "!!int",
    "- a",
    "{a: 1}",
]
AWKWARD = [
    "",
    " ",
    "a b: c",
    "#x",
    "'",
    '"',
    "ünï",
    "\n",
    "\0",
    "\x85",
    "\ud800",
    "\u2028",
    "x" * 300,
    "../..",
    "host:1",
]
WORDS = st.sampled_from([*NAMES, *LOOKALIKES, *AWKWARD, "a", "q_proj", "p.jsonl", "runs/new"])
INTEGERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 64, 65, 1000, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400]
)
FLOATS = st.sampled_from(
    [0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 5e-324, 1e-300, 1e-9, 1e16, 1e308, float("nan"), float("inf"), float("-inf")]
)
DATES = st.sampled_from([datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 12)])
LEAVES = st.none() | st.booleans() | INTEGERS | FLOATS | WORDS | DATES | st.binary(max_size=3)
JUNK = LEAVES | st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS | INTEGERS | st.none(), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def raw_section(draw: Draw, model: type[BaseModel], **given: Any) -> dict[str, Any]:
    """Keys of a model with values of their types; `given` are as they are."""
    fields = {name: field for name, field in model.model_fields.items() if name not in given}
    required = [name for name, field in fields.items() if field.is_required()]
    optional = [name for name in fields if name not in required]
    chosen = draw(st.lists(st.sampled_from(optional), max_size=4, unique=True)) if optional else []
    raw = {**given, **{name: draw(raw_value(fields[name])) for name in [*required, *chosen]}}
    if "source" in fields and draw(st.sampled_from([True, True, True, False])):  # most sources need one
        raw["path"] = draw(WORDS)
    return raw


def raw_value(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field: its default, others of its type, and those at the edges of its range."""
    values = of_type(field.annotation, field.metadata)
    default = field.default
    plain = isinstance(default, bool | int | float | str | NoneType) and not field.is_required()
    return st.one_of([st.just(default)] * 2 + [values]) if plain else values


def of_type(annotation: Any, metadata: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return of_type(inner, [m for item in more for m in (item.metadata if isinstance(item, FieldInfo) else [item])])
    if origin in (Union, UnionType):
        return st.one_of([of_type(argument, metadata) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Sequence:
        return st.lists(of_type(arguments[0]), max_size=2)
    if origin is Mapping:
        return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=2)
    if annotation is NoneType:
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return numbers(metadata, 1, 2**62)
    if annotation is float:
        whole = [number for number in range(4) if all(holds(item, number) for item in metadata)]
        return numbers(metadata, 1e-6, 1e30) | st.sampled_from(whole or [1])
    if annotation is str:
        return WORDS
    if annotation is Any:
        return JUNK
    assert issubclass(annotation, BaseModel), annotation
    return raw_section(annotation)


def numbers(metadata: Sequence[Any], step: Any, far: Any) -> st.SearchStrategy[Any]:
    """Small ones, the edges of the range, and those just inside and outside of it."""
    edges = [bound for item in metadata for bound in bounds(item)]
    found: set[Any] = {edge + offset for edge in edges for offset in (-step, 0, step)}
    small = [type(step)(number) for number in (1, 2, 3, 4, 8, 64)]
    inside = [n for n in {*small, far, *found} if all(holds(item, n) for item in metadata)]
    kinds = [st.sampled_from(sorted(inside))] * 12 + [st.sampled_from(sorted({*small, *found}))]
    if type(step) is float:
        low, high = (max(edges, default=0.0) if len(edges) < 2 else min(edges)), max(edges, default=0.0)
        kinds.append(st.floats(low, high if high > low else low + 1))
    return st.one_of(kinds)


def bounds(item: Any) -> Iterator[Any]:
    yield from (getattr(item, name) for name in ("ge", "gt", "le", "lt") if getattr(item, name, None) is not None)


def holds(item: Any, number: Any) -> bool:
    return (
        (not isinstance(item, Ge) or number >= item.ge)
        and (not isinstance(item, Gt) or number > item.gt)
        and (not isinstance(item, Le) or number <= item.le)
        and (not isinstance(item, Lt) or number < item.lt)
    )


def sections_of(raw: Any) -> list[dict]:
    """All mappings inside, the outermost first."""
    if isinstance(raw, list):
        return [section for item in raw for section in sections_of(item)]
    return (
        [raw, *(section for value in raw.values() for section in sections_of(value))] if isinstance(raw, dict) else []
    )


@st.composite
def with_mistakes(draw: Draw, whole: st.SearchStrategy[Any]) -> Any:
    """None in half of the configs, else up to three: a value of another kind, a key that is missing or misspelt. A list is
    one of configs."""
    raw = deepcopy(draw(whole))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3]))):
        section = draw(st.sampled_from(sections_of(raw)))
        key = draw(st.sampled_from(sorted(section, key=repr))) if section else "stage"
        kind = draw(st.sampled_from(["value", "value", "value", "missing", "misspelt", "unknown"]))
        if kind == "missing":
            section.pop(key, None)
        elif kind == "misspelt":
            section[f"{key}s"] = section.pop(key, None)
        else:
            section[key if kind == "value" else draw(WORDS | st.integers() | st.none())] = draw(JUNK)
    return raw
