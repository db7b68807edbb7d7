"""From a config's `data` section to problems, instruction pairs or text. Errors are ConfigErrors of one line."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffrl.config import CorpusData, ProblemsConfig, SftData
from diffrl.data.corpus import microcode_text, stdlib_text
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.data.sft import sft_rows
from diffrl.errors import ConfigError
from diffrl.seeds import derive_seed
from diffrl.types import Problem

TEXT_SUFFIXES = (".txt", ".py", ".md", ".jsonl")


def problems_of(config: ProblemsConfig) -> list[Problem]:
    if config.source == "microcode":
        problems = microcode_problems(config.split, num_prompt_tests=config.num_prompt_tests)
        return problems[: config.limit]
    assert config.path is not None
    return load_problems(config.source, config.path, num_prompt_tests=config.num_prompt_tests, limit=config.limit)


def prompt_stream(problems: Sequence[Problem], seed: int) -> Iterator[tuple[int, Problem]]:
    """(ordinal, problem) without end: every epoch is a permutation of its own."""
    ordinal = 0
    while True:
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "epoch", ordinal // len(problems))).shuffle(order)
        for index in order:
            yield ordinal, problems[index]
            ordinal += 1


def corpus_text(data: CorpusData) -> str:
    """All text of the corpus, in sorted order of files."""
    if data.source == "microcode":
        return "\n\n".join([microcode_text(), stdlib_text(data.max_stdlib_bytes)])
    assert data.path is not None
    root = Path(data.path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in TEXT_SUFFIXES)
    if not files:
        raise ConfigError(f"data.path: {root} holds no text; give a file or a folder of {', '.join(TEXT_SUFFIXES)}")
    return "\n\n".join(text_of(path) for path in files)


def text_of(path: Path) -> str:
    """A text file, or the `text` fields of a JSONL file."""
    if path.suffix != ".jsonl":
        return path.read_text(errors="replace")
    return "\n\n".join(json_field(path, number, line, "text") for number, line in json_lines(path))


def instruction_pairs(data: SftData, seed: int) -> list[tuple[str, str]]:
    """(prompt, completion) texts; of microcode with the noise that the config asks for, drawn from `seed`."""
    if data.source == "microcode":
        return sft_rows(seed=seed, wrong_share=data.wrong_frac, broken_share=data.broken_format_frac)
    assert data.path is not None
    path = Path(data.path)
    return [
        (json_field(path, number, line, "prompt"), json_field(path, number, line, "completion"))
        for number, line in json_lines(path)
    ]


def json_lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise ConfigError(f"data.path: {path} does not exist; give a file")
    return [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]


def json_field(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"data.path: {path} line {number} is not JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ConfigError(f"data.path: {path} line {number} has no text field {field!r}; add it")
    return row[field]
