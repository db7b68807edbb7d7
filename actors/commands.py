"""What `diffrl eval` and `diffrl generate` do: no Ray, one process."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from actors.reward import submission
from diffrl.batches import pad_prompt
from diffrl.benchmarks import benchmark_problems, canonical_code
from diffrl.config import ModelConfig
from diffrl.errors import ConfigError
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tokens import decode, end_ids, length_with_end, special_id
from diffrl.prompts import chat_ids
from diffrl.sampler import SamplingParams, sample
from diffrl.seeds import derive_seed
from diffrl.types import Problem
from sandbox.backends import BackendOptions, open_sandbox, pods_for
from sandbox.types import Limits, SandboxError, TestStatus, Verdict

LIMITS = Limits(cpu_s=10.0, wall_s=60.0, memory_mb=1024)


def judge_solutions(benchmark: str, path: str, solutions: str, options: BackendOptions) -> None:
    """Judge the data set's own solutions; the last line says how many pass."""
    if solutions != "canonical":
        raise ConfigError(f"--solutions: {solutions!r} is unknown; known: canonical")
    try:
        problems = benchmark_problems(benchmark, path)
        codes = [canonical_code(problem) for problem in problems]
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def judge(problem: Problem, code: str) -> Verdict:
        return pool.judge(submission(problem, code, problem.id, LIMITS))

    try:
        with pods_for(options) as options, open_sandbox(options) as pool, ThreadPoolExecutor(pool.slots) as threads:
            verdicts = list(threads.map(judge, problems, codes))
    except SandboxError as error:
        raise ConfigError(f"sandbox: {error}") from error
    counts = Counter(status for verdict in verdicts for status in verdict.statuses)
    passed = 0
    for problem, verdict in zip(problems, verdicts, strict=True):
        if all(status == TestStatus.PASSED for status in verdict.statuses):
            passed += 1
        else:
            print(f"{problem.id}: {', '.join(verdict.statuses)} {next((d for d in verdict.details if d), '')}")
    print("verdicts: " + ", ".join(f"{status} {count}" for status, count in sorted(counts.items())))
    print(f"{benchmark}: {passed} of {len(problems)} {solutions} solutions pass")


def generate_texts(
    model_path: str, prompt: str, steps: int, tokens: int, temperature: float, samples: int, seed: int
) -> list[str]:
    """Completions of one prompt."""
    config = ModelConfig(path=model_path)
    try:
        tokenizer = load_policy_tokenizer(config)
        model = load_policy(config, tokenizer, seed=seed).eval()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    ids = np.asarray(chat_ids(tokenizer, Problem(id="-", prompt=prompt, prompt_tests=(), reward_tests=())))
    prompt_ids_BP, prompt_mask_BP = pad_prompt(ids, samples, len(ids), special_id(tokenizer, "pad"))
    with torch.no_grad():
        result = sample(
            model,
            prompt_ids_BP,
            prompt_mask_BP,
            num_tokens=tokens,
            params=SamplingParams(algorithm="entropy", steps=steps, temperature=temperature, top_p=0.95, top_k=50),
            seeds=[derive_seed(seed, "generate", index) for index in range(samples)],
            vocab_size=len(tokenizer),
        )
    ends = end_ids(tokenizer)
    rows = result.completion_ids_BC.numpy()
    return [decode(tokenizer, row[: length_with_end(row, ends)], ends) for row in rows]
