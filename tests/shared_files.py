"""Benchmarks, hostile programs and schemas, not part of the repository: DIFFRL_SHARED, or the folder `shared` beside it."""

import os
from pathlib import Path

import pytest


def shared_file(name: str) -> Path:
    """A file or folder there; without it the test is skipped and says so, except in CI, where it fails."""
    path = Path(os.environ.get("DIFFRL_SHARED", Path(__file__).parents[2] / "shared")) / name
    if not path.exists():
        complain = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        complain(f"{path} is missing: set DIFFRL_SHARED to the folder that holds data/, attacks/ and schemas/")
    return path
