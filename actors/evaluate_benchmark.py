"""`diffrl eval --model`: a model folder on a benchmark, sampled by the decoder of training and judged in the sandbox.

Everything goes into a folder: journal.jsonl gets every text when it was sampled and every verdict when it was given, so that a
killed evaluation goes on where it was; samples.parquet, results.json and results.md are made of it at the end. A sample on
which the judge fails has no verdict: it is masked, told beside the score, and judged again when the command is run again.
"""

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow.parquet as pq
import ray
import torch
from ray.exceptions import RayActorError
from transformers import PreTrainedTokenizerFast

from actors.commands import (
    LIMITS,
    SampleOptions,
    check_folder,
    completion_text,
    context_length,
    device_of,
    explain_steps,
    open_policy,
    open_tokenizer,
)
from actors.evaluate import EVALUATION_ATTEMPTS
from actors.placement import Ask, make_room
from actors.reward import submission
from actors.rollout import canvases_of
from actors.system import cluster
from diffrl.benchmarks import Style, Task, TaskFile, benchmark_tasks
from diffrl.benchmarks.post_processing import POST_PROCESSING
from diffrl.benchmarks.results import JudgedSample, report_text, sample_table, score_table, scores_of
from diffrl.causal_sampler import engine_for
from diffrl.config import SupervisionConfig
from diffrl.errors import ConfigError, RunStoppedError, shown
from diffrl.files import write_json, write_whole
from diffrl.fingerprints import FileHashes, digest, model_files
from diffrl.infilling import check_length
from diffrl.models.tokens import end_ids, length_with_end
from diffrl.prompts import chat_ids
from diffrl.seeds import derive_seed
from sandbox.backends import BackendOptions, open_sandbox, pods_for
from sandbox.pool import Pool
from sandbox.types import SandboxError

PART = 64  # rows that are sampled between two looks at the journal
Key = tuple[float, str, int]  # temperature, problem, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What is evaluated and where it goes, beside how it is sampled.

    EvalOptions(benchmark="humaneval_plus", data="HumanEvalPlus.jsonl.gz", out="runs/eval", style="chat",
                temperatures=(0.0, 0.8), num_samples=10, ks=(1, 10), limit=None, max_tokens_per_batch=16384, workers=0,
                threads=1, gpus_per_worker=0.0)
    """

    benchmark: str
    data: str
    out: str
    style: str  # chat or completion
    temperatures: tuple[float, ...]
    num_samples: int
    ks: tuple[int, ...]  # empty: 1 and num_samples
    limit: int | None
    max_tokens_per_batch: int
    workers: int  # Ray actors that share the rows; 0: this process samples
    threads: int  # of torch, in each
    gpus_per_worker: float

    def __post_init__(self) -> None:
        """Raises ConfigError, in the command line's names."""
        checks = {
            "prompt": (self.style, self.style in get_args(Style), f"be one of {', '.join(get_args(Style))}"),
            "samples": (self.num_samples, self.num_samples >= 1, "be at least 1"),
            "max-tokens-per-batch": (self.max_tokens_per_batch, self.max_tokens_per_batch >= 1, "be at least 1"),
            "workers": (self.workers, self.workers >= 0, "be at least 0"),
            "threads": (self.threads, self.threads >= 1, "be at least 1"),
            "temperature": (
                self.temperatures,
                len(set(self.temperatures)) == len(self.temperatures),
                "not name one twice",
            ),
            "k": (min(self.ks, default=1), min(self.ks, default=1) >= 1, "be at least 1"),
        }
        for option, (value, good, way_out) in checks.items():
            if not good:
                raise ConfigError(f"--{option}: {shown(value)} must {way_out}")

    def num_at(self, temperature: float, algorithm: str) -> int:
        """Greedy samples are all the same, unless positions are drawn: one is enough."""
        return self.num_samples if temperature > 0 or algorithm == "origin" else 1

    def checked_ks(self, algorithm: str) -> tuple[int, ...]:
        most = max(self.num_at(temperature, algorithm) for temperature in self.temperatures)
        if self.ks and max(self.ks) > most:
            greedy = " (one at temperature 0, where all are the same)" if most < self.num_samples else ""
            raise ConfigError(
                f"--k: {max(self.ks)} is more than the {most} samples of a problem{greedy}; raise --samples"
            )
        return self.ks or tuple(sorted({1, most}))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAsk:
    """SampleAsk(key=(0.2, "HumanEval/0", 3), seed=8812..., prompt_ids=(1, 2, ...))"""

    key: Key
    seed: int
    prompt_ids: tuple[int, ...]


