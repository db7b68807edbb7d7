"""How the workers of an RL run are watched: how long anybody waits for them, and how often they may fail."""

from typing import Annotated

from pydantic import Field

from diffrl.config.base import Positive, Seconds, Section


class MemoryLimits(Section):
    """Resident MB of one worker, its child processes included; None: no limit. A worker above it is replaced between two
    steps, which changes no result."""

    rollout: Positive | None = None
    judge: Positive | None = None
    reference: Positive | None = None


class SupervisionConfig(Section):
    """A worker that does not answer in time is treated like one that died. Time counts from when it could begin."""

    start_s: Seconds = (
        1800.0  # a worker's constructor, a rank's engine; a role's wait for its first place in the cluster
    )
    generate_s: Seconds = 3600.0  # one group
    score_s: Seconds = 3600.0  # one group: programs x tests x sandbox.wall_s / sandbox.slots at worst
    reference_s: Seconds = 3600.0  # one group, or a mixture of weights
    update_s: Seconds = 3600.0  # every call of the learner
    pull_s: Seconds = 900.0  # weights to one worker, and small questions
    stall_s: Seconds = 7200.0  # no call of any worker has ended for so long: the run stops with a report
    backoff_s: Annotated[float, Field(ge=0)] = 1.0  # from a loss to the restart; twice that after every further one
    max_backoff_s: Annotated[float, Field(ge=0)] = 60.0
    max_losses: Positive = 8  # of workers in a row without any result, per worker of the pool; then the run stops
    max_rebuilds: Positive = 3  # of the learner group in a row without an update; then the run stops
    problem_attempts: Positive = 3  # workers that calls about a problem may break before it is quarantined
    max_quarantined: Annotated[int, Field(ge=0)] = 10  # problems; with more of them the run stops
    memory_mb: MemoryLimits = MemoryLimits()
    min_free_mb: Annotated[int, Field(ge=0)] = (
        512  # of run_dir's disk; with less (and room for a checkpoint) the run waits
    )

    def delay_s(self, losses: int) -> float:
        """From the last of so many losses in a row (per worker of a role) to the restart."""
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(losses - 1, 30))
