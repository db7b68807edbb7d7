"""What models made of problems: samples with their pass rates on disk, AceCode's `inferences`, splits, instruction data.

A problem's samples by one model are one small file, a shard, that appears whole or not at all. Its name says what it depends on
(the problem, the model's weights, the sampling, the judge's limits), so that what is found is right, whatever was
stopped when, and a changed problem or model is sampled anew.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffrl.config.curate import SAMPLED_BY, CurateConfig, CurateModel, CurateSft, CurateSplit
from diffrl.data.acecode import Quantiles, difficulties
from diffrl.data.sft import fenced
from diffrl.files import utf8, write_lines, write_whole
from diffrl.fingerprints import FileHashes, digest, model_files
from diffrl.prompts import build_prompt
from diffrl.types import Problem

SPLITS = ("hard", "medium", "easy")
ROWS_PER_GROUP = 1000

_STRINGS = pa.list_(pa.field("element", pa.string()))
_INFERENCE = pa.struct(
    [
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_id", pa.int64(), nullable=False),
        pa.field("model_name", pa.string(), nullable=False),
        pa.field("pass_rate", pa.float64(), nullable=False),
    ]
)
INFERENCES_SCHEMA = pa.schema(  # AceCode's columns, and the licence
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("test_cases", _STRINGS, nullable=False),  # shown and graded
        pa.field("inferences", pa.list_(pa.field("element", _INFERENCE)), nullable=False),
        pa.field("license", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One judged completion.

    Sample(completion="def f(x): ...", fenced=True, pass_rate=0.5, statuses=("passed", "failed"), num_tokens=23, cpu_s=0.01)
    """

    completion: str  # the program; the whole text where there was no fenced block
    fenced: bool
    pass_rate: float  # share of graded tests that passed, whatever stands around the block
    statuses: tuple[str, ...]
    num_tokens: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """All samples of a problem by one model, or why there are none. Shard(problem_id="mbpp/11", samples=(...), seconds=0.4)"""

    problem_id: str
    samples: tuple[Sample, ...] = ()
    skipped: str = ""
    seconds: float = 0.0  # of the clock, since the shard before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The shards of one model. Store(folder=Path("out/samples/qwen/3f09..."), name="qwen")"""

    folder: Path
    name: str

    def path(self, problem: Problem) -> Path:
        key = digest(json.dumps(asdict(problem) | {"license": "", "family": ""}, sort_keys=True))[:32]
        return self.folder / key[:2] / f"{key}.json"

    def has(self, problem: Problem) -> bool:
        return self.path(problem).is_file()

    def write(self, problem: Problem, shard: Shard) -> None:
        path = self.path(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(shard)))

    def read(self, problem: Problem) -> Shard:
        raw = json.loads(self.path(problem).read_text())
        samples = tuple(Sample(**{**s, "statuses": tuple(s["statuses"])}) for s in raw.pop("samples"))
        return Shard(**raw, samples=samples)


def store_of(config: CurateConfig, name: str) -> Store:
    """Hashes the model's files, where it has any."""
    out, model = Path(config.out), config.models[name]
    used: dict[str, Any] = {key: getattr(model, key) for key in (*SAMPLED_BY, "num_samples")}
    used |= {"seed": config.seed, "limits": [config.sandbox.cpu_s, config.sandbox.wall_s, config.sandbox.memory_mb]}
    if model.path is not None:
        hashes = FileHashes(out / "hashes.json")
        used["files"] = model_files(model.path, hashes)
        hashes.save()
    key = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:12]
    return Store(folder=out / "samples" / name / key, name=name)


# What is made of the shards


