"""Mutable containers on both sides of the link: what they hold, what has changed, new contents in place."""

import array
import collections
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from sys import getrecursionlimit, setrecursionlimit  # a program may overwrite what is in its sys
from typing import Any, Protocol

from sandbox.judge.value_types import Wire

MAX_DEPTH = 500
_ROOM = 8 * MAX_DEPTH  # frames


class BadValueError(Exception):
    """The other side sent something that is not a value."""


class ContentsEncoder(Protocol):
    def contents(self, container: Any) -> Wire: ...


def with_room(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a recursive function with stack for a value of `MAX_DEPTH`, whatever the program's own limit is."""
    limit = getrecursionlimit()
    setrecursionlimit(limit + _ROOM)
    try:
        return function(*args)
    finally:
        if getrecursionlimit() == limit + _ROOM:  # else a program that was called meanwhile has set its own
            setrecursionlimit(limit)


MUTABLE = frozenset(
    {list, dict, set, bytearray, array.array, types.SimpleNamespace}
    | {collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque}
)


def snapshot(container: Any) -> Any:
    """What `changed` compares with later: the parts themselves, so that they stay alive and keep their ids."""
    if isinstance(container, dict):
        items = collections.OrderedDict.items if isinstance(container, collections.OrderedDict) else dict.items
        return list(flat(items(container)))  # pyright: ignore[reportArgumentType]
    if isinstance(container, types.SimpleNamespace):
        return list(flat(vars(container).items()))
    if isinstance(container, list | set | collections.deque):
        return list(container)
    return bytes(container) if isinstance(container, bytearray | array.array) else _numpy_bytes(container)


def changed(before: Any, container: Any) -> bool:
    """Whether a container holds other objects now, or the same ones in another order."""
    after = snapshot(container)
    if type(after) is not list:
        return after != before
    return len(after) != len(before) or not all(map(operator.is_, before, after))


class Shared:
    """Containers that both sides hold, and what they held when this side last told the other."""

    def __init__(self, containers: Sequence[Any] = ()) -> None:
        self.containers: list[Any] = []
        self._before: list[Any] = []
        self.extend(containers)

    def extend(self, containers: Sequence[Any]) -> None:
        self.containers += containers
        self._before += map(snapshot, containers)

    def changes(self, encoder: ContentsEncoder) -> list[Wire]:
        """[number, contents] of those that changed; `encoder` was made with `known=containers`."""
        pairs = zip(self.containers, self._before, strict=True)
        return [[i, encoder.contents(c)] for i, (c, before) in enumerate(pairs) if changed(before, c)]


def replace_contents(old: Any, new: Any) -> None:
    kind = type(new)
    if not isinstance(old, kind) or (kind not in MUTABLE and _numpy_bytes(new) is None):
        raise BadValueError("contents of another kind")
    if isinstance(old, dict):
        kind.clear(old)
        (collections.OrderedDict if kind is collections.OrderedDict else dict).update(old, new)
    elif kind is set:
        old.intersection_update(())
        old.update(new)
    elif kind is types.SimpleNamespace:
        vars(old).clear()
        vars(old).update(vars(new))
    elif kind is collections.deque:
        old.clear()
        old.extend(new)
    else:
        old[:] = new


def flat(items: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
    return (part for pair in items for part in pair)


# numpy, where the program and the tests have it.


def numpy_module() -> Any:
    return sys.modules.get("numpy")


def numpy_array(dtype: str, shape: list[int], data: str) -> Any:
    numpy = numpy_module()
    if numpy is None or numpy.dtype(dtype).kind not in "biufcSU":
        raise BadValueError("no such array")
    return numpy.frombuffer(bytearray.fromhex(data), dtype).reshape(shape)


def _numpy_bytes(value: Any) -> bytes | None:
    numpy = numpy_module()
    return value.tobytes() if numpy is not None and isinstance(value, numpy.ndarray) else None
