"""Writes the folders that shards.py reads: Parquet files that appear whole, and a manifest that appears last."""

import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffrl.data.shards import MANIFEST, ROWS_PER_FILE, SCHEMA, Manifest, Row
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.files import write_json


def table_of(rows: Sequence[Row]) -> pa.Table:
    columns = {field: [list(getattr(row, field)) for row in rows] for field in ("ids", "lengths", "prompts")}
    columns |= {field: [getattr(row, field) for row in rows] for field in ("left", "fill")}
    return pa.table(columns, schema=SCHEMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """WrittenFile(num_rows=4096, num_tokens=16777216, digest="9f2c...")"""

    num_rows: int
    num_tokens: int  # without padding
    digest: str  # sha256 of the rows, in order


def write_file(file: Path, table: pa.Table) -> WrittenFile:
    """A file appears whole or not at all. Raises RunStoppedError when the disk is full."""
    part = file.with_name(f"{file.name}.part")
    with full_disk_is_said(part):
        pq.write_table(table, part)
        part.rename(file)
    digest = hashlib.sha256()
    num_tokens = 0
    for name in ("ids", "lengths", "prompts"):
        column = table[name].combine_chunks()
        num_tokens += len(column.flatten()) if name == "ids" else 0
        for numbers in (column.value_lengths(), column.flatten()):
            digest.update(numbers.to_numpy(zero_copy_only=False).astype("<i4").tobytes() + b";")
    for name in ("left", "fill"):
        numbers = table[name].to_numpy()
        num_tokens -= int(numbers.sum())
        digest.update(numbers.astype("<i4").tobytes() + b";")
    return WrittenFile(num_rows=len(table), num_tokens=num_tokens, digest=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with full_disk_is_said(folder / f"{MANIFEST}.part"):
        write_json(folder / MANIFEST, asdict(manifest))


@contextmanager
def full_disk_is_said(part: Path) -> Iterator[None]:
    """Nothing of `part` stays when writing it fails."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStoppedError(
            f"{part.parent}: no space left on the disk for {part.name.removesuffix('.part')}; nothing was kept of what "
            "was being prepared, free some or name another folder"
        ) from error


def fingerprint_of(files: Iterable[WrittenFile]) -> str:
    return hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest()


def begin_folder(folder: Path) -> None:
    """Make a folder ready for new rows. What a writer left that was cut off is removed; raises ConfigError for other files."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{MANIFEST}.part"
    names = [path.name for path in folder.iterdir()]
    if names and mark.name not in names:
        raise ConfigError(f"{folder} is not empty: it holds {sorted(names)[0]}; name a new folder")
    clear_folder(folder)
    mark.touch()


def clear_folder(folder: Path) -> None:
    """Remove rows that no manifest names, and the mark that they were being written."""
    for path in [*folder.glob("*.parquet"), *folder.glob("*.part")]:
        path.unlink()


class ShardWriter:
    """Writes rows into a folder: `with ShardWriter(path, kind=..., ...) as writer: writer.add(rows)`. Rows are taken in the
    order they come; who wants them shuffled shuffles them. The manifest appears when all went well; otherwise nothing is
    left. Raises ConfigError for a folder that holds something else, RunStoppedError when the disk is full."""

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        length: int,
        pad_token_id: int,
        vocab_size: int,
        source: str,
        inputs: str = "",
        notes: Sequence[str] = (),
        rows_per_file: int = ROWS_PER_FILE,
    ):
        self.path = Path(path)
        begin_folder(self.path)
        self.facts: dict[str, Any] = {
            "kind": kind,
            "length": length,
            "pad_token_id": pad_token_id,
            "vocab_size": vocab_size,
            "source": source,
            "inputs": inputs,
            "notes": list(notes),
        }
        self.rows_per_file = rows_per_file
        self.files: dict[str, WrittenFile] = {}
        self.waiting: list[Row] = []

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.waiting.append(row)
            if len(self.waiting) == self.rows_per_file:
                self.flush()

    def flush(self) -> None:
        if self.waiting:
            name = file_name(len(self.files))
            self.files[name] = write_file(self.path / name, table_of(self.waiting))
            self.waiting = []

    def close(self) -> Manifest:
        self.flush()
        manifest = manifest_of(self.files, self.facts)
        write_manifest(self.path, manifest)
        return manifest

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            clear_folder(self.path)
            return
        try:
            self.close()
        except RunStoppedError:
            clear_folder(self.path)
            raise


def file_name(number: int) -> str:
    return f"{number:05d}.parquet"


def manifest_of(files: Mapping[str, WrittenFile], facts: Mapping[str, Any]) -> Manifest:
    """`facts`: the fields of Manifest that do not come from the files."""
    return Manifest(
        files={name: file.num_rows for name, file in files.items()},
        num_tokens=sum(file.num_tokens for file in files.values()),
        fingerprint=fingerprint_of(files.values()),
        **facts,
    )
