"""The three supervised stages, run in this process: adaptation pre-training, mid-training, instruction tuning."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerFast

from actors.telemetry import SupervisedTelemetry
from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.shards import Row, collate
from diffrl.data.sources import corpus_text, instruction_pairs
from diffrl.diffusion import Metrics, batch_loss
from diffrl.errors import ConfigError
from diffrl.models.base import PolicyModel
from diffrl.models.folders import save_model
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.lora import adapter_state, save_adapter
from diffrl.models.tokens import special_id
from diffrl.run_folder import check_run_folder, create_run_folder
from diffrl.schedule import cosine_lr
from diffrl.seeds import derive_seed
from diffrl.supervised import make_optimizers, noised_batch


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
    with SupervisedTelemetry(folder, num_steps, config.stage) as telemetry:
        telemetry.say(f"{config.stage}: {len(rows)} rows, {num_parameters:,} parameters")
        train(model, rows, config, num_steps, telemetry.update)
    save_model(model, folder / "model")
    if model.lora is not None:
        save_adapter(adapter_state(model), model.lora, folder / "adapter", base_path=config.model.path)
    tokenizer.save_pretrained(folder / "model")
    print(f"{config.stage}: {num_steps} steps in {time.perf_counter() - started:.0f} s -> {folder / 'model'}")


def train(
    model: PolicyModel,
    rows: list[Row],
    config: PretrainConfig | SftConfig,
    num_steps: int,
    on_step: Callable[[int, Metrics], None],
) -> None:
    """All steps in this process; `on_step(step, metrics)` is called after every update."""
    model.train()
    optim, size = config.optim, config.train.batch_size
    optimizers = make_optimizers(model, optim)
    pad_weight = config.data.pad_weight if isinstance(config, SftConfig) else 1.0
    length = max(len(row.ids) for row in rows)
    for step in range(num_steps):
        index = batch_indices(len(rows), size, step, config.seed)
        batch = noised_batch(
            collate([rows[i] for i in index], length=length, pad_token_id=0, pad_weight=pad_weight),
            config,
            step=step,
            mask_token_id=model.mask_token_id,
            epoch_steps=math.ceil(len(rows) / size),
        )
        lr = cosine_lr(step, total=num_steps, peak=1.0, warmup=optim.warmup_steps, min_ratio=optim.min_lr_ratio)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["peak_lr"]
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if config.train.autocast_bf16 else nullcontext()
        with autocast, torch.random.fork_rng(devices=[]):
            # Dropout draws from the global generator and from no other.
            torch.default_generator.manual_seed(derive_seed(config.seed, "dropout", step))
            loss, metrics = batch_loss(model, batch)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), optim.grad_norm, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        on_step(step, {**metrics, "optim/grad_norm": float(norm), "optim/lr": optimizers[0].param_groups[0]["lr"]})


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of a step: every epoch is a permutation of its own, and a batch may reach over into the next one."""
    index: list[int] = []
    while len(index) < batch_size:
        epoch, offset = divmod(step * batch_size + len(index), num_rows)
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        index += torch.randperm(num_rows, generator=generator)[offset : offset + batch_size - len(index)].tolist()
    return index


def supervised_rows(config: PretrainConfig | SftConfig, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    if isinstance(config, SftConfig):
        end, pad = special_id(tokenizer, "eos"), special_id(tokenizer, "pad")
        rows = []
        for prompt, completion in tokenize_pairs(tokenizer, instruction_pairs(config.data, config.seed)):
            left = config.data.max_prompt_tokens - len(prompt)
            fill = config.data.completion_tokens - len(completion) - 1
            if left < 0 or fill < 0:
                raise ConfigError(
                    f"data: {len(prompt)} prompt tokens and {len(completion)} completion tokens with their end token do not fit "
                    f"into max_prompt_tokens {config.data.max_prompt_tokens} and completion_tokens "
                    f"{config.data.completion_tokens}; raise them"
                )
            ids = (*[pad] * left, *prompt, *completion, end, *[pad] * fill)
            rows.append(Row(ids=ids, lengths=(len(ids) - left,), prompts=(len(prompt),), left=left, fill=fill))
        return rows
    ids = tokenizer(corpus_text(config.data), add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    window = config.data.sequence_length
    if len(ids) < window:
        raise ConfigError(f"data.sequence_length: {len(ids)} tokens do not fill one window of {window}; lower it")
    starts = range(0, len(ids) - window + 1, window)
    return [Row(ids=ids[i : i + window], lengths=(window,), prompts=(0,)) for i in starts]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """(instruction, completion) texts -> (chat prompt ids, completion ids), as `prompts.chat_ids` would ask them."""
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in pairs]
    texts = [str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats]
    prompt_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    return list(zip(prompt_ids, completion_ids, strict=True))
