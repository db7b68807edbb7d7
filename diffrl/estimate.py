"""What a stage will need, before it starts: bytes on each GPU, and GPU-days. Arithmetic only, nothing is loaded.

Bytes of one rank, with P parameters, T of them trained, W ranks, b bytes of the model's dtype (4 or 2):

  weights        b P; under ZeRO 3 b P / W
  gathered       under ZeRO 3 up to 1e9 b, the parameters of the layers at work
  gradients      4 T, summed in float32; bf16 under ZeRO 1 6 T (the bf16 ones stay beside the sum); under ZeRO 2 and 3 / W
  masters        4 T / W under ZeRO 1 to 3, which keep a float32 copy also of float32 weights; 0 under ZeRO 0
  optimizer      8 T (two moments in float32), / W under ZeRO 1 to 3; a matrix trained by Muon has one moment
  buckets        5e8 b under ZeRO 1 to 3: DeepSpeed's buffer in which gradients are reduced
  activations    of n tokens of a micro-batch in rows of L: each layer n (8 D + b (9 D + 4 F + L)), D hidden size, F MLP size
                 (two norms keep float32 copies; queries, keys and values of all heads, attention's output twice; four MLP
                 sized; the mask as numbers), and the last norm n (4 + b) D; with recomputation each layer n b D, and the
                 above of one. Rows without any mask keep up to a tenth less
  head           with X hidden positions and V tokens: logits min(X V, chunk) in float32 and again in b (models/head.py), what is
                 kept of them for the backward pass, and the head's gradient, 4 V D; without chunks 8 X V

`offload: optimizer` moves masters, optimizer and gradients' sums to main memory, `all` the weights too. What frameworks and
allocators take on top, usually 1 to 3 GB, is not in it.

Floating point operations: 2 N per token of a forward pass, N the parameters that multiply (all but the input embeddings), and
4 L D per layer for attention over L positions; a backward pass is two forward passes, recomputation one more. So training
on tokens costs 6 N of them. A step of RL with mu inner iterations has (mu reference + (mu - 1) old + 3 mu learner) scoring
passes, each of as many rows per group as its estimator has distinct inputs (2 G + 1 for the coupled one), and its rollouts
take one forward pass of the whole row per denoising step, of an autoregressive model one in all.
GPU-days = operations / (utilisation * peak).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from diffrl.config import AnyConfig, EngineConfig, PretrainConfig, RLConfig, SftConfig
from diffrl.estimators import ESTIMATORS
from diffrl.models.head import CHUNK_LOGITS, KEPT_LOGITS
from diffrl.models.sizes import Sizes

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200
UTILISATION = 0.4  # of it, while training; well-tuned runs of 7B models reach 0.35 to 0.5
SAMPLING_UTILISATION = 0.25  # while sampling
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size
DRAWN_ROWS, DRAWN_TOKENS = 64, 1024  # of a group, to see which views hide everything
LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank. Memory(weights=15.2e9, gradients=30.5e9, ...)"""

    weights: float
    gradients: float
    masters: float
    optimizer: float
    gathered: float
    buckets: float
    activations: float
    head: float
    host: float  # of the above, or instead of it, in main memory

    @property
    def state(self) -> float:
        """What lives from one step to the next, on the GPU and in main memory."""
        return self.weights + self.gradients + self.masters + self.optimizer + self.host

    @property
    def gpu(self) -> float:
        return (
            self.weights + self.gradients + self.masters + self.optimizer + self.buckets + self.activations + self.head
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimate(roles={"worker": Memory(...)}, flops=4.1e14, num_steps=1000, lines=("...",))"""

    memory: Memory  # of a rank that trains
    inference: Mapping[str, float]  # bytes of each worker that only runs the model, by its role
    tokens_per_step: int  # that are trained on; of RL completions
    flops_per_step: Mapping[str, float]  # by what they are for
    num_steps: int | None  # None: only the data can tell

    def gpu_days(self, num_steps: int) -> float:
        seconds = sum(
            flops / (PEAK_FLOPS * (SAMPLING_UTILISATION if name == "rollouts" else UTILISATION))
            for name, flops in self.flops_per_step.items()
        )
        return num_steps * seconds / 86_400


# Memory


def memory(
    sizes: Sizes,
    engine: EngineConfig,
    *,
    dtype: str,
    num_ranks: int,
    tokens: int,
    length: int,
    hidden_positions: int,
    muon: bool = False,
    device: str = "cuda",
    chunked: bool = True,
) -> Memory:
    """Bytes of a rank that trains on micro-batches of `tokens` in rows of `length`; at most `hidden_positions` of them go
    through the head."""
    item = 4 if dtype == "float32" else 2
    stage, trained = engine.zero_stage, sizes.trained
    shared = num_ranks if stage >= 1 else 1
    weights = item * sizes.parameters / (num_ranks if stage == 3 else 1)
    gathered = item * min(sizes.parameters, LIVE_ELEMENTS) if stage == 3 and num_ranks > 1 else 0.0
    gradients = (6 if item == 2 and stage == 1 else 4) * trained / (num_ranks if stage >= 2 else 1)
    masters = 4 * trained / shared if stage >= 1 else 0.0
    optimizer = (8 * trained - (4 * sizes.matrices if muon else 0)) / shared
    host = 0.0
    if engine.offload != "none":
        sums = 4 * trained / shared
        host, gradients = masters + optimizer + sums, max(gradients - sums, 0.0)
        masters = optimizer = 0.0
    if engine.offload == "all":
        host, weights = host + weights, 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        masters=masters,
        optimizer=optimizer,
        gathered=float(gathered),
        buckets=float(BUCKET_ELEMENTS * item) if stage >= 1 else 0.0,
        activations=activations(sizes, tokens, length, item, recompute=engine.recompute),
        head=head(sizes, hidden_positions, item, device=device, chunked=chunked),
        host=host,
    )


def activations(sizes: Sizes, tokens: int, length: int, item: int, *, recompute: bool) -> float:
    """Bytes that the blocks keep for the backward pass of `tokens` in rows of `length`."""
    per_layer = tokens * (8 * sizes.hidden + item * (9 * sizes.hidden + 4 * sizes.mlp + length))
    last_norm = tokens * (4 + item) * sizes.hidden
    if recompute:
        return float(sizes.layers * tokens * item * sizes.hidden + per_layer + last_norm)
    return float(sizes.layers * per_layer + last_norm)


def head(sizes: Sizes, positions: int, item: int, *, device: str, chunked: bool = True) -> float:
    """Bytes of the vocabulary head while it works."""
    logits = positions * sizes.vocab
    if not chunked:
        return 8.0 * logits
    kept = min(logits, KEPT_LOGITS[device])
    working = min(logits, CHUNK_LOGITS[device])
    return 4.0 * kept + (4.0 if item == 4 else 4.0 + item) * working + 4.0 * sizes.vocab * sizes.hidden


# Operations


def forward_flops(sizes: Sizes, length: int, *, rows: float = 1.0) -> float:
    """Of rows of `length` tokens."""
    return rows * length * (2.0 * sizes.multiplied + 4.0 * sizes.layers * length * sizes.hidden)


def rows_per_group(config: RLConfig) -> int:
    """Distinct inputs of one scoring pass over a group: a view that hides everything is one for all siblings."""
    method = config.method
    rows, tokens = min(method.group_size, DRAWN_ROWS), min(config.sampling.completion_tokens, DRAWN_TOKENS)
    views = ESTIMATORS[method.estimator](torch.Generator().manual_seed(0), rows, tokens, method.view_options())
    return sum(1 if bool(hidden_GC.all()) else method.group_size for hidden_GC in views.hidden_SBC)


def estimate(config: AnyConfig, sizes: Sizes, *, num_steps: int | None = None) -> Estimate:
    """Of a whole stage. `num_steps`: where the config leaves it to the data."""
    steps = config.train.steps or num_steps
    if isinstance(config, RLConfig):
        return replace(rl_estimate(config, sizes), num_steps=steps)
    return replace(supervised_estimate(config, sizes), num_steps=steps)


def supervised_estimate(config: PretrainConfig | SftConfig, sizes: Sizes) -> Estimate:
    workers, length = config.workers, config.data.row_length
    share = config.train.batch_size // workers.num_workers
    tokens = min(config.train.rows_per_micro_batch or share, share) * length
    backward = 4.0 if workers.recompute else 3.0
    return Estimate(
        memory=memory(
            sizes,
            workers,
            dtype=config.model.dtype,
            num_ranks=workers.num_workers,
            tokens=tokens,
            length=length,
            hidden_positions=tokens,  # at t near 1 all are hidden
            muon=config.optim.muon_lr is not None,
            device="cuda" if workers.gpus_per_worker else "cpu",
        ),
        inference={},
        tokens_per_step=config.train.batch_size * length,
        flops_per_step={"training": backward * forward_flops(sizes, length, rows=config.train.batch_size)},
        num_steps=None,
    )


def rl_estimate(config: RLConfig, sizes: Sizes) -> Estimate:
    method, learner, window = config.method, config.learner, config.sampling.completion_tokens
    length = config.data.max_prompt_tokens + window
    rows, device = rows_per_group(config), "cuda" if learner.gpus_per_rank else "cpu"
    groups = config.train.prompts_per_step
    share = rows * length * groups // learner.num_ranks
    tokens = min(max(learner.max_tokens_per_micro_batch, rows * length), share)
    item = 4 if config.model.dtype == "float32" else 2
    sampled = 4 if config.rollout.dtype == "float32" or (config.rollout.dtype is None and item == 4) else 2
    scoring = forward_flops(sizes, length, rows=rows * groups)
    mu, backward = method.num_iterations, 4.0 if learner.recompute else 3.0
    passes = 1 if config.model.family == "causal" else config.sampling.steps
    return Estimate(
        memory=memory(
            sizes,
            learner,
            dtype=config.model.dtype,
            num_ranks=learner.num_ranks,
            tokens=tokens,
            length=length,
            hidden_positions=tokens * window // length,
            device=device,
        ),
        inference={
            "rollout worker": sampled * sizes.parameters
            + inference(sizes, config.max_tokens_per_batch, sampled, bool(config.rollout.gpus_per_worker)),
            **(
                {
                    "reference worker": item * sizes.parameters
                    + inference(sizes, tokens, item, bool(config.reference.gpus))
                }
                if config.num_reference_workers
                else {}
            ),
        },
        tokens_per_step=groups * method.group_size * window,
        flops_per_step={
            "rollouts": passes * forward_flops(sizes, length, rows=groups * method.group_size),
            "reference": mu * scoring if method.kl_coef > 0 else 0.0,
            "old scores": (mu - 1) * scoring,
            "learner": mu * backward * scoring,
        },
        num_steps=None,
    )


def inference(sizes: Sizes, tokens: int, item: int, on_gpu: bool) -> float:
    """Of a forward pass without a backward one: one layer at a time, and a piece of the logits."""
    working = min(tokens * sizes.vocab, CHUNK_LOGITS["cuda" if on_gpu else "cpu"])
    return float(tokens * item * (4 * sizes.hidden + 2 * sizes.mlp) + 4 * working)


# Words


def describe(config: AnyConfig, found: Estimate, sizes: Sizes) -> list[str]:
    """The estimate in a few lines for people."""
    parts = found.memory
    trains = "learner rank" if isinstance(config, RLConfig) else "worker"
    engine = config.learner if isinstance(config, RLConfig) else config.workers
    named = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "masters": parts.masters,
        "optimizer": parts.optimizer,
        "gathered": parts.gathered,
        "buckets": parts.buckets,
        "activations": parts.activations,
        "head": parts.head,
    }
    lines = [
        f"estimate: {sizes.parameters:,} parameters, {sizes.trained:,} trained; "
        f"ZeRO {engine.zero_stage}, offload {engine.offload}, recompute {str(engine.recompute).lower()}",
        f"memory of a {trains}: {gigabytes(parts.gpu)} = "
        + " + ".join(f"{name} {gigabytes(value)}" for name, value in named.items() if value)
        + (f"; in main memory {gigabytes(parts.host)}" if parts.host else ""),
    ]
    if found.inference:
        lines.append("memory of a " + ", a ".join(f"{n} {gigabytes(v)}" for n, v in found.inference.items()))
    total = sum(found.flops_per_step.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in found.flops_per_step.items() if value)
    steps = found.num_steps or 1000
    lines.append(
        f"{'1000 steps' if found.num_steps is None else f'{steps:,} steps'} of {found.tokens_per_step:,} tokens = "
        f"{steps * found.tokens_per_step:.3g} tokens, {steps * total:.3g} operations ({shares}): "
        f"{found.gpu_days(steps):.3g} GPU-days of an H100 at {UTILISATION:.0%} of its bf16 peak"
        + (f" (sampling at {SAMPLING_UTILISATION:.0%})" if "rollouts" in found.flops_per_step else "")
    )
    return lines


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB"