class SampleWorker:
    """A model in this process or in a Ray actor."""

    def __init__(self, folder: Path, sampling: SampleOptions, max_tokens: int, threads: int):
        torch.set_num_threads(threads)
        self.sampling, self.num_tokens = sampling, cast(int, sampling.tokens)
        self.tokenizer = open_tokenizer(folder)
        self.model, self.max_tokens = open_policy(folder, self.tokenizer), max_tokens

    def fill(self, asks: Sequence[SampleAsk]) -> list[tuple[str, int]]:
        """(text, number of tokens) of each; all of one temperature."""
        sampling, ends = replace(self.sampling, temperature=asks[0].key[0]), end_ids(self.tokenizer)
        engine = engine_for(
            self.model,
            sampling.params(self.num_tokens),
            max_tokens=self.max_tokens,
            vocab_size=len(self.tokenizer),
            end_ids=ends,
            device=device_of(self.model),
        )
        for ask in asks:
            prompt_P = torch.tensor(ask.prompt_ids, dtype=torch.int32).numpy()
            [canvas] = canvases_of(prompt_P, self.num_tokens, [ask.seed])
            engine.add(canvas)
        return [
            (
                completion_text(row, self.num_tokens, self.tokenizer),
                length_with_end(row.ids_L[-self.num_tokens :].cpu().numpy(), ends),
            )
            for row in engine.run()
        ]


class Journal:
    """What was sampled and judged so far, in a file that only grows."""

    def __init__(self, path: Path):
        self.texts: dict[Key, dict[str, Any]] = {}
        self.verdicts: dict[Key, dict[str, Any]] = {}
        self.lock = threading.Lock()
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self.take(json.loads(line))
        self.file = path.open("ab")
        self.file.truncate(len(whole))  # a line that was cut off with the process

    def take(self, entry: dict[str, Any]) -> None:
        key = cast(Key, tuple(entry["key"]))
        (self.texts if "text" in entry else self.verdicts)[key] = entry

    def unjudged(self) -> list[Key]:
        """What was sampled and has no verdict, or none yet: the judge may have failed on it."""
        return [key for key in self.texts if self.verdicts.get(key, {}).get("statuses") is None]

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        with self.lock:
            for entry in entries:
                self.file.write(json.dumps(entry).encode() + b"\n")
                self.take(entry)
            self.file.flush()

    def close(self) -> None:
        self.file.close()


def evaluate_benchmark(options: EvalOptions, sampling: SampleOptions, judge: BackendOptions) -> None:
    """Sample, judge, and print the table; the last line names the folder. Raises ConfigError before anything is started."""
    if sampling.tokens is None:
        raise ConfigError("--tokens: not given; say how many tokens a completion has, such as --tokens 256")
    ks = options.checked_ks(sampling.algorithm)
    for temperature in options.temperatures:
        replace(sampling, temperature=temperature).params(sampling.tokens)
    folder = check_folder(sampling.model)
    try:
        read = benchmark_tasks(options.benchmark, options.data, limit=options.limit)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    explain_steps(sampling.params(sampling.tokens), sampling.tokens)
    asks = asks_of(read.tasks, options, sampling, open_tokenizer(folder), context_length(folder))
    out = Path(options.out)
    settings = open_folder(out, settings_of(options, sampling, read.tasks, out))
    grader, judge_name = sample_and_judge(folder, asks, read.tasks, options, sampling, judge)
    samples = [judged_sample(ask, grader) for ask in asks]
    run = {"max_tokens_per_batch": options.max_tokens_per_batch, "workers": options.workers, "judge": judge_name}
    results = {
        "benchmark": options.benchmark,
        "settings": settings,
        "run": run,
        "num_rows_left_out": read.num_left_out,
        "scores": scores_of(samples, ks, seed=sampling.seed, num_base_tests=read.tasks[0].num_base_tests),
    }
    write_results(out, samples, results)
    tell(out, read, results)


