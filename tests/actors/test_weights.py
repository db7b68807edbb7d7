"""Weights on the wire: packed and unpacked bit for bit, in buckets that keep to their size."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaConfig, Qwen2Config

from actors.weights import (
    Contents,
    Entry,
    PackedState,
    Weights,
    fetch,
    fill_bucket,
    layers_of,
    pack,
    plan_buckets,
    received,
    sealed,
)
from diffrl.models.dream import DreamModel
from diffrl.models.folders import build_model, state_dict_for_export
from diffrl.models.llada import LladaModel
from tests.actors.learner_case import end

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        raw, wanted = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(raw, wanted), name  # bytes, so that NaN and -0.0 count too


def mixed_state() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    state = {str(d): (torch.randn(3, 5, generator=g) * 40).to(d) for d in DTYPES}
    state["special"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    state["special_bf16"] = state["special"].bfloat16()
    state["scalar"] = torch.tensor(2.5)
    state["scalar_bool"] = torch.tensor(True)
    state["empty"] = torch.empty(0)
    state["empty_matrix"] = torch.empty(4, 0, 2, dtype=torch.bfloat16)
    state["transposed"] = torch.arange(12.0).reshape(3, 4).T
    state["strided"] = torch.arange(20.0)[::3]
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 2, generator=g))
    return state


@pytest.mark.parametrize("bucket_bytes", [1, 7, 64, 100, 1 << 20])
def test_round_trip(bucket_bytes):
    state = mixed_state()
    entries, buckets = pack(state, bucket_bytes)
    assert all(b.dtype == np.uint8 and b.ndim == 1 for b in buckets)
    assert sum(b.nbytes for b in buckets) == sum(t.nbytes for t in state.values())
    for bucket in buckets:
        bucket.setflags(write=False)  # as the object store hands them out
    got = dict(PackedState(entries, buckets))
    assert_same(got, {k: v.detach() for k, v in state.items()})
    for tensor in got.values():  # memory of their own: writable, and not the bucket's
        tensor.zero_()
    assert_same(dict(PackedState(entries, buckets)), {k: v.detach() for k, v in state.items()})


def test_entries_by_hand():
    """Tensors of 8, 8, 12, 40, 4 and 16 bytes into buckets of 20: 8 + 8 | 12 | 40 | 4 + 16."""
    state = {
        "a": torch.zeros(2),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(3),
        "large": torch.zeros(5, 2),
        "d": torch.zeros(()),
        "e": torch.zeros(2, dtype=torch.int64),
    }
    entries, buckets = pack(state, 20)
    assert entries[0] == Entry(name="a", dtype="float32", shape=(2,), bucket=0, offset=0)
    assert entries[1] == Entry(name="b", dtype="bfloat16", shape=(4,), bucket=0, offset=8)
    assert [(e.name, e.bucket, e.offset) for e in entries[2:]] == [
        ("c", 1, 0),
        ("large", 2, 0),
        ("d", 3, 0),
        ("e", 3, 4),
    ]
    assert [b.nbytes for b in buckets] == [16, 12, 40, 20]


def test_a_tensor_larger_than_a_bucket_has_one_of_its_own():
    g = torch.Generator().manual_seed(1)
    state = {"first": torch.randn(100, generator=g), "small": torch.randn(2, generator=g)}
    state |= {"large": torch.randn(50, generator=g), "last": torch.randn(1, generator=g)}
    entries, buckets = pack(state, 16)
    assert [(e.bucket, e.offset) for e in entries] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [b.nbytes for b in buckets] == [400, 8, 200, 4]
    assert_same(dict(PackedState(entries, buckets)), state)


def test_a_full_bucket_is_not_overfull():
    entries, buckets = pack({str(i): torch.full((4,), float(i)) for i in range(6)}, 32)
    assert [b.nbytes for b in buckets] == [32, 32, 32]
    assert [e.bucket for e in entries] == [0, 0, 1, 1, 2, 2]


def test_packing_copies():
    weight = torch.ones(4)
    entries, buckets = pack({"w": weight})
    weight.zero_()  # the learner goes on while the buckets are on their way
    assert dict(PackedState(entries, buckets))["w"].tolist() == [1.0] * 4


class Maker:
    """What a learner's rank is here: somebody whose process may die."""

    @ray.method(num_returns="streaming")
    def export(self, state: dict[str, torch.Tensor], fail: bool) -> Iterator[np.ndarray | Contents]:
        plan = plan_buckets({name: tensor.nbytes for name, tensor in state.items()}, 32)
        pieces = sealed(fill_bucket({name: state[name] for name in names}, i) for i, names in enumerate(plan))
        yield next(pieces)
        if fail:
            raise OSError("half of it")
        yield from pieces


def test_buckets_outlive_who_made_them(ray_cluster):
    """They belong to the caller, which is why no actor has to keep them."""
    state = {str(i): torch.full((4,), float(i)) for i in range(6)}
    maker = ray.remote(Maker).options(num_cpus=0.1).remote()
    tensors = received(list(maker.export.remote(state, False)))
    with pytest.raises(OSError, match="half of it"):
        received(list(maker.export.remote(state, True)))
    end(maker)
    weights = Weights(version=1, hf_config={}, num_tokens=None, tensors=tensors, adapter=None)
    assert len(tensors.buckets) == 3 and weights.num_bytes == 96
    assert_same(dict(fetch(weights)), state)


def test_a_weight_and_its_adapters_stay_together():
    q, v, norm = "model.layers.0.q_proj", "model.layers.0.v_proj", "model.norm.weight"
    adapted = [f"{q}.base_layer.weight", f"{q}.lora_A.default.weight", f"{q}.lora_B.default.weight"]
    assert layers_of([*adapted[:1], f"{q}.base_layer.bias", *adapted[1:], f"{v}.weight", norm]) == {
        f"{q}.weight": adapted,
        f"{q}.base_layer.bias": [f"{q}.base_layer.bias"],
        f"{v}.weight": [f"{v}.weight"],
        norm: [norm],
    }


def test_nothing_to_pack():
    entries, buckets = pack({})
    assert dict(PackedState(entries, buckets)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "config_class"), [(DreamModel, Qwen2Config), (LladaModel, LlamaConfig)])
def test_a_model_survives_the_wire(family, config_class, tied, dtype):
    torch.set_num_threads(1)
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    config._attn_implementation = "sdpa"
    model = family.from_config(config, mask_token_id=63, generator=torch.Generator().manual_seed(0)).to(dtype)
    entries, buckets = pack(state_dict_for_export(model), 10_000)
    assert len(buckets) > 2
    rebuilt = build_model(model.hf_config, PackedState(entries, buckets), num_tokens=61)
    assert type(rebuilt) is family and rebuilt.num_tokens == 61
    ids = torch.randint(0, 60, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # long enough that rounded rotary angles would show
        got, expected = (m(ids, torch.ones_like(ids, dtype=torch.bool)) for m in (rebuilt, model))
    assert got.dtype == dtype and torch.equal(got, expected)
