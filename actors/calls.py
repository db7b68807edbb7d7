"""Calls on their way to workers and back: the words that a pool of workers uses."""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

from actors.processes import Place

# How Ray says that a worker, or the node with its results, is gone.
WORKER_LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
# Which key of SupervisionConfig is a method's deadline.
DEADLINES = {
    "generate": "generate_s",
    "score": "score_s",
    "logprobs": "reference_s",
    "mixed": "reference_s",
    "pull": "pull_s",
    "stats": "pull_s",
    "__ray_call__": "pull_s",
}


class WorkersKeepDyingError(RuntimeError):
    """Restarting does not help; the message carries the last loss."""


class WorkerRaisedError(RuntimeError):
    """A worker's own code raised, which is the cause of this error; the message says where, and what it logged last."""


@dataclass(frozen=True, slots=True)
class Call:
    key: int | None  # ordinal of the group it is about; None: of no group, so none can be blamed
    method: str
    args: tuple[Any, ...]
    avoid: int | None = None  # slot of the worker that failed on it before
    only: int | None = None  # slot of the worker that is meant
    losses: int = 0  # workers that were lost while it ran


@dataclass(frozen=True, slots=True)
class Done:
    call: Call
    slot: int
    value: Any  # of a generator, references to what it has yielded
    ref: ray.ObjectRef  # of the value


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A call that cost one worker after the other."""

    call: Call
    reason: str  # one line: what became of the last one


@dataclass(eq=False, slots=True)
class Worker:
    handle: Any
    slot: int
    since: float  # when it was started, or got a place for which it had waited
    replaces: bool  # another one that was lost, or joins those that the run began with
    ready: bool = False  # its constructor is through
    waits: bool | None = None  # for a place, and a process there; None: not known yet
    lost: bool = False
    place: Place | None = None  # once it is ready
    runs: "dict[ray.ObjectRef, Running]" = field(default_factory=dict)  # in the order in which it got them

    @property
    def works(self) -> bool:
        return self.ready and not self.lost


@dataclass(eq=False, slots=True)
class Running:
    call: Call
    worker: Worker
    stream: ray.ObjectRefGenerator | None  # of a method that is a generator
    since: float | None = None  # when it could begin; None: it waits behind another call
    forgotten: bool = False  # nobody wants the result