def sample_and_judge(
    folder: Path,
    asks: Sequence[SampleAsk],
    tasks: Sequence[Task],
    options: EvalOptions,
    sampling: SampleOptions,
    judge: BackendOptions,
) -> "tuple[Grader, str | None]":
    """Whatever the journal does not have yet; programs are judged while others are sampled."""
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(Path(options.out) / "journal.jsonl")))
        pool = None
        if any(task.answer is None for task in tasks):
            try:
                judge = stack.enter_context(pods_for(judge))
                pool = stack.enter_context(open_sandbox(judge))
            except SandboxError as error:
                raise ConfigError(f"sandbox: {error}") from error
        grader = Grader(tasks, cast(Style, options.style), pool, journal)
        threads = stack.enter_context(ThreadPoolExecutor(pool.slots if pool else 1))
        stack.callback(threads.shutdown, cancel_futures=True)  # what waits is not judged when sampling fails
        futures = [threads.submit(grader.grade, key) for key in journal.unjudged()]
        pending = [ask for ask in asks if ask.key not in journal.texts]
        for part, texts in sampled(folder, pending, sampling, options):
            entries = zip(part, texts, strict=True)
            journal.append({"key": a.key, "seed": a.seed, "text": t, "num_tokens": n} for a, (t, n) in entries)
            futures += [threads.submit(grader.grade, ask.key) for ask in part]
            print(f"{len(journal.texts)} of {len(asks)} sampled", file=sys.stderr, flush=True)
        for future in futures:
            future.result()
    return grader, pool.name if pool else None


def tell(out: Path, read: TaskFile, results: Mapping[str, Any]) -> None:
    if read.num_left_out:
        print(f"{read.num_left_out} rows are not of {results['benchmark']} and were left out")
    print(score_table(results["scores"]))
    masked = sum(score["num_masked"] for score in results["scores"])
    if masked:
        print(f"the judge failed on {masked} samples, which count neither way; run the command again to judge them")
    print(f"{results['benchmark']}: samples, verdicts and results in {out}")


def asks_of(
    tasks: Sequence[Task],
    options: EvalOptions,
    sampling: SampleOptions,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
) -> list[SampleAsk]:
    """Every sample, by temperature, then by problem. Raises ConfigError for what cannot be asked so."""
    if options.style == "chat" and tokenizer.chat_template is None:
        raise ConfigError(f"--prompt: the tokenizer of {sampling.model} has no chat template; give --prompt completion")
    prompts = {}
    for task in tasks:
        name = task.problem.id
        if options.style == "chat":
            ids = chat_ids(tokenizer, task.problem)
        elif task.prefix is None:
            raise ConfigError(f"--prompt: {options.benchmark} has nothing to complete; give --prompt chat")
        else:
            ids = tokenizer.encode(task.prefix, add_special_tokens=False)
        try:
            check_length(len(ids), cast(int, sampling.tokens), context)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        prompts[name] = tuple(ids)
    return [
        SampleAsk(
            key=(temperature, name, index),
            seed=derive_seed(sampling.seed, "benchmark", options.benchmark, name, str(temperature), index),
            prompt_ids=ids,
        )
        for temperature in options.temperatures
        for name, ids in prompts.items()
        for index in range(options.num_at(temperature, sampling.algorithm))
    ]


# The folder.


def settings_of(options: EvalOptions, sampling: SampleOptions, tasks: Sequence[Task], out: Path) -> dict[str, Any]:
    """What the samples and verdicts depend on, in the words of the command line."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    hashes, folder = FileHashes(out / "hashes.json"), Path(sampling.model)
    weights = digest(json.dumps(model_files(folder, hashes)))
    hashes.save()
    sampled_by = {name.replace("_", "-"): value for name, value in asdict(sampling).items()}
    return sampled_by | {
        "data": f"{Path(options.data).name}, {len(tasks)} problems, sha256 {digest(repr(tasks))[:16]}",
        "model": f"{folder.resolve().name}, sha256 {weights[:16]}",
        "prompt": options.style,
        "post-processing": POST_PROCESSING,
        "temperature": list(options.temperatures),
        "samples": options.num_samples,
        "judge limits": f"{LIMITS.cpu_s:g} CPU s, {LIMITS.wall_s:g} s, {LIMITS.memory_mb} MB a test",
    }


def open_folder(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError where an evaluation with other settings lies."""
    file = out / "settings.json"
    if file.exists():
        old = json.loads(file.read_text())
        for name in {**old, **settings}:
            if old.get(name) != settings.get(name):
                raise ConfigError(
                    f"--out: {out} holds an evaluation with {name} {shown(old.get(name))}, and now it is "
                    f"{shown(settings.get(name))}; name another folder"
                )
    write_json(file, settings)
    return settings


def write_results(out: Path, samples: Sequence[JudgedSample], results: Mapping[str, Any]) -> None:
    part = out / "samples.parquet.part"
    pq.write_table(sample_table(samples), part)
    part.rename(out / "samples.parquet")
    write_json(out / "results.json", results)
    write_whole(out / "results.md", report_text(results))


# Sampling.


