"""The learner: a group of ranks that turn a TrainBatch into updates of the policy, seen from the driver.

A group is one: when a rank dies the others wait in a collective for ever. Then all of them are ended, started again,
and brought to where they were: from the last save (or from the first weights, which the seed gives) through the
batches since. An update is a function of state and batch, so the result is that of an undisturbed run.

All nodes with a rank must see the folders of saves.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedTokenizerFast

from actors.calls import WORKER_LOST, WorkersKeepDyingError
from actors.learner_rank import LearnerRank
from actors.placement import ask_of_learner, require_shared
from actors.pool import POLL_S
from actors.processes import (
    account,
    cause_of_death,
    end_process,
    in_actor,
    introduce,
    place_of,
    resident_mb,
    unique_name,
)
from actors.staff import kill
from actors.watchdog import ActorState, Watchdog
from actors.weights import Part, Tensors, Weights, publish, received
from diffrl.config import RLConfig
from diffrl.errors import RunStoppedError
from diffrl.saved_batch import save_batch
from diffrl.types import ScoringBatch, TrainBatch, UpdateResult

END_S = 10.0  # what is left of lost ranks ends on other nodes
GRACE_S = 20.0  # from the failure of one rank to the death that may be behind it
MAX_FAILED_BATCHES = 4  # kept for a look

Result = TypeVar("Result")


class RankLostError(RuntimeError):
    """A rank of the group is gone, or did not answer in time; the message says which, where, and what it logged last."""


def wait_a_moment(refs: "Sequence[ray.ObjectRef]") -> "Sequence[ray.ObjectRef]":
    """Those that are ready; one, or none soon."""
    return ray.wait(list(refs), num_returns=1, timeout=POLL_S)[0]


class Learner:
    """The driver's side of the group. While it waits for the ranks it does what `wait` does."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerFast, total_steps: int):
        self.config = config
        self.folder = Path(config.run_dir).resolve()
        self.tokenizer = tokenizer
        self.total_steps = total_steps
        self.place = self.reserve()
        self.ranks = [self.make_rank(number) for number in range(config.learner.num_ranks)]
        self.saved: Path | None = None
        self.since_save: list[ray.ObjectRef[TrainBatch]] = []
        self.base: Tensors | None = None  # that adapters are published beside
        self.num_rebuilds = 0
        self.rebuilds_in_a_row = 0
        self.watchdog: Watchdog | None = None
        self.wait: Callable[[Sequence[ray.ObjectRef]], Sequence[ray.ObjectRef]] = wait_a_moment
        self.doing: tuple[str, float] | None = None  # call under way, and since when

    def reserve(self) -> PlacementGroup | None:
        """Places for the ranks, by which they sit together; None for ranks that take up nothing. Raises RunStoppedError when
        others keep them from it."""
        learner = self.config.learner
        bundle = {name: n for name, n in {"CPU": learner.cpus_per_rank, "GPU": learner.gpus_per_rank}.items() if n}
        if not bundle:
            return None
        place = placement_group(
            [bundle] * learner.num_ranks,
            strategy=learner.placement,
            bundle_label_selector=[dict(learner.labels)] * learner.num_ranks,
        )
        start_s = self.config.supervision.start_s
        if not place.wait(start_s):
            remove_placement_group(place)
            raise RunStoppedError(
                f"supervision.start_s: in {start_s:g} seconds nobody made room for {ask_of_learner(self.config)}; end what else "
                "runs on the cluster, or ask for less, and go on with --resume auto"
            )
        return place

    def make_rank(self, number: int) -> Any:
        learner = self.config.learner
        options: dict[str, Any] = {
            "num_cpus": learner.cpus_per_rank,
            "num_gpus": learner.gpus_per_rank,
            "max_restarts": 0,  # a rank alone cannot be rebuilt
            "name": unique_name("LearnerRank"),
        }
        if self.place is None:
            options["label_selector"] = dict(learner.labels)
        else:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.place, number)
        Rank = ray.remote(LearnerRank).options(**options)
        return Rank.remote(self.config, self.tokenizer, rank=number, total_steps=self.total_steps)

    def end_ranks(self) -> None:
        for rank in self.ranks:
            kill(rank)
        if self.place is not None:
            remove_placement_group(self.place)

    def join(self, watchdog: Watchdog) -> None:
        """Be watched from now on."""
        self.watchdog = watchdog
        watchdog.watched.append(self.states)

    def start(self) -> None:
        """Build the engines; what a rank's constructor raised is raised here."""
        address, port = self.answers("rendezvous", [self.ranks[0].rendezvous.remote()])[0]
        self.answers("introduce", [in_actor(rank, introduce) for rank in self.ranks])
        require_shared(self.folder, [place_of(rank).node_id for rank in self.ranks])
        self.call("start", address, port)

    def update(self, batch: "ray.ObjectRef[TrainBatch]") -> UpdateResult:
        """Sums of the ranks' partial metrics; `optim/*`, which all ranks agree on, as rank 0 saw them. A batch that
        led to a skipped optimizer step is kept in `run_dir/failed_batches`."""
        results: list[UpdateResult] = self.surviving(lambda: self.call("update", batch))
        self.rebuilds_in_a_row = 0
        metrics = {
            key: value if key.startswith("optim/") else sum(r.metrics[key] for r in results)
            for key, value in results[0].metrics.items()
        }
        version = results[0].version
        if metrics["optim/bad_steps"]:
            self.keep_failed(batch, version, metrics)
        self.since_save.append(batch)
        return UpdateResult(version=version, metrics=metrics)

    def probe(self, batch: ScoringBatch) -> torch.Tensor:
        """float32 [I, B, C]: log-probs of a batch under the policy as the learner has it."""
        return self.surviving(lambda: self.call("probe", batch))[0]

    def publish(self) -> Weights:
        """The policy as it is now."""
        facts = self.surviving(lambda: self.call("identity"))[0]
        lora = self.config.model.lora
        weights = publish(self.export, lora, self.base, **facts)
        if lora is not None and lora.publish == "adapter":
            self.base = weights.tensors  # it never changes
        return weights

    def export(self, part: Part) -> Tensors:
        return self.surviving(lambda: received(self.stream("export", part)))

    def save(self, folder: Path) -> None:
        """State of the group into a folder, from which a group that loses a rank is rebuilt from now on. Raises
        RunStoppedError when it cannot be written."""
        self.surviving(lambda: self.call("save", folder))
        self.saved = folder
        self.since_save.clear()

    def load(self, folder: Path) -> int:
        """Go on from a save; its version. Raises RunStoppedError for one of another number of ranks, stage or dtype."""
        version = self.call("load", folder)[0]
        self.saved = folder
        self.since_save.clear()
        return version

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call all ranks at once. Raises RankLostError when one is gone or late, and what a rank raised otherwise: a
        RunStoppedError as it is, everything else as Ray wraps it."""
        return self.answers(method, [getattr(rank, method).remote(*args) for rank in self.ranks])

    def stream(self, method: str, *args: Any) -> "list[ray.ObjectRef]":
        """Call a generator of all ranks at once; what rank 0's has yielded, by reference."""
        streams = [getattr(rank, method).remote(*args) for rank in self.ranks]
        self.answers(method, [stream.completed() for stream in streams])
        yielded = [list(stream) for stream in streams]
        ray.get([ref for refs in yielded[1:] for ref in refs])  # nothing, or what another rank raised
        return yielded[0]

    def answers(self, method: str, refs: "list[ray.ObjectRef]") -> list[Any]:
        """Of the first ranks, which were asked for these."""
        supervision = self.config.supervision
        limit = supervision.start_s if method in ("rendezvous", "introduce", "start") else supervision.update_s
        began = time.monotonic()
        self.doing = (method, began)
        waiting = list(refs)
        failure: tuple[Exception, float] | None = None  # and when
        while waiting:
            if self.watchdog is not None:
                self.watchdog.check()
            ready = self.wait(waiting)
            waiting = [ref for ref in waiting if ref not in ready]
            for ref in ready:
                try:
                    ray.get(ref)
                except WORKER_LOST as error:
                    raise RankLostError(self.account(refs.index(ref), cause_of_death(error))) from error
                except Exception as error:  # of a collective, perhaps, because a peer died: whose death follows
                    failure = failure or (error, time.monotonic())
            if failure is not None and time.monotonic() - failure[1] > GRACE_S:
                break
            if failure is None and waiting and time.monotonic() - began > limit:
                late = f"{method} did not end within {limit:g} seconds"
                raise RankLostError(self.account(refs.index(waiting[0]), late))
        if failure is not None:
            error = failure[0]
            if isinstance(error, RayTaskError) and isinstance(error.cause, RunStoppedError):
                raise error.cause from None  # what to tell the user, in one line
            raise error
        self.doing = None
        if self.watchdog is not None:
            self.watchdog.progress()
        return ray.get(refs)

    def account(self, rank: int, what: str) -> str:
        return f"{what}; this was {account(f'rank {rank} of the learner', place_of(self.ranks[rank]))}"

    def memory_mb(self) -> float:
        """Of the largest rank."""
        return max(self.surviving(lambda: self.call("__ray_call__", resident_mb)))

    def states(self) -> list[ActorState]:
        """For a report; another thread may ask."""
        doing = self.doing
        calls = (
            () if doing is None else ({"method": doing[0], "ordinal": None, "seconds": time.monotonic() - doing[1]},)
        )
        return [
            ActorState(role="learner", slot=number, place=place_of(rank), ready=True, calls=calls, waiting=0)
            for number, rank in enumerate(self.ranks)
        ]

    def surviving(self, work: Callable[[], Result]) -> Result:
        """Do it, again after a rebuild if a rank dies meanwhile."""
        lost: RankLostError | None = None
        while True:
            try:
                if lost is not None:
                    self.rebuild(lost)
                return work()
            except RankLostError as error:
                lost = error

    def rebuild(self, error: RankLostError) -> None:
        """All ranks anew, in the state they had after the last update."""
        self.rebuilds_in_a_row += 1
        if self.rebuilds_in_a_row > self.config.supervision.max_rebuilds:
            raise WorkersKeepDyingError(f"ranks of the learner keep dying, the last one: {error}") from error
        self.num_rebuilds += 1
        print(f"learner group lost: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        places = [place_of(rank) for rank in self.ranks]
        self.end_ranks()
        ends = [end for end in map(end_process, places) if end is not None]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=END_S)
        time.sleep(self.config.supervision.delay_s(self.rebuilds_in_a_row))
        self.place = self.reserve()  # of other nodes, if one was lost
        self.ranks = [self.make_rank(number) for number in range(len(self.ranks))]
        self.start()
        if self.saved is not None:
            self.call("load", self.saved)
        for batch in self.since_save:
            self.call("update", batch)

    def keep_failed(self, batch: "ray.ObjectRef[TrainBatch]", version: int, metrics: dict[str, float]) -> None:
        """Write a batch that led to skipped steps where somebody can look at it, unless there are enough of them."""
        folder = self.folder / "failed_batches"
        if len(list(folder.glob("*.json"))) < MAX_FAILED_BATCHES:
            facts = {"version_before": version - 1, "bad_steps": int(metrics["optim/bad_steps"])}
            save_batch(folder / f"version-{version - 1:06d}", ray.get(batch), facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end_ranks()
