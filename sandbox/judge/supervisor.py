"""PID 1 of a sandbox container: takes submissions, hands each to a free slot, sends the verdicts back.

Standard library only. It speaks (protocol.py) on its standard streams, for the docker backend, or with `--listen` on
TCP, for pods; then it refuses to start without a token. Everything that judges is forked from the nursery, which is
forked first: before the token is read and before any request arrives. So nothing that runs programs holds either.

Protected: it is not dumpable, has a uid that programs never have, and as PID 1 takes no signal from below. It needs the
capabilities SETUID, SETGID, KILL, CHOWN and DAC_OVERRIDE, nothing else, and a read-only root with a writable
/dev/shm and /scratch. Started as another user than root, without capabilities, it has one slot and protects by other
means, see one_uid.py. Frames are at most 32 MB, 4 KB before the token is proved; the queue is bounded,
and so are connections from one address that have not proved the token.
SIGTERM drains: no new connection, no new submission, what was accepted is judged, then it leaves.
`--metrics` serves the counters to Prometheus (metrics.py).
"""

import argparse
import contextlib
import hmac
import os
import queue
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from sandbox.judge import frames, metrics, one_uid, own_uids, protocol, zygote

TOKEN = "DIFFRL_SANDBOX_TOKEN"
TOKEN_FILE = "DIFFRL_SANDBOX_TOKEN_FILE"
_TOKEN_FD = "DIFFRL_SANDBOX_TOKEN_FD"
_MIN_TOKEN = 16
_HANDSHAKE_S = 10.0
_SEND_S = 60  # a client that does not read for so long is dropped
_SI_USER = 0  # of kill(); who claims that cannot also claim to be another process
_MAX_UNPROVED = 16  # connections from one address whose token is not proved yet


class StandardStreams:
    """Standard input and output as one end of a connection, in place of a socket."""

    def __init__(self) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)

    def recv(self, size: int) -> bytes:
        return os.read(self._input, size)

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._output, view) :]

    def settimeout(self, seconds: float | None) -> None:
        """Nothing to do: they never time out."""

    def close(self) -> None:
        """Nothing to do: they live as long as the container."""


class Client:
    """One connection; answers of several slots go out one at a time."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._sending = threading.Lock()

    def receive(self) -> dict[str, Any]:
        message = frames.recv(self.channel)
        if type(message) is not dict:
            raise frames.FrameError("not an object")
        return message

    def send(self, message: dict[str, Any]) -> None:
        """Never raises: when the client is gone, or does not read, its submissions are nobody's business any more."""
        with self._sending:
            try:
                frames.send(self.channel, message)
            except OSError:
                self.channel.close()

    def prove(self, token: str, challenge: str) -> bool:
        """Whether the client holds the token; only small frames are read until it has shown that."""
        message = frames.recv(self.channel, protocol.MAX_HANDSHAKE)
        given, theirs = (str(message.get(key)) for key in ("proof", "challenge")) if type(message) is dict else ("", "")
        proved = hmac.compare_digest(given.encode(), protocol.proof(token, challenge, "client").encode())
        self.send({"welcome": protocol.proof(token, theirs, "supervisor")} if proved else {"error": "wrong token"})
        return proved


class Slots(Protocol):
    """Where sessions come from. EOFError: there are none any more."""

    def start(self, index: int) -> socket.socket:
        """Cleans up after the slot's last session; the socket of a new one. OSError: something cannot be removed."""
        ...

    def settled(self) -> bool:
        """Whether all is as before, now that a submission is judged."""
        ...

    def left(self) -> list[str]:
        """What judged programs left behind."""
        ...