def write_inferences(path: Path, problems: Iterable[Problem], stores: Sequence[Store]) -> None:
    """One row a problem, in their order; those that every model skipped have no inferences."""
    part = path.with_name(f"{path.name}.part")
    with pq.ParquetWriter(part, INFERENCES_SCHEMA) as writer:
        rows: list[dict] = []
        for problem in problems:
            rows.append(inference_row(problem, [(store.name, store.read(problem)) for store in stores]))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=INFERENCES_SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=INFERENCES_SCHEMA))
    part.rename(path)


def inference_row(problem: Problem, shards: Sequence[tuple[str, Shard]]) -> dict:
    inferences = [
        {"completion": utf8(s.completion), "completion_id": number, "model_name": name, "pass_rate": s.pass_rate}
        for name, shard in shards
        for number, s in enumerate(shard.samples)
    ]
    return {
        "id": problem.id,
        "source": problem.family,
        "question": problem.prompt,
        "test_cases": [*problem.prompt_tests, *problem.reward_tests],
        "inferences": inferences,
        "license": problem.license,
    }


def split_kinds(rates: Sequence[Sequence[float]], split: CurateSplit) -> list[set[str]]:
    """Which of hard, medium and easy each problem is; nothing without samples."""
    if split.by == "quantiles":
        quantiles = Quantiles(hard=split.hard, hard_std=split.hard_std, medium_low=split.medium_low, easy=split.easy)
        return difficulties(rates, quantiles)

    def kind(mean: float) -> set[str]:
        if mean >= split.easy_min:
            return {"easy"}
        if mean > split.hard_max:
            return {"medium"}
        return {"hard"} if mean >= split.hard_min else set()

    return [kind(float(np.mean(r))) if len(r) else set() for r in rates]


def write_splits(
    folder: Path, problems: Sequence[Problem], stores: Sequence[Store], split: CurateSplit
) -> Mapping[str, int]:
    """hard.jsonl, medium.jsonl and easy.jsonl in our own format, with the mean pass rate; how many problems each has."""
    counted = [store for store in stores if split.models is None or store.name in split.models]
    rates = [[s.pass_rate for store in counted for s in store.read(problem).samples] for problem in problems]
    kinds = split_kinds(rates, split)
    sizes = {}
    for name in SPLITS:
        places = [place for place, found in enumerate(kinds) if name in found]
        rows = (asdict(problems[n]) | {"pass_rate": float(np.mean(rates[n])), "samples": len(rates[n])} for n in places)
        write_lines(folder / f"{name}.jsonl", rows)
        sizes[name] = len(places)
    return sizes


def write_sft(path: Path, problems: Sequence[Problem], stores: Sequence[Store], sft: CurateSft) -> int:
    """The best samples as rows of prompt and completion; how many."""
    rows = [row for problem in problems for row in sft_rows_of(problem, [s.read(problem) for s in stores], sft)]
    write_lines(path, rows)
    return len(rows)


def sft_rows_of(problem: Problem, shards: Sequence[Shard], sft: CurateSft) -> Iterator[dict[str, str]]:
    samples = [s for shard in shards for s in shard.samples if s.fenced and s.pass_rate >= sft.min_pass_rate]
    samples.sort(key=lambda s: (-s.pass_rate, len(s.completion), s.completion))
    programs = list(dict.fromkeys(s.completion.strip() for s in samples))
    for program in programs[: sft.per_problem]:
        yield {"prompt": build_prompt(problem), "completion": fenced(program)}


def cost_of(problems: Sequence[Problem], store: Store, model: CurateModel) -> dict[str, float]:
    """Of one model, over all sessions that made its shards."""
    shards = [store.read(problem) for problem in problems]
    samples = [sample for shard in shards for sample in shard.samples]
    return {
        "problems": len(shards),
        "skipped": sum(bool(shard.skipped) for shard in shards),
        "completions": len(samples),
        "tokens": sum(sample.num_tokens for sample in samples),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "judged_cpu_s": round(sum(sample.cpu_s for sample in samples), 3),
        "pass_rate": float(np.mean([sample.pass_rate for sample in samples])) if samples else 0.0,
    }
