"""Calls between the solution's process and the evaluator's, in both directions over one socket.

A request is {"q": number, "op": name, ...}; its answer is {"r": number, "v": value} or {"r": number, "x": exception}.
While a side waits for an answer it serves requests, so a callback may call back. Answers nobody asked for are
dropped.

An exception crosses as (class name, module, nearest standard base, arguments, text) and is raised on the other side
as that builtin, or as a class of that name below that base.

Protected: both ends take values only, so neither runs code of the other. Not protected: the solution's end of the
link runs in the solution's own process, which can answer anything it likes, at any time; it just never knows what the
tests expect.
"""

import builtins
import socket
import sys
from abc import ABC, abstractmethod
from typing import Any

from sandbox.judge import frames
from sandbox.judge.values import BadValueError, Encoder, Wire, decode, graft, is_mutable

_MAX_TEXT = 500
_EXCEPTIONS: dict[tuple[str, str], type[BaseException]] = {}
_STANDARD = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}


class GoneError(BaseException):
    """The other process closed the link or sent garbage. No `except Exception` of a test catches it."""


def standard_base(kind: type[BaseException]) -> str:
    """Name of the nearest builtin class among the bases of an exception class."""
    for base in type.mro(kind):
        if _STANDARD.get(base.__name__) is base:
            return base.__name__
    return "Exception"


def exception_class(name: str, base: str) -> type[BaseException]:
    """The builtin of that name, or one class per (name, base): what `except` in a test names is what a call raises."""
    parent = _STANDARD.get(base, Exception)
    if name == base:
        return parent
    if (name, base) not in _EXCEPTIONS:
        _EXCEPTIONS[name, base] = type(name, (parent,), {})
    return _EXCEPTIONS[name, base]


class Peer(ABC):
    """One end of the link. Subclasses say what they export, what stands in for the other's objects, what they do."""

    def __init__(self, sock: socket.socket, first_number: int = 0) -> None:
        self._sock = sock
        self._number = first_number
        self._exported: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}  # id of an exported object -> its number

    # What a subclass provides.

    @abstractmethod
    def describe(self, value: Any) -> list[Wire]:
        """Kind of an object that is no value, and what the other side needs to stand in for it; ValueError refuses."""

    @abstractmethod
    def stand_in(self, number: int, kind: str, rest: list[Wire]) -> Any:
        """What represents the other side's object `number` here."""

    @abstractmethod
    def serve(self, op: str, message: dict[str, Any]) -> Wire:
        """Does what the other side asks and returns the fields of the answer."""

    # Values.

    def encode(self, value: Any) -> Wire:
        """Wire form; what cannot cross as a value crosses as a reference."""
        try:
            return Encoder(self.export).encode(value)
        except (ValueError, RecursionError):
            return self.export(value)

    def decode(self, wire: Wire) -> Any:
        return decode(wire, self._resolve)

    def export(self, value: Any) -> Wire:
        number = self._numbers.get(id(value))
        if number is None:
            number = len(self._exported)
            self._exported[number] = value  # kept alive, so its id stays its own
            self._numbers[id(value)] = number
        return ["mine", number, *self.describe(value)]

    def exported(self, number: int) -> Any:
        return self._exported[number]

    def _resolve(self, wire: list[Wire]) -> Any:
        tag, number, *rest = wire
        if tag == "yours" and type(number) is int:
            return self._exported[number]
        if tag == "mine" and type(number) is int and rest and type(rest[0]) is str:
            return self.stand_in(number, rest[0], rest[1:])
        raise BadValueError("unknown tag")

    # Messages.

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Asks the other side; returns the fields of its answer or raises its exception."""
        self._number += 1
        number = self._number
        self._send({"q": number, "op": op, **fields})
        while True:
            message = self.receive()
            if "q" in message:
                self.answer(message)
            elif message.get("r") == number:
                if "x" in message:
                    raise self._decode_exception(message["x"])
                return message

    def answer(self, message: dict[str, Any]) -> None:
        """Serves one request of the other side."""
        try:
            fields = self.serve(str(message.get("op")), message)
            self._send({"r": message["q"], **fields})
        except GoneError:
            raise
        except BaseException as error:  # also SystemExit: the other side decides what it means
            self._send({"r": message["q"], "x": self.encode_exception(error)})

    def call(self, function: Any, message: dict[str, Any]) -> Wire:
        """Calls `function` with a request's arguments; answers with its value and with the arguments it changed."""
        wires, named = message.get("a", []), message.get("k", {})
        args = [self.decode(wire) for wire in wires]
        kwargs = {name: self.decode(wire) for name, wire in named.items()}
        result = function(*args, **kwargs)
        fields: dict[str, Wire] = {"v": self.encode(result)}
        changed = []
        for key, wire, value in [
            *((i, wires[i], args[i]) for i in range(len(wires)) if is_mutable(wires[i])),
            *((name, wire, kwargs[name]) for name, wire in named.items() if is_mutable(wire)),
        ]:
            after = self.encode(value)
            if after != wire:
                changed.append([key, after])
        if changed:
            fields["m"] = changed
        return fields

    def call_remote(self, op: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the other side's object; changes that it made to its arguments are made to ours."""
        wires = [self.encode(arg) for arg in args]
        named = {name: self.encode(value) for name, value in kwargs.items()}
        answer = self.request(op, on=number, a=wires, k=named)
        for key, wire in answer.get("m", ()):
            graft(kwargs[key] if type(key) is str else args[key], self.decode(wire))
        return self.decode(answer.get("v"))

    def receive(self) -> dict[str, Any]:
        try:
            message = frames.recv(self._sock)
        except (EOFError, OSError, frames.FrameError) as error:
            raise GoneError(f"{type(error).__name__}: {error}") from None
        if type(message) is not dict:
            raise GoneError("the other side sent garbage")
        return message

    def _send(self, message: dict[str, Any]) -> None:
        try:
            frames.send(self._sock, message)
        except frames.FrameError as error:
            raise ValueError(str(error)) from None
        except OSError as error:
            raise GoneError(str(error)) from None

    # Exceptions.

    def encode_exception(self, error: BaseException) -> Wire:
        kind = type(error)
        try:
            text = str(error)[:_MAX_TEXT]
        except BaseException:  # a program's own __str__
            text = ""
        try:
            args = Encoder(self._refuse).encode(list(error.args)[:8])
            if len(repr(args)) > 4 * _MAX_TEXT:
                args = None
        except BaseException:
            args = None
        return [str(kind.__name__), str(kind.__module__), standard_base(kind), args, text]

    def _refuse(self, value: Any) -> Wire:
        raise ValueError("not a value")

    def _decode_exception(self, wire: Wire) -> BaseException:
        try:
            name, module, base, args, text = wire
            kind = getattr(sys.modules.get(module), name, None) if module in sys.modules else None
            if not (isinstance(kind, type) and issubclass(kind, _STANDARD[base]) and _is_standard(module)):
                kind = exception_class(str(name), str(base))
            values = [text] if args is None else self.decode(args)
            try:
                return kind(*values)
            except Exception:  # constructors that want other arguments
                return exception_class(f"{name}", "Exception")(text)
        except (ValueError, TypeError, KeyError, BadValueError):
            raise GoneError("the other side sent garbage for an exception") from None


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