class Supervisor:
    """Slots and the queue in front of them."""

    def __init__(self, slots: Slots, num_slots: int, max_waiting: int) -> None:
        self._slots = slots
        self._num_slots = num_slots
        self._queue: queue.Queue[tuple[Client, dict[str, Any]]] = queue.Queue(max_waiting)
        self._counting = threading.Lock()
        self._counts = {"judged": 0, "errors": 0, "slots_started": 0, "busy": 0}
        self._draining = threading.Event()
        for index in range(num_slots):
            session = self._new_session(index)
            threading.Thread(target=self._run_slot, args=(index, session), daemon=True).start()

    def serve(self, client: Client, token: str | None = None, on_proved: Callable[[], None] = lambda: None) -> None:
        """Answers a client until it leaves."""
        challenge = secrets.token_hex(16) if token else None
        python = ".".join(map(str, sys.version_info[:3]))
        client.send({"hello": {"slots": self._num_slots, "python": python, "challenge": challenge}})
        with contextlib.suppress(EOFError, OSError):
            try:
                if token and challenge and not client.prove(token, challenge):
                    return
                on_proved()
                client.channel.settimeout(None)
                while True:
                    self._take(client, client.receive())
            except frames.FrameError as error:  # where the next frame would begin is not known any more
                client.send({"id": None, "error": str(error)})

    def drain(self) -> None:
        """Refuses what comes from now on and returns when everything accepted has been answered."""
        self._draining.set()
        self._queue.join()

    def stats(self) -> dict[str, int]:
        with self._counting:
            stats = {**self._counts, "waiting": self._queue.qsize(), "slots": self._num_slots}
        return {**stats, "draining": int(self._draining.is_set())}

    def _take(self, client: Client, message: dict[str, Any]) -> None:
        number, op = message.get("id"), message.get("op")
        if op == "stats":
            client.send({"id": number, "stats": self.stats()})
        elif op == "left":
            client.send({"id": number, "left": self._left()})
        elif op == "judge":
            self._enqueue(client, message)
        else:
            client.send({"id": number, "error": f"unknown operation {op!r}"})

    def _enqueue(self, client: Client, message: dict[str, Any]) -> None:
        number = message.get("id")
        try:
            protocol.submission_from_wire(message.get("submission"))
            if self._draining.is_set():
                client.send({"id": number, "error": "this sandbox is about to leave", "refused": True})
            else:
                self._queue.put_nowait((client, message))
        except ValueError as error:
            client.send({"id": number, "error": str(error)})
        except queue.Full:
            waiting = f"{self._queue.maxsize} submissions wait already"
            client.send({"id": number, "error": waiting, "refused": True})

    def _run_slot(self, index: int, session: socket.socket) -> None:
        while True:
            client, message = self._queue.get()
            self._count(busy=1)
            try:
                frames.send(session, {"submission": message["submission"]})
                answer = frames.recv(session)
            except (OSError, EOFError, frames.FrameError) as error:
                answer = {"error": f"a slot of the sandbox died: {type(error).__name__}", "dirty": True}
            if answer.pop("dirty") or not self._slots.settled():
                session.close()
                session = self._new_session(index)
            self._count(busy=-1, errors="error" in answer, judged="verdict" in answer)
            client.send({"id": message.get("id"), **answer})
            self._queue.task_done()

    def _new_session(self, index: int) -> socket.socket:
        self._count(slots_started=1)
        try:
            return self._slots.start(index)
        except (OSError, EOFError) as error:
            leave(1, f"could not start a slot: {error}")

    def _left(self) -> list[str]:
        try:
            return self._slots.left()
        except (OSError, EOFError) as error:
            leave(1, f"could not look for what is left: {error}")

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, count in more.items():
                self._counts[name] += count


