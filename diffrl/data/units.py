"""From a `data` section to units of work: files, the hub, or what is made on the spot.

A unit is about UNIT_BYTES: neighbouring small files together, a large JSONL or Parquet file in slices. Units depend on the
data alone, so whoever reads them, in whatever order, gets the same records.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from diffrl.config import CorpusData, SftData
from diffrl.data.corpus import microcode_documents, stdlib_documents
from diffrl.data.records import Chat, Document, Faults, Place, Record, Slice, chat_of, read_slice
from diffrl.data.sft import sft_rows
from diffrl.errors import ConfigError

UNIT_BYTES = 16 << 20
TEXT_SUFFIXES = (".txt", ".py", ".md", ".jsonl", ".parquet")
CHAT_SUFFIXES = (".jsonl", ".parquet")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is read, tokenised and packed together: slices of files, or records that are there already."""

    number: int
    slices: Sequence[Slice] = ()
    records: Sequence[Record] = ()


def unit_to_json(unit: Unit) -> str:
    return json.dumps(asdict(unit))


def unit_from_json(text: str) -> Unit:
    raw = json.loads(text)
    records: list[Record] = []
    for record in raw["records"]:
        place = Place(**record.pop("place"))
        records.append(Chat(place=place, **record) if "messages" in record else Document(place=place, **record))
    return Unit(number=raw["number"], slices=[Slice(**piece) for piece in raw["slices"]], records=records)


def units_of(data: CorpusData | SftData, *, seed: int, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """All of a source that is not `shards`. Raises ConfigError where there is nothing."""
    if data.source in ("text", "files"):
        groups: Iterable[Sequence[Any]] = grouped(
            ((piece, size) for path in files_of(data) for piece, size in slices_of(path, unit_bytes)), unit_bytes
        )
        return [Unit(number=number, slices=group) for number, group in enumerate(groups)]
    if isinstance(data, CorpusData):
        texts = microcode_documents() + stdlib_documents(data.max_stdlib_bytes)
        records: Iterable[Record] = (
            Document(place=Place("microcode:", n), text=text) for n, text in enumerate(texts) if text.strip()
        )
    elif data.source == "microcode":
        rows = sft_rows(seed=seed, wrong_share=data.wrong_frac, broken_share=data.broken_format_frac)
        records = (
            chat_of({"prompt": prompt, "completion": completion}, Place("microcode:", n))
            for n, (prompt, completion) in enumerate(rows)
        )
    else:
        records = hub_chats(data)
    sized = ((record, len(record.text if isinstance(record, Document) else record.completion)) for record in records)
    return [Unit(number=number, records=group) for number, group in enumerate(grouped(sized, unit_bytes))]


def files_of(data: CorpusData | SftData) -> list[Path]:
    assert data.path is not None
    root, suffixes = Path(data.path), TEXT_SUFFIXES if isinstance(data, CorpusData) else CHAT_SUFFIXES
    if not root.exists():
        raise ConfigError(f"data.path: {root} does not exist; give a file or a folder")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file())
    if root.is_file() and isinstance(data, SftData) and root.suffix not in suffixes:
        raise ConfigError(f"data.path: {root} must end with {' or '.join(suffixes)}")
    if not any(path.stat().st_size for path in files):
        what = "is empty" if root.is_file() else f"holds no {', '.join(suffixes)} with any content"
        raise ConfigError(f"data.path: {root} {what}; give a file or a folder with data")
    return files


def slices_of(path: Path, unit_bytes: int) -> Iterator[tuple[Slice, int]]:
    """A file in slices of about `unit_bytes`, with their sizes. A Parquet file without a footer is one slice: reading it
    finds the fault."""
    size = path.stat().st_size
    if path.suffix == ".jsonl":
        for start in range(0, max(size, 1), unit_bytes):
            yield Slice(str(path), start, min(start + unit_bytes, size)), min(unit_bytes, size - start)
    elif path.suffix == ".parquet":
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException):
            yield Slice(str(path), 0, 1), size
            return
        groups = ((n, footer.row_group(n).total_byte_size) for n in range(footer.num_row_groups))
        for numbers in grouped(groups, unit_bytes):
            yield Slice(str(path), numbers[0], numbers[-1] + 1), size * len(numbers) // footer.num_row_groups
    else:
        yield Slice(str(path), 0, size), size


def grouped(sized: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Neighbours together until they reach `limit`."""
    group: list[T] = []
    total = 0
    for item, size in sized:
        group.append(item)
        total += size
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def hub_chats(data: SftData) -> Iterator[Chat]:
    """Rows of a data set by its name or local folder. `datasets` runs no code that comes with one."""
    assert data.path is not None
    try:
        rows = load_dataset(data.path, split=data.hub_split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"data.path: the data set {data.path!r}, split {data.hub_split!r} cannot be loaded ({reason}); give the name "
            "of one on the hub, or download it and use source files"
        ) from error
    for number, row in enumerate(rows):
        place = Place(f"{data.path}:", number)
        try:
            yield chat_of(row, place)
        except ValueError as error:
            raise ConfigError(f"data.path: {place} {error}; use another data set, or mend it as a file") from None


def read_unit(unit: Unit, *, chats: bool) -> tuple[list[Record], Faults]:
    faults = Faults()
    for piece in unit.slices:
        if piece.stop == 0:
            faults.add("empty", piece.path, "has no content")
    records = [*unit.records, *(r for piece in unit.slices for r in read_slice(piece, chats=chats, faults=faults))]
    return records, faults


def sources_of(units: Iterable[Unit]) -> dict[str, str]:
    """sha256 of every file, and of the records that are no file's."""
    files = sorted({piece.path for unit in units for piece in unit.slices})
    digests = {}
    for path in files:
        with open(path, "rb") as file:
            digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    records = hashlib.sha256()
    for unit in units:
        for record in unit.records:
            records.update(json.dumps(asdict(record)).encode())
    return digests | {"records": records.hexdigest()}
