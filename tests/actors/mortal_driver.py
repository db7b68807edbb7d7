"""A driver that ends itself with SIGKILL at a place of the loop: `python -m tests.actors.mortal_driver CONFIG PLACE STEP`.

Places: sampled, recorded (rollouts are written, nothing is learned), updating (the learner is at work), updated, saving (the
learner's state is written, the checkpoint not committed), saved, evaluated; and seconds after the first step began.
"""

import os
import signal
import sys
import threading
from typing import NoReturn

import actors.driver
from actors.driver import Run
from diffrl.batches import StepRollouts
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.types import TrainBatch, UpdateResult

PLACES = ("sampled", "recorded", "updating", "updated", "saving", "saved", "evaluated")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def mortal(place: str, at: int) -> type[Run]:
    """Dies at a place of step `at` (from 0), the next time that it comes by from there on."""

    class MortalRun(Run):
        def reach(self, here: str, step: int) -> None:
            if here == place and step >= at:
                die()

        def rollouts(self, step: int) -> StepRollouts:
            drawn = super().rollouts(step)
            self.reach("sampled", step)
            return drawn

        def record(self, step: int, drawn: StepRollouts, batch: TrainBatch) -> None:
            super().record(step, drawn, batch)
            self.reach("recorded", step)
            if place == "updating" and step >= at:
                threading.Timer(0.3, die).start()  # an update takes longer

        def check_update(self, step: int, result: UpdateResult) -> None:
            super().check_update(step, result)
            self.reach("updated", step)

        def save(self, steps: int, *, ended: bool) -> None:
            if place == "saving" and steps > at:
                self.learner.save = lambda folder: (type(self.learner).save(self.learner, folder), die())[0]
            super().save(steps, ended=ended)
            self.reach("saved", steps - 1)

        def evaluate(self, step: int) -> bool:
            ended = super().evaluate(step)
            self.reach("evaluated", step)
            return ended

    return MortalRun


def main() -> None:
    file, place, at = sys.argv[1:]
    config = load_config(file)
    assert isinstance(config, RLConfig)
    if place.replace(".", "").isdecimal():

        class TimedRun(Run):
            def step(self, step: int) -> None:
                if step == self.state.step:
                    threading.Timer(float(place), die).start()
                super().step(step)

        actors.driver.Run = TimedRun
    else:
        assert place in PLACES
        actors.driver.Run = mortal(place, int(at))
    actors.driver.train(config, resume="auto")


if __name__ == "__main__":
    main()
