"""Evaluation on the run's own workers: sample, judge, count. One decoder for all numbers of a report."""

from collections.abc import Sequence

from actors.groups import Pipeline, Request
from actors.pool import WorkerPool
from actors.weights import Weights
from diffrl.analysis import paired_bootstrap
from diffrl.config import RLConfig
from diffrl.errors import RunStoppedError
from diffrl.pass_rates import PassRates
from diffrl.pass_rates import read_report as read_report  # of the driver
from diffrl.seeds import derive_seed
from diffrl.types import Judgement, Problem

REPORT_TEMPERATURES = (1.0, 0.4)
EVALUATION_ATTEMPTS = 5  # times those of a training step


def num_correct(problem: Problem, judgements: Sequence[Judgement]) -> int:
    """Samples that passed every graded test. RunStoppedError when the judge failed on one."""
    unjudged = next((j for j in judgements if not j.valid), None)
    if unjudged is not None:
        raise RunStoppedError(f"evaluation: {problem.id} could not be judged: {unjudged.detail}")
    return sum(j.format == 1.0 and all(s == "passed" for s in j.statuses or ()) for j in judgements)


class Evaluator:
    """Pass rates of one version of the policy, sampled exactly even where rollouts are not. Every sample must be judged,
    so the judge is tried more often than in a step of training, where a sample may be left out."""

    def __init__(self, rollouts: WorkerPool, judges: WorkerPool, config: RLConfig):
        self.pipeline = Pipeline(rollouts, judges, judge_attempts=EVALUATION_ATTEMPTS * config.sandbox.attempts)
        self.config = config

    def pass_rates(
        self, problems: Sequence[Problem], num_samples: int, temperature: float, weights: Weights, tag: str
    ) -> PassRates:
        """Unbiased in the problems given. Sampling seeds depend on (run seed, tag, problem, sample), not on the weights.

        Raises RunStoppedError when the judge failed on a sample: a failure of ours is not counted as one of the model.
        """
        params = self.config.sampling.params(temperature).exactly()
        requests = [
            Request(
                ordinal=index,
                problem=problem,
                seeds=tuple(derive_seed(self.config.seed, tag, problem.id, s) for s in range(num_samples)),
                params=params,
                weights=weights,
            )
            for index, problem in enumerate(problems)
        ]
        correct = [0] * len(problems)
        for scored in self.pipeline.run(requests):
            correct[scored.group.ordinal] = num_correct(scored.group.problem, scored.judgements)
        return PassRates(
            num_samples=num_samples, num_correct=tuple(correct), families=tuple(p.family for p in problems)
        )

    def report(self, held_out: Sequence[Problem], train: Sequence[Problem], weights: Weights) -> dict[str, PassRates]:
        """Held-out problems at each temperature and greedily, training problems at temperature 1."""
        assert self.config.report is not None
        samples = self.config.report.num_samples
        rates = {
            f"held_out/t{temperature}": self.pass_rates(
                held_out, samples, temperature, weights, f"report/{temperature}"
            )
            for temperature in REPORT_TEMPERATURES
        }
        rates["held_out/greedy"] = self.pass_rates(held_out, 1, 0.0, weights, "report/greedy")
        rates["train/t1.0"] = self.pass_rates(train, samples, 1.0, weights, "report/train")
        return rates

    def summary(self, before: dict[str, PassRates], after: dict[str, PassRates]) -> str:
        """The last line of a run with a report."""

        def change(key: str, k: int = 1) -> str:
            return f"{100 * before[key].pass_at(k):.1f}% -> {100 * after[key].pass_at(k):.1f}%"

        key = "held_out/t1.0"
        gain, low, high = paired_bootstrap(before[key].per_problem(1), after[key].per_problem(1), seed=self.config.seed)
        return (
            f"held-out pass@1 {change(key)}, gain {100 * gain:+.1f} [95% {100 * low:.1f}..{100 * high:.1f}] "
            f"at temperature 1.0 (at 0.4: {change('held_out/t0.4')}; greedy: {change('held_out/greedy')}; "
            f"pass@8: {change(key, 8)}; training problems: {change('train/t1.0')}), "
            f"seed {self.config.seed}"
        )
