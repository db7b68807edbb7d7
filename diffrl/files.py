"""Small files that a reader finds old or new, never half-written."""

import json
from collections.abc import Iterable
from pathlib import Path


def utf8(text: str) -> str:
    """What Parquet takes: lone surrogates, which a program can put into an error message and a server into its JSON, are
    written as \\udXXX."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_whole(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.rename(file)


def write_json(file: Path, value: object) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")


def write_lines(file: Path, rows: Iterable[object]) -> None:
    """JSONL."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    part.rename(file)
