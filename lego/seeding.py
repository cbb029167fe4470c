"""Random generators that depend on nothing but what they are named by."""

import hashlib

import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator for this key, such as (seed, step): the same key draws the same numbers.

    The key is hashed: torch's CPU generator uses the low 32 bits of a seed alone, so sums and
    shifts of large seeds would meet.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
