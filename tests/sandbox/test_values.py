"""Values cross unchanged and as exact builtins, or are refused; nothing a peer sends does more than that."""

import collections
import datetime
import decimal
import enum
import fractions
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.judge.values import BadValueError, Encoder, decode, graft


def refuse(value: Any) -> Any:
    raise ValueError("not a value")


def cross(value: Any) -> Any:
    return decode(json.loads(json.dumps(Encoder(refuse).encode(value))), refuse)


def same(a: Any, b: Any) -> bool:
    """Equal with equal types all the way down; NaN equals NaN, and 0.0 is not -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return a == b


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 9).map(lambda n: n - 10**5000),  # longer than int() reads from decimal digits
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs"])),
    st.binary(),
    st.just(range(3, -9, -2)),
    st.just(slice(None, 3)),
)
hashables = st.recursive(
    scalars.filter(lambda v: v == v and not isinstance(v, slice)),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(hashables, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_builtins_cross_exactly(value: Any) -> None:
    assert same(cross(value), value)


@pytest.mark.parametrize(
    "value",
    [
        decimal.Decimal("-0.10"),
        fractions.Fraction(-3, 7),
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 2, 29, 23, 59, 58, 7, datetime.timezone(datetime.timedelta(hours=-5)), fold=1),
        datetime.time(1, 2, 3),
        datetime.timedelta(days=-1, microseconds=5),
        collections.deque([1, [2]], maxlen=3),
        collections.Counter("abca"),
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.defaultdict(list, {"a": [1]}),
        bytearray(b"ab"),
        int,
        [..., NotImplemented],
        "\ud83d\ude00",
        {(1, (2.0, frozenset({b"x"}))): {None: -0.0}},
    ],
)
def test_standard_types_cross_exactly(value: Any) -> None:
    assert same(cross(value), value)
    assert cross(value).__class__ is value.__class__


def test_details_of_containers_cross() -> None:
    assert cross(collections.deque([1], maxlen=3)).maxlen == 3
    assert cross(collections.defaultdict(list)).default_factory is list
    assert cross({1: 2}.keys()) == {1} and list(cross({1: 2}.values())) == [2] and cross({1: 2}.items()) == {(1, 2)}
    point = cross(collections.namedtuple("Point", "x y")(1, [2]))
    assert point == (1, [2]) and point.y == [2]


class LyingStr(str):
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __str__(self) -> str:
        return "lie"


class LyingList(list[int]):
    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter([9])


class LyingInt(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __int__(self) -> int:
        return 9


class LyingFloat(float):
    def __float__(self) -> float:
        return 9.0


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [(LyingStr("a"), "a"), (LyingList([1]), [1]), (LyingInt(3), 3), (LyingFloat(3), 3.0), (Color.RED, 1)],
)
def test_subclasses_of_builtins_arrive_as_the_plain_value(value: Any, plain: Any) -> None:
    assert same(cross([value]), [plain])


def test_what_cannot_cross_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    wide: Any = [0]
    for _ in range(30):
        wide = [wide, wide]
    for value in (loop, deep, wide, object(), open):
        with pytest.raises(ValueError):
            cross(value)


@pytest.mark.parametrize(
    "wire",
    [
        [], ["no such tag"], [[]], {"a": 1}, ["d", 1], ["d", ["l"], 1], ["s", ["l"]], ["i", "zz"], ["i", 5], ["b",
        "0"], ["type", "open"], ["nt", ["P", "class"], 1], ["nt", 5, 1], ["range", 1, 2, 0], ["frac", 1, 0],
        ["date", 0, 0, 0], ["tz", 1e9], ["dec", "x"], ["dd", "open"], ["deque", "x"], ["const", "quit"], ["f"],
        ["u", "ff"], ["mine"], [None],
    ],
)  # fmt: skip
def test_garbage_is_a_bad_value_and_nothing_else(wire: Any) -> None:
    def resolve(reference: list[Any]) -> Any:
        raise BadValueError("unknown tag")

    with pytest.raises(BadValueError):
        decode(wire, resolve)


def test_graft_changes_in_place_and_keeps_inner_identity() -> None:
    inner, other = [1], {2}
    old = [inner, {"k": other}, (inner, 3)]
    assert graft(old, [[1, 5], {"k": {7}, "n": 0}, ([1, 5], 3)]) is old
    assert old == [[1, 5], {"k": {7}, "n": 0}, ([1, 5], 3)]
    assert old[0] is inner and old[1]["k"] is other and other == {7}  # type: ignore[index]
    assert graft([1, 2], [3]) == [3]
