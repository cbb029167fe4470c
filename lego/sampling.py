"""Choosing a token from logits: greedy, or by temperature, top-k and top-p under seeded noise."""

# Shape letters: B = rows, V = vocabulary.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.ops.exit_decision import perturbed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy: the highest logit, the lowest id on a tie.

    top_k keeps the k highest logits and what ties with the last of them (0: all). top_p keeps the
    smallest set of tokens whose probability reaches p (1: all). A seed fixes the tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"Sampling.temperature: must be finite and >= 0, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k: must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p: must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Sampling.seed: must be in [0, 2**63), got {self.seed}")


def row_seed(seed: int, row: int) -> int:
    """The seed of a row's noise, a signed int64: seed + row * (2^64 / golden ratio), wrapped."""
    value = (seed + row * 0x9E3779B97F4A7C15) % 2**64
    return value - 2**64 if value >= 2**63 else value


def draw(
    logits_BV: Tensor, sampling: Sampling, rows: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """Return one token id for each row of floating-point logits [B, V].

    `rows` holds the number of the sequence that each belongs to, `positions` the position that the
    drawn token will have: how many tokens are before it. With its logits and the seed, these two
    are all that a token depends on, so a sequence draws the same in any batch, and goes on from a
    longer prompt as it would have without.
    Raises: FloatingPointError if a logit is NaN.
    """
    if bool(logits_BV.isnan().any()):
        raise FloatingPointError("generate: logits must be numbers, got NaN")
    if sampling.temperature > 0:
        seeds = [row_seed(sampling.seed, row) for row in rows]
        logits_BV = perturbed(
            kept_logits(logits_BV, sampling).double(),
            sampling.temperature,
            torch.tensor(seeds, dtype=torch.int64, device=logits_BV.device),
            torch.tensor(positions, dtype=torch.int64, device=logits_BV.device),
        )
    return logits_BV.argmax(dim=-1).tolist()


def kept_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits [B, V] with -inf for what top_k and top_p leave out; temperature > 0."""
    if 0 < sampling.top_k < logits_BV.size(1):
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p < 1:
        wide_BV = logits_BV.double()
        # the highest logit becomes 0, so that no temperature makes it infinite
        scaled_BV = (wide_BV - wide_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
        # stable: the lowest ids of a tie stay
        sorted_BV, order_BV = scaled_BV.exp().sort(dim=-1, descending=True, stable=True)
        # a token stays if the mass before it has not reached p: the first always stays
        reached_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        drop_BV = reached_BV >= sampling.top_p * sorted_BV.sum(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    return logits_BV
