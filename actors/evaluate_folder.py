"""Evaluation of an exported model: held-out problems sampled from its folder and judged in the sandbox.

The model is sampled in this process, or in Ray tasks that share the problems; programs are judged from here. A program on
which the judge fails is judged again, and in the end stops the evaluation: it never counts as wrong.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import ray
import torch

from actors.commands import open_engine, open_tokenizer
from actors.evaluate import EVALUATION_ATTEMPTS, PassRates, num_correct
from actors.placement import ask_of_evaluation, make_room
from actors.reward import RewardWorker
from actors.rollout import sampled_groups
from actors.system import cluster
from diffrl.config import SupervisionConfig
from diffrl.config.pipeline import EvaluationConfig
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.seeds import derive_seed
from diffrl.types import Judgement, Problem, RolloutGroup


def evaluate_folder(
    folder: Path, config: EvaluationConfig, problems: Sequence[Problem], *, ray_address: str | None = None
) -> PassRates:
    """Pass rates of the model in `folder`. Sampling seeds depend on (seed, problem, sample) alone, so they are the same for
    every model and any number of workers. Raises RunStoppedError when the judge failed on a sample, ConfigError for a
    folder or a sandbox that cannot be used."""
    if config.num_workers == 0:
        groups = sample_problems(folder, config, problems)
    else:
        groups = sample_with_ray(folder.resolve(), config, problems, ray_address)
    worker = RewardWorker(config.sandbox, RECIPE_WEIGHTS)
    with closing(worker.pool), ThreadPoolExecutor(config.sandbox.slots) as threads:
        samples = [(group, index) for group in groups for index in range(config.num_samples)]
        attempts = EVALUATION_ATTEMPTS * config.sandbox.attempts
        judgements = list(threads.map(lambda sample: judged(worker, *sample, attempts=attempts), samples))
    size = config.num_samples
    correct = [num_correct(p, judgements[n * size : (n + 1) * size]) for n, p in enumerate(problems)]
    return PassRates(num_samples=size, num_correct=tuple(correct), families=tuple(p.family for p in problems))


def judged(worker: RewardWorker, group: RolloutGroup, index: int, *, attempts: int) -> Judgement:
    """What the judge fails on is tried as often as in an evaluation of RL."""
    judgement = worker.judge(group, index)
    while not judgement.valid and attempts > 1:
        judgement, attempts = worker.judge(group, index), attempts - 1
    return judgement


def sample_with_ray(
    folder: Path, config: EvaluationConfig, problems: Sequence[Problem], address: str | None
) -> list[RolloutGroup]:
    """The problems dealt out to Ray tasks; their groups in the order of the problems. `folder` is on every node."""
    with cluster(address, config.num_workers * config.cpus_per_worker):
        make_room([ask_of_evaluation(config)], SupervisionConfig().start_s, "evaluation.num_workers")
        task = ray.remote(sample_problems).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            label_selector=dict(config.labels),
            max_retries=1,
        )
        shares = [problems[n :: config.num_workers] for n in range(config.num_workers)]
        parts = ray.get([task.remote(folder, config, share) for share in shares])
    return [parts[n % config.num_workers][n // config.num_workers] for n in range(len(problems))]


def sample_problems(folder: Path, config: EvaluationConfig, problems: Sequence[Problem]) -> list[RolloutGroup]:
    """`num_samples` completions of each problem. Raises ConfigError for a folder that cannot be loaded."""
    torch.set_num_threads(config.threads)
    tokenizer, window = open_tokenizer(folder), config.sampling.completion_tokens
    engine = open_engine(folder, tokenizer, config.params(), max_tokens=config.max_tokens_per_batch)
    seeds = [[derive_seed(config.seed, "evaluation", p.id, s) for s in range(config.num_samples)] for p in problems]
    return sampled_groups(engine, tokenizer, problems, completion_tokens=window, seeds=seeds)
