"""Weights on their way from the learner to everybody else: flat buckets with a version and hashes, in Ray's object store.

Whoever calls `ray.put` owns the object and takes it along when it dies, so a small actor of its own receives the
buckets from learner rank 0, puts them and keeps the last two versions (and any that is pinned).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

from diffrl.models.base import PolicyModel
from diffrl.models.folders import build_model

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
class Weights:
    """One version of the policy. Weights(version=3, hf_config={...}, entries=(...), hashes=("9f...",), buckets=(ObjectRef,))"""

    version: int
    hf_config: dict
    entries: tuple[Entry, ...]
    hashes: tuple[str, ...]  # xxh3-128 of each bucket
    buckets: tuple["ray.ObjectRef", ...]


def pack(state: dict[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> tuple[tuple[Entry, ...], list[np.ndarray]]:
    """Tensors laid end to end in buckets of about `bucket_bytes` (a larger tensor gets a bucket of its own)."""
    entries: list[Entry] = []
    parts: list[list[np.ndarray]] = [[]]
    size = 0
    for name, tensor in state.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if size and size + data.nbytes > bucket_bytes:
            parts.append([])
            size = 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), bucket=len(parts) - 1, offset=size))
        parts[-1].append(data)
        size += data.nbytes
    return tuple(entries), [np.concatenate(part) for part in parts if part]


def unpack(entries: Sequence[Entry], buckets: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """The inverse of `pack`; the tensors own their memory (buckets from the object store are read-only)."""
    state = {}
    for entry in entries:
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        data = buckets[entry.bucket][entry.offset : entry.offset + tensor.nbytes]
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
        state[entry.name] = tensor
    return state


def digest(bucket: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(bucket.data)


def fetch(weights: Weights) -> dict[str, Tensor]:
    """Pull the buckets, check their hashes, unpack. Raises RuntimeError when a bucket is not what was published."""
    buckets = ray.get(list(weights.buckets))
    for number, (bucket, expected) in enumerate(zip(buckets, weights.hashes, strict=True)):
        if digest(bucket) != expected:
            raise RuntimeError(f"weights version {weights.version}: bucket {number} does not match its hash")
    return unpack(weights.entries, buckets)


class PolicyHolder:
    """The model of a worker that only reads weights: follows whatever version it is asked to work with."""

    def __init__(self, device: str):
        self.device = device
        self.version: int | None = None
        self._model: PolicyModel | None = None

    def at(self, weights: Weights) -> PolicyModel:
        """The policy at exactly this version, pulled if another one is loaded."""
        if self._model is None or self.version != weights.version:
            self._model = build_model(weights.hf_config, fetch(weights)).to(self.device).eval()
            self.version = weights.version
        return self._model


class WeightStore:
    """Owns the published buckets."""

    def __init__(self):
        self.versions: dict[int, Weights] = {}

    @ray.method
    def put(
        self, version: int, hf_config: dict, entries: tuple[Entry, ...], pinned: Sequence[int], *buckets: np.ndarray
    ) -> Weights:
        """Publish a version; the last two and the `pinned` ones stay."""
        weights = Weights(
            version=version,
            hf_config=hf_config,
            entries=entries,
            hashes=tuple(digest(bucket) for bucket in buckets),
            buckets=tuple(ray.put(bucket) for bucket in buckets),
        )
        self.versions[version] = weights
        recent = sorted(self.versions)[-KEPT_VERSIONS:]
        self.versions = {v: w for v, w in self.versions.items() if v in recent or v in pinned}
        return weights
