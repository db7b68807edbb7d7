"""Local classes for classes of the other side whose instances cross as values: Enums, named tuples, exceptions.

The side that owns a class describes it once, as plain data; the other side builds a class of its own from that. So
members, fields, equality, hashing, order and iteration are those of the standard library, decided here, whatever the
program's class overrides. What else a class has (methods, properties, operators of its own) is asked of its owner.
"""

import collections
import enum
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from sandbox.judge.value_types import Wire, is_named_tuple, mro_of, type_wire
from sandbox.judge.values import Encoder

_ENUMS = ("IntFlag", "IntEnum", "StrEnum", "Flag", "Enum")
_MIXINS: dict[str, type] = {"int": int, "str": str, "float": float}
# Operators that a class may add to a value. Never those by which values are compared, measured or iterated over.
_ADDED = {f"__{prefix}{name}__" for prefix in ("", "r") for name in ("add", "sub", "mul", "matmul", "mod", "pow")}
_ADDED |= {f"__{prefix}{name}__" for prefix in ("", "r") for name in ("truediv", "floordiv", "and", "or", "xor")}
_ADDED |= {"__call__", "__neg__", "__pos__", "__abs__", "__invert__", "__str__", "__repr__", "__format__"}
_ORDER = {"__lt__", "__le__", "__gt__", "__ge__"}


class Owner(Protocol):
    """What the local classes need of this end of the link."""

    def attribute(self, target: Any, name: str) -> Any: ...
    def construct(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def operator_of(self, name: str, plain: Callable[..., Any] | None) -> Callable[..., Any]: ...


def describe_class(encoder: Encoder, kind: type) -> list[Wire] | None:
    """A class whose instances cross as values, for the other side; None for any other class."""
    mro = mro_of(kind)
    if enum.Enum in mro:
        return _describe_enum(encoder, kind)
    if BaseException in mro:
        bases = [encoder.encode(base) for base in kind.__bases__ if BaseException in mro_of(base)]
        return ["exception", str(kind.__name__), bases]
    if is_named_tuple(kind):
        defaults = getattr(kind, "_field_defaults", {})
        return [
            *("namedtuple", str(kind.__name__), list(kind._fields), encoder.encode(dict(defaults))),
            *(_own_methods(kind, _ADDED), _has_own_constructor(kind)),
        ]
    return None


def _describe_enum(encoder: Encoder, kind: Any) -> list[Wire]:
    names = [base.__name__ for base in mro_of(kind)]
    base = next(name for name in _ENUMS if name in names)
    mixin = next((name for name in _MIXINS if name in names and base in ("Enum", "Flag")), "")
    members = [[name, object.__getattribute__(m, "__dict__")["_value_"]] for name, m in kind.__members__.items()]
    if not all(type(value) is _MIXINS[mixin] for _, value in members if mixin):
        mixin = ""
    wires = [[name, encoder.encode_or_export(value)] for name, value in members]
    return ["enum", str(kind.__name__), base, mixin, wires, _own_methods(kind, _ADDED | _ORDER | {"_missing_"})]


def _own_methods(kind: type, names: Iterable[str]) -> list[str]:
    """Those that the class's author wrote, not the library that made the class."""
    own = [vars(base) for base in mro_of(kind) if not type_wire(base)]
    found = [(name, next((space[name] for space in own if name in space), None)) for name in sorted(names)]
    return [name for name, method in found if getattr(method, "__module__", None) not in (None, "enum", "collections")]


def _has_own_constructor(kind: type) -> bool:
    own = [base for base in mro_of(kind) if base not in (tuple, object) and "_fields" not in vars(base)]
    return any("__new__" in vars(base) for base in own)


# Building.


def mirror_class(owner: Owner, decode: Callable[[Wire], Any], kind: str, rest: list[Wire]) -> type:
    """The local class for a description. Raises what garbage makes it raise."""
    if kind == "enum":
        return _mirror_enum(owner, decode, *rest)
    if kind == "namedtuple":
        return _mirror_named_tuple(owner, decode, *rest)
    return _mirror_exception(owner, decode, *rest)


def _mirror_enum(
    owner: Owner, decode: Callable[[Wire], Any], name: str, base: str, mixin: str, members: Any, own: Any
) -> type:
    class Kind(enum.EnumType):
        def __getattr__(cls, name: str) -> Any:
            member = vars(cls).get("_member_map_", {}).get(name)  # Python 3.11 looks members up here
            return _ask(owner, cls, name) if member is None else member

    standard = getattr(enum, base) if base in _ENUMS else enum.Enum
    bases = (_MIXINS[mixin], standard) if mixin else (standard,)
    space = Kind.__prepare__(name, bases)
    space["__getattr__"] = lambda self, attribute: _ask(owner, self, attribute)
    for method in own:
        if method in _ADDED or method in _ORDER:
            space[method] = owner.operator_of(method, _inherited(bases, method))
    if "_missing_" in own:
        space["_missing_"] = classmethod(lambda cls, value: owner.construct(cls, (value,), {}))
    for member, value in members:
        if member.isidentifier() and not (member.startswith("_") and member.endswith("_")) and member != "mro":
            space[member] = decode(value)
    return Kind(name, bases, space)


def _mirror_named_tuple(
    owner: Owner, decode: Callable[[Wire], Any], name: str, fields: Any, defaults: Any, own: Any, constructor: Any
) -> type:
    class Kind(type):
        def __getattr__(cls, name: str) -> Any:
            return _ask(owner, cls, name)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return owner.construct(cls, args, kwargs) if constructor else type.__call__(cls, *args, **kwargs)

    default_of = decode(defaults)
    last = [default_of[field] for field in fields if field in default_of]
    plain = collections.namedtuple(name, fields, rename=True, defaults=last)
    space: dict[str, Any] = {"__slots__": (), "__getattr__": lambda self, attribute: _ask(owner, self, attribute)}
    space |= {method: owner.operator_of(method, _inherited((plain,), method)) for method in own if method in _ADDED}
    return Kind(name, (plain,), space)


class _ExceptionKind(type):
    def __getattr__(cls, name: str) -> Any:
        mirror = next(kind for kind in mro_of(cls) if "_proxy_owner" in vars(kind))
        return _ask(vars(mirror)["_proxy_owner"], mirror, name)


def _mirror_exception(owner: Owner, decode: Callable[[Wire], Any], name: str, bases: Any) -> type:
    def text(self: Any) -> str:
        return vars(self).get("_text", super(kind, self).__str__())

    parents = tuple(map(decode, bases))
    if not (parents and all(BaseException in mro_of(parent) for parent in parents)):
        raise ValueError("not an exception")
    kind: Any = _ExceptionKind(name, parents, {"__str__": text, "_proxy_owner": owner})
    kind.__getattr__ = lambda self, attribute: _ask(owner, kind, attribute)  # what the class itself has
    return kind


def _inherited(bases: tuple[type, ...], name: str) -> Callable[..., Any] | None:
    return next((vars(kind)[name] for base in bases for kind in mro_of(base) if name in vars(kind)), None)


def _ask(owner: Owner, target: Any, name: str) -> Any:
    if name.startswith("_"):  # what the standard library looks for, and what is nobody's business
        raise AttributeError(name)
    return owner.attribute(target, name)
