"""`make bench-sampler-gpu`: rollouts of a 7B model on a GPU, beside Dream's `diffusion_generate`.

The peer, the model of random weights and the states to set out from are those of sampler.py, in bfloat16: prompt 200 + 256
tokens in 256 steps, batches of 1 to 64. Modes without a cache are measured over single steps at the middle of each quarter
of the schedule, and the mean of these is a step of a whole run; cached ones over whole runs, since a cache's work depends
on what came before. All sides of one batch alternate in one process.

Shares are of what this very GPU reaches in the same process: the matrix peak by a product of two bfloat16 matrices of 8192 x
8192, the bandwidth by a copy of 4 GB (read and written bytes). A pass needs 2 operations for each element of a layer's
matrices and each position of its rows, and of the head and each position that goes through it; attention (1%) is left out. It
reads every weight once, which bounds batches of 1.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffrl.models.dream import DreamModel
from diffrl.sampler import Canvas, Engine, SamplingParams
from tests.benchmarks.sampler import GREEDY, PLACES, Case, Start, build, compared, params, peer_generate, starts

PROMPT, COMPLETION, STEPS, BLOCK = 200, 256, 256, 32
BATCHES = (1, 8, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run did. Work(steps=4, positions=1856, scored=512)"""

    steps: int
    positions: int  # that went through the layers, padding included
    scored: int  # that went through the head


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Mode(name="exact, as called", side=ours, params=params(256))"""

    name: str
    side: Callable[[DreamModel, Start], Work]
    params: SamplingParams

    @property
    def whole(self) -> bool:
        return self.params.cache != "none"


def peer(model: DreamModel, start: Start) -> Work:
    peer_generate(model, start.ids_BL, start.params, start.num_steps)
    everywhere = start.num_steps * start.ids_BL.numel()
    return Work(steps=start.num_steps, positions=everywhere, scored=everywhere)


def ours(model: DreamModel, start: Start) -> Work:
    engine = Engine(model, start.params, max_tokens=1 << 62, device=start.ids_BL.device)
    for seed, ids_L in enumerate(start.ids_BL.cpu()):
        engine.add(Canvas(ids_L=ids_L, hidden_L=ids_L == model.mask_token_id, seed=seed))
    engine.admit()
    scored = step = 0
    while engine.busy and (start.num_steps == start.params.steps or step < start.num_steps):
        looked_at_RW = engine.hidden_RW
        if start.params.block_size is not None:
            column_W = torch.arange(looked_at_RW.shape[1], device=looked_at_RW.device)
            looked_at_RW = looked_at_RW & (column_W < engine.blocks()[:, 1:])
        scored += int(looked_at_RW.sum())
        engine.step()
        step += 1
    return Work(steps=start.num_steps, positions=engine.num_tokens_passed, scored=scored)


MODES = (
    Mode(name="transcription, as called", side=peer, params=params(STEPS)),
    Mode(name="exact, as called", side=ours, params=params(STEPS)),
    Mode(name="transcription, T=0", side=peer, params=params(STEPS, **GREEDY)),
    Mode(name="exact, T=0", side=ours, params=params(STEPS, **GREEDY)),
    *(
        Mode(
            name=f"{cache} cache, T=0, blocks of {BLOCK}",
            side=ours,
            params=params(STEPS, **GREEDY, cache=cache, block_size=BLOCK),
        )
        for cache in ("dual", "prefix")
    ),
)


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_peak() -> float:
    """Operations a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(10)]
    return 2 * 8192**3 / statistics.median(times[3:])


