"""What it means that a run goes on with another config than it was started with, key by key.

free: the result does not depend on it. fixed: the saved state does not fit another value. Everything else changes what is
computed from then on: `--resume auto` and `last` refuse it, a checkpoint that is named begins a new run with it.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffrl.config import AnyConfig

FREE = (
    *("run_dir", "ray", "checkpoint", "supervision", "sync", "judge", "telemetry"),
    *("rollout.num_workers", "rollout.cpus_per_worker", "rollout.gpus_per_worker", "rollout.labels"),
    *("rollout.max_tokens_per_batch", "reference.num_workers", "reference.cpus", "reference.gpus", "reference.labels"),
    *("learner.cpus_per_rank", "learner.gpus_per_rank", "learner.labels", "learner.placement", "learner.keep_batches"),
    *("workers.cpus_per_worker", "workers.gpus_per_worker", "workers.labels"),
    *("workers.start_s", "workers.stall_s", "workers.max_failures"),
    # Verdicts do not depend on where programs run.
    *("sandbox.backend", "sandbox.slots", "sandbox.slots_per_container", "sandbox.image", "sandbox.runtime"),
    *("sandbox.addresses", "sandbox.token_file", "sandbox.attempts", "sandbox.allow_unisolated"),
)
FIXED = (
    *("stage", "model", "learner.num_ranks", "learner.zero_stage", "workers.num_workers", "workers.zero_stage"),
    *("optim.muon_lr", "seed"),
)
MEANINGS = {
    "free": "the result does not depend on it",
    "fixed": "the saved state does not fit another",
    "changes": "it changes what is computed from there on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference(field="optim.lr", then=1e-6, now=2e-6, kind="changes")"""

    field: str
    then: Any
    now: Any
    kind: Literal["free", "fixed", "changes"]

    @property
    def meaning(self) -> str:
        return MEANINGS[self.kind]


def differences(then: AnyConfig, now: AnyConfig) -> list[Difference]:
    """Of two resolved configs. Paths that moved along with run_dir are equal."""
    old, new = resolved_fields(then), resolved_fields(now)
    found = []
    for field in {**old, **new}:
        (before, before_place), (after, after_place) = old.get(field, (None, None)), new.get(field, (None, None))
        if before != after and before_place != after_place:
            found.append(Difference(field=field, then=before, now=after, kind=kind_of(field)))
    return found


def kind_of(field: str) -> Literal["free", "fixed", "changes"]:
    if belongs(field, FREE):
        return "free"
    return "fixed" if belongs(field, FIXED) else "changes"


def belongs(field: str, prefixes: tuple[str, ...]) -> bool:
    return any(field == prefix or field.startswith(f"{prefix}.") for prefix in prefixes)


def resolved_fields(config: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """(value, of a path also the way to it from run_dir, else the value again) of every key."""
    fields = dict(fields_of(config.model_dump(mode="json")))
    return {
        field: (value, os.path.relpath(value, config.run_dir) if field.endswith(".path") and value else value)
        for field, value in fields.items()
    }


def fields_of(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key of a resolved config."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from fields_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
