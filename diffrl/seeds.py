"""Randomness is data: every random number of a run comes from a seed derived here, and no generator is global."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, such as (run seed, "rollout", ordinal, sample index); the same on every machine."""
    digest = hashlib.blake2b("/".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
