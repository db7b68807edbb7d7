"""The reward worker: extracts the code of each completion, has the sandbox judge it, turns the verdict into a reward.

A failure of the judge is never a reward: the sample comes back without statuses, and the driver has it judged elsewhere.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from diffrl.benchmarks import completion_to_code
from diffrl.config import SandboxConfig
from diffrl.rewards import total_reward
from diffrl.types import Judgement, Problem, RolloutGroup
from sandbox.backends import BackendOptions, open_sandbox, read_token
from sandbox.pool import PoolStats
from sandbox.types import Limits, SandboxError, Submission, TestMode, TestStatus

NOT_JUDGED = Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0)


class RewardWorker:
    """Owns a pool of sandboxes, in which the programs of a group are judged at the same time."""

    def __init__(self, config: SandboxConfig, weights: Mapping[str, float]):
        self.pool = open_sandbox(backend_options(config), attempts=config.attempts)
        self.limits = limits(config)
        self.weights = weights
        self.pay_low_trust = config.pay_low_trust

    @ray.method
    def score(self, group: RolloutGroup, previous: tuple[Judgement, ...] | None = None) -> tuple[Judgement, ...]:
        """One judgement per rollout and twin; with `previous`, only what another worker failed to judge is judged again."""
        known = previous or (NOT_JUDGED,) * len(group.judged)

        def judge(index: int) -> Judgement:
            return known[index] if known[index].valid else self.judge(group, index)

        with ThreadPoolExecutor(len(known)) as threads:  # as many as there are programs: the pool is what queues them
            return tuple(threads.map(judge, range(len(known))))

    def judge(self, group: RolloutGroup, index: int) -> Judgement:
        return self.judge_text(group.problem, group.judged[index].text, index)

    def judge_text(self, problem: Problem, text: str, index: int) -> Judgement:
        """`index`: of the completion, for its name."""
        code = completion_to_code(problem, text)
        if not code.strip():  # nothing to run: every test would fail on the missing name
            statuses, cpu_s, detail = ("error",) * len(problem.reward_tests), 0.0, "no fenced python block"
            details, beside = ("",) * len(statuses), (False,) * len(statuses)
        else:
            try:
                verdict = self.pool.judge(submission(problem, code, f"{problem.id}/{index}", self.limits))
            except SandboxError as error:
                return replace(NOT_JUDGED, detail=str(error))
            statuses = tuple(str(status) for status in verdict.statuses)
            cpu_s, detail = verdict.cpu_s, next((d for d in verdict.details if d), "")
            details, beside = verdict.details, verdict.beside
        reward, components = total_reward(text, self.paid(statuses, beside), self.weights)
        return Judgement(
            reward=reward,
            format=components["format"],
            pass_rate=components["pass_rate"],
            statuses=statuses,
            cpu_s=cpu_s,
            low_trust=any(beside),
            detail=detail,
            details=details,
        )

    def paid(self, statuses: tuple[str, ...], beside: tuple[bool, ...]) -> tuple[str, ...]:
        """The statuses that the reward sees."""
        if self.pay_low_trust:
            return statuses
        return tuple(
            str(TestStatus.FAILED) if forgeable else status for status, forgeable in zip(statuses, beside, strict=True)
        )

    @ray.method
    def stats(self) -> PoolStats:
        return self.pool.stats()

    @ray.method
    def close(self) -> None:
        """Ends the sandboxes."""
        self.pool.close()


def backend_options(config: SandboxConfig) -> BackendOptions:
    """Raises SandboxUnavailableError for a token file that cannot be read."""
    return BackendOptions(
        backend=config.backend,
        slots=config.slots,
        slots_per_container=config.slots_per_container,
        image=config.image,
        runtime=config.runtime,
        addresses=tuple(config.addresses),
        token=read_token(config.token_file) if config.backend == "pod" else "",
        allow_unisolated=config.allow_unisolated,
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
