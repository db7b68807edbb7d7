"""The watchdog of a run: when nothing has ended for too long, a report of who is stuck where, and the end of the run.

Deadlines replace a worker that hangs; this is for everything else. A thread looks at the time. Whoever waits for workers
calls `check`, which raises when the report is written. A driver that is stuck inside a call does not come by: after a
grace its process is ended. If the interpreter itself is stuck, so that no thread gets a turn, faulthandler's own timer
writes the driver's stacks to stderr and ends the process.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ray.exceptions import RayError

from actors.processes import Place, on_node, one_line, stacks_of
from diffrl.errors import RunStoppedError
from diffrl.files import write_json

GRACE_S = 60.0  # from the report to the end of a driver that does not come by
REPORT_S = 300.0  # the report may take


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorState:
    """What is known of an actor from outside.

    ActorState(role="judge", slot=0, place=Place(...), ready=True, waiting=3,
               calls=({"method": "score", "ordinal": 17, "seconds": 812.5},))
    """

    role: str
    slot: int
    place: Place
    ready: bool  # constructed, and not given up
    calls: tuple[Mapping[str, Any], ...]  # seconds: None of one that waits behind another
    waiting: int  # calls of its pool that no worker has


class Watchdog:
    """Ends a process in which nothing ends for `stall_s`, the config's `key`. Used as a context."""

    def __init__(
        self,
        folder: Path,
        stall_s: float,
        *,
        who: str = "driver",
        key: str = "supervision.stall_s",
        grace_s: float = GRACE_S,
    ):
        self.folder = folder / "stalls"
        self.who = who
        self.key = key
        self.stall_s = stall_s
        self.grace_s = grace_s
        self.watched: list[Callable[[], Sequence[ActorState]]] = []
        self.last = time.monotonic()
        self.message: str | None = None  # when it is over
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def progress(self) -> None:
        """Something has ended as it should."""
        self.last = time.monotonic()

    def check(self) -> None:
        """RunStoppedError when the run is stuck."""
        if self.message is not None:
            raise RunStoppedError(self.message)

    def watch(self) -> None:
        while not self.ended.wait(min(1.0, self.stall_s / 10)):
            faulthandler.dump_traceback_later(self.stall_s + self.grace_s + REPORT_S, exit=True, file=2)
            if time.monotonic() - self.last > self.stall_s:
                self.message = self.report()
                break
        if not self.ended.wait(self.grace_s if self.message else 0):
            print(f"diffrl: {self.message}; the {self.who} was stuck and has been ended", file=sys.stderr, flush=True)
            os._exit(1)

    def report(self) -> str:
        """Write it; what to tell the user."""
        said = f"{self.key}: nothing has ended for {self.stall_s:g} seconds"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.who.replace(' ', '-')}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{name}.txt").open("w") as file:
                file.write(f"{self.who}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)  # first: the rest asks others, who may not answer
            states = [state for watched in self.watched for state in watched()]
            write_json(self.folder / f"{name}.json", {"stalled_s": self.stall_s, "actors": list(map(asdict, states))})
            with (self.folder / f"{name}.txt").open("a") as file:
                file.write(stacks(states))
        except Exception as error:  # whatever it is: the run must end, and this is the only one who could say why
            return f"{said}, and the report in {self.folder} could not be completed: {one_line(error)}"
        return f"{said}: see {self.folder / name}.json for what the workers were doing and .txt for their stacks"

    def __enter__(self) -> Self:
        self.progress()
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.ended.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()


def stacks(states: Sequence[ActorState]) -> str:
    """Of all actors, under a line that says which; a word where they cannot be had."""
    text: dict[tuple[str, int | None], str] = {}
    for node in sorted({state.place.node_id for state in states if state.place.node_id}):
        pids = [state.place.pid for state in states if state.place.node_id == node and state.place.pid]
        try:
            answers = on_node(node, stacks_of, pids)
        except RayError as error:
            answers = dict.fromkeys(pids, f"the node does not answer: {one_line(error)}")
        text |= {(node, pid): answer for pid, answer in answers.items()}
    return "".join(
        f"\n{state.role} {state.slot}, {state.place.class_name} ({state.place}), {state.place.state}\n"
        f"{text.get((state.place.node_id, state.place.pid), 'no process')}\n"
        for state in states
    )
