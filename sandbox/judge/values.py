"""Values as tagged JSON, rebuilt into exact builtins on the other side. Never pickle.

None, bool, small int, finite float and str without surrogates stand for themselves; everything else is a JSON array
that starts with a one-word tag. A subclass of a builtin crosses as the plain value. What is not a value (an instance
of the program's own class, a function, a lazy iterator) goes through `export`, which names it for the other side, and
comes back through `resolve`. Depth, number of nodes and self-reference are bounded: `ValueError` when encoding (the
caller decides), `BadValueError` when decoding.

Not kept: that two places of one value are the same object, NaN payloads, time zones other than fixed offsets.
"""

import collections
import datetime
import decimal
import fractions
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 120
MAX_NODES = 1_000_000
_SMALL = 10**15

Wire = Any  # what json can hold

# Types that may be named across the border, as arguments (`keep(items, int)`) or default factories.
_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (int, float, complex, bool, str, bytes, bytearray, list, tuple, set, frozenset, dict, object, type)
} | {"NoneType": type(None), "range": range, "slice": slice}
_TYPE_NAMES = {t: name for name, t in _TYPES.items()}
_CONSTANTS = {"Ellipsis": ..., "NotImplemented": NotImplemented}
# Modules whose functions the tests may take from their own standard library when the program imported them by name.
PURE_MODULES = frozenset(
    [
        "bisect",
        "cmath",
        "collections",
        "copy",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "random",
        "re",
        "statistics",
        "string",
        "typing",
    ]
)
_NAMED_TUPLES: dict[tuple[str, ...], Any] = {}

DictKeys, DictValues, DictItems = type({}.keys()), type({}.values()), type({}.items())


class BadValueError(Exception):
    """The other side sent something that is not a value."""


class Encoder:
    """One value to wire form; a fresh Encoder for each message, because it counts nodes.

    Encoder(export).encode({1: (2.0, b"x")}) -> ["d", 1, ["t", 2.0, ["b", "78"]]]
    """

    def __init__(self, export: Callable[[Any], Wire]) -> None:
        self._export = export
        self._nodes = MAX_NODES
        self._path: set[int] = set()

    def encode(self, value: Any) -> Wire:
        kind = type(value)
        if kind is int:
            return value if -_SMALL < value < _SMALL else ["i", hex(value)]
        if value is None or kind is bool:
            return value
        if kind is str:
            return _encode_str(value)
        if kind is float:
            return value if value - value == 0 else ["f", repr(value)]
        coder = _ENCODERS.get(kind)
        if coder is None:
            for base in type.mro(kind) if kind is not type else ():
                if base in _ENCODERS or base in _PLAIN:
                    return self._encode_subclass(value, base)
            return self._encode_other(value)
        return self._encode_container(value, coder)

    def _encode_container(self, value: Any, coder: "Callable[[Encoder, Any], Wire]") -> Wire:
        key = id(value)
        if key in self._path or len(self._path) >= MAX_DEPTH:
            raise ValueError("value refers to itself or is nested too deeply")
        self._path.add(key)
        wire = coder(self, value)
        self._path.discard(key)
        return wire

    def _encode_subclass(self, value: Any, base: type) -> Wire:
        if base in _PLAIN:
            return self.encode(_PLAIN[base](value))
        if base is tuple and type(getattr(type(value), "_fields", None)) is tuple:
            return self._encode_container(value, _encode_namedtuple)
        return self._encode_container(value, _ENCODERS[base])

    def _encode_other(self, value: Any) -> Wire:
        if value is ...:
            return ["const", "Ellipsis"]
        if value is NotImplemented:
            return ["const", "NotImplemented"]
        if isinstance(value, type) and value in _TYPE_NAMES:
            return ["type", _TYPE_NAMES[value]]
        return self._export(value)

    def items(self, tag: str, values: Any, *head: Wire) -> Wire:
        wire = [tag, *head]
        encode = self.encode
        for value in values:
            self._nodes -= 1
            if self._nodes < 0:
                raise ValueError("value has too many parts")
            wire.append(encode(value))
        return wire

    def pairs(self, tag: str, mapping: Any, *head: Wire) -> Wire:
        return self.items(tag, (part for pair in dict.items(mapping) for part in pair), *head)


def _encode_str(value: str) -> Wire:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # a pair of lone surrogates would come out of JSON as one character
        return ["u", value.encode("utf-8", "surrogatepass").hex()]
    return value


