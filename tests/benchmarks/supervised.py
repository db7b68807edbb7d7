"""`make bench-supervised`: tokens per second and peak memory of a supervised train step, beside a plain trainer's.

A step is noise, forward, backward, clipping and AdamW, on packed text. The peer is transformers' own Trainer (its
training_step, its optimizer) with the loss that trainers of diffusion models use: logits of all positions, cross-entropy
of all of them, weighted afterwards. Ours is noised_batch and batch_loss with the same AdamW. Both have stock Qwen2 with
the same random weights, the same rows, the same noise, the same threads and allocator settings; the sides alternate in one
process, and losses and gradients of their first step are compared. Memory is the peak resident size of a process
that does nothing but one side.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from diffrl.config import PretrainConfig
from diffrl.data.shards import Row, SupervisedRows, collate
from diffrl.diffusion import NoisedRows, batch_loss
from diffrl.models.dream import DreamModel
from diffrl.supervised import make_optimizers, noised_batch
from tests.benchmarks import learner
from tests.benchmarks.learner import ALLOCATOR

Step = Callable[[int], tuple[float, dict[str, Tensor]]]  # number of a step -> its loss, its gradients before clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case(size="S", vocab_size=32768, documents=1, rounds=7)"""

    size: str
    vocab_size: int
    documents: int = 1  # of equal length in each row
    rows: int = 8
    length: int = 256
    rounds: int = 7

    @property
    def title(self) -> str:
        packed = f", {self.documents} documents each" if self.documents > 1 else ""
        return f"{self.size} {self.vocab_size // 1000}k, {self.rows} x {self.length}{packed}"


CASES = (
    Case(size="S", vocab_size=32768),
    Case(size="S", vocab_size=32768, documents=4),
    Case(size="S", vocab_size=152064, rounds=5),
)
CONFIG = PretrainConfig.model_validate(
    {"stage": "pretrain", "data": {"source": "microcode"}, "optim": {"lr": 1e-4, "weight_decay": 0.0}}
)


def model_of(case: Case) -> DreamModel:
    shape = learner.Case(size=case.size, vocab_size=case.vocab_size, group_size=1, what="step")
    return learner.build(shape).train()


def rows_of(case: Case, step: int) -> SupervisedRows:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(case.vocab_size - 1, (case.rows, case.length), generator=generator)
    lengths = [case.length // case.documents] * case.documents
    rows = [Row(ids=row, lengths=lengths, prompts=[0] * case.documents) for row in ids.tolist()]
    return collate(rows, length=case.length, pad_token_id=0, pad_weight=1.0)


def noise(case: Case, step: int) -> NoisedRows:
    return noised_batch(rows_of(case, step), CONFIG, step=step, mask_token_id=case.vocab_size - 1)


def gradients(model: DreamModel, wanted: bool) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} if wanted else {}


# The two sides. Only the first step's gradients are asked for, for copies cost time.


def peer_step(case: Case) -> Step:
    model = model_of(case)

    class DiffusionTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            batch = NoisedRows(**{f.name: inputs.get(f.name) for f in fields(NoisedRows)})
            document_BL = batch.document_BL
            attend_BLL = document_BL[:, :, None] == document_BL[:, None, :]
            mask: Any = {"full_attention": None} if bool(attend_BLL.all()) else attend_BLL[:, None]
            logits = model(input_ids=batch.noised_ids_BL, attention_mask=mask, use_cache=False).logits
            starts_BL = F.pad(document_BL[:, 1:] != document_BL[:, :-1], (1, 0), value=True)
            logits = torch.where(starts_BL[..., None], logits, logits.roll(1, 1))
            nll_N = F.cross_entropy(logits.flatten(0, 1).float(), batch.ids_BL.flatten(), reduction="none")
            return (nll_N * batch.weight_BL.flatten()).sum() / batch.num_weight

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        learning_rate=CONFIG.optim.lr,
        adam_beta1=CONFIG.optim.beta1,
        adam_beta2=CONFIG.optim.beta2,
        weight_decay=CONFIG.optim.weight_decay,
        max_grad_norm=CONFIG.optim.grad_norm,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
    )
    trainer = DiffusionTrainer(model=model.backbone, args=arguments)
    trainer.current_gradient_accumulation_steps = 1  # what train() would set before it calls training_step
    optimizer = trainer.create_optimizer()

    def step(number: int) -> tuple[float, dict[str, Tensor]]:
        batch = noise(case, number)
        inputs: Any = {f.name: getattr(batch, f.name) for f in fields(batch)}
        loss = trainer.training_step(model.backbone, inputs)
        grads = gradients(model, number == 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss), grads

    return step


