"""Intervals of means by resampling."""

# Shape letters: W = windows, S = resamples.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the limits of its interval."""

    mean: float
    low: float
    high: float


def mean_interval(value_W: Tensor, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean and its percentile bootstrap interval; value_W is [W], W >= 2, one a window.

    Tokens of a window depend on each other, windows hardly, so windows are what is drawn again.
    Raises: ValueError if there are less than two windows or level is not in (0, 1).
    Source: Efron 1979, Bootstrap methods: another look at the jackknife.
    """
    if value_W.dim() != 1 or len(value_W) < 2:
        raise ValueError(
            f"mean_interval: values must be [W] with W >= 2, got {tuple(value_W.shape)}"
        )
    if not 0 < level < 1:
        raise ValueError(f"mean_interval: level must be in (0, 1), got {level}")
    value_W = value_W.double()
    draw = torch.Generator().manual_seed(seed)
    index_SW = torch.randint(len(value_W), (_NUM_RESAMPLES, len(value_W)), generator=draw)
    mean_S = value_W[index_SW].mean(dim=1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = mean_S.quantile(tails).tolist()
    return Interval(mean=value_W.mean().item(), low=low, high=high)
