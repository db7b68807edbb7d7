"""Which types of the standard library cross the link, by which names, and how those without parts are written.

A type crosses by a name from a fixed list; an exception or an Enum of the standard library by its module and name, if
both sides have it. So nothing that arrives can be anything but one of these, an instance of one, or a stand-in.
"""

import array
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import importlib
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Wire = Any  # what json can hold

# Modules whose functions the tests may take from their own standard library when the program imported them by name.
PURE_MODULES = frozenset({"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools"})
PURE_MODULES |= {"heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing"}

_STANDARD_EXCEPTIONS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}
TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in [
        *(
            int,
            float,
            complex,
            bool,
            str,
            bytes,
            bytearray,
            list,
            tuple,
            set,
            frozenset,
            dict,
            object,
            type,
            range,
            slice,
        ),
        *(type(None), collections.deque, collections.Counter, collections.OrderedDict, collections.defaultdict),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, fractions.Fraction, array.array, memoryview, types.SimpleNamespace),
    ]
} | _STANDARD_EXCEPTIONS
_NAMES = {id(kind): name for name, kind in TYPES.items()}
_IDENTITY_ONLY = {"Ellipsis": ..., "NotImplemented": NotImplemented, "nan": math.nan}
_EXCEPTIONS: dict[tuple[str, str], type[BaseException]] = {}

# Attributes that plain values have: a program must not answer `result.startswith(...)` for a result that is none.
_VALUE_TYPES: list[type] = [int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, slice]
_VALUE_TYPES += [collections.deque, collections.Counter, collections.OrderedDict, collections.defaultdict]
_VALUE_TYPES += [datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction]
_VALUE_TYPES += [types.FunctionType, types.GeneratorType, types.CoroutineType, BaseException, StopIteration]
VALUE_ATTRIBUTES = frozenset(name for kind in _VALUE_TYPES for name in dir(kind))

# Types that are one string, by name, so that their modules are imported only when they occur.
_AS_TEXT = {"uuid.UUID", "zoneinfo.ZoneInfo"}
_AS_TEXT |= {f"pathlib.{name}" for name in ("PurePosixPath", "PosixPath", "PureWindowsPath")}
_AS_TEXT |= {f"ipaddress.IPv{n}{what}" for n in (4, 6) for what in ("Address", "Network", "Interface")}


def type_wire(kind: type) -> list[Wire] | None:
    """["type", name, nearest builtin exception class if it is one]; None for what is no type of the standard library."""
    if name := _NAMES.get(id(kind)):
        return ["type", name]
    mro = mro_of(kind)
    if not (BaseException in mro or enum.Enum in mro):
        return None
    module, name = str(kind.__module__), str(kind.__qualname__)
    if getattr(sys.modules.get(module), name, None) is not kind or not _is_standard(module):
        return None
    return ["type", f"{module}:{name}", standard_base(kind) if BaseException in mro else ""]


def type_of_wire(wire: list[Wire]) -> type:
    """The type that `type_wire` named. Raises what garbage makes it raise: KeyError, TypeError, ..."""
    if wire[1] in TYPES:
        return TYPES[wire[1]]
    module, _, name = wire[1].partition(":")
    kind = getattr(sys.modules.get(module), name, None) if _is_standard(module) else None
    if isinstance(kind, type) and issubclass(kind, BaseException | enum.Enum):
        return kind
    return exception_class(name, wire[2])


