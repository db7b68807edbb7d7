"""A synthetic run folder for the board, written by the project's own writers: real problems, programs that their tests really
judged, a real tokenizer. What no model chose here is made up: which program a rollout holds, the order and the probabilities of
its tokens, and the curves of the losses.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from diffrl.data.microcode import FAMILIES, Exercise, compile_f, exercise_tests, make_exercise, slot_values
from diffrl.models.tiny import train_tokenizer
from diffrl.prompts import format_score
from diffrl.rewards import RECIPE_WEIGHTS, total_reward
from diffrl.rollout_store import write_step
from diffrl.run_folder import MetricsFile
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

CONFIG = """\
stage: rl
data: {{source: microcode}}
train: {{steps: {steps}, prompts_per_step: {groups}}}
reward: {{weights: {{pass_rate: 2.0, format: 0.5}}}}
"""
CHEAT = "low trust: the program overrides a comparison"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape(steps=40, groups=8, group_size=8, problems=20, window=72, seed=0, start=0.3, gain=0.5)"""

    steps: int = 4
    groups: int = 3
    group_size: int = 4
    problems: int = 6
    window: int = 72
    seed: int = 0
    start: float = 0.3  # share of right programs at the first step
    gain: float = 0.5  # what is added by the last


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for exercise in exercises() for text in (fenced(exercise.solution), exercise.prompt)]
    return train_tokenizer(texts, 600)


