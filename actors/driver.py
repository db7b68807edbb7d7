"""The RL loop: sample, judge, score, learn, publish. `Run.step` reads like the algorithm box of the paper.

The loop takes whole groups from a buffer in order of ordinals, so its result does not depend on how many workers there
are or who finishes first. `prepare` checks everything a user can get wrong before the first actor starts.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerFast

from actors.evaluate import Evaluator, PassRates
from actors.learner import Learner
from actors.pool import GroupBuffer, Pipeline, Request
from actors.rollout import pad_prompt
from actors.system import System
from actors.telemetry import Telemetry
from actors.weights import Weights, fetch
from diffrl.config import ProblemsConfig, RLConfig
from diffrl.coupled_grpo import ADVANTAGES, usable_samples
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.errors import ConfigError
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models.dream import build_model, save_model
from diffrl.models.loading import load_policy_tokenizer
from diffrl.models.tokens import special_id
from diffrl.prompts import chat_ids
from diffrl.rollout_store import write_step
from diffrl.run_folder import check_run_folder, create_run_folder
from diffrl.scoring import concat_batches
from diffrl.seeds import derive_seed
from diffrl.types import Problem, RolloutGroup, ScoredGroup, ScoringBatch, TrainBatch
from sandbox.process import require_available
from sandbox.types import SandboxUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run needs, checked and loaded."""

    config: RLConfig
    tokenizer: PreTrainedTokenizerFast
    problems: list[Problem]
    eval_problems: list[Problem]
    report_problems: list[Problem]
    num_left_out: int  # training problems whose prompt does not fit
    num_steps: int


