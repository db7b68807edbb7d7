"""The rollout board of a run that is going on (`telemetry.board_port`): a process beside the run, a child of the one that the
user started.

It is no part of the run: what becomes of it is said, and changes nothing. It ends when its standard input does, which is held
open here: with the run, however that ends, and with this process, also when it is killed.
"""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from diffrl.config.telemetry import TelemetryConfig
from diffrl.errors import ConfigError

HOST = "127.0.0.1"
MODULE = "diffrl.board.beside"
PATIENCE_S = 5.0


def check_board(config: TelemetryConfig) -> None:
    """Raises ConfigError for a port that the board would not get."""
    port = config.board_port
    if not port:  # none, or a free one
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the board does
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError as error:
            raise ConfigError(
                f"telemetry.board_port: {port} cannot be listened on ({error.strerror}); choose another one, 0 for a free one, "
                "or null for no board"
            ) from None


class RunBoard:
    """Serves `folder` until `close`. `say` is told the address, or why there is none."""

    def __init__(self, folder: Path, port: int, say: Callable[[str], None]):
        self.say = say
        self.ending = False
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self.listen, daemon=True)
        command = [sys.executable, "-m", MODULE, str(folder.resolve()), str(port)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            say(f"board: not served ({error}); the run goes on")
            return
        self.thread.start()

    def listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        last = ""
        for line in self.process.stdout:
            last = line.strip() or last
            if last.startswith("http"):
                self.say(f"board: {last}")
        if not self.ending:
            self.say(f"board: not served any more ({last}); the run goes on")

    def close(self) -> None:
        if self.process is None:
            return
        self.ending = True
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        for force in (self.process.terminate, self.process.kill):
            try:
                self.process.wait(PATIENCE_S)
                break
            except subprocess.TimeoutExpired:
                force()
        self.process.wait()
        self.thread.join()
        self.process.stdout.close()
        self.process = None
