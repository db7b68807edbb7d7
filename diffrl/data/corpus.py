"""Text for the tiny tokenizer and the adaptation pre-training: generated problems and Python's standard library.

Only training problems are in it: no solution of a validation or held-out problem appears anywhere.
"""

import random
import sysconfig
from pathlib import Path

from diffrl.data.microcode import microcode_exercises

# Present in every CPython and small enough to read in no time; test and data packages are left out.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def microcode_text(seed: int = 0, *, split_seed: int = 0) -> str:
    """Every training problem once, as a comment with its program, in an order drawn from `seed`."""
    exercises = list(microcode_exercises("train", split_seed))
    random.Random(f"corpus/{seed}").shuffle(exercises)
    return "\n\n".join(f"# {e.prompt}\n{e.solution}" for e in exercises)


def stdlib_text(max_bytes: int = 2_000_000) -> str:
    """The sources of Python's own standard library in sorted order, up to `max_bytes` (whole files)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        source = path.read_bytes()
        if size + len(source) > max_bytes:
            continue
        size += len(source)
        parts.append(source.decode("utf-8", errors="replace"))
    return "\n\n".join(parts)
