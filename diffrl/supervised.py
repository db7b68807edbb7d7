"""What the three supervised stages do to their rows before the loss, and their optimizers.

Every row is noised at a mask ratio of its own, and all random numbers of a step are drawn from (seed, step), for the
whole batch at once: a stage that resumes, or runs on another number of workers, sees the same noise. Each purpose has its
own stream, so that one of them switched off does not change the others.

Pre-training starts from an autoregressive model (`adaptation`). The recipe is that of DiffuLLaMA (arXiv 2410.17891) and
of the paper's stage 1: attention opens from causal to full while the shift stays, a few rows are cut to a random length,
a few keep a clean prefix.

Shapes: B rows, L positions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from diffrl.config import PretrainConfig, SftConfig
from diffrl.config.supervised import SupervisedOptim
from diffrl.data.shards import SupervisedRows
from diffrl.diffusion import NoisedRows, draw_mask_ratios, forward_process, noised_rows
from diffrl.models.base import PolicyModel
from diffrl.muon import Muon
from diffrl.seeds import derive_seed


def noised_batch(
    rows: SupervisedRows,
    config: PretrainConfig | SftConfig,
    *,
    step: int,
    mask_token_id: int,
    epoch_steps: int | None = None,
) -> NoisedRows:
    """The whole global batch of a step (counted from 0), noised; of a causal model as it is, with nothing hidden.

    epoch_steps: optimizer steps of the first epoch, over which instruction tuning phases the prompts in when
    `data.condition_steps` is not set; needed then only.
    """
    if config.model.family == "causal":
        return next_tokens(rows)
    seed, opened_LL = config.seed, None
    if isinstance(config, SftConfig):
        steps = epoch_steps if config.data.condition_steps is None else config.data.condition_steps
        assert steps is not None
        if step < steps:
            rows = noised_prompts(rows, 1.0 - step / steps, step_generator(seed, step, "condition"))
    elif config.adaptation is not None:
        adaptation = config.adaptation
        rows = cut_rows(rows, adaptation.random_length_frac, step_generator(seed, step, "length"))
        rows = clean_prefixes(rows, adaptation.unnoised_prefix_frac, step_generator(seed, step, "prefix"))
        if step < adaptation.anneal_steps:
            opened_LL = opened(
                rows.ids_NL.shape[1], step / adaptation.anneal_steps, step_generator(seed, step, "attention")
            )
    return noised(rows, step_generator(seed, step, "noise"), mask_token_id=mask_token_id, opened_LL=opened_LL)


def validation_batch(rows: SupervisedRows, config: PretrainConfig | SftConfig, *, mask_token_id: int) -> NoisedRows:
    """All rows of the validation, with the same noise whenever it is asked: full attention, whole rows, clean prompts."""
    if config.model.family == "causal":
        return next_tokens(rows)
    return noised(rows, step_generator(config.seed, 0, "validation"), mask_token_id=mask_token_id)


def noised(
    rows: SupervisedRows, generator: torch.Generator, *, mask_token_id: int, opened_LL: Tensor | None = None
) -> NoisedRows:
    t_B = draw_mask_ratios(len(rows), generator)
    hidden_BL = forward_process(rows.maskable_NL, t_B, generator)
    return noised_rows(
        rows.ids_NL,
        rows.document_NL,
        rows.loss_weight_NL,
        hidden_BL,
        t_B,
        mask_token_id=mask_token_id,
        opened_LL=opened_LL,
    )


def next_tokens(rows: SupervisedRows) -> NoisedRows:
    """Every token that is not the prompt's scored once, given those before it: an autoregressive model's rows."""
    t_B = torch.ones(len(rows))
    batch = noised_rows(rows.ids_NL, rows.document_NL, rows.loss_weight_NL, rows.maskable_NL, t_B, mask_token_id=0)
    return replace(batch, noised_ids_BL=rows.ids_NL)


def cut_rows(rows: SupervisedRows, frac: float, generator: torch.Generator) -> SupervisedRows:
    """Each row with probability `frac` cut to a length uniform on 1 to its own; the rest is padding nobody attends to."""
    chosen_B, u_B = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
    size_B, place_BL = places(rows)
    length_B = torch.where(chosen_B < frac, 1 + (u_B * size_B).long(), size_B)
    kept_BL = place_BL < length_B[:, None]
    return replace(
        rows,
        document_NL=rows.document_NL * kept_BL,
        maskable_NL=rows.maskable_NL & kept_BL,
        loss_weight_NL=rows.loss_weight_NL * kept_BL,
    )


def clean_prefixes(rows: SupervisedRows, frac: float, generator: torch.Generator) -> SupervisedRows:
    """Each row with probability `frac` with a prefix that is never hidden and does not count, of a length uniform on 1 to
    one less than its own."""
    chosen_B, u_B = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
    size_B, place_BL = places(rows)
    length_B = (1 + (u_B * (size_B - 1)).long()).minimum(size_B - 1) * (chosen_B < frac)
    noised_BL = place_BL >= length_B[:, None]
    return replace(rows, maskable_NL=rows.maskable_NL & noised_BL, loss_weight_NL=rows.loss_weight_NL * noised_BL)


def places(rows: SupervisedRows) -> tuple[Tensor, Tensor]:
    """(size_B, place_BL): tokens of each row without padding, and how many of them come before each position."""
    real_BL = (rows.document_NL != 0).long()
    return real_BL.sum(1), real_BL.cumsum(1) - real_BL


def noised_prompts(rows: SupervisedRows, probability: float, generator: torch.Generator) -> SupervisedRows:
    """Each row with this probability without a condition: its prompts may be hidden and count like text."""
    chosen_B = torch.rand(len(rows), generator=generator, dtype=torch.float64) < probability
    prompt_BL = (rows.document_NL != 0) & ~rows.maskable_NL & chosen_B[:, None]
    return replace(
        rows,
        maskable_NL=rows.maskable_NL | prompt_BL,
        loss_weight_NL=rows.loss_weight_NL.masked_fill(prompt_BL, 1.0),
    )


def opened(length: int, probability: float, generator: torch.Generator) -> Tensor:
    """opened_LL, attention between causal and full: each later position is seen from each earlier one with this
    probability, in one draw for all rows (attention mask annealing, arXiv 2410.17891)."""
    return torch.rand(length, length, generator=generator) < probability


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A private stream for one step."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step))


def make_optimizers(model: PolicyModel, optim: SupervisedOptim) -> list[torch.optim.Optimizer]:
    """AdamW for everything that is trained, or Muon for the blocks' matrices and AdamW for embeddings, norms and biases.
    The rate that a schedule is relative to is each group's `peak_lr`."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside_block = ".layers." in name and parameter.ndim == 2
        (matrices if inside_block and optim.muon_lr is not None else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        betas = (optim.beta1, optim.beta2)
        optimizers.append(
            torch.optim.AdamW(rest, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True)
        )
    if optim.muon_lr is not None:
        optimizers.append(Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