def prepare(config: RLConfig) -> Prepared:
    """Load tokenizer and problems, check that they go together. Raises ConfigError; starts nothing."""
    try:
        check_run_folder(Path(config.run_dir))
        require_available(config.sandbox.allow_unisolated)
        tokenizer = load_policy_tokenizer(config.model)
        problems = problems_of(config.data)
        fitting = [p for p in problems if len(chat_ids(tokenizer, p)) <= config.data.max_prompt_tokens]
        if not fitting:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} is less than every prompt of the data needs "
                f"(the shortest has {min(len(chat_ids(tokenizer, p)) for p in problems)} tokens); raise it"
            )
        held_out = [
            [] if section is None else problems_of(section)
            for section in (config.eval.problems, config.report.problems if config.report else None)
        ]
    except SandboxUnavailableError as error:
        raise ConfigError(f"sandbox: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    for problem in (p for split in held_out for p in split):
        if len(chat_ids(tokenizer, problem)) > config.data.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens: {config.data.max_prompt_tokens} is too small for the held-out problem "
                f"{problem.id}; raise it"
            )
    prompts = config.train.prompts_per_step
    return Prepared(
        config=config,
        tokenizer=tokenizer,
        problems=fitting,
        eval_problems=held_out[0],
        report_problems=held_out[1],
        num_left_out=len(problems) - len(fitting),
        num_steps=config.train.steps or max(1, config.train.epochs * len(fitting) // prompts),
    )


def problems_of(config: ProblemsConfig) -> list[Problem]:
    if config.source == "microcode":
        problems = microcode_problems(config.split, num_prompt_tests=config.num_prompt_tests)
        return problems[: config.limit]
    assert config.path is not None
    return load_problems(config.source, config.path, num_prompt_tests=config.num_prompt_tests, limit=config.limit)


def prompt_stream(problems: Sequence[Problem], seed: int) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) without end: every epoch is a permutation of its own."""
    ordinal = 0
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", ordinal // len(problems))).shuffle(order)
        for index in order:
            yield ordinal, problems[index]
            ordinal += 1


def train(config: RLConfig, *, dry_run: bool = False) -> None:
    """One whole RL run."""
    prepared = prepare(config)
    if dry_run:
        print(f"ready: {len(prepared.problems)} problems, {prepared.num_steps} steps; nothing was started")
        return
    folder = create_run_folder(config)
    with System(config, prepared.tokenizer) as system, Telemetry(folder, prepared.num_steps) as telemetry:
        Run(prepared, folder, system, telemetry).train()


class Run:
    """State of a run between two steps: the published weights, the reference, the buffer, the place in the prompts."""

    def __init__(self, prepared: Prepared, folder: Path, system: System, telemetry: Telemetry):
        self.prepared = prepared
        self.config = prepared.config
        self.folder = folder
        self.system = system
        self.telemetry = telemetry
        self.pipeline = Pipeline(system.rollouts, system.judges, judge_attempts=self.config.sandbox.attempts)
        self.learner = Learner(self.config, prepared.tokenizer, prepared.num_steps)
        system.wait_ready()
        self.weights = self.learner.publish(system.store, ())
        self.reference = self.weights
        self.buffer = GroupBuffer(self.config.train.prompts_per_step * (self.config.rollout.max_staleness + 1))
        self.prompts = prompt_stream(prepared.problems, self.config.seed)
        self.evaluator = Evaluator(self.pipeline, self.config)
        self.best: tuple[float, int] | None = None  # pass@1 and step
        if prepared.num_left_out:
            telemetry.say(
                f"{prepared.num_left_out} of {prepared.num_left_out + len(prepared.problems)} problems left out: "
                f"prompt longer than data.max_prompt_tokens {self.config.data.max_prompt_tokens}"
            )
        if self.config.model.path is None:
            telemetry.say("model.path is not set: a tiny model starts from random weights")

    def train(self) -> None:
        before = self.report("before") if self.config.report else None
        for step in range(self.prepared.num_steps):
            self.step(step)
            if self.evaluate(step):
                self.telemetry.say(
                    f"no better evaluation since step {self.best[1]}: stopped" if self.best else "stopped"
                )
                break
        self.export("model")
        summary = None if before is None else self.evaluator.summary(before, self.report("after"))
        self.learner.close()
        if summary is not None:
            self.telemetry.last_line(summary)

    def step(self, step: int) -> None:
        """One iteration of the algorithm box: sample, judge and score, learn, publish."""
        clock = Clock()
        scored, scoring, ref_logprobs = self.rollouts()
        clock.mark("time/rollouts")
        batch, metrics = self.train_batch(scored, scoring, ref_logprobs)
        result = self.learner.update(ray.put(batch))
        clock.mark("time/learner")
        self.publish(result.version, step)
        clock.mark("time/publish")
        write_step(self.folder / "rollouts", step, scored, batch.advantages_B.numpy())
        clock.mark("time/record")
        restarts = {f"restarts/{name}": pool.num_restarts for name, pool in self.system.pools().items()}
        self.telemetry.step(step, {**metrics, **result.metrics}, {**clock.times, **restarts})

    def rollouts(self) -> tuple[list[ScoredGroup], list[ScoringBatch], list[torch.Tensor]]:
        """Sample and judge one step's groups; the reference scores each as soon as it is sampled."""
        method = self.config.method
        scoring: dict[int, ScoringBatch] = {}
        ref_logprobs: dict[Any, torch.Tensor] = {}

        def score_reference(group: RolloutGroup) -> None:
            scoring[group.ordinal] = self.scoring_batch(group)
            if method.kl_coef > 0:
                self.system.reference.submit(group.ordinal, "logprobs", scoring[group.ordinal], self.reference)

        requests = []
        for _ in range(self.config.train.prompts_per_step):
            ordinal, problem = next(self.prompts)
            self.buffer.reserve(ordinal)
            requests.append(self.request(ordinal, problem))
        finished = self.pipeline.run(requests, score_reference, self.system.reference, ref_logprobs.__setitem__)
        for group in finished:
            self.buffer.commit(group)
        scored = self.buffer.take(len(requests))
        ordinals = [s.group.ordinal for s in scored]
        ref = [ref_logprobs[o] for o in ordinals] if method.kl_coef > 0 else []
        return scored, [scoring[o] for o in ordinals], ref

    def request(self, ordinal: int, problem: Problem) -> Request:
        seeds = [
            derive_seed(self.config.seed, "rollout", ordinal, index) for index in range(self.config.method.group_size)
        ]
        params = self.config.sampling.params()
        return Request(ordinal=ordinal, problem=problem, seeds=tuple(seeds), params=params, weights=self.weights)

    def scoring_batch(self, group: RolloutGroup) -> ScoringBatch:
        """What learner and reference score: the group's tokens, and one draw of views per inner iteration."""
        config = self.config
        rows = len(group.rollouts)
        prompt_ids_BP, prompt_mask_BP = pad_prompt(
            group.prompt_ids_P, rows, config.data.max_prompt_tokens, special_id(self.prepared.tokenizer, "pad")
        )
        views = tuple(
            draw_views(
                ESTIMATORS[config.method.estimator],
                seeds=[derive_seed(config.seed, "views", group.ordinal, iteration)],
                group_size=rows,
                num_tokens=config.sampling.completion_tokens,
                options=config.method.view_options(),
            )
            for iteration in range(config.method.num_iterations)
        )
        completion_ids_BC = torch.from_numpy(np.stack([r.completion_ids_C for r in group.rollouts])).long()
        return ScoringBatch(
            prompt_ids_BP=prompt_ids_BP,
            prompt_mask_BP=prompt_mask_BP,
            completion_ids_BC=completion_ids_BC,
            views=views,
            group_size=rows,
        )

    def train_batch(
        self, scored: list[ScoredGroup], scoring: list[ScoringBatch], ref_logprobs: list[torch.Tensor]
    ) -> tuple[TrainBatch, dict[str, float]]:
        """Rewards -> advantages and loss mask. Samples that were not judged get loss mask 0; shapes never change."""
        method, group_size = self.config.method, self.config.method.group_size
        judgements = [j for s in scored for j in s.judgements]
        rollouts = [r for s in scored for r in s.group.rollouts]
        rewards_B = torch.tensor([j.reward for j in judgements])
        if self.config.reward.shuffle_within_group:
            rewards_B = shuffled(rewards_B, scored, self.config.seed)
        valid_B = torch.tensor([j.valid for j in judgements])
        usable_B = usable_samples(rewards_B, valid_B, group_size, drop_equal_groups=method.drop_equal_groups)
        num_tokens_B = torch.tensor([r.num_tokens for r in rollouts])
        positions_C = torch.arange(self.config.sampling.completion_tokens)
        loss_mask_BC = (positions_C < num_tokens_B[:, None]) & usable_B[:, None]
        batch = TrainBatch(
            scoring=concat_batches(scoring),
            loss_mask_BC=loss_mask_BC,
            advantages_B=ADVANTAGES[method.advantage](rewards_B, valid_B, group_size),
            ref_logprobs_IBC=torch.cat(ref_logprobs, dim=1) if ref_logprobs else None,
            num_loss_tokens=max(int(loss_mask_BC.sum()), 1),
        )
        return batch, rollout_metrics(scored, rewards_B, valid_B, num_tokens_B, group_size)

    def publish(self, version: int, step: int) -> None:
        """New weights to everybody who samples; every `reference_refresh_steps` they become the reference too."""
        refresh = self.config.method.reference_refresh_steps
        self.weights = self.learner.publish(self.system.store, (self.reference.version,))
        assert self.weights.version == version
        if refresh is not None and (step + 1) % refresh == 0:
            self.reference = self.weights
        acknowledged = self.system.rollouts.broadcast("pull", self.weights)
        assert acknowledged == [version] * len(acknowledged)

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
        return patience is not None and (step - self.best[1]) // every >= patience

    def report(self, when: str) -> dict[str, PassRates]:
        """Every number of the last line, for the current weights."""
        assert self.config.report is not None
        train = self.prepared.problems[:: max(1, len(self.prepared.problems) // self.config.report.num_train_problems)]
        rates = self.evaluator.report(
            self.prepared.report_problems, train[: self.config.report.num_train_problems], self.weights
        )
        self.telemetry.report(when, rates)
        return rates

    def export(self, name: str) -> None:
        """The current policy as a Hugging Face folder, with its tokenizer."""
        export_policy(self.weights, self.prepared.tokenizer, self.folder / name)


def export_policy(weights: Weights, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    save_model(build_model(weights.hf_config, fetch(weights)), path)
    tokenizer.save_pretrained(path)


def shuffled(rewards_B: torch.Tensor, scored: Sequence[ScoredGroup], seed: int) -> torch.Tensor:
    """Rewards permuted within each group: the control experiment in which they say nothing."""
    parts = rewards_B.reshape(len(scored), -1)
    rows = []
    for row, group in zip(parts, scored, strict=True):
        generator = torch.Generator().manual_seed(derive_seed(seed, "shuffle", group.group.ordinal))
        rows.append(row[torch.randperm(len(row), generator=generator)])
    return torch.cat(rows)


def rollout_metrics(
    scored: Sequence[ScoredGroup],
    rewards_B: torch.Tensor,
    valid_B: torch.Tensor,
    num_tokens_B: torch.Tensor,
    group_size: int,
) -> dict[str, float]:
    """What one line of metrics.jsonl says about the rollouts of a step."""
    judged = [j for s in scored for j in s.judgements if j.valid]
    statuses = [status for j in judged for status in j.statuses or ()]
    counts = {f"verdicts/{name}": statuses.count(name) for name in sorted(set(statuses))}
    rewards_NG = rewards_B.reshape(-1, group_size)
    num_judged = max(len(judged), 1)
    return {
        "reward/mean": sum(j.reward for j in judged) / num_judged,
        "reward/pass_rate": sum(j.pass_rate for j in judged) / num_judged,
        "reward/solved_frac": sum(j.pass_rate == 1.0 for j in judged) / num_judged,
        "reward/format": sum(j.format for j in judged) / num_judged,
        "reward/equal_groups_frac": float((rewards_NG.amax(1) == rewards_NG.amin(1)).float().mean()),
        "sandbox/infra_error_frac": 1 - float(valid_B.float().mean()),
        "rollout/completion_tokens": float(num_tokens_B.float().mean()),
        **counts,
    }


class Clock:
    """Seconds between marks."""

    def __init__(self):
        self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = round(now - self.last, 4)
        self.last = now