@lru_cache(maxsize=1)
def exercises() -> tuple[Exercise, ...]:
    return tuple(make_exercise(family, *slot_values(family)[n]) for n in (30, 7, 64) for family in FAMILIES)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def make_run(folder: Path, shape: Shape, steps: Sequence[int] | None = None) -> Path:
    """A run with those steps, all by default."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(steps=shape.steps, groups=shape.groups))
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "attempt": 1}) + "\n")
    tokenizer().save_pretrained(folder / "model")
    for step in range(shape.steps) if steps is None else steps:
        add_step(folder, shape, step)
    return folder


def add_step(folder: Path, shape: Shape, step: int) -> None:
    groups = [group_of(shape, step, step * shape.groups + n) for n in range(shape.groups)]
    advantages = [a for group in groups for a in advantages_of(group.judgements)]
    write_step(folder / "rollouts", step, groups, advantages)
    metrics = MetricsFile(folder)
    metrics.write({"step": step, **metrics_of(shape, step, groups, advantages)})
    metrics.close()


def group_of(shape: Shape, step: int, ordinal: int) -> ScoredGroup:
    rng = random.Random(f"{shape.seed}/{ordinal}")
    exercise = exercises()[ordinal % shape.problems]
    tests = exercise_tests(exercise)
    problem = Problem(
        id=exercise.id,
        prompt=exercise.prompt,
        prompt_tests=tests[:2],
        reward_tests=tests[2:],
        entry_point="f",
        family=exercise.family,
    )
    share = step / max(1, shape.steps - 1)
    codes = [program_of(rng, exercise, problem, shape.start + shape.gain * share) for _ in range(shape.group_size)]
    rollouts = tuple(rollout_of(rng, n, code, shape.window, share) for n, code in enumerate(codes))
    group = RolloutGroup(
        problem=problem,
        ordinal=ordinal,
        policy_version=max(0, step - ordinal % 2),
        prompt_ids_P=np.zeros(1, np.int32),
        rollouts=rollouts,
    )
    return ScoredGroup(group=group, judgements=tuple(judged(rng, problem, r.text) for r in rollouts))


def program_of(rng: random.Random, exercise: Exercise, problem: Problem, skill: float) -> str:
    if rng.random() < skill:
        return fenced(exercise.solution)
    kind = rng.random()
    if kind < 0.06:
        return fenced(hard_coded(problem))
    if kind < 0.1:
        return fenced(f"class Same(int):\n    __eq__ = lambda self, other: True\n{exercise.solution}")
    if kind < 0.2:
        return f"Here is the function.\n{exercise.solution}"
    return fenced(rng.choice([*exercise.mistakes, *exercise.slips]))


def hard_coded(problem: Problem) -> str:
    """Answers the shown tests, and one of the graded ones, by heart."""
    name = problem.prompt.partition("(")[2].partition(")")[0]
    pairs = [
        test.removeprefix("assert f(").split(") == ") for test in (*problem.prompt_tests, *problem.reward_tests[:1])
    ]
    lines = [f"    if {name} == {argument}: return {expected}" for argument, expected in pairs]
    return "\n".join([f"def f({name}):", *lines])


def rollout_of(rng: random.Random, number: int, text: str, window: int, share: float) -> Rollout:
    """Later in training the order is less from left to right, as in the paper."""
    ids = tokenizer().encode(text, add_special_tokens=False)
    ends = [tokenizer().eos_token_id] + [tokenizer().pad_token_id] * window
    ids_C = np.array((ids + ends)[:window], np.int32)
    noise = 0.02 + 0.5 * share
    keys = [position / window + rng.gauss(0, noise) for position in range(window)]
    ranks = np.argsort(np.argsort(keys))
    certain = [min(0.999, max(0.05, rng.betavariate(4 + 4 * share, 1.5))) for _ in range(window)]
    return Rollout(
        sample_index=number,
        seed=rng.getrandbits(64),
        completion_ids_C=ids_C,
        step_map_C=(ranks // 2).astype(np.int32),
        probability_C=np.array(certain, np.float16),
        num_tokens=min(len(ids) + 1, window),
        text=text,
    )


def judged(rng: random.Random, problem: Problem, text: str) -> Judgement:
    if rng.random() < 0.01:
        return Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0, detail="the sandbox was lost")
    statuses = tuple(status_of(text, test) for test in problem.reward_tests)
    reward, parts = total_reward(text, statuses, RECIPE_WEIGHTS)
    cheats = "__eq__" in text
    detail = CHEAT if cheats else "" if set(statuses) == {"passed"} else "a test did not hold"
    return Judgement(
        reward=reward,
        format=parts["format"],
        pass_rate=parts["pass_rate"],
        statuses=statuses,
        cpu_s=0.001 * len(text),
        low_trust=cheats,
        detail=detail,
        details=tuple("" if status == "passed" else "AssertionError" for status in statuses),
    )


def status_of(text: str, test: str) -> str:
    """By running it here: programs are templates of ours, nothing from outside."""
    if format_score(text) != 1.0:
        return "error"
    try:
        exec(test, {"f": compile_f(text.partition("\n")[2].rpartition("\n")[0])})
    except AssertionError:
        return "failed"
    except Exception:  # a wrong program may raise anything
        return "error"
    return "passed"


def advantages_of(judgements: Sequence[Judgement]) -> list[float]:
    """Against the mean of the siblings, as a group's are."""
    rewards = np.array([j.reward for j in judgements if j.valid])
    mean, spread = (rewards.mean(), rewards.std() + 1e-4) if len(rewards) else (0.0, 1.0)
    return [float((j.reward - mean) / spread) if j.valid else 0.0 for j in judgements]


def metrics_of(shape: Shape, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[float]) -> dict[str, float]:
    judgements = [j for group in groups for j in group.judgements]
    lengths = [r.num_tokens for group in groups for r in group.group.rollouts]
    rng = random.Random(f"{shape.seed}/metrics/{step}")
    share = step / max(1, shape.steps - 1)
    return {
        "reward/mean": float(np.mean([j.reward for j in judgements if j.valid])),
        "reward/solved_frac": float(np.mean([j.pass_rate == 1.0 for j in judgements if j.valid])),
        "reward/format_mean": float(np.mean([j.format for j in judgements if j.valid])),
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/staleness_mean": float(np.mean([step - g.group.policy_version for g in groups])),
        "sandbox/low_trust_frac": float(np.mean([j.low_trust for j in judgements])),
        "sandbox/infra_error_frac": float(np.mean([not j.valid for j in judgements])),
        "loss/total": rng.gauss(-0.02, 0.01),
        "loss/kl": 0.002 * share + rng.random() * 0.0004,
        "optim/grad_norm": 0.5 - 0.2 * share + rng.gauss(0, 0.04),
        "time/rollouts": 8 + rng.random(),
        "time/learner": 4 + rng.random(),
    }