def bandwidth() -> float:
    """Bytes a second."""
    a = torch.empty(1 << 31, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    times = [seconds(lambda: b.copy_(a)) for _ in range(10)]
    return 2 * a.nbytes / statistics.median(times[3:])


def measure(
    model: DreamModel, modes: tuple[Mode, ...], case: Case, rounds: int
) -> dict[str, tuple[list[float], Work, float]]:
    """Seconds per step of each round, the work of one, and the peak of memory in GB, by mode."""
    times: dict[str, list[float]] = {mode.name: [] for mode in modes}
    works: dict[str, Work] = {}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):  # the first warms up
        for mode in modes:
            if mode.whole and turn not in (0, rounds):
                continue
            sized = replace(case, params=mode.params, places=0 if mode.whole else case.places)
            begin = [replace(start, params=mode.params) if mode.whole else start for start in starts(sized)]
            if mode.whole and turn == 0:
                begin = [replace(start, params=replace(mode.params, steps=8)) for start in begin]
                begin = [replace(start, num_steps=8) for start in begin]
            torch.cuda.reset_peak_memory_stats()
            done: list[Work] = []
            spent = seconds(lambda m=mode, b=begin, d=done: d.extend(m.side(model, start) for start in b))
            peaks[mode.name] = torch.cuda.max_memory_allocated() / 1e9
            works[mode.name] = Work(
                steps=sum(work.steps for work in done),
                positions=sum(work.positions for work in done),
                scored=sum(work.scored for work in done),
            )
            if turn:
                times[mode.name].append(spent / works[mode.name].steps)
    return {name: (times[name], works[name], peaks[name]) for name in times}


def report(size: str, vocab_size: int, batches: tuple[int, ...], rounds: int, compiled: bool) -> None:
    case = Case(
        name="",
        size=size,
        vocab_size=vocab_size,
        params=params(STEPS),
        dtype="bfloat16",
        device="cuda",
        prompt=PROMPT,
        completion=COMPLETION,
        places=1,
    )
    model = build(case)
    body = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name)
    head = model.backbone.lm_head.weight.numel()
    most, widest = matrix_peak(), bandwidth()
    print(
        f"{platform.platform()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; {size}, vocabulary {vocab_size}, "
        f"{(body + 2 * head) / 1e9:.2f}G parameters, bfloat16; prompt {PROMPT} + {COMPLETION} tokens in {STEPS} steps, "
        f"{len(PLACES)} places or whole runs, medians of {rounds}; matrix peak {most / 1e12:.0f} TFLOP/s, bandwidth "
        f"{widest / 1e12:.2f} TB/s\n"
    )
    print("| batch | mode | s/step | tok/s | beside the transcription | of matrix peak | of bandwidth | peak GB |")
    print("|---|---|---|---|---|---|---|---|")

    def rows(batch: int, modes: tuple[Mode, ...], beside: dict[str, list[float]], suffix: str = "") -> None:
        for name, (times, work, peak) in measure(model, modes, replace(case, batch=batch), rounds).items():
            beside[name] = times
            step = statistics.median(times)
            other = beside[f"transcription, {'as called' if 'as called' in name else 'T=0'}"]
            ratio = "" if name.startswith("transcription") else f"{statistics.median(other) / step:.2f}"
            operations = 2 * (body * work.positions + head * work.scored) / work.steps / step
            read = 2 * (body + head) / step
            print(
                f"| {batch} | {name}{suffix} | {step:.4f} | {batch * COMPLETION / STEPS / step:.1f} | {ratio} "
                f"| {operations / most:.0%} | {read / widest:.0%} | {peak:.1f} |",
                flush=True,
            )

    times_of: dict[int, dict[str, list[float]]] = {batch: {} for batch in batches}
    for batch in batches:
        rows(batch, MODES, times_of[batch])
    alike = compared(replace(case, batch=8, params=params(STEPS, **GREEDY)), model)
    print(
        f"\nOne step of both sides from the same states, batch 8, T=0: {alike['differ']:.0f} of {alike['rows']:.0f} rows "
        f"reveal something else, the widest gap between what they took is {alike['gap']:.0e}; confidences are within "
        f"{alike['apart']:.0e}."
    )
    if compiled:
        print("\nWith torch.compile of all layers but the last (`rollout.compile`):\n", flush=True)
        for layer in model.backbone.model.layers[:-1]:
            layer.compile(dynamic=True)
        for batch in batches:
            rows(batch, (MODES[3],), times_of[batch], ", compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="7B")
    parser.add_argument("--vocab-size", type=int, default=152064)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    report(options.size, options.vocab_size, tuple(options.batches), options.rounds, options.compile)


if __name__ == "__main__":
    main()