def main() -> None:
    """The container's entry point."""
    options = parse(sys.argv[1:])
    token_fd = hide_token() if options.listen else None
    zygote.shield()
    with contextlib.suppress(OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    streams = StandardStreams()  # also where they are not spoken on: what a program prints is thrown away
    if problem := own_uids.problem() if os.geteuid() == 0 else one_uid.problem(options.slots):
        leave(2, problem)
    slots: Slots = own_uids.fork_nursery() if os.geteuid() == 0 else one_uid.OneSlot()
    token = None if token_fd is None else read_token(token_fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there are threads, see on_term
    supervisor = Supervisor(slots, options.slots, options.max_waiting)
    if token is None:
        on_term(lambda: leave(0))
        supervisor.serve(Client(streams))
        leave(0)
    if options.metrics:
        metrics.serve(options.metrics, supervisor.stats)
    listen(supervisor, options.listen, token)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="supervisor", description="judges submissions in this container")
    parser.add_argument("--slots", type=int, default=4, help="submissions judged at the same time")
    parser.add_argument("--max-waiting", type=int, default=256, help="submissions that may wait for a slot")
    parser.add_argument("--listen", metavar="HOST:PORT", help=f"serve on TCP; needs {TOKEN} or {TOKEN_FILE}")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="with --listen: serve counters to Prometheus there")
    return parser.parse_args(arguments)


def hide_token() -> int:
    """Puts the token where no child finds it: read once from this descriptor, no longer in the environment.

    What the environment held at the start stays in a process's memory, and in the memory of all it forks; so this one
    starts itself again with an empty environment, and the token waits in a pipe.
    """
    if given := os.environ.get(_TOKEN_FD):
        return int(given)
    token = os.environ.get(TOKEN, "").strip()
    if path := os.environ.get(TOKEN_FILE):
        if os.geteuid() != 0:
            leave(2, f"{TOKEN_FILE} is {path}, which programs could read, as they have this uid: give {TOKEN} instead")
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            leave(2, f"{TOKEN_FILE} is {path}: {error.strerror}: mount the secret there")
    if len(token) < _MIN_TOKEN:
        leave(2, f"--listen needs a token of {_MIN_TOKEN} characters or more: set {TOKEN} or {TOKEN_FILE}")
    reading, writing = os.pipe()
    os.write(writing, token.encode())
    os.close(writing)
    os.set_inheritable(reading, True)
    os.execve(sys.executable, sys.orig_argv, {_TOKEN_FD: str(reading)})


def read_token(fd: int) -> str:
    with open(fd) as file:
        return file.read()


def listen(supervisor: Supervisor, address: str, token: str) -> NoReturn:
    """Serves every connection in a thread of its own until SIGTERM."""
    host, _, port = address.rpartition(":")
    unproved: Counter[str] = Counter()  # programs can connect here too, from the container's own address
    counting = threading.Lock()
    server = socket.create_server((host, int(port)), reuse_port=False, backlog=64)

    def drain() -> NoReturn:
        server.shutdown(socket.SHUT_RDWR)
        supervisor.drain()
        leave(0)

    def count(peer: str, change: int) -> bool:
        with counting:
            unproved[peer] += change
            return unproved[peer] <= _MAX_UNPROVED

    def serve(sock: socket.socket, peer: str) -> None:
        with sock, contextlib.ExitStack() as stack:
            stack.callback(count, peer, -1)
            sock.settimeout(_HANDSHAKE_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            supervisor.serve(Client(sock), token, stack.close)

    on_term(drain)
    while True:
        try:
            sock, (peer, *_) = server.accept()
        except OSError:  # `drain` has shut it, and leaves when it is done
            time.sleep(3600)
            continue
        if count(peer, 1):
            with contextlib.suppress(RuntimeError):  # a program has used up the container's threads
                threading.Thread(target=serve, args=(sock, peer), daemon=True).start()
                continue
        count(peer, -1)
        sock.close()


def on_term(action: Callable[[], NoReturn]) -> None:
    """Does `action` in a thread of its own when the container is told to end, which is to come from outside of it: a
    program of the same uid could signal a thread of this process that is younger than the program."""

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo({signal.SIGTERM})
            if os.geteuid() == 0 or (told.si_code == _SI_USER and told.si_pid == 0):
                action()

    threading.Thread(target=wait, daemon=True).start()


def leave(status: int, reason: str = "") -> NoReturn:
    """Ends the container: PID 1 takes everything else along."""
    if reason:
        print(f"sandbox: {reason}", file=sys.stderr, flush=True)
    os._exit(status)
