"""The child that holds the program under judgement: runs its code once, then serves calls from the evaluator.

It receives the source and nothing else; tests, expected values and verdicts never enter this process (except in
`beside` mode, below). Everything here shares an interpreter with the program, which may rewrite all of it: what it
sends is only ever taken as a value. The program sees a copy of `builtins`, so that overwriting `len` breaks the
program and not the loop that serves it.

`beside`: a test that needs the program's classes themselves (subclassing them) or its standard streams, files and seeds
runs here, after the code. That is NOT protected: the program can forge the result. The verdict says `trust: low`. Most
unittests run so too, and as they patch modules, look at files and draw, this process is more like an ordinary one then:
no copy of `builtins`, and an environment with what libraries need to do without a home, a screen and threads.
"""

import _sitebuiltins
import atexit
import builtins
import contextlib
import os
import socket
import sys
import threading
import types
from typing import Any, NoReturn, TextIO, cast

from sandbox.judge import frames
from sandbox.judge.grading import compile_test, outcome_of, run_test
from sandbox.judge.link import GoneError
from sandbox.judge.solution_peer import SolutionPeer

_SCRIPT = "script.py"
_COPIED_BUILTINS = types.ModuleType("builtins")  # made once, as this process has a single program
vars(_COPIED_BUILTINS).update(vars(builtins))
_ENVIRONMENT = {"LANG": "C.UTF-8", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(link: socket.socket) -> None:
    """Reads {"code", "way"} from the link, runs the code, answers how that went, serves calls until killed.

    The ways: "served", "beside" (a test follows), "script" (standard input and output come along).
    """
    job, streams = frames.recv_with_fds(link, 2)
    if job["way"] == "script":
        _run_script(link, job["code"], streams)
    if job["way"] == "beside":
        os.environ.update(_ENVIRONMENT, HOME=os.getcwd())
    namespace = _new_namespace(own_builtins=job["way"] == "served")
    peer = SolutionPeer(link, namespace)
    try:
        exec(compile(job["code"], "<solution>", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # SystemExit too: the program left before it could be asked anything
        frames.send(link, {"x": peer.encode_raised(error)})
        return
    frames.send(link, {"loaded": True})
    if job["way"] == "beside":
        _run_beside(link, namespace)
        return
    try:
        while True:
            message = peer.receive()
            if "q" in message:
                peer.answer(message)
    except GoneError:
        return


def _new_namespace(*, own_builtins: bool) -> dict[str, Any]:
    module = types.ModuleType("solution")  # not __main__: a program's own command line must not run
    sys.modules["solution"] = module  # dataclasses and enum look their module up
    namespace = vars(module)
    if own_builtins:
        sys.modules["builtins"] = _COPIED_BUILTINS
        namespace["__builtins__"] = vars(_COPIED_BUILTINS)
    return namespace


def _run_beside(link: socket.socket, namespace: dict[str, Any]) -> None:
    test = frames.recv(link)
    try:
        programs = compile_test(test["setup"], test["source"])
    except BaseException as error:
        status, detail = outcome_of(error)
    else:
        status, detail = run_test(programs, test["mode"], test["entry_point"], namespace)
    frames.send(link, {"nonce": test["nonce"], "status": status, "detail": detail})


def _run_script(link: socket.socket, code: str, streams: list[int]) -> NoReturn:
    """Runs the code as `__main__` and leaves as an interpreter would: threads, atexit, flush, exit status.

    What went wrong is told over the link; the session reads it only when the exit status says that something did.
    """
    status = 1
    try:
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.argv[:] = [_SCRIPT]
        for name in ("exit", "quit"):  # the interpreter runs without `site`
            setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__ = _SCRIPT
        left_with = _exit_status(link, code, vars(module))
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        _flush()
        for name in [name for name in vars(module) if name != "__builtins__"]:
            setattr(module, name, None)  # files that were left open are written now
        status = left_with
    finally:
        os._exit(status)


def _exit_status(link: socket.socket, code: str, namespace: dict[str, Any]) -> int:
    try:
        exec(compile(code, _SCRIPT, "exec", dont_inherit=True), namespace)
    except SystemExit as error:
        return 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else 1
    except BaseException as error:
        frames.send(link, {"x": SolutionPeer(link, namespace).encode_raised(error)})
        return 1
    return 0


def _flush() -> None:
    if sys.stdout is not None and not getattr(sys.stdout, "closed", False):
        sys.stdout.flush()
    with contextlib.suppress(ValueError):  # it is closed, or has been detached
        cast(TextIO, sys.__stdout__).flush()
