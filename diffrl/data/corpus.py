"""Text for the tiny tokenizer and the adaptation pre-training: generated problems and Python's standard library.

Only training problems are in it: no solution of a validation or held-out problem appears anywhere.
"""

import os
import random
import sysconfig
from pathlib import Path

from diffrl.data.microcode import microcode_exercises

# Present in every CPython and small enough to read in no time; test and data packages are left out.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def microcode_documents(seed: int = 0, *, split_seed: int = 0) -> list[str]:
    """Every training problem once, as a comment with its program, in an order drawn from `seed`."""
    exercises = list(microcode_exercises("train", split_seed))
    random.Random(f"corpus/{seed}").shuffle(exercises)
    return [f"# {e.prompt}\n{e.solution}" for e in exercises]


def microcode_text(seed: int = 0, *, split_seed: int = 0) -> str:
    """All of `microcode_documents` in one text."""
    return "\n\n".join(microcode_documents(seed, split_seed=split_seed))


def stdlib_documents(max_bytes: int = 2_000_000) -> list[str]:
    """Sources of Python's own standard library, folder by folder in sorted order, up to `max_bytes` (whole files)."""
    parts: list[str] = []
    size = 0
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # walk goes where this list says
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix != ".py" or size + path.stat().st_size > max_bytes:
                continue
            source = path.read_bytes()
            size += len(source)
            parts.append(source.decode("utf-8", errors="replace"))
    return parts


def stdlib_text(max_bytes: int = 2_000_000) -> str:
    """All of `stdlib_documents` in one text."""
    return "\n\n".join(stdlib_documents(max_bytes))
