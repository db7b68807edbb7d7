"""What `diffrl generate` does, and `diffrl eval` with solutions and with holes: no Ray, one process."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.live import Live
from transformers import PreTrainedTokenizerFast

from actors.reward import submission
from diffrl.benchmarks import INFILLING, InfillingTask, benchmark_tasks, canonical_code, infilling_tasks
from diffrl.causal_sampler import CausalEngine, engine_for
from diffrl.config import ModelConfig
from diffrl.errors import ConfigError
from diffrl.infilling import HoledText, canvas_of, check_length, filled_text, hole_texts, parse_holes
from diffrl.models.base import PolicyModel
from diffrl.models.folders import family_of, read_config
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tokens import decode, end_ids, length_with_end
from diffrl.prompts import chat_ids
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams
from diffrl.sampler.params import Algorithm
from diffrl.seeds import derive_seed
from diffrl.trajectory import terminal_frame, to_html, to_svg, tokens_of, visible
from diffrl.types import Problem
from sandbox.backends import BackendOptions, open_sandbox, pods_for
from sandbox.types import Limits, SandboxError, TestStatus, Verdict

LIMITS = Limits(cpu_s=10.0, wall_s=300.0, memory_mb=1024)  # of a test
DEFAULT_TOKENS = 34  # the quickstart's window
MAX_TOKENS = 1 << 13  # positions of a forward pass of an evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How a model folder is sampled; None and top_k 0 are the command line's words for what is not said.

    SampleOptions(model="runs/quickstart/rl/model", tokens=34, steps=None, temperature=0.0, top_p=0.95, top_k=50,
                  algorithm="entropy", seed=0)
    """

    model: str
    tokens: int | None
    steps: int | None  # as many as tokens
    temperature: float
    top_p: float
    top_k: int  # 0: all
    algorithm: str
    seed: int

    def params(self, num_tokens: int) -> SamplingParams:
        """Raises ConfigError, in the command line's names."""
        if num_tokens < 1:
            raise ConfigError(f"--tokens: {num_tokens} must be at least 1")
        try:
            return SamplingParams(
                algorithm=cast(Algorithm, self.algorithm),
                steps=num_tokens if self.steps is None else self.steps,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k or None,
            )
        except ValueError as error:
            name, _, rest = str(error).partition(":")
            raise ConfigError(f"--{name.removeprefix('sampling.').replace('_', '-')}:{rest}") from error


# diffrl eval


def judge_solutions(benchmark: str, path: str, solutions: str, options: BackendOptions, limit: int | None) -> None:
    """Judge the data set's own solutions; the last line says how many pass."""
    if solutions != "canonical":
        raise ConfigError(f"--solutions: {solutions!r} is unknown; known: canonical")
    try:
        if benchmark == INFILLING:
            tasks = infilling_tasks(path, limit=limit)
            problems, codes = [task.problem for task in tasks], [task.program(task.middle) for task in tasks]
        else:
            found = benchmark_tasks(benchmark, path, limit=limit).tasks
            if found[0].answer is not None:  # no programs
                passed = sum(task.program(task.problem.solution or "", "chat") == task.answer for task in found)
                print(f"{benchmark}: {passed} of {len(found)} {solutions} solutions pass")
                return
            problems = [task.problem for task in found]
            codes = [canonical_code(problem) for problem in problems]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    passed = judge_programs(problems, lambda: codes, options)
    print(f"{benchmark}: {passed} of {len(problems)} {solutions} solutions pass")


def fill_holes(path: str, sampling: SampleOptions, options: BackendOptions, limit: int | None) -> None:
    """Have a model fill the holes of HumanEval-Infilling, and judge the programs; the last line is pass@1."""
    if sampling.tokens is None:
        raise ConfigError("--tokens: not given; say how many tokens a hole has, such as --tokens 32")
    params = sampling.params(sampling.tokens)
    folder = check_folder(sampling.model)
    try:
        tasks = infilling_tasks(path, limit=limit)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    explain_steps(params, sampling.tokens)
    tokenizer = open_tokenizer(folder)
    holed = [HoledText(parts=(task.prefix, task.suffix), holes=(sampling.tokens,)) for task in tasks]
    canvases = [
        infill_canvas(text, tokenizer, folder, seed=derive_seed(sampling.seed, INFILLING, task.problem.id), of=task)
        for text, task in zip(holed, tasks, strict=True)
    ]

    def programs() -> list[str]:
        engine = open_engine(folder, tokenizer, params, max_tokens=MAX_TOKENS)
        for canvas in canvases:
            engine.add(canvas)
        rows = zip(tasks, holed, engine.run(), strict=True)
        return [task.program(*hole_texts(text, filled, tokenizer)) for task, text, filled in rows]

    passed = judge_programs([task.problem for task in tasks], programs, options)
    print(f"{INFILLING}: pass@1 {passed / len(tasks):.1%} ({passed} of {len(tasks)})")


