"""Values as tagged JSON, rebuilt into exact builtins on the other side. Never pickle.

None, bool, small int, finite float and str without surrogates stand for themselves; everything else is a JSON array
that starts with a one-word tag. A subclass of a builtin crosses as the plain value. What is not a value (an instance
of the program's own class, a function, a lazy iterator) goes through `export`, which names it for the other side, and
comes back through `resolve` (decoding.py). Depth and number of nodes are bounded: `ValueError` when encoding (the
caller decides), `BadValueError` when decoding.

Containers keep their identity within a message and its answer. Both sides number the mutable ones (and NaNs, which
are equal to nothing but themselves) in the order in which they first occur, and ["ref", number] is one that occurred
before. So a list that is passed twice, holds itself, or is returned by the function that got it is one list again,
and what a function changed in place is told as the new contents of a number.

Not kept: identity over several calls, NaN payloads, time zones of a program's own making.
"""

import array
import collections
import enum
import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from sandbox.judge.containers import MAX_DEPTH, MUTABLE, flat, numpy_module, with_room
from sandbox.judge.value_types import LEAVES, Wire, as_text, constant_wire, is_named_tuple, mro_of, type_wire

MAX_NODES = 2_000_000
MAX_TEXT = 2000  # of an exception's own words
_SMALL = 10**15

DictKeys, DictValues, DictItems = type({}.keys()), type({}.values()), type({}.items())


class Exporter(Protocol):
    """Names objects that do not cross."""

    def export(self, encoder: "Encoder", value: Any) -> Wire:
        """Reference to an object; raises ValueError when it has none."""
        ...

    def foreign(self, value: Any) -> Wire:
        """Reference to what represents an object of the other side; None for anything else."""
        ...

    def keeps(self, kind: type) -> bool:
        """Whether instances of this subclass of a builtin stay where they are instead of crossing as plain values."""
        ...


class Encoder:
    """The values of one message to wire form.

    Encoder(exporter).encode({1: (2.0, b"x")}) -> ["d", 1, ["t", 2.0, ["b", "78"]]]

    known  containers that the other side has already, in the order of their numbers
    """

    def __init__(self, exporter: Exporter, known: Sequence[Any] = (), described: set[int] | None = None) -> None:
        self.exporter = exporter
        self.containers = list(known)  # which also keeps them alive, so that an id stays one object's
        self.described: set[int] = set() if described is None else described  # numbers that this message explains
        self._numbers = {id(container): number for number, container in enumerate(self.containers)}
        self._nodes = MAX_NODES
        self._depth = 0

    def encode(self, value: Any) -> Wire:
        kind = type(value)
        if kind is int:
            return value if -_SMALL < value < _SMALL else ["i", hex(value)]
        if value is None or kind is bool:
            return value
        if kind is str:
            return _encode_str(value)
        if kind is float:
            return value if value - value == 0 else self._encode_odd_float(value)
        base = kind if kind in _PARTS else _base(kind)
        if base is not kind and self.exporter.keeps(kind):
            return self.exporter.export(self, value)
        if base in _PLAIN:
            return self.encode(_PLAIN[base](value))
        if base in LEAVES:
            return LEAVES[base](value, self.encode)
        if base is None:
            return _numpy_wire(value, self) or constant_wire(value) or self._text_or_reference(value)
        if base in MUTABLE and (seen := self._seen(value)):
            return seen
        return self._encode_parts(value, base)

    def encode_or_export(self, value: Any) -> Wire:
        """Like `encode`; what is too large or too deep to cross as a value crosses as a reference."""
        described, count = set(self.described), len(self.containers)
        try:
            return with_room(self.encode, value)
        except (ValueError, TypeError, AttributeError, RecursionError):
            self.described, self._depth = described, 0
            for container in self.containers[count:]:
                del self._numbers[id(container)]
            del self.containers[count:]
            return self.exporter.export(self, value)

    def contents(self, container: Any) -> Wire:
        """Wire form of a known container as it is now, not as a reference to it."""
        base = _base(type(container))
        return _numpy_wire(container, self, known=True) if base is None else self._encode_parts(container, base)

    def items(self, tag: str, values: Iterable[Any]) -> list[Wire]:
        wire: list[Wire] = [tag]
        encode = self.encode
        for value in values:
            self._nodes -= 1
            if self._nodes < 0:
                raise ValueError("value has too many parts")
            wire.append(encode(value))
        return wire

    def _encode_parts(self, value: Any, base: type) -> Wire:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("value is nested too deeply")
        wire = _PARTS[base](self, value)
        self._depth -= 1
        return wire

    def _seen(self, value: Any) -> list[Wire] | None:
        """A reference to a container that occurred before; numbers it when it did not."""
        number = self._numbers.get(id(value))
        if number is None:
            self._numbers[id(value)] = len(self.containers)
            self.containers.append(value)
            return None
        return ["ref", number]

    def _encode_odd_float(self, value: float) -> Wire:
        if value is math.nan:
            return constant_wire(value)
        if value != value:
            return self._seen(value) or ["f", "nan"]
        return ["f", repr(value)]

    def _text_or_reference(self, value: Any) -> Wire:
        for base in mro_of(type(value)):
            if name := as_text(base):
                return ["text", name, base.__str__(value)]  # pyright: ignore[reportCallIssue]
        return self.exporter.export(self, value)


