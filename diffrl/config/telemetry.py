"""Where the metrics of a run go beside metrics.jsonl. None of it changes a result."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffrl.config.base import Section
from diffrl.errors import require

SinkName = Literal["tensorboard", "ray", "wandb", "mlflow"]


class TelemetryConfig(Section):
    # tensorboard: files in run_dir/tensorboard. ray: the metrics of the Ray cluster, for Prometheus. wandb, mlflow: these
    # services, which take the rest of their settings from their own environment variables.
    sinks: Sequence[SinkName] = ["tensorboard", "ray"]
    project: Annotated[str, Field(pattern=r"^[\w. -]+$")] = "diffrl"  # of wandb; the experiment of mlflow
    # While it goes on the run serves its own board (`diffrl board`) on this port of 127.0.0.1; 0: a free one; None: not.
    board_port: Annotated[int, Field(ge=0, le=65_535)] | None = None

    @model_validator(mode="after")
    def check(self):
        twice = next((name for name in self.sinks if list(self.sinks).count(name) > 1), None)
        require(twice is None, "sinks", twice, "be named once")
        return self
