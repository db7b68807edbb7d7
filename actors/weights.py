"""Weights on their way from the learner to everybody else: flat buckets with a version and hashes, in Ray's object store.

Buckets are what a generator method of learner rank 0 yields. Ray gives what a call returns to the caller, so the driver owns
them: they survive the process that made them, and live as long as a `Weights` refers to them. Nobody has to keep a store.

A policy with adapters travels merged, or as its adapters alone: the base is then published once and every version refers
to it, so a restarted worker finds both. Workers merge, so that they sample with the same bits either way.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from diffrl.config import LoraConfig
from diffrl.models.base import PolicyModel
from diffrl.models.folders import build_model, family_of, load_state_dict, state_dict_for_export
from diffrl.models.lora import MergedState, adapter_state, base_state, merged_state

BUCKET_BYTES = 256 << 20
Part = Literal["policy", "base", "adapter"]  # the policy with its adapters merged in, or one of the two alone
PARTS = {"policy": state_dict_for_export, "base": base_state, "adapter": adapter_state}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a bucket. Entry(name="model.norm.weight", dtype="float32", shape=(64,), bucket=0, offset=0)"""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


Bucket = tuple[list[Entry], np.ndarray]  # what is in it, its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Named tensors in the object store. Tensors(entries=(Entry(...), ...), hashes=("9f...",), buckets=(ObjectRef,))"""

    entries: tuple[Entry, ...]
    hashes: tuple[str, ...]  # xxh3-128 of each bucket
    buckets: tuple["ray.ObjectRef", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapters of one version, under peft's names. Adapter(scale=2.0, merged=True, tensors=Tensors(...))"""

    scale: float  # alpha / rank
    merged: bool  # into the weights that it comes with; else they are the base
    tensors: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One version of the policy.

    Weights(version=3, hf_config={...}, num_tokens=151665, tensors=Tensors(...), adapter=None)
    """

    version: int
    hf_config: dict
    num_tokens: int | None  # of the tokenizer, see PolicyModel
    tensors: Tensors  # under the family's names
    adapter: Adapter | None

    @property
    def num_bytes(self) -> int:
        """What a worker must pull of this version; of adapters that travel alone it has the base already."""
        parts = [] if self.adapter is None else [self.adapter.tensors]
        if self.adapter is None or self.adapter.merged:
            parts.append(self.tensors)
        return sum(entry.num_bytes for tensors in parts for entry in tensors.entries)


def plan_buckets(sizes: Mapping[str, int], bucket_bytes: int = BUCKET_BYTES) -> list[list[str]]:
    """Names of `sizes` bytes, in order, cut into buckets of about `bucket_bytes` (a larger one gets a bucket of its own)."""
    buckets: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not buckets or (total and total + size > bucket_bytes):
            buckets.append([])
            total = 0
        buckets[-1].append(name)
        total += size
    return buckets


def fill_bucket(tensors: Mapping[str, Tensor], number: int) -> Bucket:
    """Bucket `number`: the tensors' bytes end to end, copied once, from whatever device they are on."""
    read = {name: tensor.detach() for name, tensor in tensors.items()}  # a lazy state computes at every reading
    bucket = np.empty(sum(tensor.nbytes for tensor in read.values()), dtype=np.uint8)
    entries = []
    offset = 0
    for name, tensor in read.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        torch.from_numpy(bucket[offset : offset + tensor.nbytes]).copy_(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), bucket=number, offset=offset))
        offset += tensor.nbytes
    return entries, bucket


