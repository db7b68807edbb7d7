"""What a run learns from: prompts are drawn in order, their groups sampled, judged and scored by the reference.

Groups leave in order of ordinals, so what a step gets does not depend on how many workers there are or who finishes first.
"""

from dataclasses import replace

import torch

from actors.groups import GroupBuffer, Pipeline, Request
from actors.prepare import Prepared
from actors.run_start import RunStart
from actors.system import System
from actors.telemetry import Telemetry
from actors.weights import Weights
from diffrl.batches import StepRollouts, differs, scoring_batch
from diffrl.data.sources import prompt_stream
from diffrl.drift import beyond_limits, drift_metrics, guarded
from diffrl.models.tokens import special_id
from diffrl.quarantine import Quarantine
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup, ScoredGroup, ScoringBatch


class Collector:
    """The place in the prompts, the buffer, the problems left out, and how is sampled."""

    weights: Weights  # that sample
    reference: Weights

    def __init__(self, prepared: Prepared, start: RunStart, system: System, telemetry: Telemetry):
        self.prepared = prepared
        self.config = prepared.config
        self.start = start
        self.folder = start.folder
        self.system = system
        self.telemetry = telemetry
        self.pad_token_id = special_id(prepared.tokenizer, "pad")
        self.pipeline = Pipeline(system.rollouts, system.judges, judge_attempts=self.config.sandbox.attempts)
        self.buffer = GroupBuffer(self.config.train.prompts_per_step * (self.config.rollout.max_staleness + 1))
        self.next_ordinal = start.state.next_ordinal
        self.prompts = prompt_stream(prepared.problems, self.config.seed, self.next_ordinal)
        self.quarantine = Quarantine(
            self.folder,
            limit=self.config.supervision.max_quarantined,
            num_problems=len({p.id for p in prepared.problems}),
        )
        params = self.config.sampling.params()  # of rollouts; without approximations from when the guard says so
        self.params = params.exactly() if start.state.exact else params
        self.watched = list(start.state.watched)  # the guard's metrics of each step

    def rollouts(self) -> StepRollouts:
        """Sample and judge one step's groups. Of those whose rewards are all equal, which teach nothing, up to
        `method.max_replacements` give way to the next prompts (dynamic sampling of DAPO, arXiv 2503.14476). Each round
        ends before the next is drawn up, so which prompts are drawn does not depend on who finishes first."""
        drawn = self.sample(self.config.train.prompts_per_step)
        replaced: list[ScoredGroup] = []
        while equal := [s for s in drawn.scored if not differs(s)][
            : self.config.method.max_replacements - len(replaced)
        ]:
            replaced += equal
            drawn = drawn.without(equal).joined(self.sample(len(equal)))
        return replace(drawn, replaced=tuple(replaced))

    def sample(self, count: int) -> StepRollouts:
        """The next `count` prompts' groups; further prompts take the places of problems that break their workers."""
        drawn = self.sample_round(count)
        while missing := count - len(drawn.scored):
            drawn = drawn.joined(self.sample_round(missing))
        return drawn

    def sample_round(self, count: int) -> StepRollouts:
        """The groups of the next `count` prompts, but of those that are quarantined now; the reference scores each as soon
        as it is sampled."""
        scoring: dict[int, ScoringBatch] = {}
        ref_logprobs: dict[int, torch.Tensor] = {}

        def on_sampled(group: RolloutGroup) -> None:
            scoring[group.ordinal] = self.score_reference(group)

        given_up: list[int] = []

        def on_given_up(request: Request, reason: str) -> None:
            given_up.append(request.ordinal)
            self.buffer.drop(request.ordinal)
            self.telemetry.say(f"quarantine: {request.problem.id} (ordinal {request.ordinal}) left out: {reason}")
            self.quarantine.add(request.problem.id, request.ordinal, reason)

        requests = []
        for _ in range(count):
            ordinal, problem = self.next_prompt()
            self.buffer.reserve(ordinal)
            requests.append(self.request(ordinal, problem))
        if not self.params.is_exact:
            chosen = guarded([request.seeds for request in requests], self.config.sampling.guard_share)
            requests = [replace(request, guarded=g) for request, g in zip(requests, chosen, strict=True)]
        finished = self.pipeline.run(requests, on_sampled, self.system.reference, ref_logprobs.__setitem__, on_given_up)
        for group in finished:
            self.buffer.commit(group)
        scored = tuple(self.buffer.take(count - len(given_up)))
        return StepRollouts(scored=scored, scoring=scoring, ref_logprobs=ref_logprobs)

    def next_prompt(self) -> tuple[int, Problem]:
        """Ordinals of quarantined problems are passed over."""
        ordinal, problem = next((o, p) for o, p in self.prompts if not self.quarantine.holds(p.id, o))
        self.next_ordinal = ordinal + 1
        return ordinal, problem

    def score_reference(self, group: RolloutGroup) -> ScoringBatch:
        """Draw a group's views; the reference begins to score it while its tests run."""
        batch = scoring_batch(group, self.config, self.pad_token_id)
        if self.config.num_reference_workers > 0:
            self.system.reference.submit(group.ordinal, "logprobs", batch, self.reference)
        return batch

    def request(self, ordinal: int, problem: Problem) -> Request:
        seeds = [
            derive_seed(self.config.seed, "rollout", ordinal, index) for index in range(self.config.method.group_size)
        ]
        return Request(ordinal=ordinal, problem=problem, seeds=tuple(seeds), params=self.params, weights=self.weights)

    def watch(self, step: int, drawn: StepRollouts) -> dict[str, float]:
        """Metrics of the guard over approximate sampling, nothing in an exact run. Beyond its limits the run goes on exactly."""
        if self.config.sampling.params().is_exact:
            return {}
        if not self.params.is_exact:
            metrics = drift_metrics([*drawn.scored, *drawn.replaced])
            self.watched.append(metrics)
            if reasons := beyond_limits(self.watched, self.config.sampling):
                self.params = self.params.exactly()
                self.telemetry.say(
                    f"sampling: exact from step {step + 2} on: {'; '.join(reasons)} "
                    f"(means over {self.config.sampling.guard_window} steps)"
                )
        else:
            metrics = {}
        return {**metrics, "sampling/fallback": float(self.params.is_exact)}
