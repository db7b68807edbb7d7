"""Weights on their way from the learner to everybody else: flat buckets with a version and hashes, in Ray's object store.

Whoever calls `ray.put` owns the object and takes it along when it dies, so a small actor of its own receives the
buckets from learner rank 0, puts them and keeps the last two versions (and any that is pinned).

A policy with adapters travels merged, or as its adapters alone: the base is then put once and every version refers to
it, so it lives as long as any of them and a restarted worker finds both. Workers merge, so that they sample with the same
bits either way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from diffrl.models.base import PolicyModel
from diffrl.models.folders import build_model, family_of, state_dict_for_export
from diffrl.models.lora import MergedState, adapter_state, base_state, merged_state

BUCKET_BYTES = 256 << 20
KEPT_VERSIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a bucket. Entry(name="model.norm.weight", dtype="float32", shape=(64,), bucket=0, offset=0)"""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int  # bytes


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


def pack(state: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> tuple[tuple[Entry, ...], list[np.ndarray]]:
    """Tensors laid end to end in buckets of about `bucket_bytes` (a larger tensor gets a bucket of its own).

    A lazy `state` is read one bucket at a time.
    """
    entries: list[Entry] = []
    buckets: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    size = 0
    for name, tensor in state.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if size and size + data.nbytes > bucket_bytes:
            buckets.append(np.concatenate(parts))
            parts, size = [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), bucket=len(buckets), offset=size))
        parts.append(data)
        size += data.nbytes
    return tuple(entries), [*buckets, np.concatenate(parts)] if parts else []


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

    def __init__(self, device: str):
        self.device = device
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
        return model.to(self.device).eval()

    @torch.no_grad()
    def replace_adapted(self, model: PolicyModel, state: MergedState) -> None:
        """Only layers with adapters differ between versions."""
        parameters = {model.own_name(name): parameter for name, parameter in model.backbone.named_parameters()}
        for name in state.names:
            parameters[name].copy_(state[name])


class WeightStore:
    """Owns the published buckets."""

    def __init__(self):
        self.versions: dict[int, Weights] = {}

    @ray.method
    def put(self, entries: tuple[Entry, ...], *buckets: np.ndarray) -> Tensors:
        """Take over packed tensors. They live as long as somebody refers to them: see `commit`."""
        hashes = tuple(digest(bucket) for bucket in buckets)
        return Tensors(entries=entries, hashes=hashes, buckets=tuple(ray.put(bucket) for bucket in buckets))

    @ray.method
    def commit(self, weights: Weights, pinned: Sequence[int]) -> None:
        """Publish a version; the last two and the `pinned` ones stay."""
        self.versions[weights.version] = weights
        recent = sorted(self.versions)[-KEPT_VERSIONS:]
        self.versions = {v: w for v, w in self.versions.items() if v in recent or v in pinned}

    @ray.method
    def base(self) -> Tensors | None:
        """The base that unmerged adapters of the last version belong to."""
        last = self.versions[max(self.versions)] if self.versions else None
        return None if last is None or last.adapter is None or last.adapter.merged else last.tensors


def publish(
    store: Any,
    model: PolicyModel,
    version: int,
    pinned: Sequence[int],
    backbone_state: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Hand the policy to the weight store (an actor handle), as `model.lora.publish` says.

    `backbone_state` replaces `model.backbone.state_dict()` where its tensors are sharded and have been gathered. Of
    adapters that travel alone the store keeps the base: it is read the first time only.
    """

    def put(state: Mapping[str, Tensor]) -> Tensors:
        entries, buckets = pack(state)
        return ray.get(store.put.remote(entries, *buckets))

    adapter = None
    if model.lora is None:
        tensors = put(state_dict_for_export(model, backbone_state))
    else:
        merged = model.lora.publish == "merged"
        adapter = Adapter(scale=model.lora.scale, merged=merged, tensors=put(adapter_state(model, backbone_state)))
        if merged:
            tensors = put(state_dict_for_export(model, backbone_state))
        else:
            kept: Any = ray.get(store.base.remote())
            tensors = kept or put(base_state(model, backbone_state))
    weights = Weights(
        version=version, hf_config=model.hf_config, num_tokens=model.num_tokens, tensors=tensors, adapter=adapter
    )
    ray.get(store.commit.remote(weights, pinned))
    return weights
