"""What tables of rollouts filter and sort by, in memory: some 60 bytes a rollout, one chunk of columns per Parquet file.

A file that cannot be read, or lacks columns, is said in `notes` and costs no other file anything.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = "4"  # of rollout_store.py, whose names these are; a test compares them
VERSION_KEY = b"diffrl.rollout_store.version"
FILE_NAME = re.compile(r"step_(\d{6,})\.parquet")
COLUMNS = (
    *("step", "ordinal", "sample_index", "problem_id", "num_tokens", "statuses", "reward", "pass_rate", "advantage"),
    *("valid", "low_trust", "policy_version"),
)
VERDICTS = (
    *("passed", "some passed", "failed", "error", "timeout", "out_of_memory", "killed", "not_run"),
    *("not judged", "unknown"),
)
PASSED, SOME_PASSED, NOT_JUDGED, UNKNOWN = (
    VERDICTS.index(v) for v in ("passed", "some passed", "not judged", "unknown")
)
UNKNOWN_STALENESS = -1
BATCH_ROWS = 65_536

DTYPES = {
    "step": np.int32,
    "ordinal": np.int64,
    "sample": np.int32,
    "problem": np.int32,  # number in the run's list of problems
    "length": np.int32,
    "reward": np.float32,  # NaN: not judged
    "pass_rate": np.float32,
    "advantage": np.float32,
    "verdict": np.int8,  # number in VERDICTS
    "staleness": np.int32,  # updates between the sampling policy and the step that learned from it
    "low_trust": np.bool_,
    "flags": np.uint8,  # bits of suspicion.py; 0 until the file has been looked at
    "file": np.int32,
    "row": np.int32,  # in its file
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which state of a file was read. Stamp(mtime_ns=17..., size=4711, inode=99)"""

    mtime_ns: int
    size: int
    inode: int


@dataclass(slots=True)
class Chunk:
    """One file's rows. Chunk(path=Path("step_000003.parquet"), stamp=Stamp(...), columns={"reward": array([...])}, notes=())"""

    path: Path
    stamp: Stamp
    columns: dict[str, np.ndarray]  # those of DTYPES, without `file`
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.columns["step"])


@dataclass(frozen=True)
class Snapshot:
    """All rows at one moment, newest step first. Snapshot(version=3, columns={"reward": array([...])}, files=(Path(...),),
    problems=("mbpp/11",))"""

    version: int
    columns: Mapping[str, np.ndarray]
    files: Sequence[Path]
    problems: Sequence[str]  # a longer list may be shared with newer snapshots
    caches: dict[str, object] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.columns["step"])

    @cached_property
    def steps(self) -> np.ndarray:
        return np.unique(self.columns["step"])

    def find(self, step: int, ordinal: int) -> np.ndarray:
        """Rows of one group, in the order of its samples."""
        columns = self.columns
        rows = np.flatnonzero((columns["step"] == step) & (columns["ordinal"] == ordinal))
        return rows[np.argsort(columns["sample"][rows], kind="stable")]


def snapshot_of(version: int, chunks: Sequence[Chunk], problems: Sequence[str]) -> Snapshot:
    newest_first = list(reversed(chunks))
    columns: dict[str, np.ndarray] = {
        name: np.concatenate([np.empty(0, dtype), *(chunk.columns[name] for chunk in newest_first)])
        for name, dtype in DTYPES.items()
        if name != "file"
    }
    sizes = [chunk.num_rows for chunk in newest_first]
    columns["file"] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return Snapshot(version, columns, [chunk.path for chunk in newest_first], problems)


def stamp_of(path: Path) -> Stamp:
    stat = path.stat()
    return Stamp(stat.st_mtime_ns, stat.st_size, stat.st_ino)


