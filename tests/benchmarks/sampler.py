"""`make bench-sampler`: what rollouts cost, beside Dream's `diffusion_generate`.

The peer is a transcription of its loop: at every step a forward pass over whole rows with the vocabulary head at all positions,
the shift, the logits at [MASK]s; temperature, top_p by a full sort, top_k; a draw from every one of them; confidences;
tokens for the most confident. Ours is diffrl.sampler. Same stock Qwen2 with random weights (the head's row of [MASK] is
zero), same threads and allocator settings; the sides alternate in one process.

A case of `places` measures a few steps at the middle of each quarter of the schedule: there the rest of the completion
holds random tokens, which are the same for both sides, and the schedule goes on from there. A step's work grows in
proportion to what is hidden, so the mean over the places is that of a whole run; that our first pass is shared by
a group is left out. A case without `places` measures whole runs. Of a `rival` the other side is our own sampler with
other parameters. Both sides take one step from each state for the comparison: how many rows revealed something else at
temperature 0 and how close a tie that was, and how far apart the confidences are. Memory is the peak resident size of a
process that does nothing but one side.

Shapes: B rows, L positions, N hidden positions, K of them revealed in a row, V vocabulary.
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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.sampler import Canvas, Engine, SamplingParams
from diffrl.sampler.filters import confidences
from diffrl.sampler.params import reveal_counts
from tests.benchmarks import learner

BATCH, PROMPT, COMPLETION = 8, 128, 128
PLACES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of the schedule
NUCLEUS = 0.95


def params(steps: int = COMPLETION, **changes: Any) -> SamplingParams:
    """As the release's rollouts call it."""
    return SamplingParams(**{"steps": steps, "temperature": 1.0, "top_p": NUCLEUS, "top_k": 50, **changes})


GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": None, "top_k": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case(name="as called", size="S", vocab_size=32768, params=params(), goal=6.0)"""

    name: str
    size: str
    vocab_size: int
    params: SamplingParams  # ours; the peer gets them without approximations
    goal: float | None = None  # of the ratio; of a rival's the most it may be
    rival: SamplingParams | None = None  # ours against ours
    places: int = 2  # steps at each place; 0: whole runs
    nucleus: int | None = None  # logits are scaled until the nucleus holds so many tokens on average
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = BATCH
    prompt: int = PROMPT
    completion: int = COMPLETION
    rounds: int = 5

    @property
    def title(self) -> str:
        return f"{self.size} {self.vocab_size // 1000}k {self.dtype}, {self.name}, {self.params.steps} steps"


