"""Calls between the solution's process and the evaluator's, in both directions over one socket.

A request is {"q": number, "op": name, ...}; its answer is {"r": number} with some of
  v  the value
  m  [[number of a container, contents], ...]: what changed in the containers of the request
  w  the same for containers that both sides hold for longer (requests have it as well)
  x  the exception that was raised instead
While a side waits for an answer it serves requests, so a callback may call back. Answers nobody asked for are
dropped.

What is no value crosses as a reference: ["mine", number, kind, ...] is the sender's object, explained where a message
first names it, and ["yours", number] one that the receiver sent before. An exception crosses as a value of its class:
the same class that a test names, below the same standard base; one that passes through the other side comes back as
the same object.

Protected: both ends take values only, so neither runs code of the other. Not protected: the solution's end of the
link runs in the solution's own process, which can answer anything it likes, at any time; it just never knows what the
tests expect. What a test passes in, the program may change.
"""

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from sys import getrecursionlimit, setrecursionlimit
from typing import Any

from sandbox.judge import frames
from sandbox.judge.containers import BadValueError, Shared, with_room
from sandbox.judge.decoding import Decoder
from sandbox.judge.value_types import Wire, exception_class, standard_base
from sandbox.judge.values import MAX_TEXT, Encoder

_FRAMES_PER_CALL = 30  # of the judge, at least


class GoneError(BaseException):
    """The other process closed the link or sent garbage. No `except Exception` of a test catches it."""


