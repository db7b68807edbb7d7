"""Tagged JSON to values: the other half of values.py. Whatever arrives, it becomes a value, a stand-in or an error."""

import array
import collections
import enum
import types
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.judge.containers import BadValueError, numpy_array, replace_contents, with_room
from sandbox.judge.value_types import OF_LEAVES, OF_PARTS, Wire, is_named_tuple, mro_of, poses_as_value


class Decoder:
    """Wire forms of one message to values; `known` as for Encoder. Raises BadValueError, whatever the wire holds."""

    def __init__(self, resolve: Callable[[list[Wire]], Any], known: Sequence[Any] = ()) -> None:
        self._resolve = resolve
        self.containers = list(known)

    def decode(self, wire: Wire) -> Any:
        return self._guard(self._decode, wire)

    def refill(self, changes: list[Wire]) -> None:
        """Gives containers new contents, in place: [[number, contents], ...]."""
        for number, wire in changes:
            container = self.containers[_index(number)]
            self._guard(lambda c=container, w=wire: replace_contents(c, self._decode(w, numbered=False)))

    @staticmethod
    def _guard(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return with_room(function, *args)
        except BadValueError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, ImportError) as e:
            raise BadValueError(f"{type(e).__name__}: {e}") from None

    def _decode(self, wire: Wire, numbered: bool = True) -> Any:
        if type(wire) is not list:
            if type(wire) is dict:
                raise BadValueError("a JSON object is no value")
            return wire
        tag = wire[0]
        if tag in _EMPTY:
            make, start = _EMPTY[tag]
            container = make(wire)
            if numbered:
                self.containers.append(container)
            if tag in _FILL:
                _FILL[tag](container, [self._decode(part) for part in wire[start:]])
            return container
        if tag in OF_LEAVES:
            value = OF_LEAVES[tag](wire)
            if tag == "f" and value != value:
                self.containers.append(value)
            return value
        if tag == "ref":
            return self.containers[_index(wire[1])]
        if tag in OF_PARTS or tag in _OF_PARTS:
            return (OF_PARTS.get(tag) or _OF_PARTS[tag])(*[self._decode(part) for part in wire[1:]])
        return self._resolve(wire)


def _index(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise BadValueError("not an index")
    return number


def _pairs(parts: list[Any]) -> Any:
    return zip(parts[::2], parts[1::2], strict=True)


def _fill_dict(container: Any, parts: list[Any]) -> None:
    dict.update(container, _pairs(parts))


def _fill_defaultdict(container: Any, parts: list[Any]) -> None:
    if parts[0] is not None and not callable(parts[0]):
        raise BadValueError("not a factory")
    container.default_factory = parts[0]
    _fill_dict(container, parts[1:])


def _fill_namespace(container: types.SimpleNamespace, parts: list[Any]) -> None:
    if poses_as_value(parts[::2], parts[1::2]):
        raise BadValueError("attributes that pose as methods of a value")
    vars(container).update(_pairs(parts))


def _named_tuple(kind: Any, *parts: Any) -> Any:
    if not (is_named_tuple(kind) and len(kind._fields) == len(parts)):
        raise BadValueError("not a named tuple")
    return parts if poses_as_value(kind._fields, parts) else tuple.__new__(kind, parts)


def _member(kind: Any, name: Any, value: Any) -> Any:
    if enum.Enum not in mro_of(kind):
        raise BadValueError("not an Enum")
    found = kind.__members__.get(name)
    return kind(value) if found is None else found


def _exception(kind: Any, args: Any, attributes: Any, cause: Any, text: Any) -> BaseException:
    if BaseException not in mro_of(kind):
        raise BadValueError("not an exception")
    try:
        error = kind(*args)
    except Exception:  # a constructor that wants other arguments
        error = kind.__new__(kind)
        error.args = args
    if poses_as_value(attributes, attributes.values()):
        raise BadValueError("attributes that pose as methods of a value")
    vars(error).update({name: part for name, part in attributes.items() if name == "__notes__" or name[:2] != "__"})
    error.__cause__ = cause
    if type(text) is str:
        vars(error)["_text"] = text
    return error


# Mutable containers: tag -> (makes it without its parts, where these start). Those without a _FILL have none.
_EMPTY: dict[str, tuple[Callable[[Wire], Any], int]] = {
    "l": (lambda wire: [], 1),
    "d": (lambda wire: {}, 1),
    "s": (lambda wire: set(), 1),
    "od": (lambda wire: collections.OrderedDict(), 1),
    "dd": (lambda wire: collections.defaultdict(), 1),
    "counter": (lambda wire: collections.Counter(), 1),
    "deque": (lambda wire: collections.deque(maxlen=wire[1]), 2),
    "ns": (lambda wire: types.SimpleNamespace(), 1),
    "ba": (lambda wire: bytearray.fromhex(wire[1]), 0),
    "array": (lambda wire: array.array(wire[1], bytes.fromhex(wire[2])), 0),
    "nd": (lambda wire: numpy_array(*wire[1:]), 0),
}
_FILL: dict[str, Callable[[Any, list[Any]], None]] = {
    "l": list.extend,
    "deque": collections.deque.extend,
    "d": _fill_dict,
    "s": set.update,
    "od": lambda container, parts: container.update(_pairs(parts)),
    "dd": _fill_defaultdict,
    "counter": _fill_dict,
    "ns": _fill_namespace,
}
_OF_PARTS: dict[str, Callable[..., Any]] = {"nt": _named_tuple, "em": _member, "exc": _exception}
