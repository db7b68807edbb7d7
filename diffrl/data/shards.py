"""Training rows in Parquet: the one form in which the supervised stages read their data.

A row is documents laid end to end. Of each the first tokens may be given (a prompt) and are then not hidden; a row may
begin with padding that nobody attends to, and its last document may end with padding that is predicted like text. Three
layouts come of that: packed text, [prompt padded on the left | completion window], and padded or packed instructions.

A folder, written by shard_writer.py, holds a few thousand rows per file, shuffled when it was written, and manifest.json,
written last. The order of an epoch is a permutation of the files and of the rows within each, drawn from (seed, epoch): a
stage that resumes at a row opens the files from there on, and no other.

Shapes: N rows, L positions.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diffrl.errors import ConfigError
from diffrl.seeds import derive_seed

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
ROWS_PER_FILE = 4096
SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("lengths", pa.list_(pa.int32()), nullable=False),
        pa.field("prompts", pa.list_(pa.int32()), nullable=False),
        pa.field("left", pa.int32(), nullable=False),
        pa.field("fill", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Row(ids=(0, 7, 5, 9, 1, 0), lengths=(5,), prompts=(2,), left=1, fill=1): one document [7 5 | 9 1 0] behind one
    padding token; its first two tokens are the prompt, its last one is padding that is predicted."""

    ids: Sequence[int]
    lengths: Sequence[int]  # of the documents; left + sum(lengths) == len(ids)
    prompts: Sequence[int]  # given tokens at the start of each document
    left: int = 0  # padding before the first document
    fill: int = 0  # padding at the end of the last


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedRows:
    """Rows ready to be noised.

    SupervisedRows(ids_NL=tensor([[0, 7, 5, 9, 1, 0]]),  # padding, prompt of 2, completion of 2 with its end, padding
                   document_NL=tensor([[0, 1, 1, 1, 1, 1]]),
                   maskable_NL=tensor([[False, False, False, True, True, True]]),
                   loss_weight_NL=tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 0.5]]))
    """

    ids_NL: Tensor  # int64
    document_NL: (
        Tensor  # int64: 0 on padding that nobody attends to; documents of a row count from 1 and see themselves
    )
    maskable_NL: Tensor  # bool, what the forward process may hide
    loss_weight_NL: Tensor  # float32, zero where not maskable

    def __len__(self) -> int:
        return self.ids_NL.shape[0]


