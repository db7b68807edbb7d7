"""The three supervised stages, run in this process: adaptation pre-training, mid-training, instruction tuning."""

import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from actors.telemetry import SupervisedTelemetry
from diffrl.config import CorpusData, PretrainConfig, SftConfig, SftData
from diffrl.data.corpus import microcode_text, stdlib_text
from diffrl.data.sft import sft_rows
from diffrl.errors import ConfigError
from diffrl.models.dream import save_model
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tokens import special_id
from diffrl.run_folder import check_run_folder, create_run_folder
from diffrl.supervised import (
    SupervisedOptions,
    SupervisedRows,
    instruction_rows,
    packed_rows,
    tokenize_pairs,
    train,
)

TEXT_SUFFIXES = (".txt", ".py", ".md", ".jsonl")


def train_supervised(config: PretrainConfig | SftConfig, *, dry_run: bool = False) -> None:
    """One whole stage: rows, model, training, export as a Hugging Face folder `run_dir/model`. Raises ConfigError."""
    torch.set_num_threads(config.train.threads)
    started = time.perf_counter()
    try:
        check_run_folder(Path(config.run_dir))
        tokenizer = load_policy_tokenizer(config.model)
        rows = supervised_rows(config, tokenizer)
        model = load_policy(config.model, tokenizer, seed=config.seed)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    num_parameters = sum(p.numel() for p in model.parameters())
    if dry_run:
        print(
            f"ready: {len(rows)} rows, {num_parameters:,} parameters, {config.train.steps} steps; nothing was started"
        )
        return
    folder = create_run_folder(config)
    optim = config.optim
    options = SupervisedOptions(
        num_steps=config.train.steps,
        batch_size=config.train.batch_size,
        lr=optim.lr,
        muon_lr=optim.muon_lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        warmup_steps=optim.warmup_steps,
        min_lr_ratio=optim.min_lr_ratio,
        grad_norm=optim.grad_norm,
        bf16=config.train.autocast_bf16,
        seed=config.seed,
    )
    with SupervisedTelemetry(folder, config.train.steps, config.stage) as telemetry:
        telemetry.say(f"{config.stage}: {len(rows)} rows, {num_parameters:,} parameters")
        train(model, rows, options, telemetry.update)
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    print(f"{config.stage}: {config.train.steps} steps in {time.perf_counter() - started:.0f} s -> {folder / 'model'}")


def supervised_rows(config: PretrainConfig | SftConfig, tokenizer: PreTrainedTokenizerFast) -> SupervisedRows:
    if isinstance(config, SftConfig):
        return sft_stage_rows(config.data, tokenizer, config.seed)
    ids = tokenizer(corpus_text(config.data), add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return packed_rows(ids, config.data.sequence_length)


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


def sft_stage_rows(data: SftData, tokenizer: PreTrainedTokenizerFast, seed: int) -> SupervisedRows:
    if data.source == "microcode":
        pairs = sft_rows(seed=seed, wrong_share=data.wrong_frac, broken_share=data.broken_format_frac)
    else:
        assert data.path is not None
        path = Path(data.path)
        pairs = [
            (json_field(path, number, line, "prompt"), json_field(path, number, line, "completion"))
            for number, line in json_lines(path)
        ]
    return instruction_rows(
        tokenize_pairs(tokenizer, pairs),
        prompt_length=data.max_prompt_tokens,
        completion_length=data.completion_tokens,
        end_token_id=special_id(tokenizer, "eos"),
        pad_token_id=special_id(tokenizer, "pad"),
        pad_weight=data.pad_weight,
    )


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
