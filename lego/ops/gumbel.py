"""Gumbel noise by position: what makes sampling from logits one more argmax."""

# Shape letters: B = rows, V = vocabulary.

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two.

    All are int64 tensors with values in [0, 2^32), of shapes that broadcast.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap at 2^64, which leaves all 64 bits right
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _MASK) ^ c1 ^ k0,
            high & _MASK,
            (low >> 32 & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(seed_B: Tensor, offset_B: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise [B, V], float64, a function of (seed, offset, token id) alone.

    seed and offset are int64: the seed belongs to a sequence, the offset to a token in it, so a
    row draws the same noise wherever in a batch it lies. Token v takes word v % 4 of the Philox
    counter (v // 4, offset low, offset high, 0) under the key (seed low, seed high). A word x
    gives u = (x + 1/2) / 2^32 and the noise -log(-log(1 - u)), which is finite.
    argmax(logits + temperature * noise) is a draw from softmax(logits / temperature).
    Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030.
    """
    quad = torch.arange((vocab_size + 3) // 4, device=seed_B.device)[None]  # [1, V / 4]
    seed, offset = seed_B[:, None], offset_B[:, None]
    words = philox(
        (quad, offset & _MASK, offset >> 32 & _MASK, torch.zeros_like(quad)),
        (seed & _MASK, seed >> 32 & _MASK),
    )
    word_BV = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    u_BV = (word_BV.double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-u_BV)).log()
