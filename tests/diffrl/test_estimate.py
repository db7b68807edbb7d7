"""Estimates against what is measured on small models: parameters and state to the byte, activations within a tenth."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from diffrl.config import EngineConfig, LoraConfig, ModelConfig, RLConfig, TinyModel
from diffrl.config_file import validate
from diffrl.estimate import (
    PEAK_FLOPS,
    UTILISATION,
    activations,
    describe,
    estimate,
    forward_flops,
    head,
    memory,
    rows_per_group,
)
from diffrl.models.dream import DreamModel
from diffrl.models.lora import add_adapters
from diffrl.models.sizes import Sizes, sizes, sizes_of

ROWS, LENGTH = 6, 48
SHAPES = [
    {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    {"hidden_size": 128, "intermediate_size": 448, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8},
]


def small(shape: dict, dtype: torch.dtype = torch.float32, vocab: int = 512) -> tuple[DreamModel, Sizes]:
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    model = DreamModel.from_config(config, mask_token_id=1, generator=torch.Generator().manual_seed(0))
    return model.to(dtype), sizes(DreamModel.empty_backbone(config), DreamModel, None)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[:, 0] = False
    return ids_BL, mask_BL


def kept_bytes(model: torch.nn.Module, run) -> int:
    """Bytes that autograd keeps of `run()`, parameters left out, every storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or the address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_exactly(shape):
    model, found = small(shape)
    parameters = list(model.parameters())
    assert found.parameters == found.trained == sum(p.numel() for p in parameters)
    assert found.matrices == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    add_adapters(model, LoraConfig(rank=3, targets=["q_proj", "down_proj"]), torch.Generator().manual_seed(0))
    found = sizes(small(shape)[0].backbone, DreamModel, LoraConfig(rank=3, targets=["q_proj", "down_proj"]))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_known_model_has_the_published_size():
    """Qwen2.5-7B's card: 7.61B parameters, 6.53B of them no embeddings."""
    found = sizes_of(ModelConfig(path="/nowhere/Qwen2.5-Coder-7B"))
    assert found is not None and found.parameters == 7_615_616_512
    assert found.parameters - 2 * found.vocab * found.hidden == pytest.approx(6.53e9, rel=0.001)
    assert sizes_of(ModelConfig(path="/nowhere/stage1", known_as="Qwen2.5-Coder-7B")) == found
    assert sizes_of(ModelConfig(path="/nowhere/Qwen2.5-Coder-7C")) is None
    with pytest.raises(
        ValueError, match=r"model.known_as: 'Qwen2.5-Coder-7C' is unknown, did you mean 'Qwen2.5-Coder-7B'"
    ):
        sizes_of(ModelConfig(path="/nowhere", known_as="Qwen2.5-Coder-7C"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("muon", [False, True])
def test_state_of_plain_training_is_counted_exactly(shape, muon):
    model, found = small(shape)
    matrices = [p for n, p in model.named_parameters() if muon and ".layers." in n and p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest)]
    optimizers += [torch.optim.Muon(matrices)] if muon else []
    model(*batch()).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    parts = memory(
        found,
        EngineConfig(),
        dtype="float32",
        num_ranks=1,
        tokens=0,
        length=LENGTH,
        hidden_positions=0,
        muon=muon,
        device="cpu",
    )
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    assert parts.weights == sum(p.nbytes for p in model.parameters())
    assert parts.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert parts.optimizer == sum(t.nbytes for t in states)
    assert parts.state == parts.weights + parts.gradients + parts.optimizer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_within_a_tenth(shape, dtype, recompute):
    model, found = small(shape, dtype)
    model.train()
    if recompute:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    ids_BL, mask_BL = batch()
    measured = kept_bytes(model, lambda: model.hidden_states(ids_BL, mask_BL))
    item, tokens = dtype.itemsize, ROWS * LENGTH
    expected = activations(found, tokens, LENGTH, item, recompute=recompute)
    if recompute:  # the layer that is computed again exists in the backward pass only
        one = activations(found, tokens, LENGTH, item, recompute=False)
        last_norm = tokens * (4 + item) * found.hidden
        expected -= (one - last_norm) / found.layers
    assert measured == pytest.approx(expected, rel=0.1)


def test_the_head_keeps_what_is_said():
    model, found = small(SHAPES[0])
    hidden_XD = torch.randn(200, 64, requires_grad=True)
    position_N, token_N = torch.arange(200), torch.arange(200)
    measured = kept_bytes(model, lambda: model.backbone.lm_head(hidden_XD, position_N, token_N))
    logits = 200 * found.vocab * 4
    assert measured == pytest.approx(logits, rel=0.15)  # and hidden states, positions, tokens
    # What is kept, one buffer as large, and the gradient of the head.
    assert head(found, 200, 4, device="cpu") == 2 * logits + 4 * found.vocab * found.hidden
    # On a GPU nothing is kept, and there are never more logits than a chunk has.
    assert head(found, 10**9, 2, device="cuda") == 6 * (1 << 28) + 4 * found.vocab * found.hidden


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_a_forward_pass(shape):
    model, found = small(shape)
    ids_BL, _ = batch()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    assert forward_flops(found, LENGTH, rows=ROWS) == pytest.approx(counter.get_total_flops(), rel=0.05)


def pretraining(**sections) -> tuple:
    raw = {
        "stage": "pretrain",
        "model": {"path": "x/Qwen2.5-Coder-7B", "dtype": "bfloat16"},
        "data": {"source": "shards", "path": "x", "sequence_length": 4096},
        "train": {"steps": 1000, "batch_size": 256, "rows_per_micro_batch": 1},
        "workers": {"num_workers": 64, "gpus_per_worker": 1.0, "zero_stage": 2, **sections},
    }
    config = validate(raw, "here")
    found = sizes_of(config.model)
    assert found is not None
    return config, found


def test_gpu_days_of_training_are_six_n_tokens():
    config, found = pretraining()
    made = estimate(config, found)
    tokens = 1000 * 256 * 4096
    days = 6 * found.multiplied * tokens / (PEAK_FLOPS * UTILISATION * 86_400)
    assert days < made.gpu_days(1000) < 1.15 * days  # and attention over 4096 positions
    assert made.flops_per_step["training"] * 4 / 3 == estimate(*pretraining(recompute=True)).flops_per_step["training"]
    assert f"{made.gpu_days(1000):.3g} GPU-days" in describe(config, made, found)[-1]


def test_what_zero_and_offload_divide():
    """In bytes per parameter, of 64 ranks."""

    def per_parameter(**engine) -> list[float]:
        config, found = pretraining(**engine)
        parts = estimate(config, found).memory
        values = (parts.weights, parts.gradients, parts.masters, parts.optimizer, parts.host)
        return [round(value / found.parameters * 64, 3) for value in values]

    assert per_parameter(zero_stage=1) == [128, 384, 4, 8, 0]
    assert per_parameter(zero_stage=2) == [128, 4, 4, 8, 0]
    assert per_parameter(zero_stage=3) == [2, 4, 4, 8, 0]
    assert per_parameter(zero_stage=2, offload="optimizer") == [128, 0, 0, 0, 16]
    assert per_parameter(zero_stage=3, offload="all") == [0, 0, 0, 0, 18]
    assert estimate(*pretraining(zero_stage=3)).memory.gathered == 2e9


def reinforcement(**method) -> RLConfig:
    config = validate({"stage": "rl", "data": {"source": "microcode"}, "method": method}, "here")
    assert isinstance(config, RLConfig)
    return config


def test_scoring_passes_of_reinforcement_learning():
    """A whole update of one group is 9 (2 G + 1) rows of forward passes with two inner iterations, and 360 without sharing
    and with recomputation would be 36 G."""
    assert rows_per_group(reinforcement()) == 21
    assert rows_per_group(reinforcement(estimator="full_mask")) == 1
    assert rows_per_group(reinforcement(estimator="monte_carlo", num_samples=3)) == 30
    assert rows_per_group(reinforcement(num_pairs=2, group_size=4)) == 17
    config, found = reinforcement(), sizes_of(ModelConfig(tiny=TinyModel()))
    assert found is not None
    flops = estimate(config, found, num_steps=5).flops_per_step
    row = forward_flops(found, 456)
    scoring = sum(value for name, value in flops.items() if name != "rollouts")
    assert scoring / row == pytest.approx(8 * 9 * 21)
    assert flops["rollouts"] / row == pytest.approx(8 * 10 * 256)
    assert estimate(config, found, num_steps=5).num_steps == 5
    assert estimate(reinforcement(kl_coef=0.0), found).flops_per_step["reference"] == 0
