"""How a decoder draws tokens: by Gumbel-max, so that a draw is one more argmax.

Contract of lego.sampling. Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lego_kernels.gumbel import gumbel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep all tokens. A seed fixes the tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"Sampling.temperature: must be finite and >= 0, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k: must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p: must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Sampling.seed: must be in [0, 2**63), got {self.seed}")

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    @property
    def noise_scale(self) -> float:
        """The temperature as a float32: next to such noise no logit counts."""
        return min(self.temperature, 1e30)

    @property
    def filters(self) -> bool:
        """Whether tokens are left out of a draw, which takes all logits at once."""
        return self.draws and (self.top_k > 0 or self.top_p < 1)

    def row_seed(self, row: int) -> int:
        """The seed of a row, as a signed 64-bit number."""
        seed = (self.seed + row * 0x9E3779B97F4A7C15) % 2**64
        return seed - 2**64 if seed >= 2**63 else seed


def draw(logits_NV: Tensor, sampling: Sampling, seed_N: Tensor, offset_N: Tensor) -> Tensor:
    """One token a row, int64 [N], among those that top_k and top_p leave; temperature > 0."""
    logits = filtered(logits_NV.double(), sampling)
    noise = gumbel(seed_N, offset_N, logits.size(1))
    return (logits + sampling.temperature * noise).argmax(dim=-1)


def filtered(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """-inf for tokens outside the top_k (and its ties) or the smallest set that reaches top_p."""
    if 0 < sampling.top_k < logits_NV.size(1):
        kth = logits_NV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth, -math.inf)
    if sampling.top_p < 1:
        # the highest logit becomes 0, so that no temperature makes it infinite
        scaled = (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / sampling.temperature
        likely, order = scaled.exp().sort(dim=-1, descending=True, stable=True)
        # a token stays if the mass before it has not reached p: the first always stays
        drop = likely.cumsum(dim=-1) - likely >= sampling.top_p * likely.sum(dim=-1, keepdim=True)
        logits_NV = logits_NV.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    return logits_NV