def sampled(
    folder: Path, asks: Sequence[SampleAsk], sampling: SampleOptions, options: EvalOptions
) -> Iterator[tuple[Sequence[SampleAsk], list[tuple[str, int]]]]:
    """Parts of the rows with their texts, in whatever order they are done."""
    if not asks:
        return
    parts: list[Sequence[SampleAsk]] = []
    for temperature in options.temperatures:
        same = [ask for ask in asks if ask.key[0] == temperature]
        parts += [same[start : start + PART] for start in range(0, len(same), PART)]
    arguments = (folder.resolve(), sampling, options.max_tokens_per_batch, options.threads)
    if options.workers == 0:
        worker = SampleWorker(*arguments)
        for part in parts:
            yield part, worker.fill(part)
        return
    room = Ask(
        number="eval --workers",
        cpus="eval --threads",
        gpus="eval --gpus-per-worker",
        count=options.workers,
        resources={"CPU": float(options.threads), "GPU": options.gpus_per_worker},
        labels={},
    )
    with cluster(None, options.workers * options.threads):
        make_room([room], SupervisionConfig().start_s, "eval --workers")
        Worker = ray.remote(SampleWorker).options(num_cpus=options.threads, num_gpus=options.gpus_per_worker)
        workers = [Worker.remote(*arguments) for _ in range(min(options.workers, len(parts)))]
        yield from dealt(workers, parts)


def dealt(workers: Sequence[Any], parts: Sequence[Sequence[SampleAsk]]) -> Iterator[tuple[Any, list[tuple[str, int]]]]:
    """Each worker has one part at a time."""
    waiting, busy = list(parts), {}
    try:
        for worker in workers:
            part = waiting.pop(0)
            busy[worker.fill.remote(part)] = worker, part
        while busy:
            [done], _ = ray.wait(list(busy), num_returns=1)
            worker, part = busy.pop(done)
            if waiting:
                following = waiting.pop(0)
                busy[worker.fill.remote(following)] = worker, following
            yield part, cast(list[tuple[str, int]], ray.get(done))
    except RayActorError as error:
        raise RunStoppedError(
            f"a sampling worker died ({str(error).splitlines()[0]}); run again, it goes on"
        ) from error


# Judging.


class Grader:
    """What was sampled gets its verdict, in threads."""

    def __init__(self, tasks: Sequence[Task], style: Style, pool: Pool | None, journal: Journal):
        self.tasks = {task.problem.id: task for task in tasks}
        self.style: Style = style
        self.pool, self.journal = pool, journal

    def code(self, key: Key) -> str:
        return self.tasks[key[1]].program(self.journal.texts[key]["text"], self.style)

    def grade(self, key: Key) -> None:
        task, code = self.tasks[key[1]], self.code(key)
        num_tests = len(task.problem.reward_tests)
        entry = {"key": key, "cpu_s": 0.0, "low_trust": False, "detail": ""}
        if task.answer is not None:
            right = code == task.answer
            entry |= {"statuses": ["passed" if right else "failed"], "detail": "" if right else f"not {task.answer}"}
        elif not code:
            entry |= {"statuses": ["error"] * num_tests, "detail": "nothing was written"}
        else:
            entry |= self.verdict(task, code, key)
        self.journal.append([entry])

    def verdict(self, task: Task, code: str, key: Key) -> dict[str, Any]:
        assert self.pool is not None
        temperature, name, index = key
        made = submission(task.problem, code, f"{name}/{temperature:g}/{index}", LIMITS)
        attempts = EVALUATION_ATTEMPTS
        while True:
            try:
                verdict = self.pool.judge(made)
                break
            except SandboxError as error:
                attempts -= 1
                if not attempts:
                    return {"statuses": None, "detail": str(error)}
        return {
            "statuses": [str(status) for status in verdict.statuses],
            "low_trust": any(verdict.beside),
            "cpu_s": verdict.cpu_s,
            "detail": next((detail for detail in verdict.details if detail), ""),
        }


def judged_sample(ask: SampleAsk, grader: Grader) -> JudgedSample:
    temperature, name, index = ask.key
    text, verdict = grader.journal.texts[ask.key], grader.journal.verdicts[ask.key]
    return JudgedSample(
        temperature=temperature,
        problem_id=name,
        sample_index=index,
        seed=ask.seed,
        text=text["text"],
        num_tokens=text["num_tokens"],
        code=grader.code(ask.key),
        statuses=None if verdict["statuses"] is None else tuple(verdict["statuses"]),
        low_trust=verdict["low_trust"],
        cpu_s=verdict["cpu_s"],
        detail=verdict["detail"],
    )
