"""Gumbel noise as lego.ops.gumbel defines it, for the devices whose ops are plain torch."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def gumbel(seed: Tensor, offset: Tensor, vocab_size: int) -> Tensor:
    """Contract of lego.ops.gumbel: float64 [B, vocab_size] for int64 seed and offset [] or [B]."""
    quad = torch.arange((vocab_size + 3) // 4, device=seed.device)[None]
    seed, offset = seed.reshape(-1, 1), offset.reshape(-1, 1)
    counter = [quad, offset & _MASK, offset >> 32 & _MASK, torch.zeros_like(quad)]
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        # int64 products wrap at 2^64, which leaves all 64 bits right
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & _MASK) ^ counter[1] ^ key[0],
            second & _MASK,
            (first >> 32 & _MASK) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    word = torch.stack(torch.broadcast_tensors(*counter), dim=-1).flatten(1)[:, :vocab_size]
    return -(-torch.log1p(-(word.double() + 0.5) * 2.0**-32)).log()
