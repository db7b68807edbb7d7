"""The train step and loop that pre-training, mid-training and instruction tuning share.

Two layouts. Text is packed into windows and every token may be hidden. Instruction rows are [prompt, padded on the left
to P | completion window of C]: exactly what the sampler fills later. The completion ends with the end token, the
rest of its window is padding that the model has to predict too, or it would not know how to end.

Every random number comes from (seed, step): a run that resumes at a step continues as if it had never stopped.

Shapes: N rows, B rows of a batch, P prompt, C completion, L = P + C.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerFast

from diffrl.diffusion import diffusion_loss, draw_mask_ratios, forward_process
from diffrl.models.base import PolicyModel
from diffrl.schedule import cosine_lr
from diffrl.seeds import derive_seed

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedRows:
    """Rows ready to be noised.

    SupervisedRows(ids_NL=tensor([[0, 7, 5, 9, 1, 0]]),  # padding, prompt of 2, completion of 2 with its end, padding
                   attention_mask_NL=tensor([[False, True, True, True, True, True]]),
                   maskable_NL=tensor([[False, False, False, True, True, True]]),
                   loss_weight_NL=tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 0.5]]))
    """

    ids_NL: Tensor  # int64
    attention_mask_NL: Tensor  # bool, False on the padding left of a prompt only
    maskable_NL: Tensor  # bool, what the forward process may hide
    loss_weight_NL: Tensor  # float32, zero where not maskable

    def __len__(self) -> int:
        return self.ids_NL.shape[0]

    def take(self, index_B: Tensor) -> "SupervisedRows":
        return SupervisedRows(
            ids_NL=self.ids_NL[index_B],
            attention_mask_NL=self.attention_mask_NL[index_B],
            maskable_NL=self.maskable_NL[index_B],
            loss_weight_NL=self.loss_weight_NL[index_B],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedOptions:
    """One supervised stage. With `muon_lr` the matrices inside the blocks are trained by Muon, the rest by AdamW."""

    num_steps: int
    batch_size: int
    lr: float
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    grad_norm: float = 1.0
    t_min: float = 1e-3
    bf16: bool = False
    seed: int = 0


def packed_rows(token_ids: Sequence[int], window: int) -> SupervisedRows:
    """Consecutive windows of a token stream, the incomplete last one dropped; every token may be hidden and counts."""
    num_rows = len(token_ids) // window
    if num_rows == 0:
        raise ValueError(f"{len(token_ids)} tokens do not fill one window of {window}")
    ids_NL = torch.tensor(token_ids[: num_rows * window], dtype=torch.long).reshape(num_rows, window)
    everywhere_NL = torch.ones_like(ids_NL, dtype=torch.bool)
    return SupervisedRows(
        ids_NL=ids_NL,
        attention_mask_NL=everywhere_NL,
        maskable_NL=everywhere_NL,
        loss_weight_NL=everywhere_NL.float(),
    )


def instruction_rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    prompt_length: int,
    completion_length: int,
    end_token_id: int,
    pad_token_id: int,
    pad_weight: float = 1.0,
) -> SupervisedRows:
    """(prompt ids, completion ids) pairs in the sampler's layout; `pad_weight` is the loss weight of the padding.

    Raises ValueError for a pair that does not fit: nothing is ever cut.
    """
    length = prompt_length + completion_length
    ids_NL = torch.full((len(pairs), length), pad_token_id, dtype=torch.long)
    attention_mask_NL = torch.ones(len(pairs), length, dtype=torch.bool)
    loss_weight_NL = torch.zeros(len(pairs), length)
    for row, (prompt, completion) in enumerate(pairs):
        if len(prompt) > prompt_length or len(completion) + 1 > completion_length:
            raise ValueError(
                f"row {row}: {len(prompt)} prompt tokens and {len(completion)} completion tokens with their end token "
                f"do not fit into prompt_length {prompt_length} and completion_length {completion_length}"
            )
        start, end = prompt_length - len(prompt), prompt_length + len(completion)
        ids_NL[row, start : end + 1] = torch.tensor([*prompt, *completion, end_token_id])
        attention_mask_NL[row, :start] = False
        loss_weight_NL[row, prompt_length : end + 1] = 1.0
        loss_weight_NL[row, end + 1 :] = pad_weight
    maskable_NL = (torch.arange(length) >= prompt_length).expand(len(pairs), length)
    return SupervisedRows(
        ids_NL=ids_NL, attention_mask_NL=attention_mask_NL, maskable_NL=maskable_NL, loss_weight_NL=loss_weight_NL
    )


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """(instruction, completion) texts -> (chat prompt ids, completion ids), as `prompts.chat_ids` would ask them."""
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in pairs]
    texts = [str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats]
    prompt_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    return list(zip(prompt_ids, completion_ids, strict=True))


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A private stream for one step."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step))


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Rows of a step: every epoch is a permutation of its own, and a batch may reach over into the next one."""
    index, position = [], step * batch_size
    while len(index) < batch_size:
        epoch, offset = divmod(position, num_rows)
        order_N = torch.randperm(num_rows, generator=step_generator(seed, epoch, "epoch"))
        piece = order_N[offset : offset + batch_size - len(index)].tolist()
        index += piece
        position += len(piece)
    return torch.tensor(index)


def make_optimizers(model: PolicyModel, options: SupervisedOptions) -> list[torch.optim.Optimizer]:
    """AdamW for everything that is trained, or Muon for the blocks' matrices and AdamW for embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside_block = ".layers." in name and parameter.ndim == 2
        (matrices if inside_block and options.muon_lr is not None else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        adamw = torch.optim.AdamW(
            rest, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )
        optimizers.append(adamw)
    if options.muon_lr is not None:
        muon = torch.optim.Muon(
            matrices, lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def train_step(
    model: PolicyModel,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: SupervisedRows,
    options: SupervisedOptions,
    step: int,
) -> Metrics:
    """One update on the batch that (seed, step) picks from `rows`."""
    batch = rows.take(batch_indices(len(rows), options.batch_size, step, options.seed))
    generator = step_generator(options.seed, step, "noise")
    t_B = draw_mask_ratios(len(batch), generator, t_min=options.t_min)
    noised = forward_process(
        batch.ids_NL, batch.maskable_NL, t_B, mask_token_id=model.mask_token_id, generator=generator
    )
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(
                step,
                total=options.num_steps,
                peak=group["peak_lr"],
                warmup=options.warmup_steps,
                min_ratio=options.min_lr_ratio,
            )
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if options.bf16 else nullcontext()
    with autocast, torch.random.fork_rng(devices=[]):
        # Dropout draws from the global generator and from no other.
        torch.default_generator.manual_seed(derive_seed(options.seed, "dropout", step))
        loss, metrics = diffusion_loss(model, batch.ids_NL, batch.attention_mask_NL, batch.loss_weight_NL, noised)
    loss.backward()
    grad_norm = clip_grad_norm_(model.parameters(), options.grad_norm, error_if_nonfinite=True)
    for optimizer in optimizers:
        optimizer.step()
    return {**metrics, "optim/grad_norm": float(grad_norm), "optim/lr": optimizers[0].param_groups[0]["lr"]}


def train(
    model: PolicyModel,
    rows: SupervisedRows,
    options: SupervisedOptions,
    on_step: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> None:
    """Run a whole stage in this process; `on_step(step, metrics)` is called after every update."""
    model.train()
    optimizers = make_optimizers(model, options)
    for step in range(options.num_steps):
        on_step(step, train_step(model, optimizers, rows, options, step))
