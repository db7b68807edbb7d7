"""`diffrl curate`: sample problems with one model after the other, judge, and make of it AceCode's `inferences`, splits by
difficulty, and instruction data.

Sampling and judging overlap; a problem whose samples are all judged becomes one shard (diffrl/curation.py). What has a shard is
not sampled again, so a run that was killed goes on. What the judge fails on is tried as often as in an evaluation, and
then stops the run: it never counts as wrong.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from actors.completions import SAMPLERS, Completion, Sampled, Sampler
from actors.evaluate import EVALUATION_ATTEMPTS
from actors.prepare import choose_sandbox, said_in_a_line
from actors.reward import RewardWorker
from diffrl.config.curate import CurateConfig
from diffrl.curation import Sample, Shard, Store, cost_of, store_of, write_inferences, write_sft, write_splits
from diffrl.data.sources import check_ids, problems_of
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.files import write_json
from diffrl.prompts import extract_code
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.types import Problem

SAY_S = 10.0  # between two lines of progress
REFUSALS = 3  # problems in a row at the beginning that cannot be sampled: then something else is wrong
PENDING = 4  # problems that wait for the judge, for each of its slots


def curate(config: CurateConfig, *, only_check: bool = False) -> None:
    """Prints what it cost and where the results are. Raises ConfigError before work starts, RunStoppedError after."""
    with said_in_a_line(config):
        problems = problems_of(config.data)
        check_ids(problems)
        sandbox, _ = choose_sandbox(config.sandbox)
        config = config.model_copy(update={"sandbox": sandbox})
        samplers = {name: SAMPLERS[model.backend](config, name) for name, model in config.models.items()}
        if Path(config.out).exists() and not Path(config.out).is_dir():
            raise ConfigError(f"out: {config.out} is not a folder; name another")
        if only_check:
            print(f"{len(problems)} problems, {len(samplers)} models, judged by {sandbox.backend}: ready")
            return
        Path(config.out).mkdir(parents=True, exist_ok=True)
        stores = {name: store_of(config, name) for name in samplers}
    for name, sampler in samplers.items():
        with closing(sampler):
            sample_and_judge(config, problems, sampler, stores[name])
    conclude(config, problems, list(stores.values()))


def sample_and_judge(config: CurateConfig, problems: Sequence[Problem], sampler: Sampler, store: Store) -> None:
    """Until every problem has its shard."""
    todo = [problem for problem in problems if not store.has(problem)]
    if not todo:
        return
    worker = RewardWorker(config.sandbox, RECIPE_WEIGHTS)
    attempts = EVALUATION_ATTEMPTS * config.sandbox.attempts
    with closing(worker.pool), ThreadPoolExecutor(config.sandbox.slots) as threads:
        waiting: deque[tuple[Problem, list[Future[Sample]]]] = deque()
        progress = Progress(store, len(problems) - len(todo), len(problems))

        def judge() -> None:
            problem, futures = waiting.popleft()
            samples = tuple(future.result() for future in futures)
            progress.write(problem, Shard(problem_id=problem.id, samples=samples))

        try:
            for sampled in beyond_doubt(sampler.sample(todo), store.name):
                problem = sampled.problem
                if sampled.skipped:
                    progress.write(problem, Shard(problem_id=problem.id, skipped=sampled.skipped))
                    continue
                numbered = enumerate(sampled.completions)
                waiting.append(
                    (problem, [threads.submit(judged, worker, problem, c, n, attempts) for n, c in numbered])
                )
                while waiting and (len(waiting) > PENDING * config.sandbox.slots or is_done(waiting[0])):
                    judge()
            while waiting:
                judge()
        except RunStoppedError:
            while waiting:  # what is sampled is not lost
                judge()
            raise
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def is_done(entry: tuple[Problem, list[Future[Sample]]]) -> bool:
    return all(future.done() for future in entry[1])


def beyond_doubt(found: Iterator[Sampled], name: str) -> Iterator[Sampled]:
    """What was skipped is held back until something was not. Raises RunStoppedError when the first ones are all skipped."""
    held: list[Sampled] | None = []
    for sampled in found:
        if held is None:
            yield sampled
        elif not sampled.skipped:
            yield from [*held, sampled]
            held = None
        else:
            held.append(sampled)
            if len(held) == REFUSALS:
                raise RunStoppedError(
                    f"models.{name}: the first {REFUSALS} problems cannot be sampled, the last of them {sampled.problem.id}: "
                    f"{sampled.skipped}"
                )
    yield from held or ()


def judged(worker: RewardWorker, problem: Problem, completion: Completion, index: int, attempts: int) -> Sample:
    """Raises RunStoppedError when the judge fails again and again."""
    judgement = worker.judge_text(problem, completion.text, index)
    while judgement.statuses is None:
        attempts -= 1
        if attempts < 1:
            raise RunStoppedError(f"curate: {problem.id} could not be judged: {judgement.detail}")
        judgement = worker.judge_text(problem, completion.text, index)
    code = extract_code(completion.text)
    return Sample(
        completion=code or completion.text,
        fenced=bool(code),
        pass_rate=judgement.statuses.count("passed") / len(judgement.statuses),
        statuses=judgement.statuses,
        num_tokens=completion.num_tokens,
        cpu_s=judgement.cpu_s,
    )


class Progress:
    """Writes shards, with the time that each took, and says now and then how far it is."""

    def __init__(self, store: Store, done: int, of: int):
        self.store, self.done, self.of = store, done, of
        self.tokens, self.rates = 0, list[float]()
        self.started = self.last = self.said = time.monotonic()

    def write(self, problem: Problem, shard: Shard) -> None:
        now = time.monotonic()
        timed = Shard(
            problem_id=shard.problem_id, samples=shard.samples, skipped=shard.skipped, seconds=now - self.last
        )
        self.store.write(problem, timed)
        self.last = now
        self.done += 1
        self.tokens += sum(sample.num_tokens for sample in shard.samples)
        self.rates += [sample.pass_rate for sample in shard.samples]
        if now - self.said >= SAY_S:
            self.said = now
            speed = self.tokens / (now - self.started)
            rate = sum(self.rates) / max(len(self.rates), 1)
            words = f"{self.done} of {self.of} problems, {speed:.0f} tokens/s, pass rate {rate:.1%}"
            print(f"{self.store.name}: {words}", file=sys.stderr, flush=True)


def conclude(config: CurateConfig, problems: Sequence[Problem], stores: Sequence[Store]) -> None:
    """Everything that is made of the shards, which costs no sampling."""
    out = Path(config.out)
    write_inferences(out / "inferences.parquet", problems, stores)
    sizes = write_splits(out, problems, stores, config.split)
    num_rows = write_sft(out / "sft.jsonl", problems, stores, config.sft)
    costs = {store.name: cost_of(problems, store, config.models[store.name]) for store in stores}
    write_json(out / "costs.json", costs)
    for name, cost in costs.items():
        skipped = f" ({cost['skipped']:.0f} skipped)" if cost["skipped"] else ""
        print(
            f"{name}: {cost['problems']:.0f} problems{skipped}, {cost['completions']:.0f} completions, {cost['tokens']:.0f} "
            f"tokens in {cost['seconds']:.1f} s, {cost['judged_cpu_s']:.1f} s of CPU judged, pass rate {cost['pass_rate']:.1%}"
        )
    words = ", ".join(f"{size} {name}" for name, size in sizes.items())
    print(f"{words}, {num_rows} rows of instruction data -> {out}")
