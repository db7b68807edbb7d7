"""The three supervised stages, run in this process: adaptation pre-training, mid-training, instruction tuning."""

import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from actors.telemetry import SupervisedTelemetry
from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.sources import corpus_text, instruction_pairs
from diffrl.errors import ConfigError
from diffrl.models.folders import save_model
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.lora import adapter_state, save_adapter
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


def train_supervised(config: PretrainConfig | SftConfig, *, dry_run: bool = False) -> None:
    """One whole stage: rows, model, training, export as a Hugging Face folder `run_dir/model`
    (and its adapters as `run_dir/adapter`). Raises ConfigError."""
    torch.set_num_threads(config.workers.threads)
    started = time.perf_counter()
    try:
        check_run_folder(Path(config.run_dir), config.model.path)
        tokenizer = load_policy_tokenizer(config.model)
        rows = supervised_rows(config, tokenizer)
        model = load_policy(config.model, tokenizer, seed=config.seed)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    num_steps = config.train.steps or max(1, config.train.epochs * len(rows) // config.train.batch_size)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if dry_run:
        print(f"ready: {len(rows)} rows, {num_parameters:,} parameters, {num_steps} steps; nothing was started")
        return
    folder = create_run_folder(config)
    optim = config.optim
    options = SupervisedOptions(
        num_steps=num_steps,
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
    with SupervisedTelemetry(folder, num_steps, config.stage) as telemetry:
        telemetry.say(f"{config.stage}: {len(rows)} rows, {num_parameters:,} parameters")
        train(model, rows, options, telemetry.update)
    save_model(model, folder / "model")
    if model.lora is not None:
        save_adapter(adapter_state(model), model.lora, folder / "adapter", base_path=config.model.path)
    tokenizer.save_pretrained(folder / "model")
    print(f"{config.stage}: {num_steps} steps in {time.perf_counter() - started:.0f} s -> {folder / 'model'}")


def supervised_rows(config: PretrainConfig | SftConfig, tokenizer: PreTrainedTokenizerFast) -> SupervisedRows:
    if isinstance(config, SftConfig):
        return instruction_rows(
            tokenize_pairs(tokenizer, instruction_pairs(config.data, config.seed)),
            prompt_length=config.data.max_prompt_tokens,
            completion_length=config.data.completion_tokens,
            end_token_id=special_id(tokenizer, "eos"),
            pad_token_id=special_id(tokenizer, "pad"),
            pad_weight=config.data.pad_weight,
        )
    ids = tokenizer(corpus_text(config.data), add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return packed_rows(ids, config.data.sequence_length)
