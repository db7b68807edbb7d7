"""`diffrl train CONFIG --profile STEP`: where one step's time goes. `run_dir/profile` then has a trace of torch's profiler for
every rollout worker, reference worker and rank of the learner, and Ray's timeline of all actors' calls; chrome://tracing
and ui.perfetto.dev show both.
"""

from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch._C._profiler import _ExperimentalConfig

from actors.driver import Run, train
from actors.staff import QUESTIONS
from diffrl.config import RLConfig
from diffrl.errors import ConfigError

FOLDER = "profile"


def train_profiled(config: RLConfig, number: int, *, resume: str | None = None) -> None:
    """A run as always, with traces of one of its steps (from 1)."""
    if number < 1 or (config.train.steps is not None and number > config.train.steps):
        raise ConfigError(
            f"--profile: {number} must be one of the run's steps, 1 to {config.train.steps or 'the last'}"
        )

    class Profiled(Run):
        def ask_ahead(self, step: int) -> None:
            if step + 1 == number:  # before its rollouts are asked for
                for actor in self.named_actors().values():
                    ask(actor, begin)
            super().ask_ahead(step)

        def step(self, step: int) -> None:
            super().step(step)
            if step + 1 != number:
                return
            folder = (self.folder / FOLDER).resolve()
            folder.mkdir(exist_ok=True)
            for name, actor in self.named_actors().items():
                ask(actor, partial(end, file=folder / f"{name}.json"))
            ray.timeline(str(folder / "ray.json"))
            self.telemetry.say(f"profile of step {number}: {folder}")

        def named_actors(self) -> dict[str, Any]:
            """Those that compute."""
            pools = {"rollout": self.system.rollouts.workers, "reference": self.system.reference.workers}
            roles = {**pools, "learner": self.learner.ranks}
            return {f"{role}-{place}": actor for role, actors in roles.items() for place, actor in enumerate(actors)}

    train(config, resume=resume, run_class=Profiled)


def ask(actor: Any, look: Any) -> None:
    """In the thread for questions where there is one: a profiler must end in the thread in which it began."""
    call = actor.__ray_call__
    ray.get((call if "LearnerRank" in repr(actor) else call.options(concurrency_group=QUESTIONS)).remote(look))


def begin(actor: Any) -> None:
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    actor.profile = torch.profiler.profile(experimental_config=everywhere)
    actor.profile.start()


def end(actor: Any, file: Path) -> None:
    """Nothing from a worker that has been replaced meanwhile."""
    if hasattr(actor, "profile"):
        actor.profile.stop()
        actor.profile.export_chrome_trace(str(file))
        del actor.profile