def _encode_namedtuple(encoder: Encoder, value: Any) -> Wire:
    fields = [type(value).__name__, *type(value)._fields]
    if any(type(field) is not str for field in fields):
        return encoder.items("t", tuple.__iter__(value))
    return encoder.items("nt", tuple.__iter__(value), fields)


def _encode_defaultdict(encoder: Encoder, value: Any) -> Wire:
    factory = value.default_factory
    return encoder.pairs("dd", value, _TYPE_NAMES.get(factory) if isinstance(factory, type) else None)


def _encode_timezone(value: datetime.timezone) -> Wire:
    return ["tz", value.utcoffset(None).total_seconds()]


def _encode_datetime(encoder: Encoder, value: Any) -> Wire:
    zone = value.tzinfo
    if zone is not None and type(zone) is not datetime.timezone:
        raise ValueError("only fixed time zones cross")
    parts = [value.hour, value.minute, value.second, value.microsecond, value.fold]
    parts = parts if isinstance(value, datetime.time) else [value.year, value.month, value.day, *parts]
    tag = "time" if isinstance(value, datetime.time) else "datetime"
    return [tag, None if zone is None else _encode_timezone(zone)[1], *parts]


# Plain values of subclasses of scalars: IntEnum members, str subclasses with a lying __eq__, ...
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: lambda value: str.__getitem__(value, slice(None)),
}

_ENCODERS: dict[type, Callable[[Encoder, Any], Wire]] = {
    list: lambda e, v: e.items("l", list.__iter__(v)),
    tuple: lambda e, v: e.items("t", tuple.__iter__(v)),
    set: lambda e, v: e.items("s", set.__iter__(v)),
    frozenset: lambda e, v: e.items("fs", frozenset.__iter__(v)),
    collections.Counter: lambda e, v: e.pairs("counter", v),
    collections.OrderedDict: lambda e, v: e.pairs("od", v),
    collections.defaultdict: _encode_defaultdict,
    dict: lambda e, v: e.pairs("d", v),
    collections.deque: lambda e, v: e.items("deque", collections.deque.__iter__(v), v.maxlen),
    bytes: lambda e, v: ["b", bytes.hex(v)],
    bytearray: lambda e, v: ["ba", bytearray.hex(v)],
    complex: lambda e, v: ["c", repr(complex.real.__get__(v)), repr(complex.imag.__get__(v))],
    range: lambda e, v: e.items("range", (v.start, v.stop, v.step)),
    slice: lambda e, v: e.items("slice", (v.start, v.stop, v.step)),
    DictKeys: lambda e, v: e.items("dk", v),
    DictValues: lambda e, v: e.items("dv", v),
    DictItems: lambda e, v: e.items("di", v),
    decimal.Decimal: lambda e, v: ["dec", decimal.Decimal.__str__(v)],
    fractions.Fraction: lambda e, v: e.items("frac", (v.numerator, v.denominator)),
    datetime.timedelta: lambda e, v: ["delta", v.days, v.seconds, v.microseconds],
    datetime.datetime: _encode_datetime,
    datetime.date: lambda e, v: ["date", v.year, v.month, v.day],
    datetime.time: _encode_datetime,
    datetime.timezone: lambda e, v: _encode_timezone(v),
}


def decode(wire: Wire, resolve: Callable[[list[Wire]], Any]) -> Any:
    """Wire form to value; tags that are no values go to `resolve`. Raises BadValueError, whatever the wire holds."""
    try:
        return _decode(wire, resolve)
    except BadValueError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadValueError(f"{type(error).__name__}: {error}") from None


def _decode(wire: Wire, resolve: Callable[[list[Wire]], Any]) -> Any:
    if type(wire) is not list:
        if type(wire) is dict:
            raise BadValueError("a JSON object is no value")
        return wire
    tag = wire[0]
    decoder = _DECODERS.get(tag)
    if decoder is not None:
        return decoder(wire)
    container = _CONTAINERS.get(tag)
    if container is None:
        return resolve(wire)
    skip = 2 if tag in _HEADED else 1
    return container([_decode(part, resolve) for part in wire[skip:]], wire)


def _pairs(parts: list[Any]) -> Any:
    return zip(parts[::2], parts[1::2], strict=True)


