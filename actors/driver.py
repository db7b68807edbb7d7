"""The RL loop: sample, judge, score, learn, publish. `Run.step` reads like the algorithm box of the paper.

What a step learns from is the collector's business (collector.py), which lets rollouts run ahead of the updates when the
config says so. `prepare` checks everything a user can get wrong before the first actor starts.

Every `checkpoint.every` steps all that the next step depends on is saved (diffrl/checkpoint.py); a run that goes on from
there has the numbers of one that nothing happened to.
"""

import time
from dataclasses import replace

import ray
import torch

from actors.collector import Collector
from actors.disk import free_mb, size_mb, wait_for_room
from actors.evaluate import Evaluator, PassRates, read_report
from actors.learner import Learner
from actors.placement import asks_of
from actors.prepare import Prepared, prepare
from actors.processes import one_line, resident_mb
from actors.run_start import REPORT_BEFORE, RunStart, begin, check_resume
from actors.saving import export_adapter, export_policy, write_checkpoint
from actors.system import System, room_for
from actors.telemetry import Telemetry, pool_metrics, sampling_metrics
from actors.weights import Weights, put_folder, received
from diffrl.batches import StepRollouts, rollout_metrics, train_batch
from diffrl.checkpoint import RunState
from diffrl.config import RLConfig
from diffrl.errors import RunStoppedError
from diffrl.mirror import Mirror
from diffrl.models.tokens import end_ids
from diffrl.rollout_store import write_step
from diffrl.run_folder import read_run, require_newest, write_run
from diffrl.saved_batch import save_batch
from diffrl.step_metrics import learner_metrics, role_metrics, step_metrics
from diffrl.types import Problem, TrainBatch, UpdateResult


def train(
    config: RLConfig,
    *,
    dry_run: bool = False,
    resume: str | None = None,
    run_class: "type[Run] | None" = None,
    samples: bool = True,
) -> None:
    """One whole RL run. `resume`: "auto", "last" or a checkpoint's folder, see run_start.py. `samples`: with workers that
    sample and judge."""
    started = time.perf_counter()
    prepared = prepare(config)
    if dry_run:
        checkpoint = check_resume(config, resume)
        origin = f", from {checkpoint} on" if checkpoint else ""
        print(f"ready: {len(prepared.problems)} problems, {prepared.num_steps} steps{origin}; nothing was started")
        return
    start = begin(config, resume, sandbox=sandbox_choice(prepared))
    if start is None:
        print(f"rl: {config.run_dir} is finished; nothing was started")
        return
    with (
        room_for(prepared.config, asks_of(prepared.config, samples=samples)),
        Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
        System(prepared.config, prepared.tokenizer, samples=samples) as system,
        Telemetry(start.folder, prepared.num_steps, config=config.telemetry) as telemetry,
    ):
        summary = (run_class or Run)(prepared, start, system, learner, telemetry).train()
    seconds = round(time.perf_counter() - started, 1)
    write_run(start.folder, read_run(start.folder) | {"finished": seconds})
    if summary is not None:
        print(summary, flush=True)  # last: by now no actor can print anything behind it