def collate(rows: Sequence[Row], *, length: int, pad_token_id: int, pad_weight: float) -> SupervisedRows:
    """[N, length]; rows that are shorter get padding on the right that nobody attends to."""
    ids_NL = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    document_NL = torch.zeros(len(rows), length, dtype=torch.long)
    maskable_NL = torch.zeros(len(rows), length, dtype=torch.bool)
    loss_weight_NL = torch.zeros(len(rows), length)
    for n, row in enumerate(rows):
        ids_NL[n, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        start = row.left
        for number, (size, given) in enumerate(zip(row.lengths, row.prompts, strict=True), 1):
            document_NL[n, start : start + size] = number
            maskable_NL[n, start + given : start + size] = True
            start += size
        assert start == len(row.ids)
        loss_weight_NL[n] = maskable_NL[n].float()
        loss_weight_NL[n, start - row.fill : start] *= pad_weight
    return SupervisedRows(
        ids_NL=ids_NL, document_NL=document_NL, maskable_NL=maskable_NL, loss_weight_NL=loss_weight_NL
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Manifest(kind="text", length=4096, files={"00000.parquet": 4096}, num_tokens=16777216, pad_token_id=0,
    vocab_size=1024, fingerprint="9f2c...", source="microcode")"""

    kind: str  # text or instructions
    length: int  # the longest row there can be
    files: dict[str, int]  # number of rows of each, in the order in which they were written
    num_tokens: int  # without padding
    pad_token_id: int
    vocab_size: int  # of the tokenizer that made the ids
    fingerprint: str  # sha256 of all rows, in order
    source: str  # where the rows come from, for people
    inputs: str = ""  # sha256 of all that the rows were made from: files, tokenizer, settings
    notes: Sequence[str] = ()  # what was left out
    schema_version: int = SCHEMA_VERSION

    @property
    def num_rows(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows of a file in an epoch's order. Part(file="00003.parquet", seed=7, first=100, stop=4096)"""

    file: str
    seed: int  # of the permutation of the file's rows
    first: int
    stop: int


def open_shards(path: str | Path) -> Manifest:
    """Raises ConfigError for a folder without rows, with files that are missing or cannot be read (all are named)."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"data.path: {folder} holds no {MANIFEST}; write it with `diffrl data prepare`")
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        schema = raw["schema_version"]
        manifest = Manifest(**raw) if schema == SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.path: {folder / MANIFEST} cannot be read ({error}); prepare the data again") from error
    if manifest is None:
        raise ConfigError(
            f"data.path: {folder / MANIFEST} has schema_version {schema!r}, this version of diffrl knows {SCHEMA_VERSION}; "
            "prepare the data again"
        )
    if manifest.num_rows == 0:
        raise ConfigError(f"data.path: {folder} holds no rows; prepare it from data that is not empty")
    bad = [name for name, count in manifest.files.items() if not readable(folder / name, count)]
    if bad:
        raise ConfigError(
            f"data.path: {folder}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} missing or damaged, the other "
            f"{len(manifest.files) - len(bad)} files are whole; copy or prepare them again"
        )
    return manifest


def readable(file: Path, num_rows: int) -> bool:
    try:
        footer = pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):
        return False
    return footer.num_rows == num_rows


def training_parts(manifest: Manifest, *, seed: int, first: int, stop: int, held_out: int = 0) -> Iterator[Part]:
    """Where rows `first` to `stop` of the endless stream of epochs lie. The last `held_out` rows of the folder, in
    written order, are not part of it."""
    sizes = kept_sizes(manifest, held_out)
    total = sum(sizes.values())
    assert total > 0
    epoch, offset = divmod(first, total)
    position = first - offset
    while position < stop:
        names = list(sizes)
        order = np.random.Generator(np.random.Philox(derive_seed(seed, "files", epoch))).permutation(len(names))
        for index in order:
            name = names[index]
            begin, end = max(first - position, 0), min(stop - position, sizes[name])
            if begin < end:
                yield Part(file=name, seed=derive_seed(seed, "rows", epoch, name), first=begin, stop=end)
            position += sizes[name]
            if position >= stop:
                return
        epoch += 1


def kept_sizes(manifest: Manifest, held_out: int) -> dict[str, int]:
    """How many rows of each file are trained on; files of which none is are left out."""
    sizes, left = dict(manifest.files), held_out
    for name in reversed(list(sizes)):
        taken = min(left, sizes[name])
        sizes[name] -= taken
        left -= taken
    return {name: size for name, size in sizes.items() if size}


def read_part(folder: str | Path, part: Part, *, num_kept: int) -> list[Row]:
    """The rows of a part; `num_kept` rows of its file are trained on."""
    return rows_of(read_table(folder, part, num_kept=num_kept))


def read_table(folder: str | Path, part: Part, *, num_kept: int) -> pa.Table:
    """The same, as they lie in the file."""
    order = np.random.Generator(np.random.Philox(part.seed)).permutation(num_kept)[part.first : part.stop]
    return pq.read_table(Path(folder) / part.file).take(pa.array(order))


def held_out_rows(folder: str | Path, manifest: Manifest, held_out: int) -> list[Row]:
    """The last `held_out` rows, in written order."""
    rows: list[Row] = []
    kept = kept_sizes(manifest, held_out)
    for name, size in manifest.files.items():
        if kept.get(name, 0) < size:
            rows += rows_of(pq.read_table(Path(folder) / name).slice(kept.get(name, 0)))
    return rows


def rows_of(table: pa.Table) -> list[Row]:
    return [Row(**row) for row in table.to_pylist()]
