"""The child that holds the tests: compiles and runs them against stand-ins for the program's names.

Host to evaluator: {"op": "link", "mode", "setup", "entry_point"} with the solution's socket, answered when the
program has loaded; {"op": "test", "source"}, answered with {"status", "detail"}. Beside the statuses of a verdict
there are two for the host only: `gone` (the solution's process left) and `beside` (this test needs the real classes).

Names: a test's global that the program defines is bound to a stand-in or to the value. The evaluator's own builtins
and standard modules win over names of the program (a program that defines `abs` must not decide what `abs` means in a
test), unless the name is the entry point, or no entry point is given and the test uses no other name of the program.
"""

import builtins
import importlib
import os
import socket
import sys
import types
from typing import Any

from sandbox.judge import frames
from sandbox.judge.link import GoneError, Peer, exception_class
from sandbox.judge.proxies import RemoteClass, RemoteFunction, RemoteIterator, RemoteObject, StandIn
from sandbox.judge.values import PURE_MODULES, Encoder, Wire

_MAX_DETAIL = 200
_MAX_DRAINED = 100_000
_OWN_NAMES = frozenset(vars(builtins)) | sys.stdlib_module_names


class BesideError(BaseException):
    """This test needs the program's own classes."""


class OpaqueError(AssertionError):
    """An instance of the program's class was asked to decide something."""


class EvaluatorPeer(Peer):
    """The evaluator's end of the link."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, first_number=int.from_bytes(os.urandom(5), "big"))
        self._stand_ins: dict[int, Any] = {}
        self.spoiled: tuple[str, str] | None = None  # decides the test even when it swallows the exception

    def start_test(self) -> None:
        self.spoiled = None

    def spoil(self, status: str, detail: str) -> BaseException:
        self.spoiled = self.spoiled or (status, detail)
        return BesideError(detail) if status == "beside" else OpaqueError(detail)

    def receive(self) -> dict[str, Any]:
        try:
            return super().receive()
        except GoneError as error:
            self.spoiled = ("gone", str(error))
            raise

    def encode(self, value: Any) -> Wire:
        return Encoder(self.export).encode(value)  # a test's argument that cannot cross is an error of the test

    def export(self, value: Any) -> Wire:
        if isinstance(value, StandIn):
            return ["yours", value._proxy_number]
        return super().export(value) if callable(value) else self._drain(value)

    def describe(self, value: Any) -> list[Wire]:
        return ["function"]

    def _drain(self, value: Any) -> Wire:
        if not hasattr(type(value), "__next__"):
            raise self.spoil("beside", f"a {type(value).__name__} as an argument")
        items = [item for item, _ in zip(value, range(_MAX_DRAINED), strict=False)]
        return Encoder(self.export).items("iter", items)

    def stand_in(self, number: int, kind: str, rest: list[Wire]) -> Any:
        if number not in self._stand_ins:
            name = rest[0] if rest and type(rest[0]) is str else "object"
            if kind == "iterator":
                self._stand_ins[number] = RemoteIterator(self, number)
            else:
                kinds = {"class": RemoteClass, "function": RemoteFunction}
                self._stand_ins[number] = kinds.get(kind, RemoteObject)(self, number, name)
        return self._stand_ins[number]

    def serve(self, op: str, message: dict[str, Any]) -> Wire:
        if op != "call":
            raise ValueError("only calls are served")
        return self.call(self.exported(message["on"]), message)


class Evaluator:
    """Tests of one submission against one solution process."""

    def __init__(self, peer: EvaluatorPeer, job: dict[str, Any]) -> None:
        self._peer = peer
        self._mode: str = job["mode"]
        self._setup = job["setup"]
        self._entry_point: str | None = job["entry_point"]

    def load(self) -> dict[str, str]:
        """Waits until the program has run its own top level."""
        try:
            message = self._peer.receive()
            if "x" in message:
                raise self._peer._decode_exception(message["x"])
        except BaseException as error:
            return self._outcome(error)
        return {"status": "loaded" if message.get("loaded") is True else "gone", "detail": ""}

    def run(self, source: str) -> dict[str, str]:
        """One test, in globals of its own."""
        self._peer.start_test()
        try:
            programs = [compile(self._setup, "<setup>", "exec", dont_inherit=True)] if self._setup else []
            programs.append(compile(source, "<test>", "exec", dont_inherit=True))
            scope = self._scope(programs)
            for program in programs:
                exec(program, scope)
            if self._mode == "check_function":
                scope["check"](self._candidate(scope))
        except BaseException as error:
            return self._outcome(error)
        if self._peer.spoiled:
            status, detail = self._peer.spoiled
            return {"status": status, "detail": detail[:_MAX_DETAIL]}
        return {"status": "passed", "detail": ""}

    def _scope(self, programs: list[types.CodeType]) -> dict[str, Any]:
        wanted = {name for program in programs for name in _names(program)}
        if self._entry_point:
            wanted.add(self._entry_point)
        found = self._peer.request("names", names=sorted(wanted))["v"]
        found = {name: found[name] for name in sorted(wanted) if name in found and not name.startswith("__")}
        others = any(name not in _OWN_NAMES for name in found)
        scope: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        for name, (kind, *rest) in found.items():
            shadows_ok = name == self._entry_point or not (others or self._entry_point)
            if name in _OWN_NAMES and not shadows_ok:
                if name in sys.stdlib_module_names:
                    scope[name] = importlib.import_module(name)
            elif kind == "module":
                if rest[0] == name and name in sys.stdlib_module_names:
                    scope[name] = importlib.import_module(name)
            elif kind == "standard" and rest[0] in PURE_MODULES:
                scope[name] = getattr(importlib.import_module(rest[0]), name)
            elif kind == "exception":
                scope[name] = exception_class(rest[0], rest[1])
            else:
                scope[name] = self._peer.decode(rest[0])
        return scope

    def _candidate(self, scope: dict[str, Any]) -> Any:
        if self._entry_point not in scope:
            raise NameError(f"name {self._entry_point!r} is not defined")
        return scope[self._entry_point]

    def _outcome(self, error: BaseException) -> dict[str, str]:
        if self._peer.spoiled:
            status, detail = self._peer.spoiled
            return {"status": status, "detail": detail[:_MAX_DETAIL]}
        try:
            detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        except BaseException:  # an argument that does not want to be printed
            detail = type(error).__name__
        if isinstance(error, AssertionError):
            status = "failed"
        elif isinstance(error, MemoryError):
            status = "out_of_memory"
        elif isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
            status = "killed"
        else:
            status = "error"
        return {"status": status, "detail": detail[:_MAX_DETAIL]}


def _names(program: types.CodeType) -> set[str]:
    """Every name that a piece of code might look up among its globals."""
    names = set(program.co_names)
    for constant in program.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def main(host: socket.socket) -> None:
    """Serves the host until it closes the socket."""
    evaluator = None
    while True:
        try:
            message, fds = frames.recv_with_fds(host, 1)
        except EOFError:
            return
        if message["op"] == "link":
            evaluator = Evaluator(EvaluatorPeer(socket.socket(fileno=fds[0])), message)
            reply = evaluator.load()
        else:
            assert evaluator is not None
            reply = evaluator.run(message["source"])
        frames.send(host, reply)
