"""The walls between the packages, by reading the imports; and that nothing here unpickles or runs downloaded code.

Reads syntax trees, so nothing is imported and imports inside functions are seen too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffrl", "sandbox", "actors")
FORBIDDEN = {
    "diffrl": {"ray", "deepspeed", "docker", "vllm", "actors", "sandbox", "tests"},
    "actors": {"tests"},
}
SANDBOX_ALLOWED = {*sys.stdlib_module_names, "docker", "sandbox"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import, and of dynamic ones whose name is a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module:
                yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and name_of(node.func) in ("__import__", "import_module"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value.split(".")[0]


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_true_or_unknown(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is False)


def unsafe_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """torch.load without weights_only=True, numpy's allow_pickle, trust_remote_code in any guise but False."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                weights_only = keywords.get("weights_only")
                if not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
                    yield node.lineno, "torch.load without weights_only=True"
            for name in ("trust_remote_code", "allow_pickle"):
                if name in keywords and is_true_or_unknown(keywords[name]):
                    yield node.lineno, name
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            yield node.lineno, "torch.load under another name"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and is_true_or_unknown(value):
                    yield node.lineno, "trust_remote_code"


def violations(root: Path) -> list[str]:
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(), str(path))
            for line, name in imports_of(tree):
                wrong = name not in SANDBOX_ALLOWED if package == "sandbox" else name in FORBIDDEN[package]
                if wrong:
                    found.append(f"{path.relative_to(root)}:{line}: imports {name}")
                if name in UNPICKLERS:
                    found.append(f"{path.relative_to(root)}:{line}: unpickles with {name}")
            found += [f"{path.relative_to(root)}:{line}: {what}" for line, what in unsafe_calls(tree)]
    return found


def test_the_packages_keep_to_the_plan():
    for package in PACKAGES:
        assert len(list((ROOT / package).rglob("*.py"))) > 3, package  # the check looks at something
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("diffrl/a.py", "import ray", "imports ray"),
        ("diffrl/a.py", "import torch, ray.util as u", "imports ray"),
        ("diffrl/deep/er/a.py", "def f():\n    from vllm import LLM", "imports vllm"),
        ("diffrl/a.py", "if TYPE_CHECKING:\n    import deepspeed", "imports deepspeed"),
        ("diffrl/a.py", "from sandbox.types import Verdict", "imports sandbox"),
        ("diffrl/a.py", "from actors import cli", "imports actors"),
        ("diffrl/a.py", "import importlib\nimportlib.import_module('ray.train')", "imports ray"),
        ("sandbox/a.py", "import torch", "imports torch"),
        ("sandbox/judge/a.py", "import numpy as np", "imports numpy"),
        ("sandbox/a.py", "from diffrl.types import Problem", "imports diffrl"),
        ("sandbox/a.py", "import pickle", "unpickles with pickle"),
        ("actors/a.py", "from pickle import loads", "unpickles with pickle"),
        ("actors/a.py", "import cloudpickle", "unpickles with cloudpickle"),
        ("actors/a.py", "from tests import golden_files", "imports tests"),
        ("diffrl/a.py", "import torch\ntorch.load('x')", "torch.load without weights_only=True"),
        ("diffrl/a.py", "import torch\ntorch.load('x', weights_only=False)", "torch.load without weights_only=True"),
        ("diffrl/a.py", "from torch import load", "torch.load under another name"),
        ("diffrl/a.py", "np.load('x', allow_pickle=True)", "allow_pickle"),
        ("diffrl/a.py", "AutoModel.from_pretrained('x', trust_remote_code=True)", "trust_remote_code"),
        ("diffrl/a.py", "AutoModel.from_pretrained('x', trust_remote_code=flag)", "trust_remote_code"),
        ("actors/a.py", "options = {'trust_remote_code': True}", "trust_remote_code"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, found):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source + "\n")
    (only,) = violations(tmp_path)
    assert only.startswith(f"{file}:") and only.endswith(f": {found}")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("diffrl/a.py", "import torch\nfrom . import types\ntorch.load('x', weights_only=True)"),
        ("diffrl/a.py", "import json\njson.load(f)\n'import ray'  # import ray"),
        ("diffrl/a.py", "import raycast\nload('x', trust_remote_code=False)"),
        ("sandbox/a.py", "import os\nimport docker\nfrom sandbox.types import Verdict\nfrom .judge import frames"),
        ("actors/a.py", "import ray\nimport deepspeed\nimport vllm\nimport diffrl\nimport sandbox"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source + "\n")
    assert violations(tmp_path) == []
