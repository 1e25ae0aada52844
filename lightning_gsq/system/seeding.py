"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as ``(seed, block, parameter, step, rank)``; the same on every machine."""
    text = "/".join(str(part) for part in key).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*key))
