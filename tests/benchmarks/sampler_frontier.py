"""`make bench-sampler-frontier`: what each approximate mode of the sampler costs and gains on the quickstart's model.

Every mode fills the same 420 problems x 8 samples with the same seeds (of microcode's reserved splits, which no stage of
the quickstart trains on: all that are held out, and some for validation), with the quickstart's 30 tokens and 15 steps, at
the temperature of its rollouts and at the lower one of its reports. Completions are judged as in training. Differences to
exact sampling at the same temperature are paired by problem; their intervals are those of a bootstrap over problems.
Seconds are those of sampling alone, one thread; all modes take turns on a sixth of the problems after the other. Prints
what was measured and draws it to results/sampler_frontier.svg.
"""

import argparse
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.reward import RewardWorker
from diffrl.analysis import paired_bootstrap
from diffrl.config import ModelConfig, SandboxConfig
from diffrl.data.microcode import microcode_problems
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tokens import decode, end_ids, length_with_end
from diffrl.prompts import chat_ids
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.sampler import Canvas, Engine, SamplingParams
from diffrl.seeds import derive_seed
from diffrl.types import Problem, Rollout, RolloutGroup

NUM_PROBLEMS, SAMPLES, TOKENS, SLICES = 420, 8, 30, 6
EXACT = SamplingParams(algorithm="entropy", steps=15, temperature=1.0, top_p=None, top_k=None)
TEMPERATURES = {1.0: "#c33", 0.4: "#36c"}
MODES: dict[str, dict[str, Any]] = {
    "threshold 0.95": {"confidence_threshold": 0.95},
    "threshold 0.9": {"confidence_threshold": 0.9},
    "entropy budget 0.03": {"entropy_budget": 0.03},
    "entropy budget 0.1": {"entropy_budget": 0.1},
    "entropy budget 0.3": {"entropy_budget": 0.3},
    "4 tokens a step": {"tokens_per_step": 4},
    "early end": {"early_end": True},
    "early end, threshold 0.95": {"early_end": True, "confidence_threshold": 0.95},
    "dual cache, blocks of 10": {"cache": "dual", "block_size": 10},
}


class Sampling:
    def __init__(self, folder: str):
        config = ModelConfig(path=folder)
        self.tokenizer = load_policy_tokenizer(config)
        self.model = load_policy(config, self.tokenizer, seed=0).eval()
        self.ends = end_ids(self.tokenizer)

    def fill(self, problems: Sequence[Problem], params: SamplingParams) -> tuple[list[list[str]], float, float]:
        """Texts of each problem, seconds, and the share of an exact run's passes that was made."""
        engine = Engine(
            self.model, params, max_tokens=4096, vocab_size=len(self.tokenizer), end_ids=self.ends
        )  # fmt: skip
        for problem in problems:
            prompt = torch.tensor(chat_ids(self.tokenizer, problem))
            ids_L = torch.nn.functional.pad(prompt, (0, TOKENS))
            hidden_L = torch.arange(len(ids_L)) >= len(prompt)
            for sample in range(SAMPLES):
                seed = derive_seed(0, "frontier", problem.id, sample)
                engine.add(Canvas(ids_L=ids_L, hidden_L=hidden_L, seed=seed))
        started = time.perf_counter()
        filled = engine.run()
        seconds = time.perf_counter() - started
        rows = [row.ids_L[-TOKENS:].numpy() for row in filled]
        texts = [decode(self.tokenizer, row[: length_with_end(row, self.ends)], self.ends) for row in rows]
        passes = sum(row.passes for row in filled) / sum(row.exact_passes for row in filled)
        return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)], seconds, passes


class Judge:
    """Pass rates by problem; equal texts are judged once."""

    def __init__(self):
        sandbox = SandboxConfig.model_validate({"backend": "process", "slots": 2})
        self.worker = RewardWorker(sandbox, RECIPE_WEIGHTS)
        self.known: dict[tuple[str, str], bool] = {}

    def pass_rate(self, problem: Problem, texts: list[str]) -> float:
        new = sorted({text for text in texts if (problem.id, text) not in self.known})
        rollouts = tuple(
            Rollout(
                sample_index=i,
                seed=0,
                completion_ids_C=np.zeros(1, dtype=np.int32),
                step_map_C=np.zeros(1, dtype=np.int32),
                probability_C=np.ones(1, dtype=np.float16),
                num_tokens=1,
                text=text,
            )
            for i, text in enumerate(new)
        )
        group = RolloutGroup(
            problem=problem, ordinal=0, policy_version=0, prompt_ids_P=np.zeros(1, dtype=np.int32), rollouts=rollouts
        )
        with ThreadPoolExecutor(2) as threads:
            judgements = list(threads.map(lambda index: self.worker.judge(group, index), range(len(new))))
        for text, judgement in zip(new, judgements, strict=True):
            assert judgement.valid, judgement.detail
            self.known[problem.id, text] = judgement.format == 1.0 and judgement.pass_rate == 1.0
        return sum(self.known[problem.id, text] for text in texts) / len(texts)


