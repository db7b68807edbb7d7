"""The solution's end of the link: serves the evaluator's requests against the program's names and objects.

Everything here shares an interpreter with the program, which may rewrite all of it: the evaluator takes what is sent
as a value, a stand-in, or garbage, and never on trust.
"""

import copy
import math
import operator
import os
import socket
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from sandbox.judge import lazies
from sandbox.judge.containers import Shared, with_room
from sandbox.judge.link import Peer
from sandbox.judge.mirrors import describe_class, mirror_class
from sandbox.judge.proxies import OPERATORS
from sandbox.judge.value_types import PURE_MODULES, Wire, mro_of
from sandbox.judge.values import Encoder, crosses, is_mutable

_FUNCTIONS: tuple[type, ...] = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
)
_FUNCTIONS += (types.WrapperDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType)
_ABSENT = object()
_MAX_HELD = 5000  # parts of containers in attributes and globals that are compared at every request
_PERFORM: dict[str, Any] = {
    f"__{function.__name__}__": function
    for function in (len, iter, next, reversed, str, repr, format, bytes, hash, bool, int, float, complex, round, abs)
} | {
    "__copy__": copy.copy,
    "__deepcopy__": copy.deepcopy,
    "__delattr__": delattr,
    "__divmod__": divmod,
    "__fspath__": os.fspath,
    "__trunc__": math.trunc,
    "__floor__": math.floor,
    "__ceil__": math.ceil,
}


class SolutionPeer(Peer):
    """Serves the evaluator's requests against the program's namespace."""

    def __init__(self, sock: socket.socket, namespace: dict[str, Any]) -> None:
        super().__init__(sock)
        self._namespace = namespace
        self._descriptions: dict[int, list[Wire]] = {}  # number of a class -> what the other side is told
        self._describing: set[int] = set()
        self._kept: set[int] = set()  # ids of classes
        self._told: dict[str, Any] = {}  # globals as the test has them, also those that it looked for in vain
        self._to_hold: list[Any] = []  # containers of the answer that is being made

    # The program's objects there.

    def describe(self, encoder: Encoder, value: Any) -> list[Wire]:
        if type in mro_of(type(value)):
            return self._describe_class(value)
        if isinstance(value, _FUNCTIONS):
            return ["function", str(getattr(value, "__name__", ""))]
        if kind := lazies.kind_of(value):
            return [kind]
        if type(value).__module__ in ("builtins", "itertools") and isinstance(value, Iterator):
            return ["iterator"]
        return ["object", self.export(encoder, type(value))]

    def _describe_class(self, kind: type) -> list[Wire]:
        number = self._numbers[id(kind)]
        if number not in self._descriptions:
            self._describing.add(number)
            encoder = Encoder(self, described=set(self._describing))
            try:
                self._descriptions[number] = describe_class(encoder, kind) or self._describe_other(encoder, kind)
            finally:
                self._describing.discard(number)
        return self._descriptions[number]

    def _describe_other(self, encoder: Encoder, kind: type) -> list[Wire]:
        spaces = [vars(base) for base in mro_of(kind) if base is not object]
        operators = [
            name for name in sorted(OPERATORS) if next((s[name] for s in spaces if name in s), None) is not None
        ]
        bases = [self.export(encoder, base) for base in kind.__bases__ if not _is_standard(base)]
        return ["class", str(kind.__name__), bases, operators, crosses(kind), _is_standard(kind)]

    def make_stand_in(self, number: int, kind: Any, rest: list[Wire]) -> Any:
        if kind in lazies.STAND_INS:
            return lazies.STAND_INS[kind](self, number)
        if kind == "token":
            return object()
        if kind != "function":
            return mirror_class(self, self.decode, kind, rest)
        if rest:
            return getattr(sys.modules[rest[0]], rest[1])

        def callback(*args: Any, **kwargs: Any) -> Any:
            return self.call_remote("call", args, kwargs, on=number)

        return callback

    def attribute(self, target: Any, name: str) -> Any:
        raise AttributeError(f"{type(target).__name__!r} object has no attribute {name!r}")

    def construct(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type.__call__(kind, *args, **kwargs)

    def operator_of(self, name: str, plain: Any) -> Any:
        return plain

    # Requests.

    def serve(self, op: str, message: dict[str, Any]) -> dict[str, Wire]:
        if "w" in message:
            self.hear(message["w"])
        if op == "names":
            self.held, self._kept = Shared(), set()
            self._told = self._now(message["names"])
            return {"v": {name: self._name(name) for name in self._told if name in self._namespace}}
        if op in ("get", "set"):
            target = self.decode(message["of"])
            if op == "set":
                return self._call_and_hold(lambda value: setattr(target, message["name"], value), message)
            value = self._namespace[message["name"]] if target is None else getattr(target, message["name"])
            encoder = Encoder(self)
            wire = encoder.encode_or_export(value)
            self._to_hold = encoder.containers
            return {"v": wire}
        if op == "op":
            return self.call(self._operation(message["name"]), message)
        number = message["on"]
        if op in lazies.STEPS:
            return lazies.serve_step(self, op, number, message)
        target = self.exported[number]
        if op == "plain":
            self._kept, kept = set(), self._kept
            try:
                return {"v": with_room(Encoder(self).encode, target)}
            finally:
                self._kept = kept
        if op == "new":  # by a test that is about objects
            self._kept.add(id(target))
            return self._call_and_hold(target, message)
        return self.call(target, message)

    def _call_and_hold(self, function: Any, message: dict[str, Any]) -> dict[str, Wire]:
        """A call after which the program may keep its arguments."""
        decoder = self.decoder()
        fields = self.call(function, message, decoder)
        self._to_hold = [] if "x" in fields else decoder.containers
        return fields

    def keeps(self, kind: type) -> bool:
        return id(kind) in self._kept

    def finish(self, fields: dict[str, Wire]) -> dict[str, Wire]:
        if changes := self.told():
            fields["w"] = changes
        told, self._told = self._told, self._now(self._told)
        rebound = [name for name, value in self._told.items() if value is not told[name]]
        if rebound:
            fields["g"] = {name: self._name(name) if name in self._namespace else None for name in rebound}
        if self._to_hold:
            if sum(map(_size, self.held.containers + self._to_hold)) < _MAX_HELD:
                self.held.extend(self._to_hold)
                fields["held"] = True
            self._to_hold = []
        return fields

    def _now(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self._namespace.get(name, _ABSENT) for name in names}

    def _operation(self, name: str) -> Any:
        """The function that does what the special method `name` is for, with Python's own fallbacks."""
        if name == "__await__":
            return lambda target: lazies.run_awaitable(self, target)
        if name in _PERFORM or hasattr(operator, name):
            return _PERFORM.get(name) or getattr(operator, name)
        forward = f"__{name[3:]}" if name.startswith("__r") else ""
        if forward in _PERFORM or hasattr(operator, forward):
            reflected = _PERFORM.get(forward) or getattr(operator, forward)
            return lambda right, left: reflected(left, right)
        return lambda target, *args, **kwargs: getattr(type(target), name)(target, *args, **kwargs)

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
        return ["data"] if is_mutable(value) else ["value", Encoder(self).encode_or_export(value)]


def _size(container: Any) -> int:
    return 1 + (len(container) if hasattr(type(container), "__len__") else 1)


def _is_standard(kind: type) -> bool:
    module = str(kind.__module__)
    return module.partition(".")[0] in sys.stdlib_module_names and hasattr(sys.modules.get(module), kind.__name__)
