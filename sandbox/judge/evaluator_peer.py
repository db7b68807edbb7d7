"""The evaluator's end of the link: what the tests' values become on their way to the program, and back.

Of the tests' own objects the program gets functions, iterators and coroutines to call, classes of exceptions, named
tuples and Enums, and bare `object()`s as tokens: each with the one operation that it is for. Anything else that is no
value (an instance of a class that the test defines) needs the test to run beside the solution.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sandbox.judge import expectations, lazies
from sandbox.judge.containers import BadValueError, Shared, with_room
from sandbox.judge.link import GoneError, Peer
from sandbox.judge.mirrors import describe_class, mirror_class
from sandbox.judge.proxies import (
    ProgramClass,
    RemoteFunction,
    RemoteObject,
    StandIn,
    known_names,
    operator_of,
    program_class,
)
from sandbox.judge.value_types import PURE_MODULES, VALUE_ATTRIBUTES, Wire, mro_of
from sandbox.judge.values import Encoder


class BesideError(BaseException):
    """This test needs the program's own classes."""


class OpaqueError(AssertionError):
    """An instance of the program's class was asked to decide something."""


class EvaluatorPeer(Peer):
    """The evaluator's end of the link."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, first_number=int.from_bytes(os.urandom(5), "big"))
        self._offered: dict[int, frozenset[str]] = {}  # number of an object of the tests -> what may be asked of it
        self._found: tuple[list[str], dict[str, list[Wire]]] | None = None  # the last names, while they surely hold
        self.start_test()

    def start_test(self) -> None:
        self.spoiled: tuple[str, str] | None = None  # decides the test even when it swallows the exception
        self.low = False  # the program's own classes decided something
        self._origins: dict[int, frozenset[str]] = {}  # number -> the program's names from which the test reached it
        self._origin: frozenset[str] = frozenset()  # of what is decoded now
        self._bound: dict[str, Any] = {}  # the program's globals as the test has them
        self.held = Shared()
        self._names_stop_iteration = False
        self._read: Callable[[], tuple[frozenset[str], frozenset[str]]] | None = None
        self._sources: tuple[frozenset[str], frozenset[str]] | None = None

    def spoil(self, status: str, detail: str) -> BaseException:
        self.spoiled = self.spoiled or (status, detail)
        return BesideError(detail) if status == "beside" else OpaqueError(detail)

    def lost(self, why: str) -> GoneError:
        self.spoiled = ("gone", why)
        return super().lost(why)

    # What the test is about, and where an object came from.

    def read(self, sources: Sequence[str], names: frozenset[str], entry_point: str | None) -> None:
        """Takes note of a test's source; looks into it only when it matters."""

        def read() -> tuple[frozenset[str], frozenset[str]]:
            surely = expectations.sources_of_objects(sources, names, entry_point)
            return surely | expectations.sources_in_cap_words(names), surely

        self._read = read
        self._names_stop_iteration = any("StopIteration" in source for source in sources)

    def expects(self, value: Any, strictly: bool = False) -> bool:
        """Whether the test is about such objects: its source says so of a name from which it got the object or its class."""
        if not self.is_remote(value) and not isinstance(value, type):
            return False
        if self._sources is None:
            self._sources = self._read() if self._read else (frozenset(), frozenset())
        return not self._sources[strictly].isdisjoint(self._origin_of(value))

    def is_remote(self, value: Any) -> bool:
        """Whether it is an instance of a class of the program."""
        return isinstance(value, RemoteObject) or id(type(value)) in self._foreign

    def _origin_of(self, value: Any) -> frozenset[str]:
        if type(value) is int:
            return self._origins.get(value, frozenset())
        classes = mro_of(value if isinstance(value, type) else type(value))
        numbers = [self._foreign.get(id(thing), -1) for thing in (value, *classes)]
        return frozenset().union(*(self._origins.get(number, frozenset()) for number in numbers))

    @contextlib.contextmanager
    def reached_from(self, *values: Any) -> Iterator[None]:
        outer = self._origin
        self._origin = frozenset().union(*map(self._origin_of, values))
        try:
            yield
        finally:
            self._origin = outer

    def resolve(self, wire: list[Wire]) -> Any:
        value = super().resolve(wire)
        if wire[0] == "mine":
            self._origins[wire[1]] = self._origins.get(wire[1], frozenset()) | self._origin
        return value

    # Requests.

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        if changes := self.told():
            fields["w"] = changes
        answer = super().ask(op, **fields)
        if op != "call" or not answer.keys().isdisjoint(("w", "g", "held")):
            self._found = None
        try:
            if "w" in answer:
                self.hear(answer["w"])
            for name, description in answer.get("g", {}).items():
                if description is not None:  # a name that the program has deleted stays what it was
                    self._rebind(name, description)
        except (BadValueError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise self.lost(f"garbage: {error}") from None
        return answer

    def names(self, wanted: Iterable[str]) -> dict[str, list[Wire]]:
        """What the program defines of these names; a request only if it may be something else than for the test before."""
        wanted = sorted(wanted)
        if self._found and self._found[0] == wanted:
            return self._found[1]
        found = self.ask("names", names=wanted).get("v")
        if not isinstance(found, dict):
            raise self.lost("garbage for names")
        found = {name: found[name] for name in wanted if name in found and not name.startswith("__")}
        if all(map(_is_lasting, found.values())):
            self._found = wanted, found
        return found

    def bind(self, name: str, description: list[Wire]) -> Any:
        """The value of one of the program's names."""
        outer, self._origin = self._origin, frozenset({name})
        try:
            self._bound[name] = self._get(None, name) if description[0] == "data" else self.decode(description[1])
        except BadValueError as error:
            raise self.lost(f"garbage: {error}") from None
        finally:
            self._origin = outer
        return self._bound[name]

    def _rebind(self, name: str, description: list[Wire]) -> None:
        """Gives a global of the test that the program has bound anew its new value."""
        scope = vars(sys.modules["tests"])
        if name in self._bound and scope.get(name) is self._bound[name]:
            scope[name] = self.bind(name, description)

    def attribute(self, target: Any, name: str) -> Any:
        with self.reached_from(target):
            value = self._get(target, name)
        if name in VALUE_ATTRIBUTES and callable(value) and not self.expects(target):
            raise self.spoil("failed", f"{name}() of what the program made, as if it were a plain value")
        return value

    def _get(self, target: Any, name: str) -> Any:
        """An attribute, or a global of the program."""
        answer = self.ask("get", of=self._wire(target), name=name)
        decoder = self.decoder()
        value = self.value_of(answer, decoder)
        if answer.get("held") is True:
            self.held.extend(decoder.containers)
        return value

    def set_attribute(self, target: Any, name: str, value: Any) -> None:
        self.call_remote("set", (value,), {}, of=self._wire(target), name=name)

    def operate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.reached_from(*args):
            return self._unmistaken("op", args, kwargs, name in ("__next__", "__anext__"), name=name)

    def call_number(self, op: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.reached_from(number):
            return self._unmistaken(op, args, kwargs, on=number)

    def _unmistaken(self, op: str, args: Any, kwargs: Any, may_stop: bool = False, **fields: Any) -> Any:
        """A call that no exception ends as if it were the end of an iterator of the test's own: `all(map(f, cases))`."""
        try:
            return self.call_remote(op, args, kwargs, **fields)
        except (StopIteration, StopAsyncIteration) as error:
            if may_stop or self._names_stop_iteration:
                raise
            raise RuntimeError(f"the program raised {type(error).__name__}") from error

    def construct(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call_number("call", self._foreign[id(kind)], args, kwargs)

    def plain(self, target: Any) -> Any:
        return self.request("plain", on=target._proxy_number)

    def operator_of(self, name: str, plain: Callable[..., Any] | None) -> Callable[..., Any]:
        return operator_of(self, name, plain)

    def _wire(self, value: Any) -> Wire:
        return with_room(Encoder(self).encode, value)

    # The program's objects here.

    def make_stand_in(self, number: int, kind: Any, rest: list[Wire]) -> Any:
        if kind == "function":
            return RemoteFunction(self, number)
        if kind in lazies.STAND_INS:
            return lazies.STAND_INS[kind](self, number)
        if kind in ("enum", "namedtuple", "exception"):
            return mirror_class(self, self.decode, kind, rest)
        if kind == "class":
            name, bases, operators, plain, standard = rest
            parents = tuple(parent for parent in map(self.decode, bases) if isinstance(parent, ProgramClass))
            return program_class(self, number, name, parents, known_names(operators), plain is True, standard is True)
        described = self.decode(rest[0]) if rest and type(rest[0]) is list else None
        if not isinstance(described, ProgramClass):
            described = program_class(self, -1, "object", (), frozenset(), False, False)
        made: Any = object.__new__(described)
        StandIn.__init__(made, self, number)
        return made

    # The tests' objects there.

    def describe(self, encoder: Encoder, value: Any) -> list[Wire]:
        kind, rest, steps = self._kind_of(encoder, value)
        self._offered[self._numbers[id(value)]] = frozenset(steps)
        return [kind, *rest]

    def _kind_of(self, encoder: Encoder, value: Any) -> tuple[str, list[Wire], Iterable[str]]:
        if type(value) is object:
            return "token", [], ()
        if kind := lazies.kind_of(value):
            return kind, [], lazies.STEPS
        if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
            return "iterator", [], lazies.STEPS
        if isinstance(value, type) and (described := describe_class(encoder, value)):
            return described[0], described[1:], ()
        if callable(value) and type(value).__module__ != "unittest.mock":
            return "function", _standard_function(value), ("call",)
        raise self.spoil("beside", f"a {type(value).__name__} as an argument")

    def encode_raised(self, error: BaseException) -> list[Wire]:
        if isinstance(error, AssertionError) and not self.foreign(error):  # the program may be about to swallow it
            self.spoil("failed", f"{type(error).__name__}: {error}")
        return super().encode_raised(error)

    def serve(self, op: str, message: dict[str, Any]) -> dict[str, Wire]:
        number = message.get("on")
        if type(number) is not int or op not in self._offered.get(number, ()):
            raise ValueError("nothing of that kind is served")
        if op == "call":
            return self.call(self.exported[number], message)
        return lazies.serve_step(self, op, number, message)


def _is_lasting(description: list[Wire]) -> bool:
    """Whether a name's description holds until the program binds the name anew."""
    kind, *rest = description
    return kind in ("module", "standard") or (kind == "value" and (type(rest[0]) is not list or rest[0][0] == "mine"))


def _standard_function(value: Any) -> list[Wire]:
    """[module, name] of a function that the program's process has as well, so that calling it takes no request."""
    name = getattr(value, "__name__", None)
    module = str(getattr(value, "__module__", None)).lstrip("_")
    if (module in PURE_MODULES or module == "builtins") and getattr(sys.modules.get(module), str(name), None) is value:
        return [module, name]
    return []
