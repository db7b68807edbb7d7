"""The host's end of a connection to a supervisor (judge/supervisor.py), whatever carries its bytes."""

import contextlib
import hmac
import secrets
import threading
import time
from concurrent.futures import Future
from typing import Any, Protocol

from sandbox.judge import frames, protocol
from sandbox.types import (
    SandboxError,
    SandboxRefusedError,
    SandboxUnavailableError,
    Submission,
    SubmissionTooLargeError,
    Verdict,
)

_ANSWER_S = 60.0  # beyond the limits of the submission itself; a supervisor that needs longer is lost


class Channel(frames.Stream, Protocol):
    """What carries the bytes: a socket, or something that looks like one."""

    def settimeout(self, seconds: float | None, /) -> None: ...
    def close(self) -> None: ...


class ConnectionLostError(SandboxError):
    """The supervisor, or the way to it, is gone: what it was judging is not known."""


class Connection:
    """Submissions out, verdicts in, many at a time over one channel. Every call ends in an answer or an exception."""

    def __init__(self, channel: Channel, token: str | None = None, start_s: float = _ANSWER_S) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._registering = threading.Lock()
        self._lost: str | None = None
        try:
            channel.settimeout(start_s)
            self.slots = self._greet(token)
            channel.settimeout(None)
        except BaseException:
            channel.close()
            raise
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def judge(self, submission: Submission) -> Verdict:
        """Raises ConnectionLostError, SubmissionTooLargeError, SandboxRefusedError, or SandboxError with what the
        supervisor said."""
        limits = submission.limits
        bound = 2 * limits.wall_s + (limits.cpu_s + limits.wall_s) * (len(submission.tests) + 1) + _ANSWER_S
        answer = self._ask({"op": "judge", "submission": protocol.submission_to_wire(submission)}, bound)
        try:
            verdict = protocol.verdict_from_wire(answer["verdict"])
        except (KeyError, ValueError, TypeError) as error:
            raise SandboxError(f"the sandbox answered with something that is no verdict: {error}") from None
        if verdict.id != submission.id or len(verdict.statuses) != len(submission.tests):
            raise SandboxError("the sandbox answered with a verdict about something else")
        return verdict

    def stats(self, timeout_s: float = _ANSWER_S) -> dict[str, int]:
        """The supervisor's counters: judged, errors, slots_started, busy, waiting, slots, draining."""
        return self._ask({"op": "stats"}, timeout_s)["stats"]

    def survivors(self) -> list[str]:
        """Processes, files and System V objects that judged programs left behind."""
        return self._ask({"op": "left"}, _ANSWER_S)["left"]

    def close(self) -> None:
        self._lose("it was closed")
        self._channel.close()

    def _greet(self, token: str | None) -> int:
        hello = self._receive().get("hello")
        if type(hello) is not dict:
            raise SandboxError("what listens there is no sandbox")
        if (hello["challenge"] is None) != (token is None):
            expects = "no token" if hello["challenge"] is None else "a token"
            raise SandboxUnavailableError(f"the sandbox expects {expects}: it is not the kind that was asked for")
        if token is not None:
            challenge = secrets.token_hex(16)
            frames.send(
                self._channel, {"proof": protocol.proof(token, hello["challenge"], "client"), "challenge": challenge}
            )
            welcome = str(self._receive().get("welcome"))
            if not hmac.compare_digest(welcome.encode(), protocol.proof(token, challenge, "supervisor").encode()):
                raise SandboxUnavailableError(
                    "token_file: the sandbox and this client hold different tokens: give both the same secret"
                    " (sandbox.token_file or DIFFRL_SANDBOX_TOKEN)"
                )
        return int(hello["slots"])

    def _receive(self) -> dict[str, Any]:
        try:
            message = frames.recv(self._channel)
        except (OSError, EOFError, frames.FrameError) as error:
            raise ConnectionLostError(f"the sandbox left: {error or type(error).__name__}") from None
        if type(message) is not dict:
            raise ConnectionLostError("the sandbox sent garbage")
        return message

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        number = secrets.randbits(62)
        answer: Future[dict[str, Any]] = Future()
        with self._registering:
            if self._lost is not None:
                raise ConnectionLostError(f"the connection to the sandbox is gone: {self._lost}")
            self._waiting[number] = answer
        deadline = time.monotonic() + timeout_s
        try:
            if not self._sending.acquire(timeout=timeout_s):  # another thread sends to a peer that does not read
                raise TimeoutError
            try:
                frames.send(self._channel, {"id": number, **message})
            finally:
                self._sending.release()
            fields = answer.result(deadline - time.monotonic())
        except frames.FrameError as error:
            raise SubmissionTooLargeError(f"the submission is too large: {error}") from None
        except TimeoutError:
            self._lose(f"no answer within {timeout_s:.0f} s")
            self._channel.close()
            raise ConnectionLostError(f"the sandbox gave no answer within {timeout_s:.0f} s") from None
        except OSError as error:
            self._lose(str(error))
            raise ConnectionLostError(f"the sandbox left: {error}") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in fields:
            raise (SandboxRefusedError if fields.get("refused") else SandboxError)(str(fields["error"]))
        return fields

    def _read(self) -> None:
        try:
            while True:
                message = self._receive()
                answer = self._waiting.get(message.get("id", -1))
                if answer is None and "error" in message:
                    raise ConnectionLostError(f"the sandbox hung up: {message['error']}")
                if answer is not None:
                    with contextlib.suppress(Exception):  # asked and given up at the same moment
                        answer.set_result(message)
        except SandboxError as error:
            self._lose(str(error))
            self._channel.close()

    def _lose(self, why: str) -> None:
        with self._registering:
            self._lost = self._lost or why
            waiting = list(self._waiting.values())
        for answer in waiting:
            with contextlib.suppress(Exception):  # answered at the same moment
                answer.set_exception(ConnectionLostError(f"the sandbox left: {why}"))