class Run(Collector):
    """State of a run between two steps: the published weights, the reference, the groups on their way."""

    def __init__(self, prepared: Prepared, start: RunStart, system: System, learner: Learner, telemetry: Telemetry):
        super().__init__(prepared, start, system, telemetry)
        self.learner = learner
        learner.wait = self.advance
        learner.join(system.watchdog)
        learner.start()
        system.wait_ready()
        self.weights, self.reference = self.first_weights()
        self.evaluator = Evaluator(system.rollouts, system.judges, self.config)
        state = self.state = start.state  # when the last checkpoint was made
        self.best = None if state.best_rate is None or state.best_step is None else (state.best_rate, state.best_step)
        telemetry.metrics.cut(state.metrics_bytes)
        for line in start.said:
            telemetry.say(line)
        if start.checkpoint is not None:
            telemetry.say(f"goes on after step {state.step} from {start.checkpoint} (attempt {start.attempt.number})")
        telemetry.say(f"sandbox: {', '.join(filter(None, sandbox_choice(prepared).values()))}")
        if prepared.num_left_out:
            telemetry.say(
                f"{prepared.num_left_out} of {prepared.num_left_out + len(prepared.problems)} problems left out: "
                f"prompt longer than data.max_prompt_tokens {self.config.data.max_prompt_tokens}"
            )
        if self.config.model.path is None:
            telemetry.say("model.path is not set: a tiny model starts from random weights")

    def first_weights(self) -> tuple[Weights, Weights]:
        """The policy that the run begins with, published, and the reference."""
        checkpoint = self.start.checkpoint
        if checkpoint is not None:
            self.learner.load((checkpoint / "learner").resolve())
        weights = self.learner.publish()
        if checkpoint is None or not (checkpoint / "reference").exists():
            return weights, weights
        version, num_tokens = self.start.state.reference_version, len(self.prepared.tokenizer)
        return weights, put_folder(checkpoint / "reference", version, num_tokens)

    def train(self) -> str | None:
        """All steps that are left, with the evaluations and reports that the config asks for; the report in one line."""
        before = self.report_before()
        for step in range(self.state.step, 0 if self.state.ended else self.prepared.num_steps):
            self.ask_ahead(step)
            self.step(step)
            ended = self.evaluate(step) or step + 1 == self.prepared.num_steps
            if ended or (step + 1) % self.config.checkpoint.every == 0:
                self.save(step + 1, ended=ended)
            if ended:
                break
        require_newest(self.folder, self.start.attempt)
        self.export("model")
        return None if before is None else self.evaluator.summary(before, self.report("after"))

    def step(self, step: int) -> None:
        """One iteration of the algorithm box: sample, judge and score, learn, publish."""
        clock = Clock()
        judges, rollouts = self.system.judges, self.system.rollouts
        before = judges.inquire("stats"), rollouts.inquire("stats")
        self.system.used()  # until now
        self.telemetry.phase("rollouts")
        drawn = self.rollouts(step)
        clock.mark("time/rollouts")
        batch = train_batch(drawn.scored, drawn.scoring, drawn.ref_logprobs, self.config)
        self.record(step, drawn, batch)
        self.keep_batch(step, batch)
        clock.mark("time/record")
        self.telemetry.phase("learning")
        result = self.learner.update(ray.put(batch))
        clock.mark("time/learner")
        self.telemetry.phase("publishing weights")
        self.weights = self.learner.publish()
        clock.mark("time/publish")
        self.follow(step)
        clock.mark("time/pull")
        synced = self.check_sync(step, drawn)
        num_tokens = sum(r.num_tokens for s in (*drawn.scored, *drawn.replaced) for r in s.group.rollouts)
        load = pool_metrics(before[0], judges.inquire("stats"), sum(clock.times.values()))
        load |= sampling_metrics(before[1], rollouts.inquire("stats"), num_tokens)
        load |= learner_metrics(clock.times, int(batch.loss_mask_BC.sum()) * len(batch.scoring.views))
        metrics = {**rollout_metrics(drawn.scored), "rollout/replaced_groups": float(len(drawn.replaced))}
        behind = [step - s.group.policy_version for s in drawn.scored]
        metrics |= {"rollout/staleness_mean": sum(behind) / len(behind), "rollout/staleness_max": float(max(behind))}
        metrics |= step_metrics(drawn, batch, self.config, end_ids(self.prepared.tokenizer))
        metrics |= {"weights/bytes": self.weights.num_bytes, "weights/version": self.weights.version}
        metrics["data/quarantined"] = float(self.quarantine.count(self.next_ordinal))
        metrics |= synced | self.watch(step, drawn)
        self.telemetry.step(step, {**metrics, **result.metrics}, {**clock.times, **load, **self.circumstances()})
        self.check_update(step, result)

    def circumstances(self) -> dict[str, float]:
        """How the workers of each role fare: memory, what was lost, who was busy since the step began."""
        metrics: dict[str, float] = self.system.check_memory()
        metrics |= {"memory/learner_mb": self.learner.memory_mb(), "memory/driver_mb": resident_mb(children=False)}
        for name, pool in self.system.pools().items():
            metrics |= {f"restarts/{name}": pool.num_restarts, f"retries/{name}": pool.num_retries}
        metrics |= {"restarts/learner": self.learner.num_rebuilds, "rejudged/groups": self.pipeline.num_rejudged}
        for role, use in self.system.used().items():
            metrics |= role_metrics(role, use)
        return metrics | {"queue/buffered": float(self.buffer.num_committed)}

    def record(self, step: int, drawn: StepRollouts, batch: TrainBatch) -> None:
        """Write the step's rollouts; RunStoppedError when too many of them could not be judged to learn from the rest, and
        when this is no longer the newest start of the run."""
        require_newest(self.folder, self.start.attempt)
        self.wait_for_room(self.config.supervision.min_free_mb)
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

    def keep_batch(self, step: int, batch: TrainBatch) -> None:
        """The last `learner.keep_batches` of them, for `diffrl replay`."""
        if keep := self.config.learner.keep_batches:
            folder = self.folder / "batches"
            save_batch(folder / f"step-{step:06d}", batch, {"step": step, "version": self.weights.version})
            for file in folder.glob(f"step-{step - keep:06d}.*"):
                file.unlink()

    def follow(self, step: int) -> None:
        """The weights just published go to everybody who samples, at once or, where rollouts run ahead, with the next
        prompts; every `reference_refresh_steps` the reference moves to them, all the way or by `reference_mix`."""
        method = self.config.method
        if method.reference_refresh_steps is not None and (step + 1) % method.reference_refresh_steps == 0:
            if method.reference_mix == 1.0 or self.config.num_reference_workers == 0:
                self.reference = self.weights
            else:
                self.settle()
                mixture = self.system.reference.call("mixed", self.weights, self.reference, method.reference_mix)
                # Its number is below all versions of the policy.
                self.reference = replace(
                    self.weights, version=-self.weights.version, tensors=received(mixture), adapter=None
                )
        if self.staleness == 0:
            acknowledged = self.system.rollouts.broadcast("pull", self.weights)
            assert acknowledged == [self.weights.version] * len(acknowledged)

    def check_sync(self, step: int, drawn: StepRollouts) -> dict[str, float]:
        """Every `sync.every` steps: how far apart the log-probs of one group are under the learner's policy and as the rollout
        workers have it. RunStoppedError beyond the limit."""
        if self.config.sync.every is None or (step + 1) % self.config.sync.every:
            return {}
        batch = drawn.scoring[drawn.scored[0].group.ordinal]
        self.settle()
        expected = self.learner.probe(batch)
        release = self.config.method.compat == "release"
        found = self.system.rollouts.broadcast("logprobs", batch, self.weights, release)
        apart = max(float((logprobs - expected).abs()[:, batch.scored_BC].max()) for logprobs in found)
        limit = self.config.max_logprob_absdiff
        if not apart <= limit:
            self.export("model")
            raise RunStoppedError(
                f"sync.max_logprob_absdiff: after step {step + 1} a token's log-prob differs by {apart:.3g} between the learner "
                f"and a rollout worker that has weights of the same version, the limit is {limit:g}; look at the versions of "
                f"torch and the devices of both, or raise the limit (policy so far: {self.folder / 'model'})"
            )
        return {"sync/logprob_absdiff_max": apart}

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
        self.telemetry.phase("evaluation")
        self.settle()
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

    def save(self, steps: int, *, ended: bool) -> None:
        """Commit a checkpoint after so many steps."""
        self.telemetry.phase("checkpoint")
        self.settle()
        apart = self.config.num_reference_workers > 0 and self.reference.version != self.weights.version
        rate, step = self.best or (None, None)
        self.state = RunState(
            step=steps,
            version=self.weights.version,
            reference_version=self.reference.version,
            next_ordinal=self.next_ordinal,
            asked=tuple(tuple(self.asked[step]) for step in sorted(self.asked)),
            metrics_bytes=self.telemetry.metrics.sync(),
            exact=self.params.is_exact,
            watched=tuple(self.watched),
            best_rate=rate,
            best_step=step,
            ended=ended,
        )
        last = self.learner.saved
        needed_mb = self.config.supervision.min_free_mb + (0 if last is None else size_mb(last.parent))
        while True:
            self.wait_for_room(needed_mb)
            try:
                write_checkpoint(
                    self.start,
                    self.state,
                    self.learner,
                    self.weights,
                    self.reference if apart else None,
                    self.prepared.tokenizer,
                    self.save_groups if self.asked else None,
                    keep=self.config.checkpoint.keep,
                )
                break
            except (RunStoppedError, OSError):
                if free_mb(self.folder) >= needed_mb:
                    raise  # it was not for want of room
        self.copy_checkpoint(steps)

    def copy_checkpoint(self, steps: int) -> None:
        """To `checkpoint.copy_to`. A copy that fails is no reason to stop: the run's own checkpoint is there."""
        settings = self.config.checkpoint
        if settings.copy_to is None:
            return
        try:
            Mirror(settings.copy_to).push(self.folder, steps, keep=settings.keep)
        except Exception as error:  # of whatever service is behind the address
            self.telemetry.say(
                f"checkpoint.copy_to: step {steps} could not be copied ({one_line(error)}); the run goes on"
            )

    def wait_for_room(self, needed_mb: int) -> None:
        """Until so much is free where the run is written."""

        def wait() -> None:
            self.system.watchdog.progress()
            self.advance()

        wait_for_room(self.folder, needed_mb, wait, self.telemetry.say)

    def report_before(self) -> dict[str, PassRates] | None:
        """The report before training, of an earlier start of the run if there was one."""
        if self.config.report is None:
            return None
        file = self.folder / REPORT_BEFORE
        return read_report(file) if file.exists() else self.report("before")

    def report(self, when: str) -> dict[str, PassRates]:
        """Every number of the last line, for the current weights."""
        assert self.config.report is not None
        self.telemetry.phase("report")
        self.settle()
        held_out = spread(self.prepared.report_problems, self.config.report.num_problems)
        train = spread(self.prepared.problems, self.config.report.num_train_problems)
        self.telemetry.say(f"{when} training: evaluating {len(held_out)} held-out problems")
        rates = self.evaluator.report(held_out, train, self.weights)
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


def spread(problems: list[Problem], count: int | None) -> list[Problem]:
    """So many of them, evenly spread."""
    if count is None or count >= len(problems):
        return problems
    return [problems[number * len(problems) // count] for number in range(count)]


class Clock:
    """Seconds between marks."""

    def __init__(self):
        self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = round(now - self.last, 4)
        self.last = now
