"""One rollout in full, read from its file when it is asked for; and token texts, from whatever tokenizer the run has."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tokenizers import Tokenizer

from diffrl.checkpoint import last_checkpoint

SMALL_BATCH = 512  # rows that are decoded at a time: a file's rows may be long
LONGEST_CHARACTER = 4  # bytes, and therefore tokens


def read_rows(path: Path, rows: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a file by number, in the order asked for; columns that the file lacks are not in them. Raises ValueError."""
    wanted, found = {int(row): None for row in rows}, {}
    try:
        for first, batch in batches(path, columns, wanted):
            for row in wanted:
                if first <= row < first + batch.num_rows:
                    (found[row],) = batch.slice(row - first, 1).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: cannot be read ({str(error).partition(chr(10))[0]})") from None
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"{path.name}: has no row {min(missing)} any more: it was written again; go back to the table")
    return [found[int(row)] for row in rows]


def batches(
    path: Path, columns: Sequence[str] | None, wanted: Mapping[int, None] | None = None, size: int = SMALL_BATCH
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, batch) of all row groups, or of those that hold a wanted row."""
    with pq.ParquetFile(path) as file:
        there = [name for name in columns if name in file.schema_arrow.names] if columns is not None else None
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if wanted is None or any(first <= row < end for row in wanted):
                for batch in file.iter_batches(size, row_groups=[group], columns=there, use_threads=False):
                    yield first, batch
                    first += batch.num_rows
            first = end


def mapping(file: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty where it is missing or none."""
    try:
        value = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def tokenizer_file(run: Path, given: Path | None = None) -> Path | None:
    """tokenizer.json of a run: the given folder's, else of what the run wrote, else of the model that it started from."""
    folders = [given] if given is not None else [run / "model", run / "best"]
    if given is None and (checkpoint := last_checkpoint(run)) is not None:
        folders.append(checkpoint / "model")
    model = mapping(run / "config.yaml").get("model")
    if given is None and isinstance(model, dict) and isinstance(model.get("path"), str):
        folders.append(Path(model["path"]))
    return next((folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()), None)


def load_tokenizer(file: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises bare Exception for a file that it cannot read
        return None


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each token; a character that is spread over several tokens stands at the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for token_id in ids:
        pending.append(token_id)
        try:
            text = tokenizer.decode(pending, skip_special_tokens=False)
        except (OverflowError, TypeError):  # ids that no vocabulary has
            text = f"⟨{token_id}⟩"
        whole = not text.endswith("\ufffd") or len(pending) == LONGEST_CHARACTER
        texts.append((text or f"⟨{token_id}⟩") if whole else "")
        pending = [] if whole else pending
    if pending:
        texts[-1] = "\ufffd"
    return texts


def floats(values: Any) -> list[float | None]:
    """JSON knows no NaN."""
    array = np.asarray(values if values is not None else [], dtype=np.float64)
    return [round(float(v), 4) if np.isfinite(v) else None for v in array]
