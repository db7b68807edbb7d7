"""`make bench-learner`: what scoring and a whole update cost, beside the way of the released code.

The peer is a transcription of the release's scoring (apple/ml-diffucoder f735e01): the three views of every row
concatenated, logits of all positions, then row by row the log-softmax of its three views' completions. Its old scores are
computed for both inner iterations, and it works on 5 of the 10 completions at a time, as the release's batch does. Ours
is diffrl.scoring on whole groups. Same stock Qwen2 with random weights, same data without padding, same loss, same
threads and allocator settings; the sides alternate in one process, and each one's log-probs and gradients are compared.
Memory is the peak resident size of a process that does nothing but one side.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

from diffrl.coupled_grpo import coupled_grpo_loss
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models.dream import DreamModel
from diffrl.scoring import completion_logprobs, slice_rows
from diffrl.types import MaskViews, ScoringBatch
from diffrl.views import ViewOptions

PROMPT, COMPLETION = 200, 256
PEER_ROWS = 5  # completions that the peer scores at a time
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
    "M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 10},
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case(size="S", vocab_size=32768, group_size=5, what="step", dtype="float32", rounds=5)"""

    size: str
    vocab_size: int
    group_size: int
    what: str  # step: forward and backward of one group; update: old, reference and two inner iterations
    dtype: str = "float32"
    rounds: int = 5
    device: str = "cpu"

    @property
    def title(self) -> str:
        kind = "forward + backward" if self.what == "step" else "whole update"
        return f"{self.size} {self.vocab_size // 1000}k {self.dtype}, {kind}, G = {self.group_size}"


CPU_CASES = (
    Case(size="S", vocab_size=32768, group_size=5, what="step"),
    Case(size="M", vocab_size=32768, group_size=5, what="step", rounds=3),
    Case(size="S", vocab_size=152064, group_size=5, what="step", rounds=3),
    Case(size="S", vocab_size=32768, group_size=5, what="step", dtype="bfloat16"),
    Case(size="S", vocab_size=32768, group_size=10, what="update", rounds=3),
)
GPU_CASES = (
    Case(size="M", vocab_size=152064, group_size=10, what="update", dtype="bfloat16", device="cuda"),
    Case(size="7B", vocab_size=152064, group_size=4, what="step", dtype="bfloat16", device="cuda", rounds=3),
)


def build(case: Case, seed: int = 0) -> DreamModel:
    config = Qwen2Config(
        vocab_size=case.vocab_size,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **({"num_key_value_heads": SIZES[case.size]["num_attention_heads"]} | SIZES[case.size]),
    )
    config._attn_implementation = "sdpa"
    generator = torch.Generator(case.device).manual_seed(seed)
    model = DreamModel.from_config(config, mask_token_id=case.vocab_size - 1, generator=generator)
    return model.to(getattr(torch, case.dtype))


def data(case: Case) -> tuple[ScoringBatch, Tensor]:
    """One group of the published recipe: two inner iterations, nothing padded; and its advantages."""
    generator = torch.Generator().manual_seed(1)
    rows = case.group_size
    views = tuple(
        draw_views(
            ESTIMATORS["coupled"], seeds=[iteration], group_size=rows, num_tokens=COMPLETION, options=ViewOptions()
        )
        for iteration in range(2)
    )
    prompt = torch.randint(case.vocab_size - 1, (1, PROMPT), generator=generator).expand(rows, -1)
    batch = ScoringBatch(
        prompt_ids_BP=prompt,
        prompt_mask_BP=torch.ones_like(prompt, dtype=torch.bool),
        completion_ids_BC=torch.randint(case.vocab_size - 1, (rows, COMPLETION), generator=generator),
        scored_BC=torch.ones(rows, COMPLETION, dtype=torch.bool),
        views=views,
        group_size=rows,
    )
    return batch, torch.randn(rows, generator=generator)


