"""What the tests see of the program: stand-ins whose every operation is a request to its process or a refusal.

An instance of a class that the program defines never decides a comparison: ==, <, in, bool, abs, len, iteration on it
fail the assert, even when the test swallows the exception. Its attributes are fetched and its methods called over the
link, and what comes back is again a value or a stand-in.

Only when the test itself made the instance by calling the program's class, an operator that needs the real object
(two instances compared, len, str, iteration, isinstance, subclassing) sends the whole test to run beside the
solution, with low trust.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

_BATCH = (1, 8, 64, 512)  # items fetched from a remote iterator: few at first, as it may be slow or have effects


class Remote(Protocol):
    """What the stand-ins need of the evaluator's end of the link."""

    def request(self, op: str, **fields: Any) -> dict[str, Any]: ...
    def call_remote(self, op: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def decode(self, wire: Any) -> Any: ...
    def encode(self, value: Any) -> Any: ...
    def spoil(self, status: str, detail: str) -> BaseException: ...


class StandIn:
    """An object in the program's process, known by its number."""

    __slots__ = ("__weakref__", "_proxy_made_by_test", "_proxy_number", "_proxy_peer", "_proxy_type")
    __hash__ = object.__hash__

    def __init__(self, peer: Remote, number: int, type_name: str) -> None:
        object.__setattr__(self, "_proxy_peer", peer)
        object.__setattr__(self, "_proxy_number", number)
        object.__setattr__(self, "_proxy_type", type_name)
        object.__setattr__(self, "_proxy_made_by_test", False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__wrapped__"):
            raise AttributeError(name)
        peer = self._proxy_peer
        return peer.decode(peer.request("get", on=self._proxy_number, name=name)["v"])

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy_peer.request("set", on=self._proxy_number, name=name, a=self._proxy_peer.encode(value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._proxy_peer.call_remote("call", self._proxy_number, args, kwargs)


class RemoteFunction(StandIn):
    """A function, or a bound method, of the program."""

    __slots__ = ()


class RemoteClass(StandIn):
    """A class of the program."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if isinstance(made, RemoteObject):
            object.__setattr__(made, "_proxy_made_by_test", True)
        return made

    def __instancecheck__(self, instance: Any) -> bool:
        raise self._proxy_peer.spoil("beside", "isinstance with a class of the program")

    def __subclasscheck__(self, subclass: Any) -> bool:
        raise self._proxy_peer.spoil("beside", "issubclass with a class of the program")

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        raise self._proxy_peer.spoil("beside", "a subclass of a class of the program")

    def __iter__(self) -> Iterator[Any]:
        raise self._proxy_peer.spoil("beside", "iteration over a class of the program")

    def __getitem__(self, key: Any) -> Any:
        raise self._proxy_peer.spoil("beside", "a class of the program with an index")


class RemoteObject(StandIn):
    """An instance of a class that the program defines."""

    __slots__ = ()


class RemoteIterator(StandIn):
    """A generator or builtin iterator of the program, drained lazily."""

    __slots__ = ("_proxy_items", "_proxy_rounds")

    def __init__(self, peer: Remote, number: int) -> None:
        super().__init__(peer, number, "iterator")
        object.__setattr__(self, "_proxy_items", [])
        object.__setattr__(self, "_proxy_rounds", 0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        items = self._proxy_items
        if not items:
            count = _BATCH[min(self._proxy_rounds // 4, len(_BATCH) - 1)]
            object.__setattr__(self, "_proxy_rounds", self._proxy_rounds + 1)
            peer = self._proxy_peer
            wires = peer.request("next", on=self._proxy_number, count=count)["v"]
            items.extend(peer.decode(["l", *reversed(wires)]))
            if not items:
                raise StopIteration
        return items.pop()


_NEVER = ["__bool__", "__abs__", "__int__", "__float__", "__index__", "__round__", "__complex__"]
_COMPARE = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]
_ARITHMETIC = [
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
    "or",
]
_WITH_REAL_OBJECT = [
    *[
        "__len__",
        "__iter__",
        "__next__",
        "__contains__",
        "__getitem__",
        "__setitem__",
        "__delitem__",
        "__reversed__",
        "__enter__",
        "__exit__",
    ],
    *["__str__", "__repr__", "__format__", "__bytes__", "__neg__", "__pos__", "__invert__", "__delattr__"],
    *(f"__{prefix}{name}__" for name in _ARITHMETIC for prefix in ("", "r", "i")),
]


def _refusal(name: str, beside: Callable[[StandIn, tuple[Any, ...]], bool]) -> Callable[..., Any]:
    def refuse(self: StandIn, *args: Any) -> Any:
        status = "beside" if beside(self, args) else "failed"
        raise self._proxy_peer.spoil(status, f"{name} on an instance of {self._proxy_type}, a class of the program")

    refuse.__name__ = name
    return refuse


def _made_by_test(value: Any) -> bool:
    return isinstance(value, StandIn) and value._proxy_made_by_test


for _name in _NEVER:
    setattr(RemoteObject, _name, _refusal(_name, lambda self, args: False))
for _name in _COMPARE:
    setattr(RemoteObject, _name, _refusal(_name, lambda self, args: _made_by_test(self) and _made_by_test(args[0])))
for _name in _WITH_REAL_OBJECT:
    setattr(RemoteObject, _name, _refusal(_name, lambda self, args: _made_by_test(self)))
RemoteObject.__hash__ = object.__hash__  # setting __eq__ after the class exists keeps it, a dict key may be opaque
