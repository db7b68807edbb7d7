"""Some tests that a zygote runs in itself, before it forks anything.

CPython rewrites the code that it runs often into a faster form (PEP 659) and fills its caches. Done once in the zygote,
every child has that from the start, and fewer pages of its own to copy.
"""

import builtins
import contextlib
import importlib
import os
import signal
import socket
import sys

from sandbox.judge import frames

_PROGRAM = "def f(x):\n    return x\n"
_TESTS = ["assert f(3) == 3", "assert f([1, 2]) == [1, 2]", "assert f('a') == 'a'", "assert f((2.5, None)) != {}"] * 10


def warm(role: str) -> None:
    """Plays `role`, "solution" or "evaluator", in this process; a child plays the other."""
    with contextlib.ExitStack() as stack:
        link, program, host, tests = map(stack.enter_context, (*socket.socketpair(), *socket.socketpair()))
        sides = {"solution": program, "evaluator": tests}
        frames.send(link, {"code": _PROGRAM, "way": "served"})
        job = {"op": "link", "mode": "asserts", "setup": "", "entry_point": None}
        frames.send(host, job, (link.fileno(),))
        for test in _TESTS:
            frames.send(host, {"op": "test", "source": test})
        host.shutdown(socket.SHUT_WR)
        link.close()
        ours = sides.pop(role)
        ((other, theirs),) = sides.items()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                importlib.import_module(f"sandbox.judge.{other}").main(theirs)
            finally:
                os._exit(0)
        theirs.close()
        importlib.import_module(f"sandbox.judge.{role}").main(ours)
        os.kill(pid, signal.SIGKILL)  # a program waits for more until its last line is collected here
        os.waitpid(pid, 0)
    sys.modules["builtins"] = builtins
    for name in ("tests", "solution"):
        sys.modules.pop(name, None)