def judge_programs(problems: Sequence[Problem], programs: Callable[[], list[str]], options: BackendOptions) -> int:
    """How many programs pass all of their problem's tests; a line for each that does not, and one of all verdicts.

    The programs are asked for when the sandbox stands: one that cannot be opened is found out before a model works.
    """

    def judge(problem: Problem, code: str) -> Verdict:
        return pool.judge(submission(problem, code, problem.id, LIMITS))

    if not problems:
        raise ConfigError("--data: the file has no rows; give the benchmark's own file")
    try:
        with pods_for(options) as options, open_sandbox(options) as pool, ThreadPoolExecutor(pool.slots) as threads:
            verdicts = list(threads.map(judge, problems, programs()))
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
    return passed


# diffrl generate


def generate_texts(
    sampling: SampleOptions,
    prompt: str | None,
    *,
    file: str | None = None,
    infill: bool = False,
    samples: int = 1,
    save_svg: str | None = None,
    save_html: str | None = None,
) -> None:
    """Print completions of one prompt, or with `infill` a text with its holes filled; the last line, on stderr, is what
    it took. A single one is shown on a terminal while it is denoised. Files show the first sample.

    Everything that can be checked without the weights is checked before they are read. Raises ConfigError.
    """
    text = given_text(prompt, file)
    holed = holes_of(text, sampling.tokens) if infill else None
    num_tokens = holed.num_tokens if holed else DEFAULT_TOKENS if sampling.tokens is None else sampling.tokens
    params = sampling.params(num_tokens)
    if samples < 1:
        raise ConfigError(f"--samples: {samples} must be at least 1")
    for option, path in (("--save-svg", save_svg), ("--save-html", save_html)):
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise ConfigError(f"{option}: {path} cannot be written; name a file in a folder that exists")
    folder = check_folder(sampling.model)
    tokenizer = open_tokenizer(folder)
    if holed is not None:
        canvas = infill_canvas(holed, tokenizer, folder, seed=0)
        shown = len(canvas.ids_L)
    else:
        canvas = chat_canvas(text, num_tokens, tokenizer, folder)
        shown = num_tokens
    explain_steps(params, num_tokens)
    engine = open_engine(folder, tokenizer, params, seed=sampling.seed)
    for index in range(samples):
        seed = derive_seed(sampling.seed, "generate", index)
        engine.add(Canvas(ids_L=canvas.ids_L, hidden_L=canvas.hidden_L, seed=seed))
    start = time.perf_counter()
    rows = denoise(engine, tokenizer, shown)
    seconds = time.perf_counter() - start
    for row in rows:
        made = completion_text(row, shown, tokenizer) if holed is None else filled_text(holed, row, tokenizer)
        made = visible(made) if sys.stdout.isatty() else made
        print(made, end="" if made.endswith("\n") else "\n", flush=True)
    parts = (tensor[-shown:] for tensor in (rows[0].ids_L, rows[0].step_map_L, rows[0].probability_L))
    tokens = tokens_of(tokenizer, *parts)
    for path, render in ((save_svg, to_svg), (save_html, to_html)):
        if path is not None:
            Path(path).write_text(render(tokens, f"{folder}: {' '.join(text.split())[:100]}"), encoding="utf-8")
    total = samples * num_tokens
    print(
        f"{total} tokens, {engine.num_passes} forward passes, {seconds:.2f} s, {total / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def given_text(prompt: str | None, file: str | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("prompt: give it on the command line or in a file (--file), one of them")
    try:
        text = Path(file).read_bytes().decode() if file is not None else cast(str, prompt)
        text.encode()  # an argument that is not UTF-8 has surrogates
    except OSError as error:
        raise ConfigError(f"--file: {file} cannot be read ({error.strerror}); name a text file") from error
    except UnicodeError as error:
        raise ConfigError(f"{'prompt' if file is None else '--file'}: not UTF-8 ({error}); convert it") from error
    return text


def holes_of(text: str, tokens: int | None) -> HoledText:
    if tokens is not None:
        raise ConfigError(f"--tokens: {tokens} given with --infill, where the holes say how many; leave it out")
    try:
        return parse_holes(text)
    except ValueError as error:
        raise ConfigError(f"--infill: {error}") from error


def explain_steps(params: SamplingParams, num_tokens: int) -> None:
    if params.steps > num_tokens:
        print(
            f"diffrl: --steps: {params.steps} for {num_tokens} tokens; steps that reveal nothing cost nothing",
            file=sys.stderr,
        )


def chat_canvas(prompt: str, num_tokens: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Canvas:
    """The chat prompt and a window behind it; its seed is not used."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"MODEL: the tokenizer of {folder} has no chat template; add one, or use --infill")
    ids = chat_ids(tokenizer, Problem(id="-", prompt=prompt, prompt_tests=(), reward_tests=()))
    try:
        check_length(len(ids), num_tokens, context_length(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    hidden_L = torch.arange(len(ids) + num_tokens) >= len(ids)
    return Canvas(ids_L=torch.tensor([*ids, *[0] * num_tokens]), hidden_L=hidden_L, seed=0)


def infill_canvas(
    holed: HoledText, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int, of: InfillingTask | None = None
) -> Canvas:
    try:
        if policy_of(folder).family == "causal":
            raise ValueError(f"MODEL: {folder} is autoregressive and fills no holes; give a diffusion model")
        return canvas_of(holed, tokenizer, seed=seed, context=context_length(folder))
    except ValueError as error:
        raise ConfigError(f"{'' if of is None else f'{of.problem.id}: '}{error}") from error


def denoise(engine: Engine | CausalEngine, tokenizer: PreTrainedTokenizerFast, shown: int) -> list[Filled]:
    """Every row of the engine. On a terminal, a single row's last `shown` positions are drawn after each step."""
    if isinstance(engine, CausalEngine) or engine.num_added != 1 or not sys.stdout.isatty():
        return engine.run()
    full: list[tuple[int, Filled]] = []
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        while engine.busy:
            full += engine.step()
            if engine.busy:
                state = (engine.ids_RW, engine.step_map_RW, engine.probability_RW, engine.hidden_RW)
                tokens = tokens_of(tokenizer, *(tensor_RW[0, -shown:] for tensor_RW in state))
                live.update(terminal_frame(tokens), refresh=True)
    return [filled for _, filled in full]


def completion_text(row: Filled, num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The last `num_tokens` positions, up to the first end token."""
    ids, ends = row.ids_L[-num_tokens:].cpu().numpy(), end_ids(tokenizer)
    return decode(tokenizer, ids[: length_with_end(ids, ends)], ends)


# A model folder: what it says of itself before its weights are read.


def check_folder(path: str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"MODEL: {path} is no model folder, it holds no config.json; give a Hugging Face folder, such as "
            "runs/quickstart/rl/model"
        )
    return Path(path)


def context_length(folder: Path) -> int:
    """Raises ValueError for a config.json of no family."""
    raw = read_config(folder)
    return int(family_of(raw).stock_config(raw).max_position_embeddings)


def policy_of(folder: Path) -> ModelConfig:
    """A finished model, of the family that its config.json says. Raises ValueError for one of no family."""
    return ModelConfig(path=str(folder), family=family_of(read_config(folder)).family)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        return load_policy_tokenizer(policy_of(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_policy(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> PolicyModel:
    """The model of a folder, on a GPU where there is one. Raises ConfigError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_policy(policy_of(folder), tokenizer, seed=seed).eval().to(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def device_of(model: PolicyModel) -> torch.device:
    return next(model.parameters()).device


def open_engine(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    params: SamplingParams,
    *,
    seed: int = 0,
    max_tokens: int = 1 << 62,
) -> Engine | CausalEngine:
    model = open_policy(folder, tokenizer, seed=seed)
    ends, device = end_ids(tokenizer), device_of(model)
    return engine_for(model, params, max_tokens=max_tokens, vocab_size=len(tokenizer), end_ids=ends, device=device)