CASES = (
    Case(name="as called", size="S", vocab_size=32768, params=params(), goal=6.0),
    Case(name="as called", size="M", vocab_size=32768, params=params(), goal=2.0, rounds=3),
    Case(name="as called", size="S", vocab_size=152064, params=params(), goal=12.0, places=1),
    Case(name="T=0", size="S", vocab_size=32768, params=params(**GREEDY), goal=1.7),
    Case(name="T=0", size="S", vocab_size=152064, params=params(**GREEDY), goal=2.3, places=1, rounds=3),
    Case(name="T=1, a nucleus of 20", size="S", vocab_size=32768, params=params(top_k=None), goal=3.0, nucleus=20),
    Case(name="as called", size="S", vocab_size=32768, params=params(), dtype="bfloat16"),
    *(Case(name="T=0", size="S", vocab_size=32768, params=params(n, **GREEDY), places=n // 32) for n in (32, 64, 256)),
    Case(
        name="T=0, beside 128 steps",
        size="S",
        vocab_size=32768,
        params=params(256, **GREEDY),
        rival=params(128, **GREEDY),
        goal=1.05,
        places=0,
        rounds=3,
    ),
    # Approximate modes, whole runs of 64 steps.
    *(
        Case(
            name=f"T=0, {cache} cache, blocks of 32",
            size="S",
            vocab_size=32768,
            params=params(64, **GREEDY, cache=cache, block_size=32),
            goal=goal,
            places=0,
            rounds=1,
        )
        for cache, goal in (("prefix", 3.5), ("dual", 5.0))
    ),
    Case(
        name="T=0, 4 tokens a step",
        size="S",
        vocab_size=32768,
        params=params(64, **GREEDY, tokens_per_step=4),
        places=0,
        rounds=1,
    ),
)


# The peer.


def peer_sample(logits_NV: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(confidence_N, token_N)"""
    lowest = torch.finfo(logits_NV.dtype).min
    if params.temperature > 0:
        logits_NV = logits_NV / params.temperature
    if params.top_p is not None and params.top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(descending=True)
        beyond_NV = sorted_NV.softmax(-1).cumsum(-1) > params.top_p
        beyond_NV[:, 1:] = beyond_NV[:, :-1].clone()
        beyond_NV[:, 0] = False
        drop_NV = torch.zeros_like(logits_NV, dtype=torch.bool).scatter_(-1, order_NV, beyond_NV)
        logits_NV = logits_NV.masked_fill(drop_NV, lowest)
    if params.top_k is not None:
        kth_N1 = logits_NV.topk(min(params.top_k, logits_NV.shape[-1])).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, lowest)
    probs_NV = logits_NV.softmax(-1)
    confidence_N, token_N = probs_NV.max(-1) if params.temperature == 0 else peer_draw(probs_NV)
    if params.algorithm == "topk_margin":
        falling_NV = probs_NV.sort(descending=True).values
        confidence_N = falling_NV[:, 0] - falling_NV[:, 1]
    elif params.algorithm == "entropy":
        confidence_N = (probs_NV * (probs_NV + 1e-10).log()).sum(-1)
    return confidence_N, token_N


def peer_draw(probs_NV: Tensor) -> tuple[Tensor, Tensor]:
    try:
        token_N = torch.distributions.Categorical(probs=probs_NV).sample()
    except ValueError:  # in bfloat16 probabilities may not sum to 1; the release then takes the most probable
        return probs_NV.max(-1)
    return probs_NV.gather(-1, token_N[:, None])[:, 0], token_N


def peer_logits(model: PolicyModel, ids_BL: Tensor) -> Tensor:
    """[B, L, V]. Without padding the release passes no mask: plain full attention."""
    attention: Any = {"full_attention": None}
    logits_BLV = model.backbone(input_ids=ids_BL, attention_mask=attention, use_cache=False).logits
    return torch.cat([logits_BLV[:, :1], logits_BLV[:, :-1]], 1)


@torch.no_grad()
def peer_generate(model: PolicyModel, ids_BL: Tensor, params: SamplingParams, num_steps: int | None = None) -> Tensor:
    """Dream's loop from `ids_BL`, whose [MASK]s are to be filled; its first `num_steps` steps. Uses the global generator."""
    ids_BL, mask_id = ids_BL.clone(), model.mask_token_id
    time_S = torch.linspace(1, params.eps, params.steps + 1)
    for step in range(params.steps if num_steps is None else num_steps):
        hidden_BL = ids_BL == mask_id
        logits_NV = peer_logits(model, ids_BL)[hidden_BL]
        last = step == params.steps - 1
        share = 1 - time_S[step + 1] / time_S[step]
        if params.algorithm == "origin":
            token_N = torch.full((len(logits_NV),), mask_id, device=logits_NV.device)
            reveal_N = torch.rand(len(logits_NV), device=logits_NV.device) < (1.0 if last else share)
            _, token_N[reveal_N] = peer_sample(logits_NV[reveal_N], params)
            ids_BL[hidden_BL] = token_N
            continue
        confidence_N, token_N = peer_sample(logits_NV, params)
        mean = hidden_BL.sum() / len(hidden_BL)
        count = int(mean) if last else int(mean * share)
        score_BL = torch.full_like(ids_BL, -torch.inf, dtype=logits_NV.dtype)
        score_BL[hidden_BL] = confidence_N
        if not count:
            continue
        if params.alg_temp:
            index_BK = torch.multinomial((score_BL / params.alg_temp).softmax(-1), count)
        else:
            index_BK = score_BL.topk(count).indices
        drawn_BL = torch.full_like(ids_BL, mask_id)
        drawn_BL[hidden_BL] = token_N
        ids_BL.scatter_(1, index_BK, drawn_BL.gather(1, index_BK))
    return ids_BL


# The data: a model, and states in the middle of a run.


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where both sides set out. Start(ids_BL=tensor([[412, 31, 99, ...], ...]), params=SamplingParams(...), num_steps=2)"""

    ids_BL: Tensor
    params: SamplingParams  # of the rest of the schedule
    num_steps: int


def build(case: Case) -> DreamModel:
    model = learner.build(
        learner.Case(
            size=case.size,
            vocab_size=case.vocab_size,
            group_size=0,
            what="step",
            dtype=case.dtype,
            device=case.device,
        )
    )
    head: Any = model.backbone.lm_head
    with torch.no_grad():
        head.weight[model.mask_token_id] = 0
        if case.nucleus is not None:
            head.weight.mul_(nucleus_scale(model, starts(case)[len(PLACES) // 2].ids_BL, case.nucleus))
    return model.eval()


@torch.no_grad()
def nucleus_scale(model: DreamModel, ids_BL: Tensor, wanted: int) -> float:
    """The factor of the logits with which the nucleus of a hidden position holds so many tokens, on average."""
    hidden_BL = ids_BL == model.mask_token_id
    logits_NV = peer_logits(model, ids_BL[:2])[hidden_BL[:2]].float().sort(descending=True).values
    low, high = 1.0, 1e3
    for _ in range(20):
        scale = (low * high) ** 0.5
        before_NV = (scale * logits_NV).softmax(-1).cumsum(-1)
        size = float((1 + (before_NV < NUCLEUS).sum(-1)).float().mean())
        low, high = (scale, high) if size > wanted else (low, scale)
    return low


def starts(case: Case) -> list[Start]:
    """One for each place; of whole runs one at the beginning, all rows alike, as rollouts of one prompt are."""
    generator = torch.Generator().manual_seed(1)
    mask_id, exact = case.vocab_size - 1, case.params.exactly()
    ids_BL = torch.randint(mask_id, (case.batch, case.prompt + case.completion), generator=generator)
    if not case.places:
        ids_BL = ids_BL[:1].repeat(case.batch, 1)
        ids_BL[:, case.prompt :] = mask_id
        return [Start(ids_BL=ids_BL.to(case.device), params=exact, num_steps=exact.steps)]
    counts = reveal_counts(case.completion, exact.steps, exact.eps)
    time_S = torch.linspace(1, exact.eps, exact.steps + 1)
    out = []
    for place in PLACES:
        step = int(place * exact.steps)
        hidden = case.completion - sum(counts[:step])
        order_BC = torch.rand(case.batch, case.completion, generator=generator).argsort(1)
        state_BL = ids_BL.clone()
        state_BL[:, case.prompt :][order_BC < hidden] = mask_id
        rest = replace(exact, steps=exact.steps - step, eps=exact.eps / float(time_S[step]))
        assert reveal_counts(hidden, rest.steps, rest.eps)[: case.places] == counts[step : step + case.places]
        out.append(Start(ids_BL=state_BL.to(case.device), params=rest, num_steps=case.places))
    return out


# The two sides, from one state. Both return the tokens and the number of forward passes.


def run_peer(model: DreamModel, start: Start) -> tuple[Tensor, int]:
    return peer_generate(model, start.ids_BL, start.params, start.num_steps), start.num_steps


def run_ours(model: DreamModel, start: Start) -> tuple[Tensor, int]:
    device = start.ids_BL.device
    engine = Engine(model, start.params, max_tokens=1 << 62, end_ids=[0], device=device)  # of early_end: some token
    for seed, ids_L in enumerate(start.ids_BL.cpu()):
        engine.add(Canvas(ids_L=ids_L, hidden_L=ids_L == model.mask_token_id, seed=seed))
    if start.num_steps == start.params.steps:
        return torch.stack([row.ids_L for row in engine.run()]), engine.num_passes
    hidden = int((start.ids_BL[0] == model.mask_token_id).sum())
    counts = reveal_counts(hidden, start.params.steps, start.params.eps)
    calls = sum(count > 0 for count in counts[: start.num_steps])  # a call goes on to the next step that reveals
    for _ in range(calls):
        assert not engine.step()
    return engine.ids_RW if calls else start.ids_BL, engine.num_passes


Side = Callable[[DreamModel, Start], tuple[Tensor, int]]


def sides(case: Case) -> dict[str, tuple[Side, list[Start]]]:
    """What each side does, and from where."""
    begin = starts(case)
    ours = begin if case.params.is_exact else [replace(start, params=case.params) for start in begin]
    if case.rival is not None:
        rival = [replace(start, params=case.rival, num_steps=case.rival.steps) for start in begin]
        return {"other": (run_ours, rival), "diffrl": (run_ours, ours)}
    return {"other": (run_peer, begin), "diffrl": (run_ours, ours)}


def prepared(case: Case) -> tuple[DreamModel, dict[str, tuple[Side, list[Start]]]]:
    torch.set_num_threads(2)
    torch.manual_seed(0)  # of the peer's draws
    return build(case), sides(case)


def measure(case: Case) -> dict[str, Any]:
    """Seconds and forward passes of every round for both sides, which alternate place by place; and the comparison."""
    model, both = prepared(case)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    passes: dict[str, int] = {}
    for turn in range(case.rounds + 1):  # the first warms up
        spent, made = dict.fromkeys(both, 0.0), dict.fromkeys(both, 0)
        for number in range(len(starts(case))):
            for name, (side, begin) in both.items():
                started = time.perf_counter()
                _, count = side(model, begin[number])
                spent[name] += time.perf_counter() - started
                made[name] += count
        for name in both if turn else ():
            seconds[name].append(spent[name])
        passes = made
    return {"seconds": seconds, "passes": passes, **compared(case, model)}


@torch.no_grad()
def compared(case: Case, model: DreamModel) -> dict[str, float]:
    """One step of both sides from the same states: rows that revealed something else, the widest gap between what they
    took, in confidence or logit, and the largest difference of confidences. At temperature 0 a gap means a near-tie."""
    rows = differ = 0
    gap = apart = 0.0
    for start in starts(replace(case, params=case.params.exactly(), places=1)):
        hidden_BL = start.ids_BL == model.mask_token_id
        logits_NV = peer_logits(model, start.ids_BL)[hidden_BL]
        score_N, _ = peer_sample(logits_NV, start.params)
        attended_BL = torch.ones_like(hidden_BL)
        states_ND = model.selected_states(start.ids_BL, attended_BL, hidden_BL, packed=True)
        own_N = torch.cat([confidences(model.logits(chunk_nD), start.params) for chunk_nD in states_ND.split(64)])
        apart = max(apart, float((score_N.float() - own_N).abs().max()))
        if start.params.temperature > 0:
            continue
        peer_BL, our_BL = run_peer(model, start)[0], run_ours(model, start)[0]
        score_BL = torch.full(hidden_BL.shape, torch.nan, device=hidden_BL.device).masked_scatter_(
            hidden_BL, score_N.float()
        )
        logits_of = dict(zip(map(tuple, hidden_BL.nonzero().tolist()), logits_NV.float(), strict=True))
        for row in range(case.batch):
            rows += 1
            if torch.equal(peer_BL[row], our_BL[row]):
                continue
            differ += 1
            peer_took, our_took = (
                [
                    p
                    for p in range(case.prompt + case.completion)
                    if hidden_BL[row, p] and ids_BL[row, p] != model.mask_token_id
                ]
                for ids_BL in (peer_BL, our_BL)
            )
            only_peer, only_ours = set(peer_took) - set(our_took), set(our_took) - set(peer_took)
            if only_peer:
                worst = max(float(score_BL[row, p]) for p in only_peer) - min(
                    float(score_BL[row, p]) for p in only_ours
                )
                gap = max(gap, worst)
            for p in set(peer_took) & set(our_took):
                logits_V = logits_of[row, p]
                gap = max(gap, float((logits_V[peer_BL[row, p]] - logits_V[our_BL[row, p]]).abs()))
    return {"rows": rows, "differ": differ, "gap": gap, "apart": apart}


def peak_memory(case: Case, name: str) -> float:
    """GB, at the state with the most hidden positions; of a whole run too, in its first step only for the peer."""
    model, both = prepared(case)
    side, begin = both[name]
    first = begin[0]
    side(model, replace(first, num_steps=1) if side is run_peer else first)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.sampler", *arguments]
    return json.loads(subprocess.check_output(command, text=True, env=os.environ | learner.ALLOCATOR))


def report(numbers: list[int]) -> None:
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, torch {torch.__version__}, 2 threads; batch {BATCH}, prompt {PROMPT} + "
        f"{COMPLETION} new tokens, {len(PLACES)} places or whole runs, medians; weights of seed 0, data of seed 1\n"
    )
    print(
        "| | other s/step | diffrl s/step | ratio | goal | other tok/s | diffrl tok/s | passes measured | peak GB | alike |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number in numbers:
        print(row(CASES[number], number), flush=True)


def row(case: Case, number: int) -> str:
    """A line of the table. Of whole runs seconds per step are those of the run over its own steps."""
    result = in_process("--measure", str(number))
    steps = {"other": (case.rival or case.params).steps, "diffrl": case.params.steps}
    measured = {name: len(PLACES) * case.places or steps[name] for name in steps}
    seconds = {name: statistics.median(result["seconds"][name]) / measured[name] for name in steps}
    speed = {name: BATCH * COMPLETION / steps[name] / seconds[name] for name in steps}
    ratios = [a / b for a, b in zip(result["seconds"]["other"], result["seconds"]["diffrl"], strict=True)]
    if case.rival is not None:  # how much longer ours takes than the rival
        ratios = [1 / ratio for ratio in ratios]
    memory = [in_process("--memory", str(number), name) for name in steps]
    alike = f"confidences {result['apart']:.0e}"
    if case.params.temperature == 0:
        alike += f", {result['differ']} of {result['rows']} rows differ (gap {result['gap']:.0e})"
    return (
        f"| {case.title} | {seconds['other']:.3f} | {seconds['diffrl']:.3f} "
        f"| {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}] | {case.goal or ''} "
        f"| {speed['other']:.0f} | {speed['diffrl']:.0f} | {result['passes']['other']} : {result['passes']['diffrl']} "
        f"| {memory[0]:.2f} : {memory[1]:.2f} | {alike} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=int)
    parser.add_argument("--memory", nargs=2)
    parser.add_argument("--only", type=int, help="number of one case")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(CASES[options.measure])))
    elif options.memory:
        print(json.dumps(peak_memory(CASES[int(options.memory[0])], options.memory[1])))
    else:
        report([options.only] if options.only is not None else list(range(len(CASES))))


if __name__ == "__main__":
    main()