def rollout_files(folder: Path) -> list[tuple[int, Path]]:
    """(step of the name, file) in order of steps; none where there is no folder."""
    if not folder.is_dir():
        return []
    matches = ((FILE_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def read_chunk(path: Path, step: int, code_of: Callable[[str], int]) -> Chunk:
    """A file's columns; `step` is that of its name. Raises ValueError, one line that says why, for a file that is no Parquet."""
    stamp = stamp_of(path)
    notes = []
    try:
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            version = (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"none").decode("ascii", "replace")
            if version != SCHEMA_VERSION:
                notes.append(f"{path.name}: rollout schema version {version}, this board knows {SCHEMA_VERSION}")
            if missing := [name for name in COLUMNS if name not in there]:
                notes.append(f"{path.name}: has no column {', '.join(missing)}: shown without")
            present = [name for name in COLUMNS if name in there] or file.schema_arrow.names[
                :1
            ]  # which say how many rows
            batches = file.iter_batches(BATCH_ROWS, columns=present, use_threads=False)
            parts = [columns_of(batch, step, code_of) for batch in batches]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path.name}: cannot be read as Parquet ({reason}): it is being written, or the run died while it was; it is "
            "read as soon as it changes"
        ) from None
    names = [name for name in DTYPES if name not in ("file", "row")]
    columns: dict[str, np.ndarray] = {
        name: np.concatenate([np.empty(0, DTYPES[name]), *(part[name] for part in parts)]) for name in names
    }
    columns["row"] = np.arange(len(columns["step"]), dtype=np.int32)
    return Chunk(path, stamp, columns, tuple(notes))


def columns_of(batch: pa.RecordBatch, step: int, code_of: Callable[[str], int]) -> dict[str, np.ndarray]:
    size = batch.num_rows

    def numbers(name: str, missing: float, dtype: type) -> np.ndarray:
        if name not in batch.schema.names:
            return np.full(size, missing, dtype)
        return (
            batch[name].cast(pa.from_numpy_dtype(dtype), safe=False).fill_null(missing).to_numpy(zero_copy_only=False)
        )

    steps = numbers("step", step, np.int32)
    version = numbers("policy_version", -1, np.int32)
    valid = numbers("valid", True, np.bool_)
    reward = numbers("reward", np.nan, np.float32)
    return {
        "step": steps,
        "ordinal": numbers("ordinal", -1, np.int64),
        "sample": numbers("sample_index", -1, np.int32),
        "problem": problem_codes(batch, code_of),
        "length": numbers("num_tokens", -1, np.int32),
        "reward": np.where(valid, reward, np.float32(np.nan)),
        "pass_rate": np.where(valid, numbers("pass_rate", np.nan, np.float32), np.float32(np.nan)),
        "advantage": numbers("advantage", np.nan, np.float32),
        "verdict": verdicts(batch),
        "staleness": np.where(version < 0, UNKNOWN_STALENESS, steps - version).astype(np.int32),
        "low_trust": numbers("low_trust", False, np.bool_),
        "flags": np.zeros(size, np.uint8),
    }


def problem_codes(batch: pa.RecordBatch, code_of: Callable[[str], int]) -> np.ndarray:
    if "problem_id" not in batch.schema.names:
        return np.full(batch.num_rows, code_of("?"), np.int32)
    column = batch["problem_id"].cast(pa.string()).dictionary_encode()
    codes = np.array([code_of(str(name)) for name in column.dictionary.to_pylist()] or [0], np.int32)
    return codes[column.indices.fill_null(0).to_numpy(zero_copy_only=False)]


def verdicts(batch: pa.RecordBatch) -> np.ndarray:
    """All tests passed, some did, or how the first one ended where none did."""
    if "statuses" not in batch.schema.names or not pa.types.is_list(batch["statuses"].type):
        return np.full(batch.num_rows, UNKNOWN, np.int8)
    column = batch["statuses"]
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = column.flatten().dictionary_encode()
    known = {name: number for number, name in enumerate(VERDICTS)}
    names = np.array([known.get(str(name), UNKNOWN) for name in flat.dictionary.to_pylist()] or [UNKNOWN], np.int8)
    flat_codes = names[flat.indices.fill_null(0).to_numpy(zero_copy_only=False)]
    starts = np.cumsum(lengths) - lengths
    passed = np.concatenate([[0], np.cumsum(flat_codes == PASSED)])
    num_passed = passed[starts + lengths] - passed[starts]
    first = np.append(flat_codes, np.int8(UNKNOWN))[np.minimum(starts, len(flat_codes))]
    result = np.where(num_passed > 0, np.where(num_passed == lengths, PASSED, SOME_PASSED), first)
    result = np.where(lengths == 0, UNKNOWN, result)
    return np.where(column.is_null().to_numpy(zero_copy_only=False), NOT_JUDGED, result).astype(np.int8)
