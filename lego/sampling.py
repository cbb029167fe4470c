"""Choosing a token from logits: greedy, or by temperature, top-k and top-p with a seed."""

# Shape letters: B = rows, V = vocabulary.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.seeding import generator


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


class Sampler:
    """Draws one token a row and step.

    Every row owns a generator and consumes one uniform number per token whatever the exit, so a
    strategy changes the tokens of a seed only where it changes the distribution.
    """

    def __init__(self, sampling: Sampling, num_rows: int) -> None:
        self.sampling = sampling
        self._generators = [generator(sampling.seed, row) for row in range(num_rows)]

    def draw(self, logits_BV: Tensor, rows: list[int]) -> list[int]:
        """One token id for each row of logits; `rows` names the generator of each.

        Raises: FloatingPointError if a token is to be drawn from logits with a NaN.
        """
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1).tolist()
        prob_BV = token_probabilities(logits_BV, self.sampling)
        uniform = [torch.rand(1, generator=self._generators[r], dtype=torch.float64) for r in rows]
        cumulative_BV = prob_BV.cumsum(dim=-1)
        if not bool(cumulative_BV[:, -1].isfinite().all()):
            raise FloatingPointError("Sampler: logits must have a softmax, got NaN")
        # scaled by the total, so that rounding in the sum cannot push a draw past the last token
        target_B1 = torch.stack(uniform).to(cumulative_BV.device) * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1).tolist()


def token_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V], float64, that sampling at temperature > 0 draws from."""
    logits_BV = logits_BV.double()
    # the highest logit becomes 0, so that no temperature makes it infinite
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scaled_BV.size(1):
        kth_B1 = scaled_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -torch.inf)
    prob_BV = scaled_BV.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = prob_BV.sort(dim=-1, descending=True)
        # a token stays if the mass before it has not reached p: the first always stays
        drop_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        prob_BV = prob_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), 0.0)
        prob_BV = prob_BV / prob_BV.sum(dim=-1, keepdim=True)
    return prob_BV
