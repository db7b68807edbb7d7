"""A script's standard streams as the session holds them: what it reads, what it wrote, whether that is right."""

import json
import os
import select
import time
from types import TracebackType
from typing import Self

from sandbox.judge.clock import Clock, Outcome
from sandbox.types import TestStatus

_FIRST_LOOK_S, _LOOK_EVERY_S = 0.05, 0.1
_AFTER_END_OF_FILE_S = 0.001  # a process that has closed its output has most likely ended
_CHUNK = 1 << 16


def parse_test(test: str) -> tuple[bytes, bytes]:
    """Standard input and expected output of a test, {"stdin": text, "stdout": text}; ValueError when it is none."""
    try:
        case = json.loads(test)
        stdin, stdout = (case[name].encode("utf-8", "surrogatepass") for name in ("stdin", "stdout"))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("the test is no JSON object with the texts stdin and stdout") from None
    return stdin, stdout


def difference(printed: bytes, expected: bytes) -> str:
    """ "" when both are the same text: white space that ends a line and blank lines that end the text do not count."""
    lines, wanted = _lines(printed), _lines(expected)
    if lines == wanted:
        return ""
    first = next((n for n, pair in enumerate(zip(lines, wanted, strict=False)) if pair[0] != pair[1]), None)
    return f"printed {len(lines)} lines instead of {len(wanted)}" if first is None else f"line {first + 1} differs"


def _lines(text: bytes) -> list[bytes]:
    lines = [line.rstrip() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


class Streams:
    """The script's input as a file, so that not reading it blocks nobody, and a pipe for its output.

    At most `most` bytes of output are taken; a script that writes more fails.
    """

    def __init__(self, stdin: bytes, most: int) -> None:
        self._most = most
        self._output = bytearray()
        file = os.memfd_create("stdin")
        with open(file, "wb", closefd=False) as writer:
            writer.write(stdin)
        os.lseek(file, 0, os.SEEK_SET)
        self._ours, pipe = os.pipe()
        os.set_blocking(self._ours, False)
        os.fchmod(pipe, 0o666)  # the script's uid may open /dev/stdout
        self.theirs = [file, pipe]  # what the script's process gets as its standard input and output

    def close_theirs(self) -> None:
        while self.theirs:
            os.close(self.theirs.pop())

    def follow(self, clock: Clock) -> Outcome | None:
        """Reads until the script's first process has ended; an Outcome when it has to be stopped."""
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        pause_s = _FIRST_LOOK_S
        next_look = time.monotonic() + pause_s
        while clock.ended is None:
            if poll.poll(max(0.0, 1000 * (next_look - time.monotonic()))):
                if self._read():
                    if len(self._output) > self._most:
                        return self._too_much()
                else:
                    poll.unregister(self._ours)
                    pause_s, next_look = _AFTER_END_OF_FILE_S, time.monotonic()
            if time.monotonic() >= next_look:
                if outcome := clock.look():
                    return outcome
                pause_s = min(2 * pause_s, _LOOK_EVERY_S)
                next_look = time.monotonic() + pause_s
        return None

    def rest(self) -> bytes | Outcome:
        """The whole output, once every process that could write has ended."""
        while self._read():
            if len(self._output) > self._most:
                return self._too_much()
        return bytes(self._output)

    def _read(self) -> bool:
        try:
            chunk = os.read(self._ours, _CHUNK)
        except BlockingIOError:
            return False
        self._output += chunk
        return bool(chunk)

    def _too_much(self) -> Outcome:
        return Outcome(status=TestStatus.FAILED, detail=f"printed more than {self._most >> 10} kB")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_theirs()
        os.close(self._ours)
