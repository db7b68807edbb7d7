"""The child that holds the program under judgement: runs its code once, then serves calls from the evaluator.

It receives the source and nothing else; tests, expected values and verdicts never enter this process (except in
`beside` mode, below). Everything here shares an interpreter with the program, which may rewrite all of it: what it
sends is only ever taken as a value. The program sees a copy of `builtins`, so that overwriting `len` breaks the
program and not the loop that serves it.

`beside`: a test that needs the program's classes themselves (comparing two of its instances, subclassing them) runs
here, after the code. That is NOT protected: the program can forge the result. The verdict says `trust: low`.
"""

import builtins
import itertools
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

from sandbox.judge import frames
from sandbox.judge.link import GoneError, Peer, standard_base
from sandbox.judge.values import PURE_MODULES, Wire

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType)


class SolutionPeer(Peer):
    """Serves the evaluator's requests against the program's namespace."""

    def __init__(self, sock: socket.socket, namespace: dict[str, Any]) -> None:
        super().__init__(sock)
        self._namespace = namespace
        self._callbacks: dict[int, Any] = {}

    def describe(self, value: Any) -> list[Wire]:
        if isinstance(value, type):
            return ["class", str(value.__name__)]
        if isinstance(value, _FUNCTIONS):
            return ["function", str(value.__name__)]
        if type(value).__module__ in ("builtins", "itertools") and isinstance(value, Iterator):
            return ["iterator"]
        return ["object", str(type(value).__name__)]

    def stand_in(self, number: int, kind: str, rest: list[Wire]) -> Any:
        if number not in self._callbacks:

            def callback(*args: Any, **kwargs: Any) -> Any:
                return self.call_remote("call", number, args, kwargs)

            self._callbacks[number] = callback
        return self._callbacks[number]

    def export(self, value: Any) -> Wire:
        for number, callback in self._callbacks.items():
            if callback is value:
                return ["yours", number]
        return super().export(value)

    def serve(self, op: str, message: dict[str, Any]) -> Wire:
        if op == "names":
            return {"v": {name: self._name(name) for name in message["names"] if name in self._namespace}}
        target = self.exported(message["on"])
        if op == "call":
            return self.call(target, message)
        if op == "next":
            return {"v": [self.encode(item) for item in itertools.islice(target, message["count"])]}
        if op == "get":
            return {"v": self.encode(getattr(target, message["name"]))}
        if op == "set":
            setattr(target, message["name"], self.decode(message["a"]))
            return {}
        raise ValueError(f"unknown operation {op!r}")

    def _name(self, name: str) -> list[Wire]:
        """How the evaluator should bind a global name of the program."""
        value = self._namespace[name]
        if isinstance(value, types.ModuleType):
            return ["module", str(value.__name__)]
        module = getattr(value, "__module__", None)
        if module is not None and callable(value) and getattr(value, "__name__", None) == name:
            module = str(module).lstrip("_")
            if module in PURE_MODULES and hasattr(sys.modules.get(module), name):
                return ["standard", module, name]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", str(value.__name__), standard_base(value)]
        return ["value", self.encode(value)]


def main(link: socket.socket) -> None:
    """Reads {"code", "beside"} from the link, runs the code, answers how that went, serves calls until killed."""
    job = frames.recv(link)
    namespace = _new_namespace()
    peer = SolutionPeer(link, namespace)
    try:
        exec(compile(job["code"], "<solution>", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # SystemExit too: the program left before it could be asked anything
        frames.send(link, {"x": peer.encode_exception(error)})
        return
    frames.send(link, {"loaded": True})
    if job.get("beside"):
        _run_beside(link, namespace, peer)
        return
    try:
        while True:
            message = peer.receive()
            if "q" in message:
                peer.answer(message)
    except GoneError:
        return


def _new_namespace() -> dict[str, Any]:
    module = types.ModuleType("solution")  # not __main__: a program's own command line must not run
    own_builtins = types.ModuleType("builtins")
    vars(own_builtins).update(vars(builtins))
    sys.modules["builtins"] = own_builtins
    sys.modules["solution"] = module  # dataclasses and enum look their module up
    namespace = vars(module)
    namespace["__builtins__"] = vars(own_builtins)
    return namespace


def _run_beside(link: socket.socket, namespace: dict[str, Any], peer: SolutionPeer) -> None:
    test = frames.recv(link)
    try:
        for source in (test["setup"], test["source"]):
            exec(compile(source, "<test>", "exec", dont_inherit=True), namespace)
        if test["mode"] == "check_function":
            namespace["check"](namespace[test["entry_point"]])
    except BaseException as error:
        frames.send(link, {"x": peer.encode_exception(error)})
    else:
        frames.send(link, {"passed": True})
