"""Documents and chats, read from slices of files, and what was found wrong with them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffrl.config import CorpusData, SftData
from diffrl.errors import ConfigError

MAX_EXAMPLES = 3
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Place("sft.jsonl", 120): the line that starts at byte 120; of Parquet and of generated records, the record's number."""

    source: str
    offset: int = 0

    def __str__(self) -> str:
        if self.source.endswith(".jsonl"):
            with open(self.source, "rb") as file:
                line = file.read(self.offset).count(b"\n") + 1
            return f"{self.source} line {line}"
        if self.source.endswith((".parquet", ":")):
            return f"{self.source} row {self.offset + 1}"
        return self.source


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    place: Place
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Chat(place=..., messages=[{"role": "user", "content": "Add one."}], completion="x + 1")"""

    place: Place
    messages: Sequence[Message]
    completion: str


Record = Document | Chat


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of a JSONL or text file, row groups of a Parquet file: from `start` up to `stop`."""

    path: str
    start: int
    stop: int


@dataclass(slots=True)
class Faults:
    """What cannot be used, by kind, with the first examples of each. Kinds: `bad` (damaged), `form` (not what a record has
    to look like), `long` (does not fit into the layout), `empty` (files without any content)."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: Place | str, what: str) -> None:
        self.counts[kind] += 1
        found = self.examples.setdefault(kind, [])
        if len(found) < MAX_EXAMPLES:
            found.append(f"{place} {what}")

    def merge(self, other: "Faults") -> None:
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            found = self.examples.setdefault(kind, [])
            found += examples[: MAX_EXAMPLES - len(found)]

    def to_json(self) -> str:
        return json.dumps({"counts": self.counts, "examples": self.examples})

    @classmethod
    def from_json(cls, text: str) -> "Faults":
        raw = json.loads(text)
        return cls(counts=Counter(raw["counts"]), examples=raw["examples"])

    def said(self, kind: str) -> str:
        rest = self.counts[kind] - len(self.examples[kind])
        return "; ".join(self.examples[kind]) + (f"; and {rest} more" if rest else "")


def settle(faults: Faults, data: CorpusData | SftData) -> list[str]:
    """What was left out, in words. Raises ConfigError for what the config does not allow to be left out."""
    if faults.counts["form"]:
        raise ConfigError(f"data.path: {faults.said('form')}; mend or remove it")
    if faults.counts["bad"] and data.bad_files == "error":
        raise ConfigError(
            f"data.path: {faults.said('bad')}; everything else can be read: mend or remove it, or set data.bad_files: skip"
        )
    if faults.counts["long"] and isinstance(data, SftData) and data.too_long == "error":
        raise ConfigError(f"data: {faults.said('long')}; make room, or set data.too_long: drop")
    words = {"bad": "damaged and left out", "long": "too long and left out", "empty": "empty"}
    return [f"{faults.counts[kind]} {word}: {faults.said(kind)}" for kind, word in words.items() if faults.counts[kind]]


def read_slice(piece: Slice, *, chats: bool, faults: Faults) -> Iterator[Record]:
    """The records of a slice, in order; what cannot be used goes to `faults`. Blank documents are none."""
    path = Path(piece.path)
    if path.suffix == ".jsonl":
        rows = jsonl_rows(piece, faults)
    elif path.suffix == ".parquet":
        rows = parquet_rows(piece, ("messages", "prompt", "completion") if chats else ("text",), faults)
    else:
        text = path.read_text(errors="replace")
        rows = iter([(Place(piece.path), {"text": text})] if text else ())
    for place, row in rows:
        try:
            record = chat_of(row, place) if chats else document_of(row, place)
        except ValueError as error:
            faults.add("form", place, str(error))
            continue
        if isinstance(record, Chat) or record.text.strip():
            yield record


def jsonl_rows(piece: Slice, faults: Faults) -> Iterator[tuple[Place, Any]]:
    """Lines that start inside the slice."""
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # its start belongs to the slice before
        while (start := file.tell()) < piece.stop:
            line = file.readline()
            if not line.strip():
                continue
            try:
                yield Place(piece.path, start), json.loads(line)
            except ValueError as error:  # of JSON or UTF-8
                faults.add("bad", Place(piece.path, start), f"is not JSON ({error})")


def parquet_rows(piece: Slice, columns: Sequence[str], faults: Faults) -> Iterator[tuple[Place, Any]]:
    """Rows of the slice's row groups, or none of them: where one is damaged the others' data are not trusted."""
    try:
        with pq.ParquetFile(piece.path, page_checksum_verification=True) as file:
            kept = [name for name in columns if name in file.schema_arrow.names]
            first = sum(file.metadata.row_group(n).num_rows for n in range(piece.start))
            rows = file.read_row_groups(range(piece.start, piece.stop), columns=kept).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        faults.add("bad", piece.path, f"is damaged ({str(error).splitlines()[0]})")
        return
    for number, row in enumerate(rows, first):
        yield Place(piece.path, number), row


def document_of(row: Any, place: Place) -> Document:
    """Raises ValueError for a row without text."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError("has no text field 'text'")
    return Document(place=place, text=row["text"])


def chat_of(row: Any, place: Place) -> Chat:
    """Of `messages` the last one is the completion, which is the assistant's. Raises ValueError for any other row."""
    row = row if isinstance(row, dict) else {}
    messages, prompt, completion = (row.get(name) for name in ("messages", "prompt", "completion"))
    if messages is None and isinstance(prompt, str) and isinstance(completion, str):
        return Chat(place=place, messages=[{"role": "user", "content": prompt}], completion=completion)
    if not isinstance(messages, list):
        raise ValueError("has neither `messages` nor the text fields `prompt` and `completion`")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError("has a message without the text fields `role` and `content`")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("has `messages` that do not end with a question and the assistant's answer")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Chat(place=place, messages=turns[:-1], completion=turns[-1]["content"])
