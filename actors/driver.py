"""The RL loop: sample, judge, score, learn, publish. `Run.step` reads like the algorithm box of the paper.

The loop takes whole groups from a buffer in order of ordinals, so its result does not depend on how many workers there
are or who finishes first. `prepare` checks everything a user can get wrong before the first actor starts.
"""

import time
from dataclasses import replace
from pathlib import Path

import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.evaluate import Evaluator, PassRates
from actors.groups import GroupBuffer, Pipeline, Request
from actors.learner import Learner
from actors.prepare import Prepared, prepare
from actors.processes import resident_mb
from actors.system import System
from actors.telemetry import Telemetry, pool_metrics, sampling_metrics
from actors.weights import Weights, fetch, fetch_tensors
from diffrl.batches import StepRollouts, differs, rollout_metrics, scoring_batch, train_batch
from diffrl.config import ModelConfig, RLConfig
from diffrl.data.sources import prompt_stream
from diffrl.drift import beyond_limits, drift_metrics, guarded
from diffrl.errors import RunStoppedError
from diffrl.models.folders import save_folder
from diffrl.models.lora import save_adapter
from diffrl.models.tokens import special_id
from diffrl.quarantine import Quarantine
from diffrl.rollout_store import write_step
from diffrl.run_folder import create_run_folder
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup, ScoredGroup, ScoringBatch, TrainBatch, UpdateResult


def train(config: RLConfig, *, dry_run: bool = False) -> None:
    """One whole RL run."""
    prepared = prepare(config)
    if dry_run:
        print(f"ready: {len(prepared.problems)} problems, {prepared.num_steps} steps; nothing was started")
        return
    folder = create_run_folder(config, sandbox=sandbox_choice(prepared))
    with (
        System(prepared.config, prepared.tokenizer) as system,
        Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
        Telemetry(folder, prepared.num_steps) as telemetry,
    ):
        summary = Run(prepared, folder, system, learner, telemetry).train()
    if summary is not None:
        print(summary, flush=True)  # last: by now no actor can print anything behind it


