"""What a stage's result depends on, as hashes: files, generated data, model folders."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffrl.config import AnyConfig, ProblemsConfig, RLConfig
from diffrl.data.corpus import microcode_text, stdlib_text
from diffrl.data.microcode import microcode_exercises
from diffrl.data.row_files import files_of, is_hub_name
from diffrl.data.shards import open_shards
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError
from diffrl.files import write_json

Files = Mapping[str, str]  # name -> sha256 of the contents
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class FileHashes:
    """sha256 of files, kept in a file of its own: what has the size and the time of modification that it had is not read
    again, for weights and data are large. Without that file everything is read once more."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.known: dict[str, dict] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {}

    def of(self, file: Path) -> str:
        state = file.stat()
        stamp = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
        key = str(file.resolve())
        entry = self.known.get(key)
        if entry is None or {name: entry.get(name) for name in stamp} != stamp:
            with file.open("rb") as opened:
                entry = {**stamp, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
            self.known[key] = entry
        return str(entry["sha256"])

    def files(self, root: Path, files: Iterable[Path]) -> dict[str, str]:
        return {str(file.relative_to(root)): self.of(file) for file in sorted(set(files))}

    def save(self) -> None:
        write_json(self.path, self.known)


def model_files(folder: str | Path, hashes: FileHashes) -> dict[str, str]:
    """Weights, config and tokenizer of a Hugging Face folder; empty when it holds no weights."""
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        return {}
    return hashes.files(folder, (file for pattern in MODEL_FILES for file in folder.glob(pattern)))


def data_files(config: AnyConfig, hashes: FileHashes) -> dict[str, str]:
    """Everything that the stage reads, by key of its config. Raises ConfigError for what is not there."""
    if isinstance(config, RLConfig):
        sections = {"data": config.data, "eval.problems": config.eval.problems}
        sections["report.problems"] = config.report and config.report.problems
        return {
            name: sha
            for key, section in sections.items()
            if section is not None
            for name, sha in problem_files(section, hashes, key).items()
        }
    data = config.data
    if data.source == "microcode":
        text = repr(microcode_exercises("train"))
        if config.stage != "sft":
            text = microcode_text() + stdlib_text(config.data.max_stdlib_bytes)
        return {"data (microcode)": digest(text)}
    assert data.path is not None
    if data.source == "shards":
        return {"data (shards)": open_shards(data.path).fingerprint}
    if data.source == "hub":
        return {"data (hub)": "contents not looked at"}
    path = Path(data.path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    if not files:
        raise ConfigError(f"data.path: {path} does not exist or is empty; give a file or a folder with files")
    return {f"data ({name})": sha for name, sha in hashes.files(path.parent, files).items()}


def problem_files(config: ProblemsConfig, hashes: FileHashes, key: str) -> dict[str, str]:
    if config.source == "microcode":
        return {f"{key} (microcode)": digest(repr(problems_of(config)))}
    assert config.path is not None
    path = Path(config.path)
    if config.source == "acecode" and is_hub_name(config.path):
        return {f"{key} (hub)": "contents not looked at"}
    if config.source == "acecode" and path.is_dir():
        return {f"{key} ({name})": sha for name, sha in hashes.files(path, files_of(path)).items()}
    if not path.is_file():
        raise ConfigError(f"{key}.path: {path} does not exist; give a file")
    return {f"{key} ({path.name})": hashes.of(path)}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