def our_step(case: Case) -> Step:
    model = model_of(case)
    (optimizer,) = make_optimizers(model, CONFIG.optim)

    def step(number: int) -> tuple[float, dict[str, Tensor]]:
        loss, metrics = batch_loss(model, noise(case, number))
        loss.backward()
        grads = gradients(model, number == 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.optim.grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return metrics["loss/diffusion"], grads

    return step


SIDES = {"peer": peer_step, "diffrl": our_step}


def measure(case: Case) -> dict[str, Any]:
    """Seconds of every round for both sides, which alternate, and how far apart their first steps are."""
    torch.set_num_threads(2)
    steps = {name: make(case) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, list[float]] = {name: [] for name in SIDES}
    first = {}
    for turn in range(case.rounds + 1):  # the first warms up
        for name, step in steps.items():
            started = time.perf_counter()
            loss, grads = step(turn)
            if turn:
                seconds[name].append(time.perf_counter() - started)
            else:
                first[name] = grads
            losses[name].append(loss)
    peer, ours = first["peer"], first["diffrl"]
    norm = torch.stack([g.norm() for g in peer.values()]).norm()
    gap = torch.stack([(peer[k] - ours[k]).norm() for k in peer]).norm()
    apart = max(abs(a - b) / a for a, b in zip(losses["peer"], losses["diffrl"], strict=True))
    assert apart < 1e-3, f"the two sides do not compute the same loss: {losses}"
    return {"seconds": seconds, "loss": apart, "gradient": float(gap / norm)}


def peak_memory(case: Case, name: str) -> float:
    """GB."""
    torch.set_num_threads(2)
    step = SIDES[name](case)
    for number in (1, 2):
        step(number)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.supervised", *arguments]
    output = subprocess.check_output(command, text=True, env=os.environ | ALLOCATOR)
    return json.loads(output.splitlines()[-1])  # a trainer may say more


def report(numbers: list[int], rounds: int | None) -> None:
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, torch {torch.__version__}; tokens/s are medians\n")
    print("| | peer tokens/s | diffrl tokens/s | ratio | peer GB | diffrl GB | memory | loss apart | gradient apart |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in numbers:
        case = CASES[number]
        result = in_process("--measure", str(number), "--rounds", str(rounds or case.rounds))
        pairs = result["seconds"]
        rate = {name: case.rows * case.length / statistics.median(times) for name, times in pairs.items()}
        ratios = [a / b for a, b in zip(pairs["peer"], pairs["diffrl"], strict=True)]
        memory = [in_process("--memory", str(number), name) for name in SIDES]
        print(
            f"| {case.title} | {rate['peer']:.0f} | {rate['diffrl']:.0f} "
            f"| {rate['diffrl'] / rate['peer']:.2f} [{min(ratios):.2f}..{max(ratios):.2f}] "
            f"| {memory[0]:.2f} | {memory[1]:.2f} | {memory[1] / memory[0]:.2f} "
            f"| {result['loss']:.1e} | {result['gradient']:.1e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=int)
    parser.add_argument("--memory", nargs=2)
    parser.add_argument("--only", type=int, help="number of one case")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    if options.measure is not None:
        case = CASES[options.measure]
        print(json.dumps(measure(replace(case, rounds=options.rounds or case.rounds))))
    elif options.memory:
        print(json.dumps(peak_memory(CASES[int(options.memory[0])], options.memory[1])))
    else:
        report([options.only] if options.only is not None else list(range(len(CASES))), options.rounds)


if __name__ == "__main__":
    main()
