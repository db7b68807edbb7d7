"""Shards, splits and instruction data, without any model."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffrl.config.curate import CurateConfig, CurateSft, CurateSplit
from diffrl.config_file import load_as
from diffrl.curation import (
    INFERENCES_SCHEMA,
    Sample,
    Shard,
    Store,
    cost_of,
    split_kinds,
    store_of,
    write_inferences,
    write_sft,
    write_splits,
)
from diffrl.data.acecode import difficulties
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import ReadOptions, load_problems, read_problems
from diffrl.prompts import build_prompt
from diffrl.types import Problem

PROBLEMS = [replace(problem, license="MIT") for problem in microcode_problems("train")[:4]]
RATES = ((0.0, 0.2), (0.5, 0.5), (1.0, 1.0), ())


def sample(rate: float, program: str = "def f(x):\n    return x", fenced: bool = True) -> Sample:
    statuses = ("passed",) if rate else ("failed",)
    return Sample(completion=program, fenced=fenced, pass_rate=rate, statuses=statuses, num_tokens=5, cpu_s=0.25)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(folder=tmp_path / "samples", name="tiny")
    for problem, rates in zip(PROBLEMS, RATES, strict=True):
        samples = tuple(sample(rate, f"def f(x):\n    return {n}") for n, rate in enumerate(rates))
        skipped = "" if samples else "too long"
        store.write(problem, Shard(problem_id=problem.id, samples=samples, skipped=skipped, seconds=0.5))
    return store


def test_shards_come_back_and_follow_their_problem(store: Store):
    assert store.read(PROBLEMS[0]).samples[1] == sample(0.2, "def f(x):\n    return 1")
    assert store.has(replace(PROBLEMS[0], license="BSD")) and not store.has(replace(PROBLEMS[0], prompt="another"))
    assert not list(store.folder.rglob("*.part"))


def test_inferences_have_acecode_s_columns_and_can_be_read_as_acecode(store: Store, tmp_path: Path):
    write_inferences(tmp_path / "i.parquet", PROBLEMS, [store])
    table = pq.read_table(tmp_path / "i.parquet")
    assert table.schema == INFERENCES_SCHEMA
    rows = table.to_pylist()
    assert [len(row["inferences"]) for row in rows] == [2, 2, 2, 0]
    assert rows[0]["inferences"][1] == {
        "completion": "def f(x):\n    return 1",
        "completion_id": 1,
        "model_name": "tiny",
        "pass_rate": 0.2,
    }
    assert rows[0]["test_cases"] == [*PROBLEMS[0].prompt_tests, *PROBLEMS[0].reward_tests]
    again = [p for p in read_problems("acecode", tmp_path / "i.parquet", ReadOptions()) if isinstance(p, Problem)]
    assert [p.license for p in again if not p.id.endswith("/signature")] == ["MIT"] * 4


def test_inferences_that_are_not_unicode_are_kept_as_signs(tmp_path: Path):
    """A server can put them into its JSON."""
    store = Store(folder=tmp_path / "samples", name="tiny")
    store.write(
        PROBLEMS[0], Shard(problem_id=PROBLEMS[0].id, samples=(sample(0.0, "\ud800"),), skipped="", seconds=0.5)
    )
    write_inferences(tmp_path / "i.parquet", PROBLEMS[:1], [store])
    [row] = pq.read_table(tmp_path / "i.parquet").to_pylist()
    assert [each["completion"] for each in row["inferences"]] == ["\\ud800"]


def test_splits(store: Store, tmp_path: Path):
    thresholds = CurateSplit(by="thresholds", hard_max=0.25, easy_min=0.75)
    assert write_splits(tmp_path, PROBLEMS, [store], thresholds) == {"hard": 1, "medium": 1, "easy": 1}
    assert load_problems("problems", tmp_path / "hard.jsonl") == PROBLEMS[:1]
    assert json.loads((tmp_path / "medium.jsonl").read_text())["pass_rate"] == 0.5
    assert split_kinds(RATES, CurateSplit(by="thresholds", hard_min=0.2))[0] == set()
    assert split_kinds(RATES, CurateSplit()) == difficulties(RATES)
    assert split_kinds(RATES, CurateSplit(hard=0, hard_std=0))[0] == {"hard"}


def test_the_best_samples_are_instruction_data(store: Store, tmp_path: Path):
    longer = (
        sample(1.0, "def f(x):\n    return 10 ** 1"),
        sample(1.0, "prose", fenced=False),
        sample(1.0, "def f(x): 1\n"),
    )
    other = replace(store, folder=tmp_path / "other")
    for problem in PROBLEMS:
        other.write(problem, Shard(problem_id=problem.id, samples=longer))
    assert write_sft(tmp_path / "sft.jsonl", PROBLEMS, [store], CurateSft()) == 1
    [row] = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert row == {"prompt": build_prompt(PROBLEMS[2]), "completion": "```python\ndef f(x):\n    return 0\n```"}
    assert write_sft(tmp_path / "sft.jsonl", PROBLEMS, [store, other], CurateSft(per_problem=2)) == 8
    first = json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])
    assert first["completion"] == "```python\ndef f(x): 1\n```"


def test_costs_and_what_a_store_depends_on(store: Store, tmp_path: Path):
    raw = {
        "out": str(tmp_path),
        "data": {"source": "microcode"},
        "models": {"tiny": {"backend": "openai", "url": "http://a", "model": "m", "num_samples": 2}},
    }
    config = CurateConfig.model_validate(raw)
    assert cost_of(PROBLEMS, store, config.models["tiny"]) == {
        "problems": 4, "skipped": 1, "completions": 6, "tokens": 30, "seconds": 2.0, "judged_cpu_s": 1.5,
        "pass_rate": pytest.approx(3.2 / 6),
    }  # fmt: skip

    def folder(**changes) -> Path:
        models = {"tiny": {**raw["models"]["tiny"], **changes}}
        return store_of(CurateConfig.model_validate({**raw, "models": models}), "tiny").folder

    assert folder() == folder(url="http://b", concurrency=2, max_retries=1)  # where and how fast
    assert len({folder(), folder(temperature=0.5), folder(num_samples=3), folder(model="n"), folder(top_p=0.5)}) == 5


def test_the_config_that_comes_along():
    config = load_as(
        CurateConfig, Path(__file__).parents[2] / "configs" / "curate.yaml", ["models.policy.num_samples=2"]
    )
    assert config.models["policy"].num_samples == 2 and config.split == CurateSplit()