def _base(kind: type) -> type | None:
    """The class by which a value crosses: the nearest in its ancestry that has a wire form."""
    mro = mro_of(kind)
    if enum.Enum in mro:
        return enum.Enum
    return next((base for base in mro if base in _PARTS or base in LEAVES or base in _PLAIN), None)


def crosses(kind: type) -> bool:
    """Whether instances of a class cross as values."""
    return _base(kind) is not None


def is_mutable(value: Any) -> bool:
    return _base(type(value)) in MUTABLE


def _encode_str(value: str) -> Wire:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # a pair of lone surrogates would come out of JSON as one character
        return ["u", value.encode("utf-8", "surrogatepass").hex()]
    return value


def _encode_tuple(encoder: Encoder, value: Any) -> Wire:
    if is_named_tuple(type(value)) and len(type(value)._fields) == tuple.__len__(value):
        try:
            kind = encoder.encode(type(value))
        except ValueError:  # a class that is not to cross leaves the plain tuple
            pass
        else:
            return ["nt", *encoder.items(kind, tuple.__iter__(value))]
    return encoder.items("t", tuple.__iter__(value))


def _encode_member(encoder: Encoder, value: Any) -> Wire:
    fields = object.__getattribute__(value, "__dict__")
    try:
        return encoder.items("em", (type(value), fields.get("_name_"), fields.get("_value_")))
    except ValueError:  # a class that is not to cross leaves the plain value
        plain = next((base for base in mro_of(type(value)) if base in _PLAIN), None)
        if plain is None:
            raise
        return encoder.encode(_PLAIN[plain](value))


def _encode_type(encoder: Encoder, value: type) -> Wire:
    return type_wire(value) or encoder.exporter.export(encoder, value)


def _encode_exception(encoder: Encoder, value: BaseException) -> Wire:
    """["exc", its class, constructor arguments, attributes, cause, text if the class has a `__str__` of its own]"""
    if reference := encoder.exporter.foreign(value):
        return reference
    standard = next(base for base in mro_of(type(value)) if type_wire(base))
    _, args, *_ = standard.__reduce__(value)  # pyright: ignore[reportArgumentType, reportCallIssue]
    own_text = type(value).__str__ is not standard.__str__
    try:
        text = str(value)[:MAX_TEXT] if own_text else None
    except Exception:
        text = None
    attributes = {name: part for name, part in vars(value).items() if type(name) is str}
    return encoder.items("exc", (type(value), args, attributes, value.__cause__, text))


# Plain values of subclasses of scalars: a str subclass with a lying __eq__, ...
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: lambda value: str.__getitem__(value, slice(None)),
}
_PARTS: dict[type, Callable[[Encoder, Any], Wire]] = {
    list: lambda e, v: e.items("l", list.__iter__(v)),
    tuple: _encode_tuple,
    set: lambda e, v: e.items("s", set.__iter__(v)),
    frozenset: lambda e, v: e.items("fs", frozenset.__iter__(v)),
    dict: lambda e, v: e.items("d", flat(dict.items(v))),
    collections.Counter: lambda e, v: e.items("counter", flat(dict.items(v))),
    collections.OrderedDict: lambda e, v: e.items("od", flat(collections.OrderedDict.items(v))),
    collections.defaultdict: lambda e, v: e.items("dd", (_factory(v), *flat(dict.items(v)))),
    collections.deque: lambda e, v: [
        "deque",
        *e.items(vars(collections.deque)["maxlen"].__get__(v), collections.deque.__iter__(v)),
    ],
    collections.ChainMap: lambda e, v: e.items("chain", v.maps),
    types.MappingProxyType: lambda e, v: e.items("proxy", (v.copy(),)),
    types.SimpleNamespace: lambda e, v: e.items("ns", flat(vars(v).items())),
    bytearray: lambda e, v: ["ba", bytearray.hex(v)],
    array.array: lambda e, v: ["array", v.typecode, array.array.tobytes(v).hex()],
    range: lambda e, v: e.items("range", (v.start, v.stop, v.step)),
    slice: lambda e, v: e.items("slice", (v.start, v.stop, v.step)),
    DictKeys: lambda e, v: e.items("dk", v),
    DictValues: lambda e, v: e.items("dv", v),
    DictItems: lambda e, v: e.items("di", v),
    enum.Enum: _encode_member,
    BaseException: _encode_exception,
    type: _encode_type,
}
_factory = vars(collections.defaultdict)["default_factory"].__get__


def _numpy_wire(value: Any, encoder: Encoder, known: bool = False) -> Wire:
    """A scalar as the plain value, an array of numbers as its bytes; None for what is neither."""
    numpy = numpy_module()
    if numpy is None or not isinstance(value, numpy.generic | numpy.ndarray) or value.dtype.kind not in "biufcSU":
        return None
    if isinstance(value, numpy.ndarray):
        seen = None if known else encoder._seen(value)
        return seen or ["nd", value.dtype.str, list(value.shape), numpy.ndarray.tobytes(value).hex()]
    plain = value.item()
    return None if isinstance(plain, numpy.generic) else encoder.encode(plain)
