"""The reward worker: extracts the code of each completion, has the sandbox judge it, turns the verdict into a reward.

A failure of the judge is never a reward: the sample comes back without statuses, and the driver has it judged elsewhere.
"""

from collections.abc import Mapping
from dataclasses import replace

import ray

from diffrl.benchmarks import completion_to_code
from diffrl.config import SandboxConfig
from diffrl.rewards import total_reward
from diffrl.types import Judgement, Problem, RolloutGroup
from sandbox.process import ProcessSandbox
from sandbox.types import Limits, SandboxError, Submission, TestMode

NOT_JUDGED = Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0)


class RewardWorker:
    """Holds one warm sandbox."""

    def __init__(self, config: SandboxConfig, weights: Mapping[str, float]):
        self.sandbox = ProcessSandbox(allow_unisolated=config.allow_unisolated)
        self.limits = limits(config)
        self.weights = weights

    @ray.method
    def score(self, group: RolloutGroup, previous: tuple[Judgement, ...] | None = None) -> tuple[Judgement, ...]:
        """One judgement per rollout; with `previous`, only those that another worker failed to judge are judged again."""
        known = previous or (NOT_JUDGED,) * len(group.rollouts)
        return tuple(
            judgement if judgement.valid else self.judge(group, index) for index, judgement in enumerate(known)
        )

    def judge(self, group: RolloutGroup, index: int) -> Judgement:
        text = group.rollouts[index].text
        code = completion_to_code(group.problem, text)
        problem = group.problem
        if not code.strip():  # nothing to run: every test would fail on the missing name
            statuses, cpu_s, detail = ("error",) * len(problem.reward_tests), 0.0, "no fenced python block"
        else:
            try:
                verdict = self.sandbox.judge(submission(problem, code, f"{problem.id}/{index}", self.limits))
            except SandboxError as error:
                return replace(NOT_JUDGED, detail=str(error))
            statuses = tuple(str(status) for status in verdict.statuses)
            cpu_s, detail = verdict.cpu_s, next((d for d in verdict.details if d), "")
        reward, components = total_reward(text, statuses, self.weights)
        return Judgement(
            reward=reward,
            format=components["format"],
            pass_rate=components["pass_rate"],
            statuses=statuses,
            cpu_s=cpu_s,
            detail=detail,
        )


def limits(config: SandboxConfig) -> Limits:
    return Limits(cpu_s=config.cpu_s, wall_s=config.wall_s, memory_mb=config.memory_mb)


def submission(problem: Problem, code: str, id_: str, limits_: Limits) -> Submission:
    return Submission(
        id=id_,
        code=code,
        tests=problem.reward_tests,
        mode=TestMode(problem.test_mode),
        entry_point=problem.entry_point,
        setup=problem.setup,
        limits=limits_,
    )