# The two sides: log-probs of some rows under the views of one inner iteration.


def peer_logprobs(model: DreamModel, batch: ScoringBatch, views: MaskViews) -> Tensor:
    """The release's selective_log_softmax over its three concatenated views."""
    targets_BC = batch.completion_ids_BC
    noised = [
        torch.cat([batch.prompt_ids_BP, targets_BC.masked_fill(hidden, model.mask_token_id)], 1)
        for hidden in views.hidden_SBC
    ]
    ids = torch.cat(noised)
    attention: Any = {"full_attention": None}  # the release passes no mask: plain full attention
    logits = model.backbone(input_ids=ids, attention_mask=attention, use_cache=False).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[:, -COMPLETION:]
    rows = []
    for row, targets_C in enumerate(targets_BC):
        index_S = torch.arange(len(noised), device=ids.device) * len(targets_BC) + row
        logprobs_SCV = logits[index_S].log_softmax(-1)
        rows.append(logprobs_SCV.gather(-1, targets_C.expand(len(noised), -1)[..., None]).squeeze(-1))
    return (views.weight_SBC * views.hidden_SBC * torch.stack(rows, 1)).sum(0)


def our_logprobs(model: DreamModel, batch: ScoringBatch, views: MaskViews) -> Tensor:
    return completion_logprobs(model, batch, views, mask_token_id=model.mask_token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How one side goes about it. Side(logprobs=our_logprobs, rows=10, own_old=True)"""

    logprobs: Callable[[DreamModel, ScoringBatch, MaskViews], Tensor]
    rows: int  # at a time
    own_old: bool  # old scores of the first inner iteration are its own forward pass


def sides(case: Case) -> dict[str, Side]:
    return {
        "peer": Side(logprobs=peer_logprobs, rows=min(PEER_ROWS, case.group_size), own_old=False),
        "diffrl": Side(logprobs=our_logprobs, rows=case.group_size, own_old=True),
    }


def parts(batch: ScoringBatch, rows: int) -> list[tuple[slice, ScoringBatch]]:
    if rows == batch.group_size:
        return [(slice(0, rows), batch)]
    alone = ScoringBatch(
        **{
            f: getattr(batch, f) for f in ("prompt_ids_BP", "prompt_mask_BP", "completion_ids_BC", "scored_BC", "views")
        },
        group_size=1,
    )
    return [(slice(i, i + rows), slice_rows(alone, i, i + rows)) for i in range(0, batch.group_size, rows)]


def run(case: Case, side: Side, model: DreamModel, reference: DreamModel, batch: ScoringBatch, adv: Tensor) -> Tensor:
    """The work itself; the gradient is left on the model. Returns the log-probs of the last inner iteration."""
    model.zero_grad()
    logprobs = torch.empty(0)
    iterations = 2 if case.what == "update" else 1
    pieces = parts(batch, side.rows)
    with torch.no_grad():
        scored = range(1 if side.own_old else 0, iterations) if case.what == "update" else range(0)
        old = {
            (i, n): side.logprobs(model, piece, piece.views[i]) for i in scored for n, (_, piece) in enumerate(pieces)
        }
        ref = {
            (i, n): side.logprobs(reference, piece, piece.views[i])
            for i in range(iterations if case.what == "update" else 0)
            for n, (_, piece) in enumerate(pieces)
        }
    for i in range(iterations):
        model.zero_grad()
        rows = []
        for n, (cut, piece) in enumerate(pieces):
            new = side.logprobs(model, piece, piece.views[i])
            loss, _ = coupled_grpo_loss(
                new,
                old.get((i, n), new.detach()),
                ref.get((i, n)),
                adv[cut],
                piece.scored_BC,
                num_loss_tokens=batch.scored_BC.numel(),
                clip_low=0.5,
                clip_high=0.5,
                kl_coef=0.01,
            )
            loss.backward()
            rows.append(new.detach())
        logprobs = torch.cat(rows)
    return logprobs


def prepared(case: Case) -> tuple[DreamModel, DreamModel, ScoringBatch, Tensor]:
    torch.set_num_threads(2 if case.device == "cpu" else 8)
    model = build(case)
    reference = build(case, seed=1) if case.what == "update" else model
    batch, advantages = data(case)
    if case.device != "cpu":
        from diffrl.scoring import to_device

        batch, advantages = to_device(batch, case.device), advantages.to(case.device)
    for layer in [*model.backbone.model.layers, *reference.backbone.model.layers]:
        layer.self_attn.is_causal = False  # of the peer, which has no mask; with a mask it plays no part
    return model, reference, batch, advantages


def measure(case: Case) -> dict[str, Any]:
    """Seconds of every round for both sides, which alternate, and how far apart their results are."""
    model, reference, batch, advantages = prepared(case)
    seconds: dict[str, list[float]] = {name: [] for name in sides(case)}
    results = {}
    for turn in range(case.rounds + 1):  # the first warms up
        for name, side in sides(case).items():
            started = time.perf_counter()
            logprobs = run(case, side, model, reference, batch, advantages)
            if case.device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            else:
                grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
                results[name] = (logprobs.float(), grads)
    (peer, peer_grads), (ours, our_grads) = results["peer"], results["diffrl"]
    norm = torch.stack([g.float().norm() for g in peer_grads.values()]).norm()
    gap = torch.stack([(peer_grads[k].float() - our_grads[k].float()).norm() for k in peer_grads]).norm()
    gaps = {"logprobs": float((peer - ours).abs().max()), "gradient": float(gap / norm)}
    return {"seconds": seconds, **gaps}


def peak_memory(case: Case, name: str) -> float:
    """GB; of a GPU what the allocator held at most."""
    model, reference, batch, advantages = prepared(case)
    run(case, sides(case)[name], model, reference, batch, advantages)
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.learner", *arguments]
    return json.loads(subprocess.check_output(command, text=True, env=os.environ | ALLOCATOR))


def report(cases: tuple[Case, ...], first: int) -> None:
    where = torch.cuda.get_device_name() if cases[0].device == "cuda" else f"{os.cpu_count()} CPUs"
    print(
        f"{platform.platform()}, {where}, torch {torch.__version__}; prompt {PROMPT} + completion {COMPLETION}, medians\n"
    )
    print("| | peer s | diffrl s | ratio | peer GB | diffrl GB | memory | log-probs apart | gradient apart |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, case in enumerate(cases, first):
        result = in_process("--measure", str(number))
        peer, ours = (statistics.median(result["seconds"][name]) for name in ("peer", "diffrl"))
        ratios = [a / b for a, b in zip(result["seconds"]["peer"], result["seconds"]["diffrl"], strict=True)]
        memory = [in_process("--memory", str(number), name) for name in ("peer", "diffrl")]
        print(
            f"| {case.title} | {peer:.2f} | {ours:.2f} | {peer / ours:.2f} [{min(ratios):.2f}..{max(ratios):.2f}] "
            f"| {memory[0]:.2f} | {memory[1]:.2f} | {memory[1] / memory[0]:.2f} "
            f"| {result['logprobs']:.1e} | {result['gradient']:.1e} |",
            flush=True,
        )


def main() -> None:
    everything = CPU_CASES + GPU_CASES
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=int)
    parser.add_argument("--memory", nargs=2)
    parser.add_argument("--only", type=int, help="number of one case")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(everything[options.measure])))
    elif options.memory:
        print(json.dumps(peak_memory(everything[int(options.memory[0])], options.memory[1])))
    elif options.only is not None:
        report((everything[options.only],), options.only)
    elif torch.cuda.is_available():
        report(GPU_CASES, len(CPU_CASES))
    else:
        report(CPU_CASES, 0)


if __name__ == "__main__":
    main()
