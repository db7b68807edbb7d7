"""The whole of supervised training in a few lines, in this process: for tests of models and of the method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.shards import Row, SupervisedRows, collate
from diffrl.diffusion import Metrics, batch_loss
from diffrl.models.base import PolicyModel
from diffrl.seeds import derive_seed
from diffrl.supervised import make_optimizers, noised_batch


def pretrain_config(**sections: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"stage": "pretrain", "data": {"source": "microcode"}, **sections})


def sft_config(**sections: Any) -> SftConfig:
    return SftConfig.model_validate({"stage": "sft", "data": {"source": "microcode", "condition_steps": 0}, **sections})


def text_rows(ids: Sequence[int], length: int) -> SupervisedRows:
    """Consecutive windows of a token stream."""
    windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    rows = [Row(ids=window, lengths=(length,), prompts=(0,)) for window in windows]
    return collate(rows, length=length, pad_token_id=0, pad_weight=1.0)


def train(
    model: PolicyModel,
    config: PretrainConfig | SftConfig,
    rows_of_step: Callable[[int], SupervisedRows],
    num_steps: int,
) -> list[Metrics]:
    """Metrics of every step, each on the global batch `rows_of_step(step)`, at a constant learning rate."""
    model.train()
    optimizers, seen = make_optimizers(model, config.optim), []
    for step in range(num_steps):
        batch = noised_batch(rows_of_step(step), config, step=step, mask_token_id=model.mask_token_id)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(config.seed, "dropout", step))
            loss, metrics = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_norm, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen.append(metrics)
    return seen