def pack(state: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> tuple[tuple[Entry, ...], list[np.ndarray]]:
    """All buckets at once, of a state that is whole in one place."""
    plan = plan_buckets({name: tensor.nbytes for name, tensor in state.items()}, bucket_bytes)
    filled = [fill_bucket({name: state[name] for name in names}, number) for number, names in enumerate(plan)]
    return tuple(entry for entries, _ in filled for entry in entries), [bucket for _, bucket in filled]


def export_buckets(
    model: PolicyModel,
    part: Part,
    *,
    gather: Callable[[list[Tensor]], AbstractContextManager] = lambda tensors: nullcontext(),
    write: bool = True,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[Bucket]:
    """A part of the policy, bucket by bucket: what goes into one is gathered (where tensors are sharded, all ranks must
    exhaust the iterator) and merged for that bucket alone. Only those that `write` get anything."""
    state: dict[str, Tensor] = model.backbone.state_dict(keep_vars=True)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    kept = {"policy": (True, False), "base": (False,), "adapter": (True,)}[part]
    layers = layers_of(name for name in state if (".lora_" in name) in kept)
    sizes = {key: sum(whole_bytes(state[name]) for name in names) for key, names in layers.items()}
    for number, keys in enumerate(plan_buckets(sizes, bucket_bytes)):
        tensors = {name: state[name] for key in keys for name in layers[key]}
        with gather(list(tensors.values())):
            filled = fill_bucket(PARTS[part](model, tensors), number) if write else None
        if filled is not None:
            yield filled


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors of a backbone by what must be together for adapters to be merged: a weight and its A and B."""
    layers: dict[str, list[str]] = {}
    for name in names:
        key = re.sub(r"\.base_layer(?=\.weight$)|\.lora_[AB]\..*(?=\.weight$)", "", name)
        layers.setdefault(key, []).append(name)
    return layers


def whole_bytes(tensor: Tensor) -> int:
    """Size of a tensor, also of a parameter that ZeRO 3 has divided (it is empty and knows its `ds_numel`)."""
    return int(getattr(tensor, "ds_numel", tensor.numel())) * tensor.element_size()


class PackedState(Mapping[str, Tensor]):
    """The inverse of `pack`. A tensor is copied out when it is read: buckets from the object store are read-only."""

    def __init__(self, entries: Sequence[Entry], buckets: Sequence[np.ndarray], device: str = "cpu"):
        self.entries = {entry.name: entry for entry in entries}
        self.buckets = buckets
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        data = self.buckets[entry.bucket][entry.offset : entry.offset + tensor.nbytes]
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
        return tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def digest(bucket: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(bucket.data)


def fetch(weights: Weights) -> Mapping[str, Tensor]:
    """The policy's tensors, adapters merged in, each when it is read.

    Pulls the buckets and checks their hashes. Raises RuntimeError when a bucket is not what was published.
    """
    tensors = fetch_tensors(weights.tensors, weights.version)
    if weights.adapter is None or weights.adapter.merged:
        return tensors
    return with_adapter(tensors, weights)


def fetch_tensors(tensors: Tensors, version: int, device: str = "cpu") -> PackedState:
    """The tensors of buckets that have been checked; `version` is for the message."""
    buckets = ray.get(list(tensors.buckets))
    for number, (bucket, expected) in enumerate(zip(buckets, tensors.hashes, strict=True)):
        if digest(bucket) != expected:
            raise RuntimeError(f"weights version {version}: bucket {number} does not match its hash")
    return PackedState(tensors.entries, buckets, device)


def with_adapter(base: Mapping[str, Tensor], weights: Weights) -> MergedState:
    assert weights.adapter is not None
    adapter = dict(fetch_tensors(weights.adapter.tensors, weights.version))
    return merged_state(base, adapter, weights.adapter.scale, family_of(weights.hf_config))


class PolicyHolder:
    """The model of a worker that only reads weights: follows whatever version it is asked to work with."""

    def __init__(self, device: str, dtype: torch.dtype | None = None, *, compile: bool = False):
        """`dtype` None: that of the weights. `compile`: layers through torch.compile."""
        self.device = device
        self.dtype = dtype
        self.compile = compile
        self.version: int | None = None
        self._model: PolicyModel | None = None
        self._base: tuple[Tensors, PackedState] | None = None  # what adapters are added to

    def at(self, weights: Weights) -> PolicyModel:
        """The policy at exactly this version, pulled if another one is loaded."""
        if self._model is None or self.version != weights.version:
            self.version = None  # until it is complete
            if weights.adapter is None or weights.adapter.merged:
                self._model, self._base = self.build(weights, fetch(weights)), None
            elif self._model is None or self._base is None or self._base[0] != weights.tensors:
                base = fetch_tensors(weights.tensors, weights.version, self.device)
                self._model, self._base = self.build(weights, with_adapter(base, weights)), (weights.tensors, base)
            else:
                self.replace_adapted(self._model, with_adapter(self._base[1], weights))
            self.version = weights.version
        return self._model

    def build(self, weights: Weights, state: Mapping[str, Tensor]) -> PolicyModel:
        model = build_model(weights.hf_config, state, num_tokens=weights.num_tokens)
        model = model.to(self.device, self.dtype).eval()
        if self.compile:
            for layer in model.backbone.model.layers[:-1]:  # of the last one only parts are called
                layer.compile(dynamic=True)
        return model

    @torch.no_grad()
    def replace_adapted(self, model: PolicyModel, state: MergedState) -> None:
        """Only layers with adapters differ between versions."""
        parameters = {model.own_name(name): parameter for name, parameter in model.backbone.named_parameters()}
        for name in state.names:
            parameters[name].copy_(state[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the buckets of a `sealed` iteration held. Contents(entries=(Entry(...), ...), hashes=("9f...",))"""

    entries: tuple[Entry, ...]
    hashes: tuple[str, ...]


def sealed(buckets: Iterable[Bucket]) -> Iterator[np.ndarray | Contents]:
    """The bytes of each bucket as it is made, then what they hold."""
    entries: list[Entry] = []
    hashes: list[str] = []
    for made, bucket in buckets:
        entries += made
        hashes.append(digest(bucket))
        yield bucket
    yield Contents(entries=tuple(entries), hashes=tuple(hashes))


def received(refs: "Sequence[ray.ObjectRef]") -> Tensors:
    """What a `sealed` iteration elsewhere has brought here; raises what it raised."""
    contents = ray.get(refs[-1])
    return Tensors(entries=contents.entries, hashes=contents.hashes, buckets=tuple(refs[:-1]))


def publish(
    export: Callable[[Part], Tensors],
    lora: LoraConfig | None,
    base: Tensors | None,
    *,
    version: int,
    hf_config: dict,
    num_tokens: int | None,
) -> Weights:
    """A version out of its parts; adapters that travel alone refer to the `base`, which is exported if there is none yet."""
    adapter, tensors = None, None
    if lora is not None:
        adapter = Adapter(scale=lora.scale, merged=lora.publish == "merged", tensors=export("adapter"))
        if not adapter.merged:
            tensors = base or export("base")
    tensors = tensors or export("policy")
    return Weights(version=version, hf_config=hf_config, num_tokens=num_tokens, tensors=tensors, adapter=adapter)


def put_model(
    model: PolicyModel, version: int, base: Tensors | None = None, bucket_bytes: int = BUCKET_BYTES
) -> Weights:
    """A model of this process as a version."""

    def export(part: Part) -> Tensors:
        return received([ray.put(piece) for piece in sealed(export_buckets(model, part, bucket_bytes=bucket_bytes))])

    return publish(export, model.lora, base, version=version, hf_config=model.hf_config, num_tokens=model.num_tokens)


def put_folder(path: Path, version: int, num_tokens: int | None) -> Weights:
    """A Hugging Face folder as a version."""
    state = load_state_dict(path)
    plan = plan_buckets({name: tensor.nbytes for name, tensor in state.items()})
    buckets = (fill_bucket({name: state[name] for name in names}, number) for number, names in enumerate(plan))
    return Weights(
        version=version,
        hf_config=json.loads((path / "config.json").read_text()),
        num_tokens=num_tokens,
        tensors=received([ray.put(part) for part in sealed(buckets)]),
        adapter=None,
    )
