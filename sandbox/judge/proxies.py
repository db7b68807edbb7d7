"""What the tests see of the program: stand-ins whose every operation is a request to its process or a refusal.

An instance of a class that the program defines never decides a comparison with a plain value: ==, <, in, bool, abs,
len, iteration on it fail the assert, even when the test swallows the exception. Its attributes are fetched and its
methods called over the link, and what comes back is again a value or a stand-in.

A test that is about objects needs more of them, and its source alone says so (expectations.py). Then operators run in
the program's process and their results cross as values: `len`, iteration, indexing, `str`, arithmetic of two instances
show the program nothing that it could not have known. Where it does decide something, the test has low trust: two
instances compared, `in`, arithmetic with a plain value. Only what needs the class itself (a subclass of it, iteration
over it, dataclasses.asdict) sends the whole test to run beside the solution.
"""

import opcode
import operator
from collections.abc import Callable
from typing import Any, Protocol

from sandbox.judge.value_types import VALUE_ATTRIBUTES

_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_ARITHMETIC = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift"]
_ARITHMETIC += ["and", "xor", "or"]
_BINARY = frozenset(f"__{prefix}{name}__" for name in _ARITHMETIC for prefix in ("", "r", "i"))
_DIFFERENCES = {"__sub__", "__rsub__"}  # `abs(f(x) - 5) < 1e-6` shows the expected value
_QUESTIONS = ["len", "iter", "reversed", "contains", "getitem", "setitem", "delitem", "str", "repr", "format", "bytes"]
_QUESTIONS += ["hash", "bool", "int", "float", "complex", "index", "round", "trunc", "floor", "ceil", "neg", "pos"]
_QUESTIONS += ["abs", "invert", "delattr", "fspath"]
_FREE = ("__call__", "__next__", "__enter__", "__aenter__", "__aiter__", "__anext__", "__await__")  # as methods are
_ATTRIBUTES = {"__name__", "__qualname__", "__doc__", "__wrapped__", "__dict__", "__annotations__", "__defaults__"}
OPERATORS = frozenset(
    {*_COMPARISONS, *_BINARY, *_FREE, *(f"__{name}__" for name in _QUESTIONS), "__exit__", "__aexit__"}
)


