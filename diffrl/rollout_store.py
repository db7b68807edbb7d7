"""The record of every rollout: one Parquet file per step, `step_000012.parquet`, one row per rollout.

The folder is the `rollouts/` folder of a run. Rows stand in the order of the step's batch (groups by ordinal,
siblings adjacent). A file appears whole or not at all, and writing a step again (after a resume) replaces it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from diffrl.files import utf8
from diffrl.prompts import build_prompt, chat_ids
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

SCHEMA_VERSION = 4  # raise it with every change of a column
READABLE = (3, 4)  # 3 had neither tests nor details
MAX_TEST_CHARACTERS = 1000  # of a graded test's text: those of HumanEval+ are megabytes
_VERSION_KEY = b"diffrl.rollout_store.version"
_FILE_NAME = re.compile(r"step_(\d{6,})\.parquet")

# "element" is Parquet's own name for the items of a list: with it a file comes back with exactly this schema
_INT32S = pa.list_(pa.field("element", pa.int32()))
_FLOAT16S = pa.list_(pa.field("element", pa.float16()))
_STRINGS = pa.list_(pa.field("element", pa.string()))

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),  # place of the prompt in the run's stream
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("family", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),  # the user message, shown tests included
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_ids", _INT32S, nullable=False),  # the whole window
        pa.field("num_tokens", pa.int32(), nullable=False),  # up to and including the first end token
        pa.field("step_map", _INT32S, nullable=False),  # denoising step of each position
        pa.field("probability", _FLOAT16S, nullable=False),  # of each token when it was revealed, at temperature 1
        pa.field("tests", _STRINGS),  # what was graded, cut to MAX_TEST_CHARACTERS each
        pa.field("statuses", _STRINGS),  # null: the judge failed
        pa.field("details", _STRINGS),  # what the judge said of each test
        pa.field("reward", pa.float64(), nullable=False),  # meaningless when not valid
        pa.field("format", pa.float64(), nullable=False),
        pa.field("pass_rate", pa.float64(), nullable=False),
        pa.field("advantage", pa.float32(), nullable=False),
        pa.field("valid", pa.bool_(), nullable=False),
        pa.field("low_trust", pa.bool_(), nullable=False),  # a test ran in the program's own process
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("cpu_s", pa.float64(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


def step_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.parquet"


def write_step(folder: str | Path, step: int, scored_groups: Sequence[ScoredGroup], advantages: npt.ArrayLike) -> Path:
    """Write one step and return its file. `advantages` is flat [B]: one per rollout, in the groups' order."""
    advantage_B = np.asarray(advantages, dtype=np.float32)
    num_rollouts = sum(len(scored.group.rollouts) for scored in scored_groups)
    assert step >= 0 and advantage_B.shape == (num_rollouts,), (step, advantage_B.shape, num_rollouts)
    samples = [
        (scored.group, rollout, judgement)
        for scored in scored_groups
        for rollout, judgement in zip(scored.group.rollouts, scored.judgements, strict=True)
    ]
    rows = [
        _row(step, group, rollout, judgement, float(advantage))
        for (group, rollout, judgement), advantage in zip(samples, advantage_B, strict=True)
    ]
    path = step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same folder: a rename is atomic only there
    try:
        with partial.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_step(path: str | Path) -> pa.Table:
    """One step's rows. ValueError for a file that is missing, damaged or of another schema version."""
    try:
        with pq.ParquetFile(path) as file:
            found = (file.schema_arrow.metadata or {}).get(_VERSION_KEY)
            if found is not None and found in [str(known).encode() for known in READABLE]:
                return pa.concat_tables([SCHEMA.empty_table(), file.read()], promote_options="default")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as Parquet ({reason}): remove it or restore it") from None
    version = "no rollout schema version" if found is None else f"rollout schema version {found.decode()}"
    known = " and ".join(map(str, READABLE))
    raise ValueError(f"{path} has {version}, this diffrl reads {known}: use the diffrl that wrote it")


