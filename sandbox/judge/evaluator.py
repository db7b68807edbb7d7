"""The child that holds the tests: compiles and runs them against stand-ins for the program's names.

Host to evaluator: {"op": "link", "mode", "setup", "entry_point"} with the solution's socket, answered when the
program has loaded; {"op": "test", "source"}, answered with {"status", "detail", "low"}. Beside the statuses of a verdict
there are two for the host only: `gone` (the solution's process left) and `beside` (this test needs the real classes).

Names: a test's global that the program defines is bound to a stand-in or to the value. The evaluator's own builtins win
over names of the program (a program that defines `abs` must not decide what `abs` means in a test), unless the name is
the entry point, or no entry point is given and the test uses no other name of the program. So do standard modules,
except for a name that the test calls, and `isclose(f(2), 4)` or `Counter(f(2))`, which check what the program returned.
What `setup` defines wins over everything but the entry point.
"""

import builtins
import importlib
import socket
import sys
import types
from typing import Any

from sandbox.judge import frames
from sandbox.judge.evaluator_peer import EvaluatorPeer
from sandbox.judge.expectations import SHARED_WORDS, called_names, checking_names, shares_state
from sandbox.judge.grading import compile_test, outcome_of, run_test
from sandbox.judge.value_types import PURE_MODULES

_MAX_DETAIL = 200
_OWN_NAMES = frozenset(vars(builtins)) | sys.stdlib_module_names
# What a test may check results with although only the program has imported it: name -> module.
_CHECKERS = dict.fromkeys(("isclose", "isnan", "isinf", "isfinite"), "math") | {
    "Decimal": "decimal",
    "Fraction": "fractions",
}
_CHECKERS |= dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque"), "collections")


class Evaluator:
    """Tests of one submission against one solution process."""

    def __init__(self, peer: EvaluatorPeer, job: dict[str, Any]) -> None:
        self._peer = peer
        self._mode: str = job["mode"]
        self._setup = job["setup"]
        self._entry_point: str | None = job["entry_point"]

    def load(self) -> dict[str, Any]:
        """Waits until the program has run its own top level."""
        try:
            message = self._peer.receive()
            if "x" in message:
                raise self._peer.decode_raised(message["x"])
        except BaseException as error:
            return self._reply(*outcome_of(error))
        return {"status": "loaded" if message.get("loaded") is True else "gone", "detail": ""}

    def run(self, source: str) -> dict[str, Any]:
        """One test, in globals of its own."""
        self._peer.start_test()
        try:
            programs = compile_test(self._setup, source)
            module = types.ModuleType("tests")
            vars(module).update(self._scope(programs, source))
        except BaseException as error:
            return self._reply(*outcome_of(error))
        sys.modules["tests"] = module  # dataclasses and unittest look their module up
        return self._reply(*run_test(programs, self._mode, self._entry_point, vars(module)))

    def _scope(self, programs: list[types.CodeType], source: str) -> dict[str, Any]:
        """Globals for a test: what the program defines of the names that it uses."""
        wanted = {name for program in programs for name in _names(program)}
        if self._entry_point:
            wanted.add(self._entry_point)
        sources = (self._setup, source)
        if not wanted.isdisjoint(SHARED_WORDS) and shares_state(sources):
            raise self._peer.spoil("beside", "a test that shares more with the program than calls")
        found = self._peer.names(wanted)
        self._peer.read(sources, frozenset(found), self._entry_point)
        scope: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        if self._entry_point not in found and self._entry_point in vars(builtins):
            scope["__builtins__"] = {name: value for name, value in vars(builtins).items() if name != self._entry_point}
        own = [name for name in found if name in _OWN_NAMES and name != self._entry_point]
        own_may_be_tested = not self._entry_point and [kind != "module" for kind, *_ in found.values()].count(True) == 1
        called = called_names(sources) if own else frozenset()
        checking = frozenset() if _CHECKERS.keys().isdisjoint(found) else checking_names(sources, frozenset(found))
        for name, (kind, *rest) in found.items():
            if name in own and name in sys.stdlib_module_names and name not in called:
                scope[name] = importlib.import_module(name)
            elif name in own and name not in sys.stdlib_module_names and not own_may_be_tested:
                continue
            elif name in _CHECKERS and name in checking and name != self._entry_point:
                scope[name] = getattr(importlib.import_module(_CHECKERS[name]), name)
            elif kind == "module":
                if (rest[0] == name and name in sys.stdlib_module_names) or (name, rest[0]) == ("np", "numpy"):
                    scope[name] = importlib.import_module(rest[0])
            elif kind == "standard" and rest[0] in PURE_MODULES:
                scope[name] = getattr(importlib.import_module(rest[0]), name)
            else:
                scope[name] = self._peer.bind(name, [kind, *rest])
        return scope

    def _reply(self, status: str, detail: str) -> dict[str, Any]:
        if self._peer.spoiled:
            status, detail = self._peer.spoiled
        return {"status": status, "detail": detail[:_MAX_DETAIL], "low": self._peer.low}


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
