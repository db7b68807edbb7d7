"""Small files that a reader finds old or new, never half-written."""

import json
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.rename(file)


def write_json(file: Path, value: object) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")