def read_all(folder: str | Path) -> pa.Table:
    """All steps of a folder in their order, no rows before the first; ValueError for a missing folder."""
    return pa.concat_tables([SCHEMA.empty_table(), *(read_step(path) for _, path in step_files(folder))])


def step_files(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, file) in the order of steps; ValueError for a missing folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"rollouts: no folder at {folder}: give the rollouts/ folder of a run")
    matches = ((_FILE_NAME.fullmatch(path.name), path) for path in Path(folder).iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)  # as numbers: a millionth step sorts last


def scored_groups(
    table: pa.Table, problems: Mapping[str, Problem], tokenizer: PreTrainedTokenizerFast
) -> list[ScoredGroup]:
    """The groups that `write_step` was given, without their twins; rows of one group stand together. Raises ValueError for
    a problem that is not there, or whose prompt is another one now."""
    groups: list[ScoredGroup] = []
    for _, rows in groupby(table.to_pylist(), key=lambda row: row["ordinal"]):
        group = list(rows)
        problem = problems.get(group[0]["problem_id"])
        if problem is None or utf8(build_prompt(problem)) != group[0]["prompt"]:
            what = "missing" if problem is None else "another one"
            raise ValueError(
                f"data: problem {group[0]['problem_id']!r} is {what}, and there are rollouts of it; use the data that they "
                "were sampled from"
            )
        groups.append(_scored_group(problem, group, tokenizer))
    return groups


def _scored_group(
    problem: Problem, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> ScoredGroup:
    rollouts = tuple(
        Rollout(
            sample_index=row["sample_index"],
            seed=row["seed"],
            completion_ids_C=np.asarray(row["completion_ids"], dtype=np.int32),
            step_map_C=np.asarray(row["step_map"], dtype=np.int32),
            probability_C=np.asarray(row["probability"], dtype=np.float16),
            num_tokens=row["num_tokens"],
            text=row["completion"],
        )
        for row in rows
    )
    judgements = tuple(
        Judgement(
            reward=row["reward"],
            format=row["format"],
            pass_rate=row["pass_rate"],
            statuses=None if row["statuses"] is None else tuple(row["statuses"]),
            cpu_s=row["cpu_s"],
            low_trust=row["low_trust"],
            detail=row["detail"],
            details=tuple(row["details"] or ()),
        )
        for row in rows
    )
    group = RolloutGroup(
        problem=problem,
        ordinal=rows[0]["ordinal"],
        policy_version=rows[0]["policy_version"],
        prompt_ids_P=np.asarray(chat_ids(tokenizer, problem), dtype=np.int32),
        rollouts=rollouts,
    )
    return ScoredGroup(group=group, judgements=judgements)


def _row(step: int, group: RolloutGroup, rollout: Rollout, judgement: Judgement, advantage: float) -> dict:
    return {
        "step": step,
        "ordinal": group.ordinal,
        "sample_index": rollout.sample_index,
        "problem_id": group.problem.id,
        "family": group.problem.family,
        "prompt": utf8(build_prompt(group.problem)),
        "completion": utf8(rollout.text),
        "completion_ids": rollout.completion_ids_C,
        "num_tokens": rollout.num_tokens,
        "step_map": rollout.step_map_C,
        "probability": rollout.probability_C,
        "tests": [utf8(test[:MAX_TEST_CHARACTERS]) for test in group.problem.reward_tests],
        "statuses": None if judgement.statuses is None else list(judgement.statuses),
        "details": [utf8(line) for line in judgement.details],
        "reward": judgement.reward,
        "format": judgement.format,
        "pass_rate": judgement.pass_rate,
        "advantage": advantage,
        "valid": judgement.valid,
        "low_trust": judgement.low_trust,
        "seed": rollout.seed,
        "policy_version": group.policy_version,
        "cpu_s": judgement.cpu_s,
        "detail": utf8(judgement.detail),
    }
