"""What a run learns from: prompts are drawn in order, their groups sampled, judged and scored by the reference.

A step gets the groups of its own prompts, so it does not depend on how many workers there are or who finishes first.
With `rollout.max_staleness` N the prompts of step k + N are sent out, with the weights of then, before step k is learned
from: rollouts and updates overlap, and every group of step k is of version k - N (of the first one for k < N; a prompt
that takes another's place is sampled with the newest weights).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch

from actors.groups import GroupBuffer, Pipeline, Request
from actors.prepare import Prepared
from actors.run_start import RunStart
from actors.system import System
from actors.telemetry import Telemetry
from actors.weights import Weights
from diffrl.batches import StepRollouts, differs, scoring_batch
from diffrl.buffered import GROUPS, load_groups, save_groups
from diffrl.data.sources import prompt_stream
from diffrl.drift import beyond_limits, drift_metrics, guarded
from diffrl.models.tokens import special_id
from diffrl.quarantine import Quarantine
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup, ScoredGroup, ScoringBatch


class Collector:
    """The place in the prompts, the groups on their way, the problems left out, and how is sampled."""

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
        self.staleness = self.config.rollout.max_staleness
        self.pipeline = Pipeline(
            system.rollouts,
            system.judges,
            judge_attempts=self.config.sandbox.attempts,
            also=system.reference if self.config.num_reference_workers > 0 else None,
            on_sampled=self.score_reference,
            on_also=self.keep_reference_scores,
            on_given_up=self.note_given_up,
        )
        self.asked: dict[int, list[int]] = {}  # ordinals of each step that has not been learned from
        self.references: dict[int, Weights] = {}  # by ordinal, like all that follows
        self.buffer = GroupBuffer(self.config.train.prompts_per_step * (self.staleness + 1))
        self.scoring: dict[int, ScoringBatch] = {}
        self.ref_logprobs: dict[int, torch.Tensor] = {}
        self.given_up: dict[int, tuple[str, str]] = {}  # problem, reason
        self.quarantine = Quarantine(
            self.folder,
            limit=self.config.supervision.max_quarantined,
            num_problems=len({p.id for p in prepared.problems}),
        )
        self.next_ordinal = self.restore(start)
        self.prompts = prompt_stream(prepared.problems, self.config.seed, self.next_ordinal)
        params = self.config.sampling.params()  # of rollouts; without approximations from when the guard says so
        self.params = params.exactly() if start.state.exact else params
        self.watched = list(start.state.watched)  # the guard's metrics of each step

    def restore(self, start: RunStart) -> int:
        """Groups that were waiting when the checkpoint was made; the ordinal of the next prompt. A run with another config
        samples them anew."""
        state = start.state
        if start.checkpoint is None or not state.asked:
            return state.next_ordinal
        if start.said:
            return min(ordinal for ordinals in state.asked for ordinal in ordinals)
        problems = {p.id: p for p in self.prepared.problems}
        groups, ref_logprobs = load_groups(start.checkpoint / GROUPS, problems, self.prepared.tokenizer)
        for scored in groups:
            ordinal = scored.group.ordinal
            self.buffer.reserve(ordinal)
            self.buffer.commit(scored)
            self.scoring[ordinal] = scoring_batch(scored.group, self.config, self.pad_token_id)
        self.ref_logprobs |= ref_logprobs
        self.asked = {state.step + ahead: list(ordinals) for ahead, ordinals in enumerate(state.asked)}
        return state.next_ordinal

    # Ask

    def ask_ahead(self, step: int) -> None:
        """Send out the prompts of a step and of the `max_staleness` steps after it, as far as that has not been done. They
        are sampled with the weights of now and scored under the reference of now, whenever it is their turn: so which
        version a group has does not depend on who is fast, and none can become too old."""
        last = min(step + self.staleness, self.prepared.num_steps - 1)
        for ahead in range(step, last + 1):
            if ahead not in self.asked:
                self.asked[ahead] = self.send(self.config.train.prompts_per_step)

    def send(self, count: int) -> list[int]:
        """The next `count` prompts on their way; their ordinals."""
        requests = [self.request(*self.next_prompt()) for _ in range(count)]
        if not self.params.is_exact:
            chosen = guarded([request.seeds for request in requests], self.config.sampling.guard_share)
            requests = [replace(request, guarded=g) for request, g in zip(requests, chosen, strict=True)]
        for request in requests:
            ordinal, reason = request.ordinal, self.quarantine.given_up.get(request.ordinal)
            self.buffer.reserve(ordinal)
            if reason is None:
                self.references[ordinal] = self.reference
                self.pipeline.submit(request)
            else:  # it broke its workers before the run was resumed
                self.given_up[ordinal] = (request.problem.id, reason)
        return [request.ordinal for request in requests]

    def next_prompt(self) -> tuple[int, Problem]:
        """Quarantined problems are passed over."""
        ordinal, problem = next((o, p) for o, p in self.prompts if not self.quarantine.holds(p.id, o))
        self.next_ordinal = ordinal + 1
        return ordinal, problem

    def request(self, ordinal: int, problem: Problem) -> Request:
        seeds = [
            derive_seed(self.config.seed, "rollout", ordinal, index) for index in range(self.config.method.group_size)
        ]
        return Request(ordinal=ordinal, problem=problem, seeds=tuple(seeds), params=self.params, weights=self.weights)

    # On the way

    def advance(self, beside: "Sequence[ray.ObjectRef]" = ()) -> "list[ray.ObjectRef]":
        """Wait a moment for a group to come on, or for one of the references; those that are ready."""
        ready = self.pipeline.advance(beside)
        for scored in self.pipeline.taken():
            self.buffer.commit(scored)
        return ready

    def score_reference(self, group: RolloutGroup) -> None:
        """Draw a group's views; the reference begins to score it while its tests run."""
        batch = self.scoring[group.ordinal] = scoring_batch(group, self.config, self.pad_token_id)
        reference = self.references.pop(group.ordinal)
        if self.config.num_reference_workers > 0:
            self.system.reference.submit(group.ordinal, "logprobs", batch, reference)

    def keep_reference_scores(self, ordinal: int, logprobs_IBC: torch.Tensor) -> None:
        self.ref_logprobs[ordinal] = logprobs_IBC

    def note_given_up(self, request: Request, reason: str) -> None:
        self.given_up[request.ordinal] = (request.problem.id, reason)

    # Collect

    def rollouts(self, step: int) -> StepRollouts:
        """One step's groups, sampled and judged. Of those whose rewards are all equal, which teach nothing, up to
        `method.max_replacements` give way to the next prompts (dynamic sampling of DAPO, arXiv 2503.14476). Each round
        ends before the next is drawn up, so which prompts are drawn does not depend on who finishes first."""
        drawn = self.take(self.complete(self.asked.pop(step)))
        replaced: list[ScoredGroup] = []
        while equal := [s for s in drawn.scored if not differs(s)][
            : self.config.method.max_replacements - len(replaced)
        ]:
            replaced += equal
            drawn = drawn.without(equal).joined(self.take(self.complete(self.send(len(equal)))))
        return replace(drawn, replaced=tuple(replaced))

    def complete(self, ordinals: list[int]) -> list[int]:
        """Wait for these groups; further prompts take the places of problems that break their workers."""
        while True:
            for ordinal in ordinals:  # what is there stays there: none is looked at twice
                while ordinal not in self.given_up and not self.has(ordinal):
                    self.advance()
            lost = [ordinal for ordinal in ordinals if ordinal in self.given_up]
            if not lost:
                return ordinals
            for ordinal in lost:
                self.leave_out(ordinal)
            ordinals = [o for o in ordinals if o not in lost] + self.send(len(lost))

    def has(self, ordinal: int) -> bool:
        """Whether a group is judged, and scored by the reference."""
        scored = self.config.num_reference_workers == 0 or ordinal in self.ref_logprobs
        return scored and self.buffer.holds(ordinal)

    def leave_out(self, ordinal: int) -> None:
        problem_id, reason = self.given_up.pop(ordinal)
        self.buffer.drop(ordinal)
        for kept in (self.scoring, self.ref_logprobs, self.references):
            kept.pop(ordinal, None)
        self.telemetry.say(f"quarantine: {problem_id} (ordinal {ordinal}) left out: {reason}")
        self.quarantine.add(problem_id, ordinal, reason, since=self.next_ordinal)

    def take(self, ordinals: list[int]) -> StepRollouts:
        return StepRollouts(
            scored=tuple(self.buffer.take(ordinals)),
            scoring={ordinal: self.scoring.pop(ordinal) for ordinal in ordinals},
            ref_logprobs={o: self.ref_logprobs.pop(o) for o in ordinals if o in self.ref_logprobs},
        )

    def settle(self) -> None:
        """Wait for everything that is on its way, so that workers can be asked other things and the run can be saved."""
        self.asked = {step: self.complete(ordinals) for step, ordinals in sorted(self.asked.items())}

    def save_groups(self, folder: Path) -> None:
        """What waits for its step. For a settled run."""
        groups = [self.buffer.look(self.asked[step]) for step in sorted(self.asked)]
        save_groups(folder, groups, self.ref_logprobs)

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
