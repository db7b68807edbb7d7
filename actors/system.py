"""The actors of a run, started and stopped as one."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from transformers import PreTrainedTokenizerFast

from actors.elastic import ElasticPool, Room
from actors.machine import CONNECT_S, check_ray
from actors.placement import Ask, asks_of, make_room
from actors.pool import WorkerPool
from actors.processes import one_line, resident_mb, unique_name
from actors.reference import Reference
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker
from actors.staff import CLOSE_S, QUESTIONS
from actors.watchdog import Watchdog
from diffrl.config import AnyConfig, RLConfig
from diffrl.errors import ConfigError
from diffrl.step_metrics import RoleUse


class System:
    """Rollout workers, reward workers and reference, and the watchdog over all of the run. The learner group is the driver's
    own: it has state."""

    def __init__(self, config: RLConfig, tokenizer: PreTrainedTokenizerFast, *, samples: bool = True):
        """`samples`: with workers that sample and judge."""
        rollout, judge, reference = config.rollout, config.judge, config.reference
        self.limits_mb = config.supervision.memory_mb.model_dump()
        self.watchdog = Watchdog(Path(config.run_dir).resolve(), config.supervision.stall_s)
        watched = {"config": config.supervision, "watchdog": self.watchdog}
        self.rollouts = WorkerPool(
            spawner(
                RolloutWorker,
                {
                    "num_cpus": rollout.cpus_per_worker,
                    "num_gpus": rollout.gpus_per_worker,
                    "max_concurrency": config.groups_in_flight,
                    "label_selector": dict(rollout.labels),
                },
                tokenizer,
                completion_tokens=config.sampling.completion_tokens,
                max_tokens=config.max_tokens_per_batch,
                threads=rollout.threads,
                dtype=rollout.dtype,
                compile=rollout.compile,
            ),
            rollout.num_workers if samples else 0,
            role="rollout",
            in_flight=config.groups_in_flight,
            concurrency=config.groups_in_flight,
            **watched,
        )
        self.reference = WorkerPool(
            spawner(
                Reference,
                {"num_cpus": reference.cpus, "num_gpus": reference.gpus, "label_selector": dict(reference.labels)},
                threads=reference.threads,
                attend_padding=config.method.compat == "release",
            ),
            config.num_reference_workers,
            role="reference",
            **watched,
        )
        make_judge = spawner(
            RewardWorker,
            {"num_cpus": judge.cpus_per_worker, "label_selector": dict(judge.labels)},
            config.sandbox,
            dict(config.reward.weights),
        )
        if samples and judge.most > judge.num_workers:
            self.judges = ElasticPool(
                make_judge,
                judge.num_workers,
                most=judge.most,
                idle_s=judge.idle_s,
                places=Room(asks_of(config), "judge"),
                beside=[
                    pool
                    for pool, section in ((self.rollouts, rollout), (self.reference, reference))
                    if section.labels == judge.labels
                ],
                role="judge",
                **watched,
            )
        else:
            self.judges = WorkerPool(make_judge, judge.num_workers if samples else 0, role="judge", **watched)
        self.watchdog.watched += [pool.states for pool in self.pools().values()]

    def pools(self) -> dict[str, WorkerPool]:
        return {"rollout": self.rollouts, "judge": self.judges, "reference": self.reference}

    def used(self) -> dict[str, RoleUse]:
        """What the workers of each role were doing since the last look."""
        return {name: pool.meter.taken() for name, pool in self.pools().items()}

    def wait_ready(self) -> None:
        for pool in self.pools().values():
            pool.wait_ready()

    def check_memory(self) -> dict[str, float]:
        """MB of the largest worker of each role; those above their limit are replaced, in a pool that has nothing to do."""
        metrics = {}
        for name, pool in self.pools().items():
            used = [mb or 0.0 for mb in pool.inquire("__ray_call__", resident_mb)]
            metrics[f"memory/{name}_mb"] = max(used, default=0.0)
            for slot, mb in enumerate(used):
                if mb > (self.limits_mb[name] or math.inf) and not pool.busy:
                    pool.renew(slot)
        return metrics

    def __enter__(self) -> "System":
        self.watchdog.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            closing = [worker.handle.close.remote() for worker in self.judges.slots if worker.works]
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)  # what is left then ends with its worker
            for pool in self.pools().values():
                pool.close()
        finally:
            self.watchdog.__exit__()


def spawner(actor_class: type, options: dict[str, Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A function that starts one such actor. Restarts are the pool's business, so Ray itself does none."""
    settings: Any = {**options, "max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {QUESTIONS: 1}}
    remote: Any = ray.remote(**settings)(actor_class)
    return lambda: remote.options(name=unique_name(actor_class.__name__)).remote(*args, **kwargs)


def num_cpus_needed(config: AnyConfig) -> float:
    """By all actors, or all workers, of a stage."""
    return sum(ask.count * ask.resources["CPU"] for ask in asks_of(config))


def num_cpus_used(config: AnyConfig) -> float:
    """By as many of them as there may be."""
    judge = config.judge if isinstance(config, RLConfig) else None
    more = 0.0 if judge is None else (judge.most - judge.num_workers) * judge.cpus_per_worker
    return num_cpus_needed(config) + more


@contextmanager
def cluster(address: str | None, num_cpus: float) -> Iterator[None]:
    """Be in the cluster of `connect`, and leave it at the end, or end the one that was started here."""
    owns_ray = connect(address, num_cpus)
    try:
        yield
    finally:
        if owns_ray:
            ray.shutdown()


@contextmanager
def room_for(config: RLConfig, asks: Sequence[Ask]) -> Iterator[None]:
    """The run's cluster, once it has room for what is asked."""
    with cluster(config.ray.address, num_cpus_used(config)):
        make_room(asks, config.supervision.start_s)
        yield


def connect(address: str | None, num_cpus: float, *, log_to_driver: bool = True) -> bool:
    """Join the named cluster, the job's own, or start a local one that offers enough CPU slots. True when started here.

    A process that is already connected stays so: then the caller owns the cluster. Raises ConfigError where nobody answers.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        join(address, log_to_driver=log_to_driver)
        return True
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=max(math.ceil(num_cpus), os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=log_to_driver,
        logging_level=logging.ERROR,
    )
    return True


def join(address: str, *, log_to_driver: bool) -> None:
    found = check_ray(address, timeout=CONNECT_S)
    if found.verdict == "bad":
        raise ConfigError(f"ray.address: {found.found}; {found.way_out}")
    try:
        ray.init(address=address, log_to_driver=log_to_driver)
    except ConnectionError as error:  # of `auto`, which was not checked
        raise ConfigError(f"ray.address: {address}: {error}; name the head's host:port") from error
    except AuthenticationError as error:
        raise ConfigError(
            f"ray.address: {address} asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN ({one_line(error)})"
        ) from error
