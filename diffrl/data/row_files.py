"""Rows of JSONL, JSON and Parquet files and of the hub, and their fields: what is wrong with a row is told by row, field and
reason."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
MAX_ROW_MB = 64  # a row of training problems has kilobytes


class RowError(ValueError):
    """What is wrong with a row; `field` is "" where no field alone is to blame."""

    def __init__(self, reason: str, field: str = ""):
        super().__init__(reason, field)
        self.reason, self.field = reason, field

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """BadRow(place="line 12", field="reward_tests", reason="field 'reward_tests' is missing: the row has id, prompt")"""

    place: str
    field: str
    reason: str


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where the row stands, row) of a file; blank lines are skipped. Raises ValueError for the first bad row."""
    for place, row in scan_rows(path):
        if isinstance(row, RowError):
            raise ValueError(f"{path} {place}: {row}")
        yield place, row


def scan_rows(path: Path, max_row_mb: int = MAX_ROW_MB) -> Iterator[tuple[str, Row | RowError]]:
    """As `read_rows`, with an error in the place of a row that cannot be used. A row of more than `max_row_mb` is never held
    in memory. Raises ValueError for a file of which nothing further can be read."""
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path} has an unknown ending: give a .jsonl, .jsonl.gz, .json or .parquet file")
    if not path.is_file():
        raise ValueError(f"no file at {path}: check the path")
    read = {".parquet": _parquet_rows, ".json": _json_rows}.get(path.suffix, _jsonl_rows)
    return read(path, max_row_mb)


def _jsonl_rows(path: Path, max_row_mb: int) -> Iterator[tuple[str, Row | RowError]]:
    number, most = 0, max_row_mb << 20
    try:
        with cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(most)
                    yield f"line {number}", RowError(f"more than {max_row_mb} MB: cut or remove the line")
                elif line.strip():
                    yield f"line {number}", _json_row(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} after line {number}: damaged gzip ({error}): fetch the file again") from None


def _json_row(line: bytes) -> Row | RowError:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # with or without a byte order mark
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, numbers or nesting beyond Python's limits
        return RowError(f"not JSON in UTF-8 ({error}): mend or remove the line")
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(row: object) -> RowError:
    return RowError(f"a {type(row).__name__}, not an object: give one object a line")


def _json_rows(path: Path, max_row_mb: int) -> Iterator[tuple[str, Row | RowError]]:
    """A list of objects, which is read at once: small files only."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error}): mend the file") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a {type(rows).__name__}, not a list of objects: give a list, or JSONL")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row if isinstance(row, dict) else _no_object(row)


def _parquet_rows(path: Path, max_row_mb: int) -> Iterator[tuple[str, Row | RowError]]:
    number, most = 0, max_row_mb << 20
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                sizes = [batch.slice(n, 1).nbytes for n in range(len(batch))] if batch.nbytes > most else []
                large = {n for n, size in enumerate(sizes) if size > most}
                for place in range(len(batch)):
                    number += 1
                    if place in large:
                        yield f"row {number}", RowError(f"more than {max_row_mb} MB: cut or remove the row")
                    else:
                        yield f"row {number}", batch.slice(place, 1).to_pylist()[0]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} after row {number}: damaged Parquet ({reason}): fetch it again") from None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that can be read again and again: of a file, of all files of a folder, or of a data set on the hub (its split train).

    Rows("TIGER-Lab/AceCode-87K")
    """

    path: str
    max_row_mb: int = MAX_ROW_MB

    def __iter__(self) -> Iterator[tuple[str, Row | RowError]]:
        """Raises ValueError for what cannot be read."""
        path = Path(self.path)
        if path.is_dir():
            files = files_of(path)
            return (
                (f"{f.relative_to(path)} {place}", row) for f in files for place, row in scan_rows(f, self.max_row_mb)
            )
        return hub_rows(self.path) if is_hub_name(self.path) else scan_rows(path, self.max_row_mb)


def files_of(folder: Path) -> list[Path]:
    """Raises ValueError for a folder without any."""
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(ENDINGS))
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(ENDINGS)} file: name another folder")
    return files


def is_hub_name(path: str) -> bool:
    """Such as TIGER-Lab/AceCode-87K: two parts, and nothing of that name here."""
    return (
        not Path(path).exists()
        and not path.endswith(ENDINGS)
        and path.count("/") == 1
        and path[:1] not in (".", "/", "~")
    )


def hub_rows(name: str, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Of a data set, or of one of its configurations: openai/gsm8k:main. Raises ValueError for what cannot be loaded."""
    from datasets import load_dataset  # takes seconds to import
    from datasets.exceptions import DatasetsError

    path, _, configuration = name.partition(":")
    try:
        rows = load_dataset(path, configuration or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the data set {name!r} cannot be loaded ({reason}): give a file, a folder of files, or the name of one on the hub"
        ) from error
    return ((f"row {number}", dict(row)) for number, row in enumerate(rows, start=1))


def text_of(row: Row, field: str, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if value is None:
        raise _missing(row, field)
    if not isinstance(value, str):
        raise RowError(f"field {field!r} is of type {type(value).__name__}: give a string", field)
    return value


def texts_of(row: Row, field: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """A list of strings; blank ones are dropped."""
    value = row.get(field)
    if value is None and default is not None:
        return default
    if value is None:
        raise _missing(row, field)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RowError(f"field {field!r} is of type {type(value).__name__}: give a list of strings", field)
    return tuple(item for item in value if item.strip())


def identifier_of(row: Row, field: str) -> str:
    value = row.get(field)
    return str(value) if isinstance(value, int) else text_of(row, field)


def license_of(row: Row) -> str:
    """Data sets spell the column in either way."""
    return text_of(row, "license", "") or text_of(row, "licence", "")


def _missing(row: Row, field: str) -> RowError:
    return RowError(f"field {field!r} is missing: the row has {', '.join(row) or 'no field'}", field)