class Peer(Protocol):
    """What the stand-ins need of the evaluator's end of the link."""

    low: bool

    def attribute(self, target: Any, name: str) -> Any: ...
    def set_attribute(self, target: Any, name: str, value: Any) -> None: ...
    def operate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def call_number(self, op: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def plain(self, target: Any) -> Any: ...
    def expects(self, value: Any, strictly: bool = False) -> bool: ...
    def is_remote(self, value: Any) -> bool: ...
    def spoil(self, status: str, detail: str) -> BaseException: ...


class StandIn:
    """An object in the program's process, known by its number."""

    __slots__ = ("__weakref__", "_proxy_number", "_proxy_peer")

    _proxy_number: int
    _proxy_peer: Peer

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_proxy_peer", peer)
        object.__setattr__(self, "_proxy_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _ATTRIBUTES:
            raise AttributeError(name)
        return self._proxy_peer.attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy_peer.set_attribute(self, name, value)


class RemoteFunction(StandIn):
    """A function, or a bound method, of the program."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._proxy_peer.call_number("call", self._proxy_number, args, kwargs)


RemoteFunction.__doc__ = property(lambda self: self._proxy_peer.attribute(self, "__doc__"))  # type: ignore[assignment]


class RemoteObject(StandIn):
    """An instance of a class that the program defines; each has a local class of its own, made by `program_class`."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        peer = self._proxy_peer
        if name in VALUE_ATTRIBUTES and not peer.expects(self):
            raise peer.spoil("failed", f"{name} of an instance of {type(self).__name__}, a class of the program")
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        self._proxy_peer.operate("__delattr__", (self, name), {})

    def __copy__(self) -> Any:
        return self._proxy_peer.operate("__copy__", (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        return self._proxy_peer.operate("__deepcopy__", (self,), {})

    def __bool__(self) -> bool:
        kind: Any = type(self)
        simple = kind._proxy_own_operators.isdisjoint({"__bool__", "__len__"})
        if simple and (kind._proxy_standard or self._proxy_peer.expects(self)):
            return True
        return operator_of(self._proxy_peer, "__bool__")(self)

    def __hash__(self) -> int:
        if "__hash__" in type(self)._proxy_own_operators and self._proxy_peer.expects(self):  # type: ignore[attr-defined]
            return self._proxy_peer.operate("__hash__", (self,), {})
        return object.__hash__(self)

    def __eq__(self, other: object) -> Any:
        return _compare("__eq__", self, other)

    def __ne__(self, other: object) -> Any:
        return _compare("__ne__", self, other)


class ProgramClass(type):
    """A class of the program, as the class of its stand-ins.

    Its instances see its attributes, so these have names that no program has.
    """

    _proxy_owner: Peer
    _proxy_class_number: int
    _proxy_own_operators: frozenset[str]  # the special methods that it has
    _proxy_plain: bool  # it is a subclass of a type that crosses as a value
    _proxy_standard: bool  # it claims to be one of the standard library

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Any:
        of_program = next(base for base in bases if isinstance(base, ProgramClass))
        raise of_program._beside("a subclass")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        op = "new" if cls._proxy_owner.expects(cls) else "call"
        return cls._proxy_owner.call_number(op, cls._proxy_class_number, args, kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name == "__dataclass_fields__" and cls._proxy_owner.expects(cls):
            raise cls._beside("the fields")
        if name.startswith("__") and name not in _ATTRIBUTES:
            raise AttributeError(name)
        return cls._proxy_owner.attribute(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        cls._proxy_owner.set_attribute(cls, name, value)

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls._proxy_plain and not cls._proxy_owner.is_remote(instance):
            raise cls._beside("isinstance with a value and")
        return type.__instancecheck__(cls, instance)

    def __iter__(cls) -> Any:
        raise cls._beside("iteration over")

    def __getitem__(cls, key: Any) -> Any:
        raise cls._beside("an index into")

    def _beside(cls, what: str) -> BaseException:
        status = "beside" if cls._proxy_owner.expects(cls) else "failed"
        return cls._proxy_owner.spoil(status, f"{what} of {cls.__name__}, a class of the program")


for _name in [*_COMPARISONS[2:], *_BINARY, *(f"__{name}__" for name in ("neg", "pos", "abs", "invert"))]:
    setattr(RemoteObject, _name, lambda self, *args, _name=_name: operator_of(self._proxy_peer, _name)(self, *args))


def program_class(
    peer: Peer,
    number: int,
    name: str,
    bases: tuple[Any, ...],
    own_operators: frozenset[str],
    plain: bool,
    standard: bool,
) -> Any:
    """The local class for a class of the program."""
    space: dict[str, Any] = {
        name: operator_of(peer, name) for name in own_operators - {"__bool__", "__hash__", "__delattr__"}
    }
    for comparison in ("__eq__", "__ne__"):
        space.pop(comparison, None)
    if "__next__" in own_operators and "__iter__" in own_operators:
        space["__iter__"] = lambda self: self
    space |= {
        "__slots__": (),
        "_proxy_own_operators": own_operators,
        "_proxy_plain": plain,
        "_proxy_standard": standard,
    }
    space |= {"_proxy_owner": peer, "_proxy_class_number": number}
    try:
        return type.__new__(ProgramClass, name, bases or (RemoteObject,), space)
    except TypeError:  # bases that do not go together
        return type.__new__(ProgramClass, name, (RemoteObject,), space)


def operator_of(peer: Peer, name: str, plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The special method `name` of a local class. `plain`: what it does in a test that is not about objects."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _FREE:
            return peer.operate(name, (self, *args), kwargs)
        if name in _COMPARISONS and isinstance(self, RemoteObject):
            return _compare(name, self, *args)
        shown = not all(map(peer.is_remote, args))
        as_value = (name in _COMPARISONS or name in _DIFFERENCES) and shown and plain is not None
        if as_value or not any(map(peer.expects, (self, *args))):
            if plain is not None:
                return plain(self, *args, **kwargs)
            raise peer.spoil("failed", f"{name} on an instance of {type(self).__name__}, a class of the program")
        if isinstance(self, RemoteObject) and name not in type(self)._proxy_own_operators:  # type: ignore[attr-defined]
            if args:
                return NotImplemented
            raise TypeError(f"bad operand type for {name}: {type(self).__name__!r}")
        shown = shown and (name in _BINARY or name == "__contains__")
        if shown and (name in _DIFFERENCES or not peer.expects(self, strictly=True)):
            raise peer.spoil("failed", f"{name} of an instance of {type(self).__name__} and a plain value")
        if shown or name in _COMPARISONS or name == "__contains__":
            peer.low = True
        return peer.operate(name, (self, *args), kwargs)

    def leave(self: Any, kind: Any, error: BaseException | None, trace: Any) -> bool:
        suppresses = peer.operate(name, (self, kind, error, None), {})
        return bool(suppresses) and raised_by_test(error, trace)

    async def leave_later(self: Any, kind: Any, error: BaseException | None, trace: Any) -> bool:
        suppresses = await peer.operate(name, (self, kind, error, None), {})
        return bool(suppresses) and raised_by_test(error, trace)

    def wait(self: Any) -> Any:
        yield from ()
        return peer.operate(name, (self,), {})

    made = {"__exit__": leave, "__aexit__": leave_later, "__await__": wait}.get(name, method)
    made.__name__ = name
    return made


def raised_by_test(error: BaseException | None, trace: Any) -> bool:
    """Whether an explicit `raise` of the test itself is what happened, so that a context manager may suppress it.

    Anything else would let the program skip the asserts that follow: an assert that failed, an exception that it
    raised, or one that its odd values led to.
    """
    if error is None or isinstance(error, AssertionError) or trace.tb_next is not None:
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == opcode.opmap["RAISE_VARARGS"]


def _compare(name: str, self: Any, other: object) -> Any:
    peer, kind = self._proxy_peer, type(self)
    if other is None or other is self:
        return {"__eq__": self is other, "__ne__": self is not other}.get(name, NotImplemented)
    if not peer.is_remote(other):
        if kind._proxy_plain and peer.expects(self):
            return getattr(operator, name)(peer.plain(self), other)
        raise peer.spoil("failed", f"{name} on an instance of {kind.__name__}, a class of the program, and a value")
    if not (peer.expects(self) or peer.expects(other)):
        raise peer.spoil("failed", f"{name} on an instance of {kind.__name__}, a class of the program")
    own = kind._proxy_own_operators | getattr(type(other), "_proxy_own_operators", frozenset())
    if name not in own and not (name == "__ne__" and "__eq__" in own):
        return {"__eq__": False, "__ne__": True}.get(name, NotImplemented)
    peer.low = True
    return peer.operate(name, (self, other), {})


def known_names(names: Any) -> frozenset[str]:
    """Those of a description's operators that there are."""
    return frozenset(name for name in names if type(name) is str) & OPERATORS