def _counter(parts: list[Any], wire: Wire) -> Any:
    counter: collections.Counter[Any] = collections.Counter()
    dict.update(counter, _pairs(parts))
    return counter


def _named_tuple(parts: list[Any], wire: Wire) -> Any:
    key = tuple(wire[1])
    if key not in _NAMED_TUPLES:
        if len(key) > 256 or len(_NAMED_TUPLES) > 256:
            return tuple(parts)
        _NAMED_TUPLES[key] = collections.namedtuple(key[0], key[1:])
    return _NAMED_TUPLES[key]._make(parts)


def _zone(seconds: float | None) -> datetime.timezone | None:
    return None if seconds is None else datetime.timezone(datetime.timedelta(seconds=seconds))


_HEADED = frozenset({"dd", "deque", "nt"})  # containers whose second part is not an element
_CONTAINERS: dict[str, Callable[[list[Any], Wire], Any]] = {
    "l": lambda parts, wire: parts,
    "t": lambda parts, wire: tuple(parts),
    "s": lambda parts, wire: set(parts),
    "fs": lambda parts, wire: frozenset(parts),
    "d": lambda parts, wire: dict(_pairs(parts)),
    "od": lambda parts, wire: collections.OrderedDict(_pairs(parts)),
    "dd": lambda parts, wire: collections.defaultdict(_TYPES[wire[1]] if wire[1] else None, _pairs(parts)),
    "counter": _counter,
    "deque": lambda parts, wire: collections.deque(parts, wire[1]),
    "nt": _named_tuple,
    "range": lambda parts, wire: range(*parts),
    "slice": lambda parts, wire: slice(*parts),
    "dk": lambda parts, wire: dict.fromkeys(parts).keys(),
    "dv": lambda parts, wire: dict(enumerate(parts)).values(),
    "di": lambda parts, wire: dict(parts).items(),
    "frac": lambda parts, wire: fractions.Fraction(*parts),
    "iter": lambda parts, wire: iter(parts),
}
_DECODERS: dict[str, Callable[[Wire], Any]] = {
    "i": lambda wire: int(wire[1], 16),
    "f": lambda wire: float(wire[1]),
    "u": lambda wire: bytes.fromhex(wire[1]).decode("utf-8", "surrogatepass"),
    "b": lambda wire: bytes.fromhex(wire[1]),
    "ba": lambda wire: bytearray.fromhex(wire[1]),
    "c": lambda wire: complex(float(wire[1]), float(wire[2])),
    "dec": lambda wire: decimal.Decimal(wire[1]),
    "delta": lambda wire: datetime.timedelta(*wire[1:]),
    "date": lambda wire: datetime.date(*wire[1:]),
    "datetime": lambda wire: datetime.datetime(*wire[2:9], tzinfo=_zone(wire[1]), fold=wire[9]),
    "time": lambda wire: datetime.time(*wire[2:6], tzinfo=_zone(wire[1]), fold=wire[6]),
    "tz": lambda wire: _zone(wire[1]),
    "type": lambda wire: _TYPES[wire[1]],
    "const": lambda wire: _CONSTANTS[wire[1]],
}

MUTABLE_TAGS = frozenset({"l", "d", "s", "t", "ba", "deque", "dd", "od", "counter", "nt"})


def is_mutable(wire: Wire) -> bool:
    """Whether a function could have changed the value in place (a tuple may hold a list)."""
    return type(wire) is list and wire[0] in MUTABLE_TAGS


def graft(old: Any, new: Any) -> Any:
    """Makes `old` equal to `new` in place where its type allows and returns it; else returns `new`.

    Inner containers keep their identity while lengths and keys agree, so a test that holds a row of a matrix sees the
    change.
    """
    kind = type(old)
    if kind is not type(new):
        return new
    if kind is list:
        old[:] = [graft(a, b) for a, b in zip(old, new, strict=True)] if len(old) == len(new) else new
    elif isinstance(old, dict):
        merged = {key: graft(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        dict.update(old, merged)
    elif kind is set:
        old.clear()
        old |= new
    elif kind is bytearray:
        old[:] = new
    elif kind is collections.deque:
        old.clear()
        old.extend(new)
    elif kind is tuple and len(old) == len(new):
        parts = tuple(graft(a, b) for a, b in zip(old, new, strict=True))
        return old if all(a is b for a, b in zip(old, parts, strict=True)) else parts
    else:
        return new
    return old
