"""Which files of this package run inside the image, and one hash over them: `python -m sandbox.image.fingerprint`.

A backend compares the hash with the image's label `diffrl.judge`, so that a judge of another version never answers.
"""

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def judge_sources() -> dict[str, bytes]:
    """Path below /opt/judge -> content, sorted by path."""
    paths = [_PACKAGE / "__init__.py", _PACKAGE / "types.py", *(_PACKAGE / "judge").glob("*.py")]
    return {path.relative_to(_PACKAGE.parent).as_posix(): path.read_bytes() for path in sorted(paths)}


def judge_fingerprint() -> str:
    """SHA-256 over paths and contents."""
    digest = hashlib.sha256()
    for path, content in judge_sources().items():
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(judge_fingerprint())
