"""Where the golden numbers lie: DIFFRL_GOLDEN, or tests/golden/. Missing or damaged means failed, never skipped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def golden_dir() -> Path:
    path = Path(os.environ.get("DIFFRL_GOLDEN", Path(__file__).parent / "golden"))
    if not path.is_dir():
        pytest.fail(f"DIFFRL_GOLDEN: {path} is not a folder")
    return path


def golden_file(name: str) -> Path:
    path = golden_dir() / name
    if not path.is_file():
        pytest.fail(f"DIFFRL_GOLDEN: {path} is missing")
    return path


def golden_json(name: str) -> Any:
    path = golden_file(name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        pytest.fail(f"DIFFRL_GOLDEN: {path} is damaged: {error}")


def golden_tensors(name: str) -> dict[str, Tensor]:
    path = golden_file(name)
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        pytest.fail(f"DIFFRL_GOLDEN: {path} is damaged: {error}")
