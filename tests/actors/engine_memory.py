"""One rank of a group that measures what DeepSpeed keeps for a small model: `python -m tests.actors.engine_memory RANK WORLD
PORT`. Prints a JSON object: "stage/dtype" -> bytes per parameter of all live tensors, but for the
buffer in which gradients are reduced."""

import gc
import json
import sys

import torch
from transformers import PreTrainedTokenizerFast

from actors.engine import PolicyEngine, join_group
from diffrl.config import RLConfig
from diffrl.config_file import validate
from diffrl.estimate import BUCKET_ELEMENTS
from diffrl.models.loading import load_policy
from diffrl.models.tiny import train_tokenizer

CASES = [
    (0, "float32"),
    (1, "float32"),
    (2, "float32"),
    (3, "float32"),
    (1, "bfloat16"),
    (2, "bfloat16"),
    (3, "bfloat16"),
]
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "vocab_size": 300}


def case(stage: int, dtype: str) -> RLConfig:
    learner = {"zero_stage": stage, "stage3_param_persistence_threshold": 0, "num_ranks": 2}
    config = validate(
        {"stage": "rl", "data": {"source": "microcode"}, "model": {"dtype": dtype, "tiny": TINY}, "learner": learner},
        "here",
    )
    assert isinstance(config, RLConfig)
    return config


def live_bytes() -> int:
    """Of every tensor that is reachable, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            tensors = [thing, thing.grad] if thing.is_leaf else [thing]
            for tensor in tensors:
                if tensor is not None and tensor.untyped_storage().nbytes() > 64:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for size in found.values() if size < BUCKET_ELEMENTS)


def measure(config: RLConfig, tokenizer: PreTrainedTokenizerFast, kept: list[PolicyEngine]) -> float:
    """Bytes per parameter after a step and a backward pass behind it, when all that is kept exists. `kept` holds the engine,
    so that nothing of it is freed while the next one is measured."""
    before = live_bytes()
    model = load_policy(config.model, tokenizer, seed=0)
    num_parameters = sum(p.numel() for p in model.parameters())
    engine = PolicyEngine(model, config)
    kept.append(engine)
    ids_BL = torch.arange(64).reshape(4, 16)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)

    def backward(*, last: bool) -> None:
        engine.backward(engine.engine(ids_BL, mask_BL).float().logsumexp(-1).mean(), last=last)

    backward(last=False)
    backward(last=True)
    engine.step(1e-4)
    backward(last=False)
    return (live_bytes() - before) / num_parameters


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[1:])
    join_group(rank=rank, world=world, address="127.0.0.1", port=port, device="cpu")
    words, engines = train_tokenizer(["def f(x): return x\n"], TINY["vocab_size"]), []
    print(json.dumps({f"{stage}/{dtype}": measure(case(stage, dtype), words, engines) for stage, dtype in CASES}))