class Peer(ABC):
    """One end of the link. Subclasses say how objects are described, what stands in for them, and what they serve."""

    def __init__(self, sock: socket.socket, first_number: int = 0) -> None:
        self._sock = sock
        self._number = first_number
        self._turn = threading.RLock()  # several threads may call, one after the other
        self._waiting = 0  # requests that have no answer yet
        self.exported: list[Any] = []
        self._numbers: dict[int, int] = {}  # id of an exported object -> its number
        self._stand_ins: dict[int, Any] = {}  # number of the other side's object -> what represents it here
        self._foreign: dict[int, int] = {}  # id of that -> the number
        self.iterated: dict[int, Shared] = {}  # number of an iterator here -> containers among its items
        self.held = Shared()  # containers that both sides hold for longer than a call, such as a list in an attribute
        self.loop: Any = None  # of the coroutines that run here
        self._closing: list[int] = []  # iterators of the other side that were dropped here

    # What a subclass provides.

    @abstractmethod
    def describe(self, encoder: Encoder, value: Any) -> list[Wire]:
        """Kind of an object that is no value, and what the other side needs to stand in for it; ValueError refuses."""

    @abstractmethod
    def make_stand_in(self, number: int, kind: Any, rest: list[Wire]) -> Any:
        """What represents the other side's object `number` here."""

    @abstractmethod
    def serve(self, op: str, message: dict[str, Any]) -> dict[str, Wire]:
        """Does what the other side asks and returns the fields of the answer."""

    def finish(self, fields: dict[str, Wire]) -> dict[str, Wire]:
        """Adds to an answer what else the other side should know."""
        return fields

    def lost(self, why: str) -> GoneError:
        return GoneError(why)

    def reached_from(self, *values: Any) -> AbstractContextManager[None]:
        """Around what decodes objects that were reached from others; a side that keeps no book does nothing."""
        return nullcontext()

    # References.

    def export(self, encoder: Encoder, value: Any) -> list[Wire]:
        if reference := self.foreign(value):
            return reference
        number = self._numbered(value)
        if number in encoder.described:
            return ["mine", number]
        encoder.described.add(number)
        return ["mine", number, *self.describe(encoder, value)]

    def keeps(self, kind: type) -> bool:
        """See Exporter."""
        return False

    def _numbered(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.exported)
            self.exported.append(value)  # kept alive, so its id stays its own
        return number

    def foreign(self, value: Any) -> list[Wire] | None:
        number = self._foreign.get(id(value))
        return None if number is None else ["yours", number]

    def resolve(self, wire: list[Wire]) -> Any:
        tag, number, *rest = wire
        if type(number) is not int or number < 0 or tag not in ("mine", "yours"):
            raise BadValueError("unknown tag")
        if tag == "yours":
            return self.exported[number]
        if number not in self._stand_ins:
            if not rest:
                raise BadValueError("an object that was never explained")
            self._represent(number, self.make_stand_in(number, rest[0], rest[1:]))
        return self._stand_ins[number]

    def _represent(self, number: int, value: Any) -> None:
        self._stand_ins[number] = value
        self._foreign[id(value)] = number

    def decoder(self, known: Sequence[Any] = ()) -> Decoder:
        return Decoder(self.resolve, known)

    def decode(self, wire: Wire) -> Any:
        return self.decoder().decode(wire)

    # Messages.

    def request(self, op: str, known: Sequence[Any] = (), **fields: Any) -> Any:
        """Asks the other side; returns its value or raises its exception. `known`: the containers in the request."""
        return self.value_of(self.ask(op, **fields), self.decoder(known))

    def value_of(self, answer: dict[str, Any], decoder: Decoder) -> Any:
        try:
            value = decoder.decode(answer.get("v"))
            decoder.refill(answer.get("m", ()))
        except (BadValueError, ValueError, TypeError, LookupError) as error:
            raise self.lost(f"garbage: {error}") from None
        if "x" in answer:
            raise self.decode_raised(answer["x"])
        return value

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Asks the other side and returns the fields of its answer."""
        while self._closing:
            self._exchange("close", {"on": self._closing.pop()})
        return self._exchange(op, fields)

    def close(self, number: int) -> None:
        """Closes an iterator of the other side; later, when this is the collector at work in the middle of a message."""
        if self._waiting:
            self._closing.append(number)
        else:
            self.request("close", on=number)

    def _exchange(self, op: str, fields: dict[str, Any]) -> dict[str, Any]:
        with self._turn:
            return self._exchange_in_turn(op, fields)

    def _exchange_in_turn(self, op: str, fields: dict[str, Any]) -> dict[str, Any]:
        self._waiting += 1
        try:
            self._number += 1
            number = self._number
            self._send({"q": number, "op": op, **fields})
            while True:
                message = self.receive()
                if "q" in message:
                    self.answer(message)
                elif message.get("r") == number:
                    return message
        finally:
            self._waiting -= 1

    def answer(self, message: dict[str, Any]) -> None:
        """Serves one request of the other side."""
        limit = getrecursionlimit()
        setrecursionlimit(limit + _FRAMES_PER_CALL)  # what the judge adds is not to count against the program
        try:
            fields = self.finish(self.serve(str(message.get("op")), message))
            self._send({"r": message["q"], **fields})
        except GoneError:
            raise
        except BaseException as error:  # also SystemExit: the other side decides what it means
            self._send({"r": message["q"], "x": self.encode_raised(error)})
        finally:
            if getrecursionlimit() == limit + _FRAMES_PER_CALL:  # else the program has set its own
                setrecursionlimit(limit)

    def receive(self) -> dict[str, Any]:
        try:
            message = frames.recv(self._sock)
        except (EOFError, OSError, frames.FrameError) as error:
            raise self.lost(f"{type(error).__name__}: {error}") from None
        if type(message) is not dict:
            raise self.lost("the other side sent garbage")
        return message

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with_room(frames.send, self._sock, message)
        except frames.FrameError as error:
            raise ValueError(str(error)) from None
        except OSError as error:
            raise self.lost(str(error)) from None

    # Calls.

    def call_remote(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], **fields: Any) -> Any:
        """Calls something on the other side; what it changes in its arguments is changed in ours."""
        encoder = Encoder(self)
        wires = [with_room(encoder.encode, arg) for arg in args]
        named = {name: with_room(encoder.encode, value) for name, value in kwargs.items()}
        answer = self.ask(op, a=wires, k=named, **fields)
        value = self.value_of(answer, self.decoder(encoder.containers))
        if answer.get("held") is True:
            self.held.extend(encoder.containers)
        return value

    def call(self, function: Any, message: dict[str, Any], decoder: Decoder | None = None) -> dict[str, Wire]:
        """Calls `function` with a request's arguments."""
        decoder = decoder or self.decoder()
        args = [decoder.decode(wire) for wire in message.get("a", ())]
        kwargs = {name: decoder.decode(wire) for name, wire in message.get("k", {}).items()}
        shared = Shared(decoder.containers)
        encoder = Encoder(self, shared.containers)
        fields: dict[str, Wire] = {}
        try:
            result = function(*args, **kwargs)
        except GoneError:
            raise
        except BaseException as error:
            fields["x"] = self.encode_raised(error)
        else:
            fields["v"] = encoder.encode_or_export(result)
        if changes := with_room(shared.changes, encoder):
            fields["m"] = changes
        return fields

    def told(self) -> list[Wire]:
        """What has changed here in containers that both sides hold, for the other side."""
        if not self.held.containers:
            return []
        encoder = Encoder(self, self.held.containers)
        if changes := with_room(self.held.changes, encoder):
            self.held = Shared(encoder.containers)
        return changes

    def hear(self, changes: list[Wire]) -> None:
        """Takes over what the other side told."""
        decoder = self.decoder(self.held.containers)
        decoder.refill(changes)
        self.held = Shared(decoder.containers)

    # Exceptions.

    def encode_raised(self, error: BaseException) -> list[Wire]:
        """[class name, number, nearest standard base, value, text]: number and value are null where there is none."""
        kind = type(error)
        try:
            text = str(error)[:MAX_TEXT]
        except BaseException:  # a program's own __str__
            text = ""
        try:
            wire = with_room(Encoder(self).encode, error)
        except BaseException:
            wire = None
        number = None
        if self._waiting and wire is not None and wire[0] == "exc":  # it may come back from there
            number = self._numbered(error)
            error.__traceback__ = None
        return [str(kind.__name__), number, standard_base(kind), wire, text]

    def decode_raised(self, wire: Wire) -> BaseException:
        try:
            name, number, base, value, text = wire
            error = exception_class(str(name), str(base))(str(text)) if value is None else self.decode(value)
            if isinstance(error, BaseException):
                if type(number) is int and number not in self._stand_ins:
                    self._represent(number, error)
                return error
        except (ValueError, TypeError, BadValueError):
            pass
        return self.lost("garbage for an exception")