def _is_standard(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names and top != "unittest"  # whose exceptions mean something to a test


def standard_base(kind: type) -> str:
    """Name of the nearest builtin class among the bases of an exception class."""
    for base in mro_of(kind):
        if _STANDARD_EXCEPTIONS.get(base.__name__) is base:
            return base.__name__
    return "Exception"


def exception_class(name: str, base: str) -> type[BaseException]:
    """The builtin of that name, or one class per (name, base)."""
    parent = _STANDARD_EXCEPTIONS.get(base, Exception)
    if name == base:
        return parent
    if (name, base) not in _EXCEPTIONS:
        _EXCEPTIONS[name, base] = type(name, (parent,), {})
    return _EXCEPTIONS[name, base]


def mro_of(kind: type) -> tuple[type, ...]:
    """The classes that a value really has, whatever a metaclass or a `__class__` property says."""
    return type.__dict__["__mro__"].__get__(kind)


def is_named_tuple(kind: type) -> bool:
    names = getattr(kind, "_fields", None)
    return tuple in mro_of(kind) and type(names) is tuple and all(type(name) is str for name in names)


def poses_as_value(names: Iterable[Any], parts: Iterable[Any]) -> bool:
    """Whether attributes of an object would answer for methods of a plain value."""
    return any(name in VALUE_ATTRIBUTES and callable(part) for name, part in zip(names, parts, strict=False))


def constant_wire(value: Any) -> list[Wire] | None:
    """For what is known by identity alone."""
    for name, constant in _IDENTITY_ONLY.items():
        if value is constant:
            return ["const", name]
    return None


def as_text(base: type) -> str | None:
    """Full name of a type that is one string."""
    name = f"{base.__module__}.{base.__qualname__}"
    return name if name in _AS_TEXT else None


def _of_text(wire: list[Wire]) -> Any:
    module, _, name = wire[1].rpartition(".")
    if wire[1] not in _AS_TEXT or type(wire[2]) is not str:
        raise ValueError("no such type")
    return getattr(importlib.import_module(module), name)(wire[2])


# Scalars to wire form, read through the base class and never through what a subclass overrides.


def _read(kind: type, *names: str) -> Callable[[Any], list[Any]]:
    getters = [vars(kind)[name].__get__ for name in names]
    return lambda value: [get(value) for get in getters]


_date = _read(datetime.date, "year", "month", "day")
_time = _read(datetime.time, "hour", "minute", "second", "microsecond", "fold")
_datetime = _read(datetime.datetime, "hour", "minute", "second", "microsecond", "fold")
_delta = _read(datetime.timedelta, "days", "seconds", "microseconds")
_zone_of_time, _zone_of_datetime = _read(datetime.time, "tzinfo"), _read(datetime.datetime, "tzinfo")


def _zone(value: Any, encode: Callable[[Any], Wire]) -> Wire:
    if value is not None and type(value) is not datetime.timezone and as_text(type(value)) is None:
        raise ValueError("a time zone of the program's own making")
    return encode(value)


def _timezone(value: datetime.timezone) -> list[Wire]:
    delta, *name = datetime.timezone.__getinitargs__(value)  # pyright: ignore[reportAttributeAccessIssue]
    return ["tz", _delta(delta), *name]


def _of_timezone(wire: list[Wire]) -> datetime.timezone:
    return datetime.timezone(datetime.timedelta(*wire[1]), *wire[2:])


# Type -> its wire form; these may hold other values (a time zone), which they give to `encode`.
LEAVES: dict[type, Callable[[Any, Callable[[Any], Wire]], Wire]] = {
    bytes: lambda v, encode: ["b", bytes.hex(v)],
    complex: lambda v, encode: ["c", *(repr(part.__get__(v)) for part in (complex.real, complex.imag))],  # type: ignore[attr-defined]
    memoryview: lambda v, encode: ["mv", v.tobytes().hex()],
    decimal.Decimal: lambda v, encode: ["dec", decimal.Decimal.__str__(v)],
    fractions.Fraction: lambda v, encode: [
        "frac",
        *(encode(vars(fractions.Fraction)[name].__get__(v)) for name in ("_numerator", "_denominator")),
    ],
    datetime.timedelta: lambda v, encode: ["delta", *_delta(v)],
    datetime.datetime: lambda v, encode: ["datetime", _zone(_zone_of_datetime(v)[0], encode), *_date(v), *_datetime(v)],
    datetime.date: lambda v, encode: ["date", *_date(v)],
    datetime.time: lambda v, encode: ["time", _zone(_zone_of_time(v)[0], encode), *_time(v)],
    datetime.timezone: lambda v, encode: _timezone(v),
}
# Tag -> the value; for the first element after the tag see ZONED.
OF_LEAVES: dict[str, Callable[[list[Wire]], Any]] = {
    "i": lambda wire: int(wire[1], 16),
    "f": lambda wire: float(wire[1]),
    "u": lambda wire: bytes.fromhex(wire[1]).decode("utf-8", "surrogatepass"),
    "b": lambda wire: bytes.fromhex(wire[1]),
    "mv": lambda wire: memoryview(bytes.fromhex(wire[1])),
    "c": lambda wire: complex(float(wire[1]), float(wire[2])),
    "dec": lambda wire: decimal.Decimal(wire[1]),
    "delta": lambda wire: datetime.timedelta(*wire[1:]),
    "date": lambda wire: datetime.date(*wire[1:]),
    "tz": _of_timezone,
    "type": type_of_wire,
    "const": lambda wire: _IDENTITY_ONLY[wire[1]],
    "text": _of_text,
}


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError("not a mapping")
    return value


# Tag -> the value, from parts that are decoded already.
OF_PARTS: dict[str, Callable[..., Any]] = {
    "t": lambda *parts: parts,
    "fs": lambda *parts: frozenset(parts),
    "range": range,
    "slice": slice,
    "dk": lambda *parts: dict.fromkeys(parts).keys(),
    "dv": lambda *parts: dict(enumerate(parts)).values(),
    "di": lambda *parts: dict(parts).items(),
    "frac": fractions.Fraction,
    "chain": lambda *maps: collections.ChainMap(*map(_mapping, maps)),
    "proxy": lambda mapping: types.MappingProxyType(_mapping(mapping)),
    "datetime": lambda zone, *parts: datetime.datetime(*parts[:7], tzinfo=zone, fold=parts[7]),
    "time": lambda zone, *parts: datetime.time(*parts[:4], tzinfo=zone, fold=parts[4]),
}