class Run:
    """State of a run between two steps: the published weights, the reference, the buffer, the place in the prompts."""

    def __init__(self, prepared: Prepared, folder: Path, system: System, learner: Learner, telemetry: Telemetry):
        self.prepared = prepared
        self.config = prepared.config
        self.folder = folder
        self.system = system
        self.telemetry = telemetry
        self.pad_token_id = special_id(prepared.tokenizer, "pad")
        self.pipeline = Pipeline(system.rollouts, system.judges, judge_attempts=self.config.sandbox.attempts)
        self.learner = learner
        learner.join(system.watchdog)
        learner.start()
        system.wait_ready()
        self.weights = self.learner.publish(system.store, ())
        self.reference = self.weights
        self.buffer = GroupBuffer(self.config.train.prompts_per_step * (self.config.rollout.max_staleness + 1))
        self.prompts = prompt_stream(prepared.problems, self.config.seed)
        self.quarantine = Quarantine(
            folder, limit=self.config.supervision.max_quarantined, num_problems=len({p.id for p in prepared.problems})
        )
        self.evaluator = Evaluator(system.rollouts, system.judges, self.config)
        self.params = self.config.sampling.params()  # of rollouts; without approximations from when the guard says so
        self.watched: list[dict[str, float]] = []  # the guard's metrics of each step
        self.best: tuple[float, int] | None = None  # pass@1 and step
        telemetry.say(f"sandbox: {', '.join(filter(None, sandbox_choice(prepared).values()))}")
        if prepared.num_left_out:
            telemetry.say(
                f"{prepared.num_left_out} of {prepared.num_left_out + len(prepared.problems)} problems left out: "
                f"prompt longer than data.max_prompt_tokens {self.config.data.max_prompt_tokens}"
            )
        if self.config.model.path is None:
            telemetry.say("model.path is not set: a tiny model starts from random weights")

    def train(self) -> str | None:
        """All steps, with the evaluations and reports that the config asks for; the report in one line."""
        before = self.report("before") if self.config.report else None
        for step in range(self.prepared.num_steps):
            self.step(step)
            if self.evaluate(step):
                break
        self.export("model")
        return None if before is None else self.evaluator.summary(before, self.report("after"))

    def step(self, step: int) -> None:
        """One iteration of the algorithm box: sample, judge and score, learn, publish."""
        clock = Clock()
        before, sampled_before = self.system.judges.broadcast("stats"), self.system.rollouts.broadcast("stats")
        drawn = self.rollouts()
        clock.mark("time/rollouts")
        pools = pool_metrics(before, self.system.judges.broadcast("stats"), clock.times["time/rollouts"])
        num_tokens = sum(r.num_tokens for s in (*drawn.scored, *drawn.replaced) for r in s.group.rollouts)
        sampling = sampling_metrics(sampled_before, self.system.rollouts.broadcast("stats"), num_tokens)
        batch = train_batch(drawn.scored, drawn.scoring, drawn.ref_logprobs, self.config)
        self.record(step, drawn, batch)
        clock.mark("time/record")
        result = self.learner.update(ray.put(batch))
        clock.mark("time/learner")
        self.publish(result.version)
        clock.mark("time/publish")
        self.follow(step)
        clock.mark("time/pull")
        memory = {**self.system.check_memory(), "memory/learner_mb": self.learner.memory_mb()}
        memory["memory/driver_mb"] = resident_mb(children=False)
        restarts = {f"restarts/{name}": pool.num_restarts for name, pool in self.system.pools().items()}
        restarts["restarts/learner"] = self.learner.num_rebuilds
        metrics = {**rollout_metrics(drawn.scored), "rollout/replaced_groups": float(len(drawn.replaced))}
        metrics["weights/bytes"] = self.weights.num_bytes
        metrics["data/quarantined"] = float(self.quarantine.count(max(drawn.scoring)))
        metrics |= self.watch(step, drawn)
        self.telemetry.step(
            step, {**metrics, **result.metrics}, {**clock.times, **restarts, **memory, **pools, **sampling}
        )
        self.check_update(step, result)

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
        return next((o, problem) for o, problem in self.prompts if not self.quarantine.holds(problem.id, o))

    def record(self, step: int, drawn: StepRollouts, batch: TrainBatch) -> None:
        """Write the step's rollouts; RunStoppedError when too many of them could not be judged to learn from the rest."""
        sampled = [*drawn.scored, *drawn.replaced]
        num_replaced = len(drawn.replaced) * self.config.method.group_size  # whose rewards are equal: advantage 0
        advantages_B = torch.nn.functional.pad(batch.advantages_B, (0, num_replaced)).numpy()
        path = write_step(self.folder / "rollouts", step, sampled, advantages_B)
        judgements = [j for s in sampled for j in s.judgements]
        unjudged = [j for j in judgements if not j.valid]
        share, limit = len(unjudged) / len(judgements), self.config.sandbox.max_masked_share
        if share > limit:
            self.export("model")
            raise RunStoppedError(
                f"sandbox.max_masked_share: step {step + 1} has {100 * share:.1f}% samples that could not be judged, more "
                f"than {100 * limit:g}%; the last failure: {unjudged[-1].detail}; mend the sandbox or raise the limit "
                f"(rollouts: {path}, policy so far: {self.folder / 'model'})"
            )

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

    def publish(self, version: int) -> None:
        """The learner's policy becomes the current version; the reference's stays beside it."""
        self.weights = self.learner.publish(self.system.store, (self.reference.version,))
        assert self.weights.version == version

    def follow(self, step: int) -> None:
        """The weights just published go to everybody who samples; every `reference_refresh_steps` the reference moves
        to them, all the way or by `reference_mix`."""
        method = self.config.method
        if method.reference_refresh_steps is not None and (step + 1) % method.reference_refresh_steps == 0:
            if method.reference_mix == 1.0 or self.config.num_reference_workers == 0:
                self.reference = self.weights
            else:
                self.reference = self.system.reference.call(
                    "mixed", self.weights, self.reference, method.reference_mix, self.system.store
                )
        acknowledged = self.system.rollouts.broadcast("pull", self.weights)
        assert acknowledged == [self.weights.version] * len(acknowledged)

    def check_update(self, step: int, result: UpdateResult) -> None:
        """RunStoppedError when too many optimizer steps in a row had to be skipped."""
        limit = self.config.learner.max_bad_steps
        if result.metrics["optim/bad_in_a_row"] >= limit:
            self.export("model")
            raise RunStoppedError(
                f"learner.max_bad_steps: by step {step + 1} {result.metrics['optim/bad_in_a_row']:.0f} optimizer steps in a "
                f"row had a NaN or infinite loss or gradient and were skipped, the limit is {limit}; lower optim.lr, or "
                f"look at the batches in {self.folder / 'failed_batches'} (policy so far: {self.folder / 'model'})"
            )

    def evaluate(self, step: int) -> bool:
        """Held-out evaluation when it is due; keeps the best model. True when `stop.patience` says to end the run."""
        every, patience = self.config.eval.every, self.config.stop.patience
        if every is None or (step + 1) % every:
            return False
        settings = self.config.eval
        rates = self.evaluator.pass_rates(
            self.prepared.eval_problems, settings.num_samples, settings.temperature, self.weights, "eval"
        )
        self.telemetry.evaluation(step, {"eval/pass@1": rates.pass_at(1)})
        if self.best is None or rates.pass_at(1) > self.best[0]:
            self.best = (rates.pass_at(1), step)
            self.export("best")
        if patience is None or (step - self.best[1]) // every < patience:
            return False
        self.telemetry.say(f"no better evaluation since step {self.best[1] + 1}: stopped")
        return True

    def report(self, when: str) -> dict[str, PassRates]:
        """Every number of the last line, for the current weights."""
        assert self.config.report is not None
        self.telemetry.say(f"{when} training: evaluating {len(self.prepared.report_problems)} held-out problems")
        train = self.prepared.problems[:: max(1, len(self.prepared.problems) // self.config.report.num_train_problems)]
        rates = self.evaluator.report(
            self.prepared.report_problems, train[: self.config.report.num_train_problems], self.weights
        )
        self.telemetry.report(when, rates)
        return rates

    def export(self, name: str) -> None:
        """The current policy as a Hugging Face folder, with its tokenizer; adapters beside it, `model`'s as `adapter`."""
        export_policy(self.weights, self.prepared.tokenizer, self.folder / name)
        if self.weights.adapter is not None:
            folder = self.folder / ("adapter" if name == "model" else f"{name}_adapter")
            export_adapter(self.weights, self.config.model, folder)


def sandbox_choice(prepared: Prepared) -> dict[str, str]:
    """What judges in this run, and why."""
    return {"backend": prepared.config.sandbox.backend, "reason": prepared.sandbox_reason}


def export_policy(weights: Weights, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    save_folder(weights.hf_config, fetch(weights), path)
    tokenizer.save_pretrained(path)


def export_adapter(weights: Weights, model: ModelConfig, path: Path) -> None:
    """The adapters alone, as peft reads them."""
    assert weights.adapter is not None and model.lora is not None
    tensors = fetch_tensors(weights.adapter.tensors, weights.version)
    save_adapter(tensors, model.lora, path, base_path=model.path)


class Clock:
    """Seconds between marks."""

    def __init__(self):
        self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = round(now - self.last, 4)
        self.last = now