def report(folder: str) -> list[tuple[str, float, float, float]]:
    """Prints a line a mode; (mode, temperature, speed, points of pass@1 above exact) of each."""
    torch.set_num_threads(1)
    problems = [*microcode_problems("held_out"), *microcode_problems("validation")][:NUM_PROBLEMS]
    sampling, judge = Sampling(folder), Judge()
    slices = [problems[i::SLICES] for i in range(SLICES)]
    modes = {
        (name, temperature): replace(EXACT, temperature=temperature, **changes)
        for temperature in TEMPERATURES
        for name, changes in {"exact": {}, **MODES}.items()
    }
    seconds: dict[tuple[str, float], list[float]] = {mode: [] for mode in modes}
    passes: dict[tuple[str, float], list[float]] = {mode: [] for mode in modes}
    rates: dict[tuple[str, float], list[float]] = {mode: [] for mode in modes}
    for part in slices:
        for mode, params in modes.items():
            texts, taken, made = sampling.fill(part, params)
            seconds[mode].append(taken)
            passes[mode].append(made)
            rates[mode] += [judge.pass_rate(problem, text) for problem, text in zip(part, texts, strict=True)]
    judge.worker.pool.close()
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, torch {torch.__version__}, 1 thread; {folder}; "
        f"{len(problems)} problems x {SAMPLES} samples\n"
    )
    print("| mode | temperature | passes | times as fast | pass@1 % | against exact, points [95%] |")
    print("|---|---|---|---|---|---|")
    points = []
    for name, temperature in modes:
        mode, exact = (name, temperature), ("exact", temperature)
        ratios = [a / b for a, b in zip(seconds[exact], seconds[mode], strict=True)]
        gain, low, high = paired_bootstrap(rates[exact], rates[mode], seed=0)
        points.append((name, temperature, float(np.median(ratios)), 100 * gain))
        print(
            f"| {name} | {temperature:g} | {np.mean(passes[mode]):.2f} "
            f"| {np.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}] | {100 * np.mean(rates[mode]):.1f} "
            f"| {100 * gain:+.2f} [{100 * low:+.2f}..{100 * high:+.2f}] |",
            flush=True,
        )
    return points


def draw(points: list[tuple[str, float, float, float]], path: Path) -> None:
    """Speed to the right, points of pass@1 upwards."""
    width, height, left, bottom = 900, 520, 70, 50
    fastest, lowest = max(p[2] for p in points) * 1.1, min(p[3] for p in points) * 1.1 - 0.5
    highest = max(p[3] for p in points) + 0.5

    def place(speed: float, gain: float) -> tuple[float, float]:
        x = left + (width - left - 20) * speed / fastest
        return x, 20 + (height - bottom - 20) * (highest - gain) / (highest - lowest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">times as fast as exact sampling</text>',
        f'<text transform="translate(18 {height / 2}) rotate(-90)" text-anchor="middle">points of pass@1</text>',
    ]
    for gain in range(int(lowest), int(highest) + 1, max(1, int((highest - lowest) / 8))):
        _, y = place(0, gain)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{gain:+d}</text>')
    for speed in range(int(fastest) + 1):
        x, _ = place(speed, 0)
        parts.append(f'<text x="{x:.1f}" y="{height - 30}" text-anchor="middle">{speed}</text>')
    for row, (temperature, colour) in enumerate(TEMPERATURES.items()):
        parts.append(f'<text x="{width - 130}" y="{40 + 16 * row}" fill="{colour}">temperature {temperature:g}</text>')
    for name, temperature, speed, gain in points:
        x, y = place(speed, gain)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{TEMPERATURES[temperature]}"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the quickstart's model")
    points = report(parser.parse_args().model)
    draw(points, Path(__file__).parent / "results" / "sampler_frontier.svg")


if __name__ == "__main__":
    main()
