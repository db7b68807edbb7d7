"""The processes behind actors: where they run, what they logged last, what they are doing, how much memory they take.

Looking must never be what breaks a run: what cannot be found out is said in words, in the place of the answer.
"""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray._private.state import state as global_state  # the public way to it needs a dashboard
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOG_LINES = 15  # that an error shows
ANSWER_S = 3.0  # a process writes its stacks
LOOK_S = 60.0  # at processes of another node

NAMED: Counter[str] = Counter()  # how many, by role

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where Ray says that an actor is.

    Place(class_name="RolloutWorker", pid=4711, node_id="1014...", node_ip="10.0.0.7", state="ALIVE")
    """

    class_name: str = "actor"
    pid: int | None = None  # None: not known, or not started yet
    node_id: str = ""
    node_ip: str = "unknown"
    state: str = "UNKNOWN"

    def __str__(self) -> str:
        return f"pid {self.pid or 'unknown'}, node {self.node_ip} {self.node_id[:12]}".rstrip()


def unique_name(role: str) -> str:
    """Of an actor of this process, which the Ray dashboard shows: RolloutWorker-0, RolloutWorker-1, and so on; one that takes
    the place of another has the next number."""
    NAMED[role] += 1
    return f"{role}-{NAMED[role] - 1}"


def place_of(actor: Any) -> Place:
    """From the cluster's table of actors, which answers for dead and frozen ones too."""
    try:
        row = global_state.actor_table(actor._actor_id.hex())
    except RayError as error:  # the table itself cannot be reached
        return Place(state=f"UNKNOWN: {one_line(error)}")
    if not row:  # it waits for a place
        return Place()
    return Place(
        class_name=row["ActorClassName"],
        pid=row["Pid"] or None,
        node_id=row["Address"]["NodeID"],
        node_ip=row["Address"]["IPAddress"],
        state=row["State"],
    )


def in_actor(actor: Any, look: Callable[[Any], Any]) -> ray.ObjectRef:
    """Call `look` on an actor, in its own process, after the calls that it got before."""
    return actor.__ray_call__.remote(look)


def on_node(node_id: str, look: Callable[..., Answer], *args: Any) -> Answer:
    """Call `look` on a node, in this process if that is ours. Raises RayError when the node does not answer."""
    if node_id == ray.get_runtime_context().get_node_id():
        return look(*args)
    return ray.get(begin_on_node(node_id, look, *args), timeout=LOOK_S)


def begin_on_node(node_id: str, look: Callable[..., Answer], *args: Any) -> "ray.ObjectRef[Answer]":
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(*args)


def end_process(place: Place) -> "ray.ObjectRef | None":
    """SIGKILL a worker that Ray was told to kill: what it holds is free at once. Ray gives one that does not answer 5 seconds,
    and was seen to let a frozen one live on. On another node it is done when the reference is ready; a node that is lost
    itself leaves nothing to do."""
    if place.pid is None or not place.node_id:
        return None
    if place.node_id == ray.get_runtime_context().get_node_id():
        end_worker(place.pid)
        return None
    return begin_on_node(place.node_id, end_worker, place.pid)


def end_worker(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.name().startswith("ray::"):  # the number is not another's by now
            process.kill()


def logs_folder() -> Path:
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs"


def last_lines(pid: int) -> list[str]:
    """What a worker process of this node wrote last, stdout then stderr."""
    lines: list[str] = []
    for kind in ("out", "err"):
        for file in sorted(logs_folder().glob(f"worker-*-{pid}.{kind}")):
            written = file.read_text(errors="replace").splitlines()
            lines += [line for line in written if not line.startswith((":job_id:", ":actor_name:"))][-LOG_LINES:]
    return lines


def account(name: str, place: Place) -> str:
    """Which actor, where, and the last lines of its log: the rest of an error message."""
    head = f"{name} ({place})"
    if place.pid is None or not place.node_id:
        return f"{head}; its log cannot be found"
    try:
        lines = on_node(place.node_id, last_lines, place.pid)
    except (RayError, OSError) as error:
        return f"{head}; its log cannot be read: {one_line(error)}"
    if not lines:
        return f"{head}; its log is empty"
    return "\n".join([f"{head}; the last lines of its log:", *(f"  | {line}" for line in lines)])


def one_line(error: object, width: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def cause_of_death(error: Exception) -> str:
    """What matters of Ray's words about a lost actor; where it was is known better from elsewhere."""
    text = str(error)
    return one_line(text.partition("The actor is dead because ")[2] or text, 200)


# Stacks


def stacks_file(pid: int) -> Path:
    return logs_folder() / f"diffrl-stacks-{pid}.txt"


def introduce(_actor: Any) -> None:
    """The first call of every worker, which answers when the constructor is through. From now on its process writes the
    stacks of its threads when it gets SIGUSR1, whatever it is busy with: the handler is C and needs neither the interpreter
    nor the rights of a debugger."""
    descriptor = os.open(stacks_file(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # stays open
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def stacks_of(pids: Iterable[int]) -> dict[int, str]:
    """Of processes of this node; all are asked before any is waited for."""
    asked = {pid: ask(pid) for pid in pids}
    return {pid: answer_of(pid, offset) for pid, offset in asked.items()}


def ask(pid: int) -> int | None:
    """Size of the file to which the answer will be appended; None when the process would not answer but die."""
    try:
        caught = int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
        if not caught >> (signal.SIGUSR1 - 1) & 1:
            return None
        size = stacks_file(pid).stat().st_size
        os.kill(pid, signal.SIGUSR1)
    except (OSError, IndexError):  # gone, or another system's /proc
        return None
    return size


def answer_of(pid: int, offset: int | None) -> str:
    """What it wrote behind `offset`; else, of one that is frozen or still in its constructor, what py-spy sees."""
    deadline = time.monotonic() + ANSWER_S
    seen = offset
    while offset is not None and time.monotonic() < deadline:
        time.sleep(0.1)
        size = stacks_file(pid).stat().st_size
        if size > offset and size == seen:
            return stacks_file(pid).read_text(errors="replace")[offset:]
        seen = size
    return seen_from_outside(pid)


def seen_from_outside(pid: int) -> str:
    spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if spy is None:
        return "no answer to SIGUSR1, and there is no py-spy"
    try:
        done = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=10 * ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer to SIGUSR1, and none to py-spy: {one_line(error)}"
    return done.stdout if done.returncode == 0 else f"no answer to SIGUSR1; py-spy: {one_line(done.stderr)}"


# Memory


def resident_mb(_actor: Any = None, *, children: bool = True) -> float:
    """Of this process and, with `children`, all below it. MB are 2**20 bytes."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True) if children else []:
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return round(total / 2**20, 1)
