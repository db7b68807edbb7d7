"""Values cross unchanged and as exact builtins, or are refused; nothing a peer sends does more than that."""

import array
import collections
import datetime
import decimal
import enum
import fractions
import http
import ipaddress
import json
import math
import pathlib
import random
import types
import uuid
import zoneinfo
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.judge.containers import BadValueError, Shared, with_room
from sandbox.judge.decoding import Decoder
from sandbox.judge.values import Encoder


class Refusal:
    """Stands for a side that describes no object."""

    def export(self, encoder: Encoder, value: Any) -> Any:
        raise ValueError("not a value")

    def foreign(self, value: Any) -> None:
        return None

    def keeps(self, kind: type) -> bool:
        return False


def unknown(reference: list[Any]) -> Any:
    raise BadValueError("unknown tag")


def cross(value: Any) -> Any:
    return Decoder(unknown).decode(json.loads(json.dumps(with_room(Encoder(Refusal()).encode, value))))


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
        collections.ChainMap({"a": 1}, {"b": [2]}),
        types.MappingProxyType({"a": 1}),
        types.SimpleNamespace(a=[1]),
        array.array("d", [1.5, -0.0]),
        uuid.UUID(int=7),
        pathlib.PurePosixPath("/a"),
        ipaddress.ip_network("10.0.0.0/8"),
        zoneinfo.ZoneInfo("UTC"),
        datetime.timezone(datetime.timedelta(minutes=90), "X"),
        http.HTTPStatus.OK,
        json.JSONDecodeError,
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
    reordered = collections.OrderedDict([("b", 1), ("a", 2)])
    reordered.move_to_end("b")
    assert list(cross(reordered)) == ["a", "b"]
    assert str(cross(decimal.Decimal("-sNaN7"))) == "-sNaN7"
    assert cross(collections.deque([1], maxlen=3)).maxlen == 3
    assert cross(collections.defaultdict(list)).default_factory is list
    assert cross({1: 2}.keys()) == {1} and list(cross({1: 2}.values())) == [2] and cross({1: 2}.items()) == {(1, 2)}


def test_what_numpy_makes_crosses_as_plain_values_and_arrays() -> None:
    for value, plain in (
        (numpy.int64(-3), -3),
        (numpy.float64(0.5), 0.5),
        (numpy.bool_(True), True),
        (numpy.str_("a"), "a"),
    ):
        assert same(cross([value]), [plain])
    array = numpy.arange(6, dtype="<i4").reshape(2, 3)
    crossed = cross(array)
    assert crossed.dtype == array.dtype and crossed.tolist() == [[0, 1, 2], [3, 4, 5]] and crossed.flags.writeable


def test_exceptions_cross_with_what_they_carry() -> None:
    try:
        raise KeyError("k") from ValueError("cause", 1)
    except KeyError as error:
        error.code = 5  # type: ignore[attr-defined]
        error.add_note("a note")
        crossed = cross(error)
    assert type(crossed) is KeyError and crossed.args == ("k",)
    assert vars(crossed) == {"code": 5, "__notes__": ["a note"]}
    assert type(crossed.__cause__) is ValueError and crossed.__cause__.args == ("cause", 1)
    group = cross(ExceptionGroup("g", [OSError(2, "no", "name")]))
    assert group.message == "g" and group.exceptions[0].filename == "name"
    assert str(cross(json.JSONDecodeError("bad", "{", 1))) == "bad: line 1 column 2 (char 1)"


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


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        *((LyingStr("a"), "a"), (LyingList([1]), [1]), (LyingInt(3), 3), (LyingFloat(3), 3.0)),
        *((Color.RED, 1), (Point(1, [2]), (1, [2]))),  # as nothing describes their classes here
    ],
)
def test_subclasses_of_builtins_arrive_as_the_plain_value(value: Any, plain: Any) -> None:
    assert same(cross([value]), [plain])


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def test_what_cannot_cross_is_refused() -> None:
    wide: Any = (0,)
    for _ in range(30):
        wide = (wide, wide)
    assert same(cross(nested(450)), nested(450))
    for value in (nested(600), wide, object(), open):
        with pytest.raises(ValueError):
            cross(value)


