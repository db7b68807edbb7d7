"""One row of the table, and what several programs share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.types import Limits, TestMode, TestStatus

# What a judge promises.
NO_FORGERY = "a wrong program is not paid"
NO_WAY_OUT = "a program reaches no other process and no secret"
NO_TRACE = "nothing of a program is left for the next one"
LIMITS_HOLD = "CPU, memory, output and time are bounded"
ALIVE = "whatever a program does gets a verdict, soon"
NO_LOSS = "a right program is paid"
KNOWN_TRUST = "a test that ran beside the program is marked"

RIGHT = "\ndef f(x): return x * x\n"
SQUARE = ("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")
ANY_RATE = tuple(round(passed / 3, 4) for passed in range(4))
SHORT, ROOM = Limits(cpu_s=0.5, wall_s=2), Limits(cpu_s=5, wall_s=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One program, its tests, and the pass rates that a correct judge may give.

    Attack(name="sleeps", property=ALIVE, code="import time\\ntime.sleep(99)", accept=(0,), tests=SQUARE)
    """

    name: str
    property: str
    code: str
    accept: tuple[float, ...]
    tests: tuple[str, ...] = SQUARE
    mode: TestMode = TestMode.ASSERTS
    entry_point: str | None = None
    setup: str = ""
    trust: str = "high"
    status: TestStatus | None = None  # of every test, where the rate alone might have another cause
    runs: int = 1  # how often it is judged in a row
    limits: Limits = SHORT


def attacks(
    property: str, programs: Mapping[str, str | tuple[str, ...]], *, accept: tuple[float, ...] = (0,), **common: Any
) -> list[Attack]:
    """An Attack for each name: its code, or its code and then its tests. `common` are fields that all of them have."""
    return [
        Attack(name=name, property=property, code=program, accept=accept, **common)
        if isinstance(program, str)
        else Attack(name=name, property=property, code=program[0], accept=accept, **{**common, "tests": program[1:]})
        for name, program in programs.items()
    ]


# The solution's end of the link, spoken by hand (sandbox/judge/link.py). The first programs that use it are honest:
# while these pass, the others attack a protocol that is really spoken.
HANDMADE = """
import json, os, socket, struct
def _link():
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            end = socket.socket(fileno=os.dup(fd))
            end.getpeername()
            return end
        except OSError: pass
_sock = _link()
def raw(data, ancillary=()): _sock.sendmsg([data], ancillary)
def send(message):
    body = json.dumps(message).encode()
    _sock.sendall(struct.pack("!I", len(body)) + body)
def receive():
    size, = struct.unpack("!I", _sock.recv(4, socket.MSG_WAITALL) or os._exit(0))
    return json.loads(_sock.recv(size, socket.MSG_WAITALL))
def box(number, standard=False):
    operators = [f"__{n}__" for n in "eq ne lt len iter next getitem contains str bool add sub abs float index hash".split()]
    return ["mine", number, "class", "Box", [], operators, False, standard]
def serve(call, names=lambda wanted: {n: ["value", ["mine", 0, "function", n]] for n in wanted if n == "f"}):
    send({"loaded": True})
    while True:
        message = receive()
        if message.get("op") == "names": send({"r": message["q"], "v": names(message["names"])})
        elif "source" in message: send({"nonce": message["nonce"], "status": "passed", "detail": ""})
        elif "q" in message:
            answer = call(message)
            if answer is not None: send({"r": message["q"], **answer})
"""

LIAR = "class Liar:\n    def __init__(s, *a): pass\n" + "".join(
    f"    def __{name}__(s, *o): return {value}\n"
    for name, value in {
        **dict.fromkeys(["eq", "lt", "gt", "le", "ge", "contains", "bool"], "True"),
        **{"ne": "False", "len": "4", "iter": "iter([4])", "getitem": "4", "str": "'4'", "add": "4", "abs": "4"},
    }.items()
)
UNWRAPPED = ("assert list(f(2)) == [4]", "assert f(2)[0] == 4", "assert len(f(2)) == 4", "assert sorted(f(2)) == [4]")