def test_containers_are_the_same_again_within_a_value() -> None:
    row, nan = [1], float("nan")
    loop: list[Any] = [row, (row, {"k": row}), nan, nan]
    loop.append(loop)
    a, (b, c), d, e, again = cross(loop)
    assert a is b is c["k"] and d is e and again[0] is a
    assert cross([math.nan])[0] is math.nan


def shaken(value: Any, choose: random.Random) -> list[Any]:
    """A value's containers after random changes in place: items moved, dropped, doubled, new ones put in."""
    found: list[Any] = []
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, list | dict | set | tuple | frozenset) and not any(part is seen for seen in found):
            found.append(part)
            todo += [*part.values()] if isinstance(part, dict) else part
    for part in found:
        items = list(part)
        choose.shuffle(items)
        if isinstance(part, list):
            part[:] = [*items[1:], *items[:1] * choose.randrange(3), [choose.random()], choose.choice(found)]
        elif isinstance(part, dict):
            for key in items[:1]:
                part[str(choose.random())] = part.pop(key)
        elif isinstance(part, set):
            part ^= {*items[:1], choose.random()}
    return found


def in_order(wire: Any) -> Any:
    """A wire form in which equal sets are written the same way."""
    if type(wire) is not list:
        return wire
    parts = [in_order(part) for part in wire]
    return [parts[0], *sorted(parts[1:], key=repr)] if parts[0] in ("s", "fs") else parts


@settings(max_examples=150, deadline=None)
@given(values, st.randoms(use_true_random=False))
def test_changes_in_place_are_made_on_the_other_side_too(value: Any, choose: random.Random) -> None:
    ours = [value, [value]]
    encoder = Encoder(Refusal())
    theirs_decoder = Decoder(unknown)
    theirs = theirs_decoder.decode(encoder.encode(ours))
    shared = Shared(theirs_decoder.containers)
    shaken(theirs, choose)
    changes = shared.changes(Encoder(Refusal(), shared.containers))
    Decoder(unknown, encoder.containers).refill(json.loads(json.dumps(changes)))
    assert in_order(Encoder(Refusal()).encode(ours)) == in_order(Encoder(Refusal()).encode(theirs))


@pytest.mark.parametrize(
    "wire",
    [
        [], ["no such tag"], [[]], {"a": 1}, ["d", 1], ["d", ["l"], 1], ["s", ["l"]], ["i", "zz"], ["i", 5], ["b",
        "0"], ["type", "open"], ["nt", ["P", "class"], 1], ["nt", 5, 1], ["range", 1, 2, 0], ["frac", 1, 0],
        ["date", 0, 0, 0], ["tz", 1e9], ["dec", "x"], ["dd", "open"], ["deque", "x"], ["const", "quit"], ["f"],
        ["u", "ff"], ["mine"], [None], ["ref", 0], ["ref", -1], ["em", ["type", "int"], "RED", 1], ["nt", ["type", "tuple"], 1],
        ["exc", ["type", "int"], ["t", 1], ["d"], None, None], ["type", "unittest.case:SkipTest"], ["type", "os:system"],
        ["text", "os.system", "x"], ["nd", "|O", [1], "00"], ["array", "u", "0"], ["chain", 4], ["ns", 1],
    ],
)  # fmt: skip
def test_garbage_is_a_bad_value_and_nothing_else(wire: Any) -> None:
    with pytest.raises(BadValueError):
        Decoder(unknown).decode(wire)


def test_nothing_that_arrives_can_answer_for_the_methods_of_a_value() -> None:
    def resolve(reference: list[Any]) -> Any:
        return len

    for wire in (
        ["ns", "startswith", ["mine"]],
        ["exc", ["type", "OSError"], ["t"], ["d", "count", ["mine"]], None, None],
    ):
        with pytest.raises(BadValueError):
            Decoder(resolve).decode(wire)
    assert Decoder(resolve).decode(["ns", "fetch", ["mine"]]).fetch is len
